"""Decides whether a result of mixed samples couples them: a sum over samples does not, a function of a sum does.

`Mixed.kind` says what is known. "summed": a linear function of sums over samples, as a loss is. "moved": each entry
is of one sample, but of which one is not known. "unknown": an operation without a rule made it. "coupled": anything
else, so that no sample has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .operation import Operation
from .propagation import MOVES, POINTWISE, PRODUCTS, LayoutRules
from .sample_layout import Mixed, SampleLayout, State

_SUMS = frozenset("sum nansum mean nanmean".split())
_ADDS = frozenset("add sub subtract __add__ __radd__ __sub__ __rsub__ rsub".split())
_SCALES = frozenset("mul multiply __mul__ __rmul__ div divide true_divide __truediv__".split())
#: Linear in their only operand.
_KEEPS = MOVES | frozenset(
    """neg __neg__ negative positive float double half bfloat16 to type type_as clone contiguous alias real cpu cuda
    index_select conj resolve_conj resolve_neg""".split()
)
#: Losses with a rule, which are a mean or a sum where their result has no dimension.
_LOSSES = frozenset(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div
    binary_cross_entropy_with_logits""".split()
)


def is_sum(op: Operation) -> bool:
    """Return whether an operation sums over samples and does not divide by their number."""
    return op.name in ("sum", "nansum") or op.kwargs.get("reduction") == "sum"


def is_linear(op: Operation, state: Mixed) -> bool:
    """Return whether an operation adds parameters to a sum over samples, or scales it, as a penalty on weights does."""
    return state.kind == "summed" and (adds(op) or op.name in ("mul", "multiply", "__mul__", "__rmul__"))


def adds(op: Operation) -> bool:
    """Return whether an operation adds its operands, or subtracts them."""
    return op.name in _ADDS


def may_couple(op: Operation, result: Tensor, states: Sequence[tuple[Tensor, State]]) -> bool:
    """Return whether an operation on samples of unknown places may couple them; one element by element does not."""
    has_samples = [t for t, s in states if s is not None]
    return op.name not in POINTWISE or any(t.shape != result.shape for t in has_samples)


def made(op: Operation, result: Tensor, state: Mixed) -> Mixed:
    """Return the state of a result in which an operation mixed samples that could be told apart before."""
    name = op.name
    is_scalar = result.dim() == 0
    if name in _SUMS or (is_scalar and (name in _LOSSES or not LayoutRules.knows(name))):
        return replace(state, kind="summed", is_sum=is_sum(op))
    if not LayoutRules.knows(name):
        return replace(state, kind="unknown")
    if name in _KEEPS:
        return replace(state, kind="moved")
    sums_products = (name in PRODUCTS or name in ("einsum", "tensordot")) and "sums over the samples" in state.why
    if name in _ADDS or sums_products:
        return replace(state, kind="summed")
    return state


def after(op: Operation, result: Tensor, states: Sequence[tuple[Tensor, State]]) -> Mixed:
    """Return the state of a result of an operation of which an operand is mixed."""
    mixed = [(t, s) for t, s in states if isinstance(s, Mixed)]
    first = next(s for t, s in mixed if t.requires_grad)
    kinds = {s.kind for t, s in mixed if t.requires_grad}
    if "coupled" in kinds:
        return next(s for t, s in mixed if t.requires_grad and s.kind == "coupled")
    name = op.name
    has_samples = any(isinstance(s, SampleLayout) for _, s in states)
    together = Mixed(first.why, is_sum=any(s.is_sum for t, s in mixed if t.requires_grad) and "mean" not in name)
    if result.dim() == 0 and not LayoutRules.knows(name) and "summed" not in kinds:
        return replace(together, kind="summed", is_sum=is_sum(op))
    if result.dim() == 0 and "summed" not in kinds and (name in _SUMS or name in _LOSSES):
        return replace(together, kind="summed", is_sum=is_sum(op))
    if "unknown" in kinds:
        return replace(together, kind="unknown")
    if kinds == {"moved"} and not has_samples and len(mixed) == 1:
        if name in _SUMS:
            return replace(together, kind="summed", is_sum=is_sum(op))
        if name in _KEEPS or name in POINTWISE:
            return replace(together, kind="moved")
        return replace(together, kind="summed" if result.dim() == 0 and name in _LOSSES else "unknown")
    if kinds == {"moved"} and not has_samples and name in MOVES:
        return replace(together, kind="moved")
    if name in _SUMS or name in _ADDS or name in _KEEPS:
        return Mixed(first.why, kind="summed", is_sum=together.is_sum, are_losses=_are_losses(mixed, has_samples))
    if name in _SCALES and len(mixed) == 1 and not has_samples and (op.args[0] is mixed[0][0] or "mul" in name):
        return Mixed(first.why, kind="summed", are_losses=_are_losses(mixed, has_samples))
    return together


def _are_losses(mixed: Sequence[tuple[Tensor, Mixed]], has_samples: bool) -> bool:
    """Return whether all operands are sums over samples that were numbers by themselves."""
    return not has_samples and all(s.kind == "summed" and (s.are_losses or t.numel() == 1) for t, s in mixed)
