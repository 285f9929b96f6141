"""Fake implementations of the ops of ``torch.ops.normkern``: results and refusals from shapes, without values.

Shapes may be symbolic. Checks that `ops` makes in Python are shared with it. Those that the binary makes are written
here once more, with the same sentences, as the binary cannot read a symbolic shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._binary import describe
from .checks import check_l, check_pairs, not_taken, why_refused, would_take
from .clipping import check_max_norm
from .per_sample import new_embedding_moments, new_norm_sums, new_sample_sums
from .sample_moments import check_recentre, new_moments, new_row_sums
from .sphere import radii_of
from .step_arguments import check_norm_arguments
from .types import PAIR_SUMS, SUMS, Norm, Stats, stats_code

Entries = Sequence[Tensor | None]


def no_table(params: Sequence[Tensor]) -> Tensor:
    """Return the table of an op that measures nothing: it has no rows."""
    return _new_table(params, 0, len(SUMS))


def _new_table(like: Entries, slots: Any, columns: int) -> Tensor:
    device = next((x.device for x in like if x is not None), None)
    return torch.empty((slots, columns), dtype=torch.float64, device=device)


def _slots(params: Entries, stats: Stats, op: str) -> Any:
    stats_code(stats, op)
    return sum(p.shape[0] if stats == "row" and p is not None and p.ndim >= 2 else 1 for p in params)


def _check_lists(op: str, lists: dict[str, Any], one_device: bool) -> None:
    """Check that lists fit the first in length and, beside each gradient of the second, in shape, dtype and device."""
    lists = {name: x for name, x in lists.items() if x is not None}
    (first, params), (_, grads), *_ = lists.items()
    for name, x in lists.items():
        if len(x) != len(params):
            raise ValueError(f"{op}: {name} has {len(x)} entries but {first} has {len(params)}")
    there = [i for i, g in enumerate(grads) if g is not None]
    for i in there:
        p = params[i]
        for name, x in lists.items():
            if x[i] is None:
                continue
            if not would_take(x[i]) or x[i].dtype != p.dtype or x[i].device != p.device:
                raise TypeError(why_refused(op, i, lists, would_take))
            if x[i].shape != p.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(x[i].shape)} but {first}[{i}] has shape {tuple(p.shape)}"
                )
        if one_device and p.device != params[there[0]].device:
            raise TypeError(why_refused(op, i, lists, would_take))


def check_first(params: Sequence[Tensor], momentum_buffers: Sequence[Tensor], first: Sequence[int]) -> None:
    """Check the argument `first` of the op `sgd_`: indices of momentum buffers that fit their parameters."""
    for i in first:
        if not 0 <= i < len(momentum_buffers):
            raise ValueError(
                f"sgd_: first expected indices of momentum_buffers, 0 to {len(momentum_buffers) - 1}, got {i}"
            )
        v, p = momentum_buffers[i], params[i]
        if v.shape != p.shape or v.dtype != p.dtype or v.device != p.device:
            _check_lists("sgd_", {"params": [p], "grads": [p], "momentum_buffers": [v]}, one_device=False)


def sgd_(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    *,
    momentum: float = 0.0,
    stats: Stats = None,
    held: list[Tensor | None] | None = None,
    l: float = 1.0,
    first: Sequence[int] = (),
    **others: Any,
) -> Tensor:
    """Check the arguments of `ops.sgd_`; return unwritten results."""
    check_l(l, "sgd_")
    if held is not None and stats is None:
        stats = "tensor"
    if momentum != 0 and not momentum_buffers and params:
        raise ValueError("sgd_: momentum is not 0, expected momentum_buffers, got None")
    lists: dict[str, Any] = {"params": params, "grads": grads, "momentum_buffers": None, "held": held}
    if momentum != 0:
        lists["momentum_buffers"] = momentum_buffers
    _check_lists("sgd_", lists, one_device=stats is not None)
    check_first(params, momentum_buffers, first)
    slots = _slots(params, stats, "sgd_")
    pairs = any(h is not None and g is not None for h, g in zip(held or [], grads, strict=False))
    return _new_table(params, slots if stats else 0, len(SUMS) + (len(PAIR_SUMS) if pairs else 0))


def adamw_(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    stats: Stats = None,
    **others: Any,
) -> Tensor:
    """Check the arguments of `ops.adamw_`; return unwritten results."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_lists("adamw_", lists, one_device=stats is not None)
    if len(steps) != len(params):
        raise ValueError(f"adamw_: steps has {len(steps)} entries but params has {len(params)}")
    return _new_table(params, _slots(params, stats, "adamw_") if stats else 0, len(SUMS))


