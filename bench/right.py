"""Checks a peer's result against float64, on awkward tensors. A peer with wrong results is not timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkern import reference

from .arrays import MAX_NORM, SVAG_L, AdamArrays, AdamMaker, Arrays, Maker, Matrix, MatrixMaker, Step
from .cases import dtype_name

STEPS = 3
#: The decay is small enough for an exponential learning rate and large enough to matter in every dtype.
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.025}
#: Lengths: odd; whole vectors and nothing else; one more and one less than whole vectors; several pieces of work.
LENGTHS = (1003, 256, 257, 255, 70001)
#: In units of the dtype's epsilon, for weights of size 1: each of three steps rounds the buffer and the weight.
TOLERANCE = 8


def awkward(dtype: torch.dtype) -> Arrays:
    """Return tensors of `LENGTHS`, one that starts one coordinate into its storage, and one of three dimensions."""
    weights = [torch.linspace(-1, 1, n).to(dtype) for n in LENGTHS]
    weights += [torch.linspace(1, -1, 516).to(dtype)[1:], torch.linspace(-1, 1, 3 * 5 * 7).to(dtype).view(3, 5, 7)]
    params = [nn.Parameter(w) for w in weights]
    for p in params:
        p.grad = torch.linspace(1, -2, p.numel()).to(dtype).view(p.shape)
    return Arrays(params, [torch.zeros_like(p, requires_grad=False) for p in params], HYPER, graph=[])


def run(
    maker: Maker, dtype: torch.dtype, pairs: bool = False, clips: bool = False
) -> tuple[Step, Arrays, list[Tensor], list[Tensor]]:
    """Take `STEPS` steps; return the step, its arrays, and in float64 the weights after and before the last step."""
    given = awkward(dtype)
    rule: dict[str, Any] = HYPER
    if pairs:
        rule = {**HYPER, "lr": HYPER["lr"] / SVAG_L, "l": SVAG_L, "held": [g.double() for g in given.held]}
    exact = [p.detach().double().clone() for p in given.params]  # float64's .double() is the tensor itself
    grads = [p.grad.double().clone() for p in given.params if p.grad is not None]
    if clips:
        rule = {**HYPER, "clip_coef": reference.clip_coef(reference.grad_sq_norms(grads), MAX_NORM)[1]}
    buffers: list[Tensor | None] = [torch.zeros_like(w) for w in exact]
    step = maker(given)
    before = exact
    for _ in range(STEPS):
        before = [w.clone() for w in exact]
        reference.sgd_(exact, grads, buffers, **rule)
        for p, g in zip(given.params, grads, strict=True):
            # Anew at each step: some peers add the decay to the user's gradients. Through .data, which leaves the
            # version counter alone: SVAG takes writes to the second half of pairs for clipping.
            p.grad.data.copy_(g * step.true_scale())  # type: ignore[union-attr]  # arrays always have one
        step.run()
    step.write_back()
    with torch.no_grad():
        for p in given.params:
            p.mul_(step.true_scale())
    return step, given, exact, before


def sgd_fault(maker: Maker, dtype: torch.dtype) -> str:
    """Return what is wrong with the weights of a step, or ""."""
    _, given, exact, _ = run(maker, dtype)
    return _weights_fault(given, exact, dtype)


def clipped_fault(maker: Maker, dtype: torch.dtype) -> str:
    """Return what is wrong with the weights of a step that clips by the global norm, or ""."""
    _, given, exact, _ = run(maker, dtype, clips=True)
    return _weights_fault(given, exact, dtype)


def sgd_statistics_fault(maker: Maker, dtype: torch.dtype) -> str:
    """Return what is wrong with the weights, or with |w|^2, |g|^2, <w,g> before the step, or ""."""
    step, given, exact, before = run(maker, dtype)
    if fault := _weights_fault(given, exact, dtype):
        return fault
    if step.sums is None:
        return "wrong: it measures nothing"
    grads = [g.double() for g in awkward(dtype).grads if g is not None]
    wanted = _dots([((w, w), (g, g), (w, g)) for w, g in zip(before, grads, strict=True)])
    size = torch.stack([wanted[:, 0], wanted[:, 1], (wanted[:, 0] * wanted[:, 1]).sqrt()], dim=1)
    return _sums_fault(step.sums(), wanted, size, dtype)


def adamw_fault(maker: AdamMaker, dtype: torch.dtype) -> str:
    """Return what is wrong with the weights of a step of AdamW, or ""."""
    of_sgd = awkward(dtype)
    squares = [torch.full_like(p, 0.5, requires_grad=False) for p in of_sgd.params]
    hyper = {"lr": 0.01, "weight_decay": 0.1}
    given = AdamArrays(of_sgd.params, of_sgd.momentum_buffers, squares, hyper, graph=[])
    exact = [p.detach().double().clone() for p in given.params]
    grads = [g.double().clone() for g in of_sgd.grads if g is not None]
    state: list[list[Tensor | None]] = [[x.double() for x in xs] for xs in (given.exp_avgs, given.exp_avg_sqs)]
    steps: list[Tensor | None] = [torch.zeros(()) for _ in exact]
    step = maker(given)
    for _ in range(STEPS):
        reference.adamw_(exact, grads, state[0], state[1], steps, **hyper)
        step.run()
    return _weights_fault(of_sgd, exact, dtype)


def svag_fault(maker: Maker, dtype: torch.dtype) -> str:
    """Return what is wrong with the weights of an SVAG step, or its sums (combined gradient, pair), or ""."""
    step, given, exact, before = run(maker, dtype, pairs=True)
    if fault := _weights_fault(given, exact, dtype):
        return fault
    if step.sums is None:
        return "wrong: it measures nothing"
    held, grads = ([g.double() for g in both if g is not None] for both in (given.held, awkward(dtype).grads))
    mixed = [reference.svag_combination(a, b, SVAG_L) for a, b in zip(held, grads, strict=True)]
    zipped = list(zip(before, mixed, held, grads, strict=True))
    wanted = _dots([((w, w), (g, g), (w, g), (a, b), (a - b, a - b)) for w, g, a, b in zipped])
    # The combination's two terms, and the three of |a-b|^2 = |a|^2 + |b|^2 - 2<a,b>, may be larger than the result.
    w_sq, a_sq, b_sq = _dots([((w, w), (a, a), (b, b)) for w, _, a, b in zipped]).unbind(1)
    g_sq, pair = 4 * (SVAG_L * a_sq + SVAG_L * b_sq), a_sq + b_sq
    size = torch.stack([w_sq, g_sq, (w_sq * g_sq).sqrt(), pair, pair], dim=1)
    return _sums_fault(step.sums(), wanted, size, dtype)


def moments_fault(maker: MatrixMaker, dtype: torch.dtype) -> str:
    """Return what is wrong with means, variances or norms of rows with a large mean and little noise."""
    eps = torch.finfo(dtype).eps
    make = torch.Generator().manual_seed(0)
    columns = 0.1 * eps**-0.5 * torch.linspace(-1, 1, LENGTHS[0], dtype=torch.float64)
    x = (columns + torch.randn(33, LENGTHS[0], generator=make, dtype=torch.float64)).to(dtype)
    step = maker(Matrix(x.clone()))
    step.run()
    if step.sums is None:
        return "wrong: it measures nothing"
    exact = x.double()
    wanted = torch.cat([exact.mean(0), exact.var(0), exact.square().sum(1)])
    size = torch.cat([exact.square().mean(0).sqrt(), exact.var(0), exact.square().sum(1)])
    off = float(((step.sums() - wanted).abs() / size).max())
    return "" if off < max(1e-3, 4 * eps) else f"wrong: it is off by {off:.1e}"


def _dots(rows: list[tuple[tuple[Tensor, Tensor], ...]]) -> Tensor:
    return torch.stack([torch.stack([(a * b).sum() for a, b in row]) for row in rows])


def _sums_fault(got: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype) -> str:
    # One rounding of the result to the dtype, and those of a plain sum in the dtype that the arithmetic is done in.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = TOLERANCE * torch.finfo(dtype).eps + max(LENGTHS) ** 0.5 * arithmetic
    off = float(((got - wanted).abs() / size).max())
    if not off < allowed:
        return f"wrong: its sums are off by {off:.1e} of their size"
    return ""


def _weights_fault(given: Arrays, exact: list[Tensor], dtype: torch.dtype) -> str:
    for p, w in zip(given.params, exact, strict=True):
        off = float((p.detach().double() - w).abs().max() / torch.finfo(dtype).eps)
        if not off < TOLERANCE:
            return f"wrong: {off:.0f} eps of {dtype_name(dtype)} off after {STEPS} steps of {p.numel()} coordinates"
    return ""
