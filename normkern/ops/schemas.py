"""``torch.ops.normkern``: the ops of `ops` as torch's dispatcher, torch.compile and torch.export know them.

A table of schemas, each with the function of `ops` that runs it and the one of `stand_ins` that says what it returns.
Through `torch.library.Library`: a call costs 1.5 us more than ours, one through `torch.library.custom_op` 13 us, and so
does the import. Nothing is registered for autograd but that it passes: as with `ops`, no graph leads through an op.

Where a schema cannot say what `ops` does, the op differs:

* `sgd_`, `welford_`: a table of no rows where `ops` returns None. Lists that are written hold no None: new momentum
  buffers are unwritten tensors whose indices are in `first`. Overload "tensor": lr, weight_decay and grad_scale in
  tensors, as with found_inf.
* `moments`: returns the totals, (2,), instead of writing them. `divisor` divides `factor`, for B may be a symbol and
  a float none. Overload "list" takes several tensors.
* `recentre_`: its answer is a bool tensor of no dimension.

Not here, for they are no functions of tensors: `Pass` and `gauge_step` with what `sgd_` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from . import fake as stand_ins


def _table(sums: Tensor | None, params: Sequence[Tensor]) -> Tensor:
    return stand_ins.no_table(params) if sums is None else sums


def _sgd_(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    *,
    first: Sequence[int] = (),
    weight_decay: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    **others: Any,
) -> Tensor:
    new = frozenset(first)
    buffers: list[Tensor | None] | None = [None if i in new else v for i, v in enumerate(momentum_buffers)] or None
    weight_decay, grad_scale = 0.0 if weight_decay is None else weight_decay, 1.0 if grad_scale is None else grad_scale
    stand_ins.check_first(params, momentum_buffers, first)
    sums = ops.sgd_(params, grads, buffers, weight_decay=weight_decay, grad_scale=grad_scale, **others)
    with torch.no_grad():
        for i in first:
            made = None if buffers is None else buffers[i]
            if made is not None:
                momentum_buffers[i].copy_(made)
    return _table(sums, params)


def _welford_(means: list[Tensor], samples: list[Tensor | None], squares: list[Tensor], **others: Any) -> Tensor:
    return _table(ops.welford_(means, samples, squares, **others), means)


def _moments(x: Any, *, factor: float = 1.0, divisor: int = 1, squares: bool = True) -> tuple[Any, Any, Tensor, Tensor]:
    like = x[0] if isinstance(x, list) and x else x
    totals = torch.empty(2, dtype=torch.float64, device=getattr(like, "device", None))
    return *ops.moments(x, factor=factor / divisor, squares=squares, totals=totals), totals


def _recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> Tensor:
    return torch.tensor(ops.recentre_(raw, total, count, least), device=raw.device)


class Op(NamedTuple):
    """One overload."""

    schema: str
    run: Callable[..., Any]
    stand_in: Callable[..., Any]  #: the same arguments and results, of tensors without values

    @property
    def name(self) -> str:
        """With its overload, as `torch.library` spells it."""
        return self.schema.partition("(")[0]


_SGD = (
    "sgd_{}(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] momentum_buffers, *, {}, float momentum=0.0, "
    "float dampening=0.0, bool nesterov=False, bool maximize=False, str? stats=None, Tensor?[]? held=None, "
    "float l=1.0, float held_scale=1.0, int[] first=[]{}) -> Tensor"
)

OPS = (
    Op(
        _SGD.format("", "float lr, float weight_decay=0.0, float grad_scale=1.0", ""),
        _sgd_,
        stand_ins.sgd_,
    ),
    Op(
        _SGD.format(
            ".tensor",
            "Tensor lr, Tensor? weight_decay=None, Tensor? grad_scale=None",
            ", Tensor? found_inf=None, Tensor? clip_coef=None, Tensor? lr_multipliers=None",
        ),
        _sgd_,
        stand_ins.sgd_,
    ),
    Op(
        "svag_combine_(Tensor(a!)[] grads_a, Tensor[] grads_b, float l) -> ()",
        ops.svag_combine_,
        stand_ins.svag_combine_,
    ),
    Op(
        'pair_sums(Tensor?[] grads_a, Tensor?[] grads_b, str stats="tensor") -> Tensor',
        ops.pair_sums,
        stand_ins.pair_sums,
    ),
    Op(
        "welford_(Tensor(a!)[] means, Tensor?[] samples, Tensor(b!)[] squares, *, SymInt n, str? stats=None) -> Tensor",
        _welford_,
        stand_ins.welford_,
    ),
    Op(
        "outer_moments(Tensor a, Tensor g, *, bool squares) -> (Tensor, Tensor?, Tensor)",
        ops.outer_moments,
        stand_ins.outer_moments,
    ),
    Op(
        "conv_moments(Tensor x, Tensor g, int[] kernel_size, *, int[] stride, int[] padding, int[] dilation, "
        "int groups, bool squares) -> (Tensor, Tensor?, Tensor)",
        ops.conv_moments,
        stand_ins.conv_moments,
    ),
    Op(
        "moments(Tensor x, *, bool squares=True, float factor=1.0, SymInt divisor=1) -> "
        "(Tensor, Tensor?, Tensor, Tensor)",
        _moments,
        stand_ins.moments,
    ),
    Op(
        "moments.list(Tensor[] x, *, bool squares=True, float factor=1.0, SymInt divisor=1) -> "
        "(Tensor[], Tensor[]?, Tensor, Tensor)",
        _moments,
        stand_ins.moments,
    ),
    Op(
        "grad_sq_norms(Tensor?[] grads, *, float grad_scale=1.0, Tensor?[]? held=None, float l=1.0, "
        "float held_scale=1.0) -> Tensor",
        ops.grad_sq_norms,
        stand_ins.grad_sq_norms,
    ),
    Op(
        "clip_coef(Tensor sq_norms, float max_norm, *, Tensor? found_inf=None) -> (Tensor, Tensor)",
        ops.clip_coef,
        stand_ins.clip_coef,
    ),
    Op("row_sq_norms(Tensor x) -> Tensor", ops.row_sq_norms, stand_ins.row_sq_norms),
    Op("row_sums(Tensor x) -> Tensor", ops.row_sums, stand_ins.row_sums),
    Op(
        "recentre_(Tensor(a!) raw, Tensor total, SymInt count, float least) -> Tensor",
        _recentre_,
        stand_ins.recentre_,
    ),
    Op(
        "norm_sums(Tensor g, Tensor x, Tensor? mean, Tensor rstd, *, str channels) -> (Tensor, Tensor)",
        ops.norm_sums,
        stand_ins.norm_sums,
    ),
    Op(
        "embedding_moments(Tensor ids, Tensor g, int num_embeddings, *, int? padding_idx=None, bool squares) -> "
        "(Tensor, Tensor?, Tensor)",
        ops.embedding_moments,
        stand_ins.embedding_moments,
    ),
)

_library = torch.library.Library("normkern", "DEF")
for _op in OPS:
    _library.define(_op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op.name, _op.run, "CompositeExplicitAutograd")  # any device: `ops` says what it does not take
    _library.impl(_op.name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"normkern::{_op.name}", _op.stand_in, lib=_library)


def traced_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None] | None,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float | Tensor,
    grad_scale: float | Tensor,
    stats: ops.Stats,
    held: Sequence[Tensor | None] | None,
    gauge: ops.GaugeStep | None,
    found_inf: Tensor | None,
    clip_coef: Tensor | None,
    lr_multipliers: Sequence[float] | Tensor | None,
    stored: tuple[Any, ...],
    **others: Any,
) -> Tensor | None:
    """`ops.sgd_` by way of ``torch.ops``. `stored`: state_dtype, rounding and masters."""
    for name, given in zip(("gauge", "state_dtype", "rounding", "masters"), (gauge, *stored), strict=True):
        if given is not None:
            raise NotImplementedError(
                f"sgd_: {name} expected None under torch.compile and dispatch modes, got {ops.describe(given)}"
            )
    if lr_multipliers is not None and not isinstance(lr_multipliers, Tensor):
        lr_multipliers = torch.tensor(list(lr_multipliers), dtype=torch.float64)
    params, grads = list(params), list(grads)
    buffers: list[Tensor] = []
    first: list[int] = []
    if momentum != 0:
        if momentum_buffers is None:
            raise ValueError("sgd_: momentum is not 0, expected momentum_buffers, got None")
        for i, v in enumerate(momentum_buffers):
            if v is None:
                first.append(i)
                v = torch.zeros_like(params[i], requires_grad=False)
                if grads[i] is not None:
                    momentum_buffers[i] = v
            buffers.append(v)
    numbers: Any = {"lr": lr, "weight_decay": weight_decay, "grad_scale": grad_scale}
    tensors = {"found_inf": found_inf, "clip_coef": clip_coef, "lr_multipliers": lr_multipliers}
    op = torch.ops.normkern.sgd_.default
    if any(isinstance(x, Tensor) for x in (*numbers.values(), *tensors.values())):
        op = torch.ops.normkern.sgd_.tensor
        numbers = {k: x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()}
        numbers |= tensors
    held = None if held is None else list(held)
    table: Tensor = op(
        params, grads, buffers, momentum=momentum, stats=stats, held=held, first=first, **numbers, **others
    )
    return None if stats is None and held is None else table
