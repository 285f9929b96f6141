"""The ops of ``torch.ops.normkern``, as torch's dispatcher, torch.compile and torch.export see them.

A table of schemas, each with the function of `ops` that runs it and the function of `fake` that returns its results
without values. The ops are registered through `torch.library.Library`: a call costs 1.5 us more than the function of
`ops`, one through `torch.library.custom_op` 13 us. For autograd they are registered as fallthrough: as with `ops`,
no graph leads through an op.

An op differs from its function in `ops` where a schema cannot express it:

* `sgd_`, `welford_`: they return a table of no rows where `ops` returns None. Lists that are written hold no None: new
  momentum buffers are unwritten tensors whose indices are in `first`. The overload "tensor" takes lr, weight_decay and
  grad_scale as tensors, which it needs for found_inf too.
* `adamw_`: as `sgd_`, but that lists of state hold zeros where a parameter has none yet.
* `apply_updates_`: `radius` is None or a list with one tensor, or None, for each parameter.
* `moments`: returns the totals, (2,), instead of writing them. `divisor` divides `factor`, as B may be a symbol and
  a float cannot. The overload "list" takes several tensors.
* `recentre_`: returns a bool tensor of no dimension.

`Pass`, and `gauge_step` with the `gauge` argument of `sgd_`, are not here: they are no functions of tensors. Nor are
`norm` and `radii` of `sgd_` and `adamw_`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import adam, clipping, fake, pairs, per_sample, sample_moments, sgd, sphere


def _table(sums: Tensor | None, params: Sequence[Tensor]) -> Tensor:
    return fake.no_table(params) if sums is None else sums


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
    fake.check_first(params, momentum_buffers, first)
    sums = sgd.sgd_(params, grads, buffers, weight_decay=weight_decay, grad_scale=grad_scale, **others)
    with torch.no_grad():
        for i in first:
            made = None if buffers is None else buffers[i]
            if made is not None:
                momentum_buffers[i].copy_(made)
    return _table(sums, params)


def _adamw_(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    beta1: float | Tensor | None = None,
    beta2: float | Tensor | None = None,
    weight_decay: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    **others: Any,
) -> Tensor:
    numbers: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "grad_scale": grad_scale}
    others |= {name: x for name, x in numbers.items() if x is not None}
    return _table(adam.adamw_(params, grads, list(exp_avgs), list(exp_avg_sqs), list(steps), **others), params)


def _apply_updates_(params: list[Tensor], updates: list[Tensor | None], **others: Any) -> Tensor:
    return _table(sphere.apply_updates_(params, updates, **others), params)


def _welford_(means: list[Tensor], samples: list[Tensor | None], squares: list[Tensor], **others: Any) -> Tensor:
    return _table(pairs.welford_(means, samples, squares, **others), means)


def _moments(x: Any, *, factor: float = 1.0, divisor: int = 1, squares: bool = True) -> tuple[Any, Any, Tensor, Tensor]:
    like = x[0] if isinstance(x, list) and x else x
    totals = torch.empty(2, dtype=torch.float64, device=getattr(like, "device", None))
    return *sample_moments.moments(x, factor=factor / divisor, squares=squares, totals=totals), totals


def _recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> Tensor:
    return torch.tensor(sample_moments.recentre_(raw, total, count, least), device=raw.device)


class Op(NamedTuple):
    """An overload of an op."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]  #: takes the same arguments and returns results without values

    @property
    def name(self) -> str:
        """Return the op's name with its overload, as `torch.library` spells it."""
        return self.schema.partition("(")[0]


_SGD = (
    "sgd_{}(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] momentum_buffers, *, {}, float momentum=0.0, "
    "float dampening=0.0, bool nesterov=False, bool maximize=False, str? stats=None, Tensor?[]? held=None, "
    "float l=1.0, float held_scale=1.0, int[] first=[]{}) -> Tensor"
)

_ADAMW = (
    "adamw_{}(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, *, {}, float eps=1e-08, bool decoupled=True, bool maximize=False, str? stats=None{}) -> Tensor"
)

