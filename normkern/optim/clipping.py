"""Clipping between the two passes of a step: from the norms of all gradients to the factor that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .dtensor import check_summable, is_dtensor, sum_over_shards
from .fallback import sq_norms_with_torch
from .group_step import GroupStep
from .options import place


def clip(
    step: ops.Pass,
    groups: Sequence[GroupStep],
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r"""Sum the squares of all gradients, and scale them in `step` and the groups by :math:`\min(1, m/(n+10^{-6}))`.

    Args:
        step: checked, not run.
        grad_scale: of a GradScaler, for the gradients that torch's loop takes.
        found_inf: of a GradScaler, where the kernel is to read it.

    Returns:
        The global norm before clipping and the coefficient, float64 of no dimension on the device of the first
        parameter that a kernel steps. Not synchronised, unless parameters lie on several devices.
    """
    tables = ops.sq_norm_tables(step)
    of_torch = [entry for group in groups for entry in sq_norms_with_torch(group, grad_scale)]
    if tables:
        sq_norms, *others = tables
        for other in others:
            sq_norms += other.to(sq_norms.device)
        for row, sq_norm in of_torch:
            sq_norms[row] = sq_norm
    else:  # no kernel takes a parameter: all is torch's operations, which dispatch modes can see
        sq_norms = _table(step.parameters, of_torch, groups)
    _sum_over_meshes(sq_norms, groups)
    if tables:
        norm, coef = ops.clip_coef(sq_norms, max_norm, found_inf=found_inf)
    else:
        from ..reference import clip_coef

        norm, coef = clip_coef(sq_norms, max_norm)
    step.clip([coef.to(table.device) for table in tables])
    return norm, coef


def _sum_over_meshes(sq_norms: Tensor, groups: Sequence[GroupStep]) -> None:
    """Add the shards' sums of DTensors over the ranks, which clip by one norm."""
    owners = []
    for group in groups:
        for i, p in enumerate(group.params):
            if is_dtensor(p):
                check_summable(p, f"{place(group.index)}: params[{i}]")
                owners.append((slice(group.row + i, group.row + i + 1), p))
    if owners:
        sum_over_shards(sq_norms.view(-1, 1), owners)


def _table(parameters: int, sq_norms: Sequence[tuple[int, Tensor]], groups: Sequence[GroupStep]) -> Tensor:
    """Return (parameters,) float64 with these numbers in these rows, and 0 in the others."""
    device = next((p.device for group in groups for p in group.params), torch.device("cpu"))
    if not sq_norms:
        return torch.zeros(parameters, dtype=torch.float64, device=device)
    device = sq_norms[0][1].device
    rows = [torch.zeros((), dtype=torch.float64, device=device)] * parameters
    for row, sq_norm in sq_norms:
        rows[row] = sq_norm.to(device)
    return torch.stack(rows)