def apply_updates_(
    params: list[Tensor],
    updates: list[Tensor | None],
    *,
    lr: float,
    norm: Norm = "keep",
    radius: list[Tensor | None] | None = None,
    stats: Stats = None,
) -> Tensor:
    """Check the arguments of `ops.apply_updates_`; return unwritten results."""
    check_norm_arguments("apply_updates_", norm, None, lr, params, updates)
    radii_of(radius, params, norm)
    _check_lists("apply_updates_", {"params": params, "updates": updates}, one_device=stats is not None)
    return _new_table(params, _slots(params, stats, "apply_updates_") if stats else 0, len(SUMS))


def svag_combine_(grads_a: list[Tensor], grads_b: list[Tensor], l: float) -> None:
    """Check the arguments of `ops.svag_combine_`."""
    check_l(l, "svag_combine_")
    _check_pairs("svag_combine_", grads_a, grads_b)


def pair_sums(grads_a: Entries, grads_b: Entries, stats: Stats = "tensor") -> Tensor:
    """Check the arguments of `ops.pair_sums`; return unwritten results."""
    _check_pairs("pair_sums", grads_a, grads_b)
    return _new_table(grads_a, _slots(grads_a, stats, "pair_sums"), len(PAIR_SUMS))


def _check_pairs(op: str, a: Entries, b: Entries) -> None:
    check_pairs(op, a, b)
    _check_lists(op, {"grads_a": a, "grads_b": b}, one_device=op == "pair_sums")


def welford_(
    means: list[Tensor], samples: list[Tensor | None], squares: list[Tensor], *, n: int, stats: Stats = None
) -> Tensor:
    """Check the arguments of `ops.welford_`; return unwritten results."""
    if n < 1:
        raise ValueError(f"welford_: n expected a whole number from 1, got {n!r}")
    _check_lists("welford_", {"means": means, "samples": samples, "squares": squares}, one_device=stats is not None)
    slots = _slots(means, stats, "welford_")
    return _new_table(means, slots if stats else 0, len(SUMS))


