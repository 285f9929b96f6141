"""A pytest plugin for BackPACK's own tests: `make test-backpack`.

BackPACK's tests compare its extensions with torch.autograd. Here the class that calls the extensions is replaced by one
that measures with `normkern.GradientNoise`. BackPACK's quantities are those of the terms of the loss; its variance
divides by n instead of n - 1.
"""

import sys
import types

import torch

import normkern


class Measured:
    """BackPACK's extensions of first order, by GradientNoise."""

    def __init__(self, problem):
        self.problem = problem
        self.samples = problem.get_batch_size()
        is_mean = self.samples > 1 and abs(problem.compute_reduction_factor() - 1 / self.samples) < 1e-12
        self.unit = self.samples if is_mean else 1
        self.named = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}

    def _result(self, stats):
        reduction = "mean" if self.unit != 1 else "sum"
        noise = normkern.GradientNoise(self.problem.model, stats, reduction=reduction, batch_size=self.samples)
        self.problem.model.zero_grad()
        with noise:
            _, _, loss = self.problem.forward_pass()
            loss.backward()
        return noise.result()

    def batch_l2_grad(self):
        norms = self._result(("norms",)).sq_norms_per_param
        return [(norms[name] / self.unit**2).float() for name in self.named]

    def variance(self):
        variance = self._result(("variance",)).variance
        scale = (self.samples - 1) / self.samples / self.unit**2
        return [variance[name] * scale for name in self.named]

    def sgs(self):
        return [
            self.samples * (spread + (p.grad / self.samples) ** 2)
            for spread, p in zip(self.variance(), self.named.values(), strict=True)
        ]

    batch_l2_grad_extension_hook = batch_l2_grad
    sgs_extension_hook = sgs


def import_torchvision():
    """Import torchvision, whose ResNet the tests take, also where its operators do not load.

    So it is with a build for CUDA beside a torch for the CPU. Its Python files ask for the names of two, to be imported.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401


def pytest_configure():
    """Put `Measured` in the place of the class that calls BackPACK, before the tests import it."""
    import_torchvision()
    # BackPACK's tests import this package for a check of memory that is not run here.
    sys.modules.setdefault("pytorch_memlab", types.SimpleNamespace(MemReporter=None))
    import test.extensions.implementation.backpack as implementation

    implementation.BackpackExtensions = Measured
