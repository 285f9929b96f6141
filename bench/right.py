"""Is a peer right? Its own maker, on tensors chosen to be awkward, against float64. Who is wrong is not timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkern import reference

from .arrays import Arrays, Maker, Step
from .cases import dtype_name

STEPS = 3
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
#: Lengths: odd; whole vectors and nothing else; one more and one less than whole vectors; several pieces of work.
LENGTHS = (1003, 256, 257, 255, 70001)
#: In units of the dtype's epsilon, for weights of size 1: each of three steps rounds the buffer and the weight.
TOLERANCE = 8


def awkward(dtype: torch.dtype) -> Arrays:
    """Tensors of `LENGTHS`, then one that starts one coordinate off its storage, and one of three dimensions."""
    weights = [torch.linspace(-1, 1, n).to(dtype) for n in LENGTHS]
    weights += [torch.linspace(1, -1, 516).to(dtype)[1:], torch.linspace(-1, 1, 3 * 5 * 7).to(dtype).view(3, 5, 7)]
    params = [nn.Parameter(w) for w in weights]
    for p in params:
        p.grad = torch.linspace(1, -2, p.numel()).to(dtype).view(p.shape)
    return Arrays(params, [torch.zeros_like(p, requires_grad=False) for p in params], HYPER, graph=[])


def run(maker: Maker, dtype: torch.dtype) -> tuple[Step, Arrays, list[Tensor], list[Tensor]]:
    """`STEPS` steps of a peer -> it, its arrays, and in float64 the weights after and before the last step."""
    given = awkward(dtype)
    exact = [p.detach().double().clone() for p in given.params]  # float64's .double() is the tensor itself
    grads = [p.grad.double().clone() for p in given.params if p.grad is not None]
    buffers: list[Tensor | None] = [torch.zeros_like(w) for w in exact]
    step = maker(given)
    before = exact
    for _ in range(STEPS):
        before = [w.clone() for w in exact]
        reference.sgd_(exact, grads, buffers, **HYPER)
        for p, g in zip(given.params, grads, strict=True):
            p.grad.copy_(g)  # type: ignore[union-attr]  # some peers add the decay to the user's gradients
        step.run()
    step.write_back()
    return step, given, exact, before


def sgd_fault(maker: Maker, dtype: torch.dtype) -> str:
    """What is wrong with the weights of a step, or ""."""
    _, given, exact, _ = run(maker, dtype)
    return _weights_fault(given, exact, dtype)


def sgd_statistics_fault(maker: Maker, dtype: torch.dtype) -> str:
    """What is wrong with the weights, or with |w|^2, |g|^2, <w,g> before the step, or ""."""
    step, given, exact, before = run(maker, dtype)
    if fault := _weights_fault(given, exact, dtype):
        return fault
    if step.sums is None:
        return "wrong: it measures nothing"
    grads = [g.double() for g in awkward(dtype).grads if g is not None]
    pairs = [((w, w), (g, g), (w, g)) for w, g in zip(before, grads, strict=True)]
    wanted = torch.stack([torch.stack([(a * b).sum() for a, b in row]) for row in pairs])
    size = torch.stack([wanted[:, 0], wanted[:, 1], (wanted[:, 0] * wanted[:, 1]).sqrt()], dim=1)
    # One rounding of the result to the dtype, and those of a plain sum in the dtype that the arithmetic is done in.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = TOLERANCE * torch.finfo(dtype).eps + max(LENGTHS) ** 0.5 * arithmetic
    off = float(((step.sums() - wanted).abs() / size).max())
    if not off < allowed:
        return f"wrong: its sums are off by {off:.1e} of their size"
    return ""


def _weights_fault(given: Arrays, exact: list[Tensor], dtype: torch.dtype) -> str:
    for p, w in zip(given.params, exact, strict=True):
        off = float((p.detach().double() - w).abs().max() / torch.finfo(dtype).eps)
        if not off < TOLERANCE:
            return f"wrong: {off:.0f} eps of {dtype_name(dtype)} off after {STEPS} steps of {p.numel()} coordinates"
    return ""