def outer_moments(a: Tensor, g: Tensor, *, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the arguments of `ops.outer_moments`; return unwritten results."""
    op = "outer_moments"
    for name, x, shape in (("a", a, "(B, T, I)"), ("g", g, "(B, T, O)")):
        _check_taken(op, name, x)
        if x.ndim != 3:
            raise ValueError(f"{op}: {name} expected shape {shape}, got {tuple(x.shape)}")
    _check_one(op, "g", g, "a", a)
    if a.shape[:2] != g.shape[:2]:
        raise ValueError(f"{op}: g has shape {tuple(g.shape)} but a has {tuple(a.shape)}; expected the same (B, T)")
    return new_sample_sums((g.shape[2], a.shape[2]), a, squares)


def conv_moments(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    squares: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the arguments of `ops.conv_moments`; return unwritten results."""
    op = "conv_moments"
    _check_taken(op, "x", x)
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"{op}: x expected shape (B, C, *space) with 1 to 3 space dimensions, got {tuple(x.shape)}")
    _check_taken(op, "g", g)
    if g.ndim != x.ndim:
        shape = ("(B, O, L)", "(B, O, H, W)", "(B, O, D, H, W)")[x.ndim - 3]
        raise ValueError(f"{op}: g expected shape {shape}, got {tuple(g.shape)}")
    _check_one(op, "g", g, "x", x)
    if g.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: g has shape {tuple(g.shape)} but x has {tuple(x.shape)}; expected the same B")
    dims = x.ndim - 2
    numbers = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, given in numbers.items():
        least = None if name == "padding" else 1
        if len(given) != dims or (least is not None and any(n < least for n in given)):
            raise ValueError(
                f"{op}: {name} expected {dims} whole numbers{' from 1' if least else ''}, one for each space "
                f"dimension, got {list(given)!r}"
            )
    if groups < 1 or x.shape[1] % groups != 0 or g.shape[1] % groups != 0:
        raise ValueError(
            f"{op}: groups expected a divisor of the channels of x and of g, {x.shape[1]} and {g.shape[1]}, "
            f"got {groups}"
        )
    return new_sample_sums((g.shape[1], x.shape[1] // groups, *kernel_size), x, squares)


def _check_taken(op: str, name: str, x: Tensor) -> None:
    if not would_take(x):
        raise TypeError(not_taken(op, name, x))


def _check_one(op: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    for what in ("dtype", "device"):
        if getattr(x, what) != getattr(y, what):
            raise TypeError(f"{op}: {name} is {describe(x)} but {other} is {describe(y)}; expected one {what}")


def moments(
    x: Tensor | list[Tensor], *, squares: bool = True, factor: float = 1.0, divisor: int = 1
) -> tuple[Any, Any, Tensor, Tensor]:
    """Check the arguments of `ops.moments`; return unwritten results."""
    if isinstance(x, list):
        names = [f"x[{i}]" for i in range(len(x))]
        means, centred, row_sq = new_moments(x, names, squares, would_take)
        return means, centred, row_sq, row_sq.new_empty(2)
    (mean,), of_one, row_sq = new_moments([x], ["x"], squares, would_take)
    return mean, None if of_one is None else of_one[0], row_sq, row_sq.new_empty(2)


def grad_sq_norms(
    grads: Entries,
    *,
    grad_scale: float = 1.0,
    held: Entries | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
) -> Tensor:
    """Check the arguments of `ops.grad_sq_norms`; return unwritten results."""
    check_l(l, "grad_sq_norms")
    _check_lists("grad_sq_norms", {"grads": grads, "grads again": grads, "held": held}, one_device=True)
    device = next((g.device for g in grads if g is not None), None)
    return torch.empty(len(grads), dtype=torch.float64, device=device)


def clip_coef(sq_norms: Tensor, max_norm: float, *, found_inf: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Check the arguments of `ops.clip_coef`; return unwritten results."""
    check_max_norm(max_norm, "clip_coef")
    return sq_norms.new_empty(()), sq_norms.new_empty(())


def row_sq_norms(x: Tensor) -> Tensor:
    """Check the arguments of `ops.row_sq_norms`; return unwritten results."""
    return new_row_sums("row_sq_norms", x, would_take)


def row_sums(x: Tensor) -> Tensor:
    """Check the arguments of `ops.row_sums`; return unwritten results."""
    return new_row_sums("row_sums", x, would_take)


def recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> Tensor:
    """Check the arguments of `ops.recentre_`; return unwritten results."""
    check_recentre(raw, total, count, would_take)
    return raw.new_empty((), dtype=torch.bool)


def norm_sums(g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, *, channels: str) -> tuple[Tensor, Tensor]:
    """Check the arguments of `ops.norm_sums`; return unwritten results."""
    return new_norm_sums(g, x, mean, rstd, channels, would_take)


def embedding_moments(
    ids: Tensor, g: Tensor, num_embeddings: int, *, padding_idx: int | None = None, squares: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the arguments of `ops.embedding_moments`; return unwritten results."""
    return new_embedding_moments(ids, g, num_embeddings, padding_idx, squares, would_take)
