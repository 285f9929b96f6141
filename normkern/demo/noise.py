"""The gradient noise that the demo measures: of single samples, or of the pairs of batches that SVAG takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkern


class SampleNoise:
    """The noise of the samples' gradients in every n-th batch, from a forward and backward apart from the training's.

    The model is in eval mode there: with the statistics of its batch, a sample has no gradient of its own.
    """

    #: The sums of a measurement, in this order.
    SUMS = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased")

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self.measured: list[tuple[int, Tensor]] = []  # since the last `take`: batch size, `SUMS`
        self._noise = normkern.GradientNoise(model)
        self._names = {p: name for name, p in model.named_parameters()}

    def before_step(self, images: Tensor, labels: Tensor) -> None:
        """Measure the batch that the next step takes, if it is the turn of this step; leave no gradients."""
        self.steps += 1
        if self.steps % self.every:
            return
        self.optimizer.zero_grad()
        self.model.eval()
        with self._noise:
            F.cross_entropy(self.model(images), labels).backward()  # type: ignore[no-untyped-call]
        self.model.train()
        result = self._noise.result()
        self.optimizer.zero_grad()
        # Under --decay exponential gradients are those of the weights without decay times the scale between the two.
        scales = self.optimizer.true_scale() if isinstance(self.optimizer, normkern.SGD) else None
        sums = torch.zeros(len(self.SUMS), dtype=torch.float64, device=images.device)
        for i, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                of = result.per_param[self._names[p]]
                sums += torch.stack([getattr(of, key) for key in self.SUMS]) / (scales[i] if scales else 1.0) ** 2
        self.measured.append((result.batch_size, sums))

    def take(self) -> dict[str, float | None]:
        """Return ratios of means over the measurements since the last call, and those means; None for what is unknown.

        `nsr_batch` and `gns` are those of `GradientNoise`. `gns` is unknown where the unbiased estimate of the squared
        gradient norm, which it divides by, is not positive: the noise hides the signal.
        """
        measured, self.measured = self.measured, []
        if not measured:
            return dict.fromkeys(("gns", "nsr_batch", *self.SUMS))
        trace, square, unbiased = torch.stack([sums for _, sums in measured]).mean(0)
        of_batch = torch.stack([sums[0] / batch for batch, sums in measured]).mean()
        numbers = {"gns": trace / unbiased, "nsr_batch": of_batch / square}
        row = finite(numbers | dict(zip(self.SUMS, (trace, square, unbiased), strict=True)))
        return row if unbiased > 0 else row | {"gns": None}


#: What `pair_noise` puts into a row: key -> field of `normkern.Noise`.
NOISE = {
    "nsr": "nsr_batch",
    "trace_sigma": "trace_sigma",
    "grad_sq_norm_unbiased": "grad_sq_norm_unbiased",
    "nsr_stderr": "nsr_batch_stderr",
    "trace_sigma_stderr": "trace_sigma_stderr",
    "grad_sq_norm_unbiased_stderr": "grad_sq_norm_unbiased_stderr",
}


def pair_noise(noise: normkern.Noise) -> dict[str, float | None]:
    """Return signal, noise and their ratio with standard errors; None for what is unknown.

    The ratio is unknown where the estimate of the squared gradient norm, which it divides by, is not positive or
    smaller than its own standard error.
    """
    row = finite({key: getattr(noise, field) for key, field in NOISE.items()})
    signal, error = row["grad_sq_norm_unbiased"], row["grad_sq_norm_unbiased_stderr"]
    if signal is None or signal <= (error or 0.0):
        row |= {"nsr": None, "nsr_stderr": None}
    return row


def finite(numbers: dict[str, Tensor]) -> dict[str, float | None]:
    """Return the numbers as JSON can hold them: None for infinity and NaN."""
    return {key: x.item() if x.isfinite() else None for key, x in numbers.items()}