OPS = (
    Op(
        _SGD.format("", "float lr, float weight_decay=0.0, float grad_scale=1.0", ""),
        _sgd_,
        fake.sgd_,
    ),
    Op(
        _SGD.format(
            ".tensor",
            "Tensor lr, Tensor? weight_decay=None, Tensor? grad_scale=None",
            ", Tensor? found_inf=None, Tensor? clip_coef=None, Tensor? lr_multipliers=None",
        ),
        _sgd_,
        fake.sgd_,
    ),
    Op(
        _ADAMW.format(
            "", "float lr, float beta1=0.9, float beta2=0.999, float weight_decay=0.01, float grad_scale=1.0", ""
        ),
        _adamw_,
        fake.adamw_,
    ),
    Op(
        _ADAMW.format(
            ".tensor",
            "Tensor lr, Tensor? beta1=None, Tensor? beta2=None, Tensor? weight_decay=None, Tensor? grad_scale=None",
            ", Tensor? found_inf=None, Tensor? clip_coef=None, Tensor? lr_multipliers=None",
        ),
        _adamw_,
        fake.adamw_,
    ),
    Op(
        'apply_updates_(Tensor(a!)[] params, Tensor?[] updates, *, float lr, str? norm="keep", Tensor?[]? radius=None, '
        "str? stats=None) -> Tensor",
        _apply_updates_,
        fake.apply_updates_,
    ),
    Op(
        "svag_combine_(Tensor(a!)[] grads_a, Tensor[] grads_b, float l) -> ()",
        pairs.svag_combine_,
        fake.svag_combine_,
    ),
    Op(
        'pair_sums(Tensor?[] grads_a, Tensor?[] grads_b, str stats="tensor") -> Tensor',
        pairs.pair_sums,
        fake.pair_sums,
    ),
    Op(
        "welford_(Tensor(a!)[] means, Tensor?[] samples, Tensor(b!)[] squares, *, SymInt n, str? stats=None) -> Tensor",
        _welford_,
        fake.welford_,
    ),
    Op(
        "outer_moments(Tensor a, Tensor g, *, bool squares) -> (Tensor, Tensor?, Tensor)",
        per_sample.outer_moments,
        fake.outer_moments,
    ),
    Op(
        "conv_moments(Tensor x, Tensor g, int[] kernel_size, *, int[] stride, int[] padding, int[] dilation, "
        "int groups, bool squares) -> (Tensor, Tensor?, Tensor)",
        per_sample.conv_moments,
        fake.conv_moments,
    ),
    Op(
        "moments(Tensor x, *, bool squares=True, float factor=1.0, SymInt divisor=1) -> "
        "(Tensor, Tensor?, Tensor, Tensor)",
        _moments,
        fake.moments,
    ),
    Op(
        "moments.list(Tensor[] x, *, bool squares=True, float factor=1.0, SymInt divisor=1) -> "
        "(Tensor[], Tensor[]?, Tensor, Tensor)",
        _moments,
        fake.moments,
    ),
    Op(
        "grad_sq_norms(Tensor?[] grads, *, float grad_scale=1.0, Tensor?[]? held=None, float l=1.0, "
        "float held_scale=1.0) -> Tensor",
        clipping.grad_sq_norms,
        fake.grad_sq_norms,
    ),
    Op(
        "clip_coef(Tensor sq_norms, float max_norm, *, Tensor? found_inf=None) -> (Tensor, Tensor)",
        clipping.clip_coef,
        fake.clip_coef,
    ),
    Op("row_sq_norms(Tensor x) -> Tensor", sample_moments.row_sq_norms, fake.row_sq_norms),
    Op("row_sums(Tensor x) -> Tensor", sample_moments.row_sums, fake.row_sums),
    Op(
        "recentre_(Tensor(a!) raw, Tensor total, SymInt count, float least) -> Tensor",
        _recentre_,
        fake.recentre_,
    ),
    Op(
        "norm_sums(Tensor g, Tensor x, Tensor? mean, Tensor rstd, *, str channels) -> (Tensor, Tensor)",
        per_sample.norm_sums,
        fake.norm_sums,
    ),
    Op(
        "embedding_moments(Tensor ids, Tensor g, int num_embeddings, *, int? padding_idx=None, bool squares) -> "
        "(Tensor, Tensor?, Tensor)",
        per_sample.embedding_moments,
        fake.embedding_moments,
    ),
)

_library = torch.library.Library("normkern", "DEF")
for _op in OPS:
    _library.define(_op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op.name, _op.run, "CompositeExplicitAutograd")  # for any device: `ops` refuses those without kernels
    _library.impl(_op.name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"normkern::{_op.name}", _op.fake, lib=_library)
