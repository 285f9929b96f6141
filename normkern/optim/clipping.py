"""Clipping between the two passes of a step: from the norms of all gradients to the factor that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from .clip_options import ClipOptions
from .dtensor import check_summable, is_dtensor, sum_over_shards
from .fallback import norms_with_torch, sq_norms_with_torch
from .group_step import GroupStep
from .options import place
from .partitions import reduced


def clip(
    step: ops.Pass,
    groups: Sequence[GroupStep],
    max_norm: float,
    options: ClipOptions,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    name_of: Callable[[int, int], str],
) -> tuple[Tensor, Tensor]:
    r"""Sum the squares of all gradients, and scale them in `step` and the groups by :math:`\min(1, m/(n+10^{-6}))`.

    Args:
        step: checked, not run.
        options: which norm; the process group whose ranks have the other gradients.
        grad_scale: of a GradScaler, for the gradients that torch's loop takes.
        found_inf: of a GradScaler, where the kernel is to read it.
        name_of: returns the name of a parameter, from the positions of its group and in it.

    Returns:
        The global norm before clipping and the coefficient, float64 of no dimension on the device of the first
        parameter that a kernel steps. Not synchronised, unless parameters lie on several devices or
        `error_if_nonfinite` asks for the norm.

    Raises:
        RuntimeError: the norm is not finite, with `error_if_nonfinite`.
    """
    if options.norm_type != 2:
        return _clip_by_p_norm(step, groups, max_norm, options, grad_scale, name_of)
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
    whole = sq_norms if options.group is None else reduced(sq_norms.sum().view(1), options.group)
    if tables:
        norm, coef = ops.clip_coef(whole, max_norm, found_inf=found_inf)
    else:
        from ..reference import clip_coef

        norm, coef = clip_coef(whole, max_norm)
    if options.error_if_nonfinite:
        _check_finite(norm, sq_norms, groups, name_of)
    step.clip([coef.to(table.device) for table in tables])
    return norm, coef


def _clip_by_p_norm(
    step: ops.Pass,
    groups: Sequence[GroupStep],
    max_norm: float,
    options: ClipOptions,
    grad_scale: Tensor | None,
    name_of: Callable[[int, int], str],
) -> tuple[Tensor, Tensor]:
    """Do as `clip` does, for another norm than the Euclidean one, by torch's operations."""
    p, places = options.norm_type, step.places
    is_max = math.isinf(p)
    entries = [entry for group in groups for entry in norms_with_torch(group, grad_scale, p)]
    table = _table(step.parameters, [(row, norm if is_max else norm**p) for row, norm in entries], groups)
    _sum_over_meshes(table, groups, is_max)
    total = (table.max() if len(table) else table.sum()) if is_max else table.sum()
    if options.group is not None:
        total = reduced(total.view(1), options.group, maximum=is_max)[0]
    norm = total if is_max else total ** (1 / p)
    coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if options.error_if_nonfinite:
        _check_finite(norm, table, groups, name_of)
    step.clip([coef.to(place_.device) for place_ in places])
    return norm, coef


def _check_finite(
    norm: Tensor, of_each: Tensor, groups: Sequence[GroupStep], name_of: Callable[[int, int], str]
) -> None:
    """Check that the global norm is finite.

    Raises:
        RuntimeError: it is not; the sentence names the first parameter whose gradient is not.
    """
    if math.isfinite(float(norm)):
        return
    bad = (~of_each.isfinite()).nonzero().view(-1).tolist()
    which = "a parameter of another process"
    for group in groups:
        if bad and group.row <= bad[0] < group.row + len(group.params):
            which = name_of(group.index, bad[0] - group.row)
    raise RuntimeError(
        f"{groups[0].at.who}.step: the norm of all gradients is {float(norm)}, because of the gradient of {which}; "
        "nothing was stepped. error_if_nonfinite=False would step"
    )


def _sum_over_meshes(table: Tensor, groups: Sequence[GroupStep], maximum: bool = False) -> None:
    """Add the shards' sums of DTensors over the ranks, which clip by one norm; or take the maximum."""
    owners = []
    for group in groups:
        for i, p in enumerate(group.params):
            if is_dtensor(p):
                check_summable(p, f"{place(group.at)}: params[{i}]")
                owners.append((slice(group.row + i, group.row + i + 1), p))
    if owners:
        sum_over_shards(table.view(-1, 1), owners, maximum)


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
