"""Fallback of a step: parameters that no kernel takes are stepped and measured by torch's loop or by `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tracing import is_materialized
from .dtensor import is_dtensor, shard
from .group_step import GroupStep


def sq_norms_with_torch(group: GroupStep, grad_scale: Tensor | None) -> list[tuple[int, Tensor]]:
    """Return row and |g|^2 of the parameters that no kernel takes; `Pass.sq_norms` has those of the others."""
    if not group.left_to_torch:
        return []
    from ..reference import sq_norm

    scale = 1.0 if group.gauge is None or group.gauge.step is None else group.gauge.step.scale
    grads = ((i, _local(_whole_gradient(group, i, grad_scale), group.params[i])) for i in group.left_to_torch)
    return [(group.row + i, sq_norm(g) / scale**2) for i, g in grads]


def norms_with_torch(group: GroupStep, grad_scale: Tensor | None, p: float) -> list[tuple[int, Tensor]]:
    """Return row and p-norm of the gradient of every parameter, in float64."""
    scale = 1.0 if group.gauge is None or group.gauge.step is None else group.gauge.step.scale
    if not group.has_entries:
        group.grads = [param.grad for param in group.params]
    norms = []
    for i, g in enumerate(group.grads):
        if g is not None:
            local = _local(_dense(_whole_gradient(group, i, grad_scale)), group.params[i])
            norms.append((group.row + i, _p_norm(local, p) / scale))
    return norms


def _p_norm(x: Tensor, p: float) -> Tensor:
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    norm: Tensor = torch.linalg.vector_norm(x, p, dtype=None if x.is_complex() else torch.float64)
    return norm.double()


def step_with_torch(group: GroupStep, grad_scale: Tensor | None, clip_coef: Tensor | None) -> None:
    """Step the parameters that no kernel takes, by torch's loop where it has all options of the group."""
    is_plain = (group.gauge is None or group.gauge.step is None) and group.precision is None and group.sphere is None
    (_step_with_torch if is_plain else _step_with_reference)(group, grad_scale, clip_coef)


def _step_with_torch(group: GroupStep, grad_scale: Tensor | None, clip_coef: Tensor | None) -> None:
    which = group.left_to_torch
    grads = [_whole_gradient(group, i, grad_scale) for i in which]
    sparse = any(g.layout != torch.strided for g in grads)
    before = [_local(group.params[i], group.params[i]).clone() for i in which] if group.stats else []
    with torch.set_grad_enabled(bool(group.options["differentiable"])):
        clipped = grads if clip_coef is None else [g * clip_coef.to(g.device) for g in grads]
        for lr, some in _runs(group):
            group.step_by_torch(which[some], clipped[some], lr, sparse)
    if group.stats:
        _measure(group, before, grads)


def _measure(group: GroupStep, before: list[Tensor], grads: list[Tensor]) -> None:
    """Add the sums of the parameters that torch's loop has stepped to `torch_sums` of the group."""
    from ..reference import gradient_sums, step_sums

    for i, w, g in zip(group.left_to_torch, before, grads, strict=True):
        p = group.params[i]
        if is_materialized(p):
            sums = step_sums(w, _local(g, p), _local(p, p), group.stats)
            if group.pair is not None and group.pair.held[i] is not None:
                first, second = (_local(x, p) for x in _unscaled_pair(group, i))
                sums = torch.cat([sums, gradient_sums(first, second, group.stats)], dim=1)
            group.torch_sums.append((group.first_slot(i), sums))


def _runs(group: GroupStep) -> list[tuple[Any, slice]]:
    """Return learning rates, and which of `left_to_torch` have them: torch's function takes one for all."""
    lr = group.options["lr"]
    if group.multipliers is None:
        return [(lr, slice(None))]
    return [(lr * group.multipliers.value(i), slice(k, k + 1)) for k, i in enumerate(group.left_to_torch)]


def _step_with_reference(group: GroupStep, grad_scale: Tensor | None, clip_coef: Tensor | None) -> None:
    pair = group.pair
    for i in group.left_to_torch:
        p, more = group.params[i], group.reference_options(i)
        if pair is not None and pair.held[i] is not None:
            grad = pair.grads[i]
            more |= {"held": [_dense(pair.held[i])], "l": pair.l}
            more |= {"held_scale": 1 / pair.first_inverse_scale, "grad_scale": 1 / pair.second_inverse_scale}
        else:
            grad = _whole_gradient(group, i, grad_scale)
        more["clip_coef"] = None if clip_coef is None else clip_coef.to(p.device)
        more["lr_multipliers"] = None if group.multipliers is None else [float(group.multipliers.value(i))]
        stats = group.stats if is_materialized(p) else None
        sums = group.step_by_reference(i, _dense(grad), stats, more)
        if sums is not None and stats is not None:
            group.torch_sums.append((group.first_slot(i), sums))


def _whole_gradient(group: GroupStep, i: int, grad_scale: Tensor | None) -> Tensor:
    """Return the unscaled gradient of parameter i: the combination where there are two."""
    g: Tensor = group.grads[i]
    if group.pair is None:
        return g if grad_scale is None else g / grad_scale
    if group.pair.held[i] is None:
        return g if group.pair.first_inverse_scale == 1 else g * group.pair.first_inverse_scale
    from ..reference import svag_combination

    return svag_combination(*_unscaled_pair(group, i), group.pair.l)


def _unscaled_pair(group: GroupStep, i: int) -> tuple[Tensor, Tensor]:
    pair = group.pair
    assert pair is not None
    return pair.held[i] * pair.first_inverse_scale, pair.grads[i] * pair.second_inverse_scale


def with_torch_sums(table: Tensor, groups: list[GroupStep]) -> Tensor:
    """Return the table with the sums of parameters that no kernel took: wider if they alone are pairs."""
    sums = [entry for group in groups for entry in group.torch_sums]
    columns = max([table.shape[1], *(s.shape[1] for _, s in sums)])
    if columns > table.shape[1]:
        table = torch.cat([table, table.new_full((len(table), columns - table.shape[1]), torch.nan)], dim=1)
    for slot, rows in sums:
        table[slot : slot + len(rows), : rows.shape[1]] = rows
    return table


@torch.no_grad()
def _local(x: Tensor, p: Tensor) -> Tensor:
    """Return the part of a tensor that is measured: the shard of one that goes with a DTensor parameter p."""
    return shard(x, like=p) if is_dtensor(p) else x.detach()


def _dense(x: Tensor) -> Tensor:
    return x if x.layout == torch.strided else x.to_dense()
