r"""DTensors: the local part of one, and sums of the parts over the mesh.

A rank's step sees shards. Sums over coordinates (norms, inner products) of the whole parameter are those of its shards
added over the mesh dimensions that split it, and over no others: along those that replicate it every rank has the same
sums.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tracing import isinstance_if_imported


def is_dtensor(x: Any) -> bool:
    """Return whether x is a DTensor, without importing the module: until it is imported there are none."""
    return isinstance_if_imported(x, "torch.distributed.tensor", "DTensor")


def has_dtensors(tensors: Iterable[Any]) -> bool:
    """Return whether one of them is a DTensor, asking each type once: cheap enough for every step."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and any(issubclass(kind, loaded.DTensor) for kind in set(map(type, tensors)))


def shard(x: Any, like: Any) -> Tensor:
    """Return the local part of a DTensor, laid out over the mesh as `like` is.

    Raises:
        RuntimeError: it is no DTensor.
    """
    if not is_dtensor(x):
        raise RuntimeError(f"normkern: expected a DTensor to go with a DTensor parameter, got {ops.describe(x)}")
    if x.device_mesh != like.device_mesh or x.placements != like.placements:
        x = x.redistribute(like.device_mesh, like.placements)
    local = x.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def check_summable(p: Any, where: str) -> None:
    """Check that the sums of a DTensor are those of its shards, added.

    Raises:
        ValueError: a placement is partial: the squares of a sum are not the sum of squares.
    """
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"{where} has placements {_words(p.placements)}; expected Shard or Replicate where sums are measured "
            "(stats, max_norm, SVAG's noise), got a Partial: redistribute it"
        )


def _words(placements: Iterable[Any]) -> str:
    return f"({', '.join(map(str, placements))})"


def own_rows(p: Any) -> slice:
    """Return which indices of its first dimension this rank's part of a DTensor has."""
    coordinate = p.device_mesh.get_coordinate()
    return _own_rows(p.shape, p.device_mesh, p.placements, None if coordinate is None else tuple(coordinate))


@functools.lru_cache(maxsize=4096)
def _own_rows(shape: torch.Size, mesh: Any, placements: tuple[Any, ...], _of: tuple[int, ...] | None) -> slice:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    begin = offset[0] if offset and size[0] else 0
    return slice(begin, begin + size[0])


def sum_step_over_shards(table: Tensor, params: Iterable[tuple[Any, int, bool]]) -> None:
    """Turn the sums of a step, which are of this rank's shards, into those of whole parameters, on every rank.

    Args:
        table: (slots, columns) float64, NaN where nothing was stepped; updated in place.
        params: the parameters, where the slots of each begin, and whether it has one per row.
    """
    owners: list[tuple[slice, Any]] = []
    for p, begin, by_row in params:
        if not is_dtensor(p):
            continue
        count = p.shape[0] if by_row and p.ndim >= 2 else 1
        if by_row and p.ndim >= 2:  # rows of other ranks: nothing to add
            own = own_rows(p)
            table[begin : begin + own.start] = 0
            table[begin + own.stop : begin + count] = 0
        owners.append((slice(begin, begin + count), p))
    sum_over_shards(table, owners)


@torch.no_grad()
def sum_over_shards(table: Tensor, owners: Sequence[tuple[slice, Any]], maximum: bool = False) -> None:
    r"""Add the ranks' sums of their shards: :math:`T_s \leftarrow \sum_r T_s^{(r)}`, in place.

    One all_reduce for each mesh dimension that splits one of the parameters, of all their rows together; over a
    dimension that replicates a parameter nothing is added. A NaN of one rank reaches all.

    Args:
        table: float64 (slots, columns); updated in place. A rank that has nothing of a slot has zeros there.
        owners: the slots of each DTensor, and it; in the same order on every rank, all of which call this. Others than
            DTensors, and slots of none, are left alone.
        maximum: take the maximum over the ranks instead.

    Nothing is synchronised with a CUDA device.

    Raises:
        RuntimeError: another rank has died.
    """
    groups: dict[str, tuple[Any, Any, list[slice]]] = {}
    for slots, p in owners:
        if not is_dtensor(p) or p.device_mesh.get_coordinate() is None or slots.start == slots.stop:
            continue
        for dim, placement in enumerate(p.placements):
            if placement.is_replicate() or placement.is_partial() or p.device_mesh.size(dim) == 1:
                continue
            group = p.device_mesh.get_group(dim)
            _, _, runs = groups.setdefault(group.group_name, (group, p.device_mesh.device_type, []))
            if runs and runs[-1].stop == slots.start:
                runs[-1] = slice(runs[-1].start, slots.stop)
            else:
                runs.append(slots)
    for group, device_type, runs in groups.values():
        rows = table[runs[0]] if len(runs) == 1 else torch.cat([table[run] for run in runs])
        there = rows if rows.device.type == device_type else rows.to(device_type)  # offloaded: groups know one device
        there = there.contiguous()
        distributed = torch.distributed
        distributed.all_reduce(there, distributed.ReduceOp.MAX if maximum else distributed.ReduceOp.SUM, group=group)
        if len(runs) > 1 or there is not rows:
            parts = torch.split(there.to(table.device), [run.stop - run.start for run in runs])
            for run, part in zip(runs, parts, strict=True):
                table[run] = part
