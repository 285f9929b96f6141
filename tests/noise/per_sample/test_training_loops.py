"""What training loops do besides: mixed precision, loss scaling, activation checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .budgets import SCALARS, TIERS, assert_says
from .case import numbers, text
from .left_behind import assert_nothing_left, snapshot
from .measuring import assert_right, measured, noise_of, problem_of, told_of
from .reference import expected, gradient

NETS = ("mlp", "linear_of_rows", "conv2d", "resnet", "gpt_tied_by_module", "encoder_layer", "class_token", "layer_norm")
LOW = 6e-2  #: what bfloat16's 2^-9 may grow to in a few layers, in units of the squares


def loop(problem, low=lambda: torch.autocast("cpu", enabled=False)):
    """The contributions in the precision that the model itself uses, one sample after the other."""
    named = {n: p for n, p in problem.model.named_parameters() if p.requires_grad}
    rows = []
    for b in range(problem.samples):
        with low():
            term = problem.sample(b, b + 1).value() / problem.samples
        rows.append(torch.autograd.grad(term, list(named.values()), materialize_grads=True))
    return expected({n: torch.stack([row[i] for row in rows]).double() for i, n in enumerate(named)})


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", NETS)
def test_autocast(name):
    problem = problem_of(name, torch.float32)
    noise, before = noise_of(problem), snapshot(problem.model)
    with noise:
        with bfloat16():
            loss = problem.value()
        loss.backward()
    assert_nothing_left(problem.model, before)
    told = loop(problem, bfloat16)
    assert_says(noise.result(), told, TIERS, LOW)
    ours = {n: p.grad.clone() for n, p in problem.model.named_parameters()}
    problem.model.zero_grad()
    with bfloat16():
        loss = problem.value()
    loss.backward()
    size = max(float(p.grad.abs().max()) for p in problem.model.parameters())
    for n, p in problem.model.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=0, atol=LOW * size)


@pytest.mark.parametrize("name", NETS)
def test_a_model_in_bfloat16(name):
    problem = problem_of(name, torch.bfloat16)
    result = measured(problem)
    assert_says(result, loop(problem), TIERS, LOW)
    assert all(p.grad.dtype == torch.bfloat16 for p in problem.model.parameters())
    assert all(v.dtype == torch.float32 for v in result.variance.values())


def test_layers_of_different_dtypes():
    """A float32 head on a bfloat16 body."""
    problem = numbers(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Raised(), nn.Linear(5, 3)), 4, 6)
    problem.model[0].bfloat16()
    problem = type(problem)(problem.model, (problem.inputs[0].bfloat16(),), problem.target, problem.loss)
    assert_says(measured(problem), loop(problem), TIERS, LOW)


class Raised(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10, 3.0])
def test_scaled_losses(scale):
    """c_b carry the scale, as `.grad` does; ratios do not."""
    problem = problem_of("gpt_tied_by_module")
    plain, scaler, noise = measured(problem), torch.amp.GradScaler("cpu", init_scale=scale), noise_of(problem)
    problem.model.zero_grad()
    opt = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    with noise:
        scaler.scale(problem.value()).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    result = noise.result()
    for field in ("nsr", "nsr_batch", "gns"):
        torch.testing.assert_close(getattr(result, field), getattr(plain, field), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.trace_sigma, plain.trace_sigma * scale**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(result.sq_norms, plain.sq_norms * scale**2, rtol=1e-9, atol=0)


# --- activation checkpointing -----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Segments that are computed again in backward; a layer of all of them; a head outside that is tied into one."""

    def __init__(self, reentrant, shared):
        super().__init__()
        self.reentrant, self.shared = reentrant, shared
        self.into, self.blocks = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm, self.conv, self.out = nn.LayerNorm(6), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.randn(6))

    def segment(self, x, i):
        x = x + torch.tanh(self.blocks[0 if self.shared else i](self.norm(x))) * self.scale
        return x + torch.relu_(self.conv(x))

    def forward(self, x):
        x = self.into(x)
        for i in range(3):
            x = (
                self.segment(x, i)
                if self.reentrant is None
                else checkpoint(self.segment, x, i, use_reentrant=self.reentrant)
            )
        return self.out(self.blocks[0](x))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant, shared):
    problem = numbers(Checkpointed(reentrant, shared), 3, 4, 5).to(torch.float64)
    before = snapshot(problem.model)
    result = measured(problem)
    problem.model.reentrant = None
    assert_right(problem, result)
    for name, g in gradient(problem).items():
        torch.testing.assert_close(problem.model.get_parameter(name).grad, g)
    problem.model.reentrant = reentrant
    assert_nothing_left(problem.model, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_in_two_micro_batches(reentrant):
    problem = numbers(Checkpointed(reentrant, True), 4, 4, 5).to(torch.float64)
    tiers = ("nsr", "norms", "variance")
    noise = noise_of(problem, tiers)
    with noise:
        for part in (problem.sample(0, 2), problem.sample(2, 4)):
            (part.value() / 2).backward()
    problem.model.reentrant = None
    assert_right(problem, noise.result(), tiers)


class CheckpointedText(nn.Module):
    """An embedding tied to the head, blocks recomputed by checkpoint_sequential."""

    def __init__(self, reentrant):
        super().__init__()
        self.words, self.reentrant = nn.Embedding(7, 6), reentrant
        self.blocks = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU(True))

    def forward(self, ids):
        x = self.words(ids)
        if self.reentrant is None:
            x = self.blocks(x)
        else:
            x = checkpoint_sequential(self.blocks, 2, x, use_reentrant=self.reentrant)
        return x @ self.words.weight.t()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_text(reentrant):
    problem = text(CheckpointedText(reentrant), 4, 5).to(torch.float64)
    result = measured(problem)
    problem.model.reentrant = None
    assert_right(problem, result)


def test_checkpoints_under_autocast():
    problem = numbers(Checkpointed(False, True), 3, 4, 5)
    noise = noise_of(problem)
    with noise:
        with bfloat16():
            loss = problem.value()
        loss.backward()
    problem.model.reentrant = None
    assert_says(noise.result(), loop(problem, bfloat16), TIERS, LOW)


# --- others -----------------------------------------------------------------------------------------------------------


def test_saved_tensors_may_be_elsewhere():
    """Hooks that keep activations in another place, as offloading does."""
    problem = problem_of("resnet")
    noise = noise_of(problem)
    with noise, torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        problem.value().backward()
    assert_right(problem, noise.result())


def test_gradient_clipping_and_accumulation_buffers():
    """What loops do to `.grad` afterwards is theirs."""
    problem = problem_of("mlp")
    noise = noise_of(problem)
    with noise:
        problem.value().backward()
        nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-3)
    result = noise.result()
    told = told_of(problem)
    for field in SCALARS:
        torch.testing.assert_close(float(getattr(result, field)), told.scalars[field], rtol=1e-9, atol=0)


def test_threads_in_backward():
    """Autograd's own threads run the backward when it is called from another one."""
    import threading

    problem, failed = problem_of("resnet"), []

    def run():
        torch.set_num_threads(1)
        try:
            assert_right(problem, measured(problem))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["mlp_wide", "linear_of_long_rows", "conv_wide", "resnet", "gpt"])
def test_threads(name, threads):
    torch.set_num_threads(threads)
    problem = problem_of(name, torch.float32)
    assert_right(problem, measured(problem), dtype=torch.float32)


def test_partial_checks_do_not_cost_the_result():
    problem = problem_of("conv_circular")
    for check in (True, False, "first"):
        assert_right(problem, measured(problem, check=check))
        problem.model.zero_grad()
