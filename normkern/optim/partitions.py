"""Parameters that are split over processes without saying so: FSDP's first version and ZeroRedundancyOptimizer.

A DTensor knows its mesh, and its sums are added over it (`dtensor`). The flat shards of `FullyShardedDataParallel` and
the part of all parameters that `ZeroRedundancyOptimizer` gives to a rank are plain tensors: sums over them are of one
rank, and are refused, or added over the process group that the user names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import has_dtensors

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_ZERO_NAME = "ZeroRedundancyOptimizer"


def several_processes() -> bool:
    """Return whether this process is one of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def wrapper_that_splits() -> str | None:
    """Return the name of the wrapper that is constructing an optimizer for its part of the parameters, or None."""
    if _ZERO not in sys.modules or not several_processes():
        return None
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _ZERO:
            return _ZERO_NAME
        frame = frame.f_back
    return None


def check_whole(
    who: str, params: Iterable[Any], part_of: str | None, group: Any, measured: bool, clipped: bool, kept: bool
) -> None:
    """Check that what is summed over the parameters is of whole ones, or is added over the ranks.

    Args:
        who: the optimizer's name.
        params: the parameters of all groups, with and without gradients.
        part_of: as in `RunState`.
        group: the process group that the user has named, or None.
        measured: sums of each parameter are wanted.
        clipped: the norm of all gradients is wanted.
        kept: the norm of each parameter, or of its rows, is to stay.

    Raises:
        RuntimeError: sums over the parameters would be of one rank.
    """
    if clipped and part_of is not None and group is None:
        raise RuntimeError(
            f"{who}.step: max_norm needs the norm of all gradients, but {part_of} has given this rank a part of the "
            f'parameters; construct it with group="world", or the process group that it splits them over: {part_of}('
            f'params, normkern.{who}, ..., max_norm=1.0, group="world")'
        )
    if not several_processes():
        return
    params = list(params)
    if clipped and group is not None and has_dtensors(params):
        raise RuntimeError(
            f"{who}.step: parameters are DTensors, which know the processes that they are split over; expected "
            "group=None"
        )
    if not has_flat_shards(params):
        return
    if kept:
        raise RuntimeError(
            f"{who}.step: the parameters are shards of FullyShardedDataParallel, and no rank knows the norms of whole "
            "ones, which norm= keeps; expected norm=None, or parameters that are not split"
        )
    if measured:
        raise RuntimeError(
            f"{who}.step: the parameters are shards of FullyShardedDataParallel, and no rank can measure whole "
            "parameters (stats, SVAG's noise); use torch.distributed.fsdp.fully_shard, whose DTensors are summed over "
            "the ranks, or stats=None"
        )
    if clipped and group is None:
        raise RuntimeError(
            f"{who}.step: the parameters are shards of FullyShardedDataParallel, and max_norm needs the norm of all of "
            "them; use torch.distributed.fsdp.fully_shard, or construct the optimizer with group=, the process group "
            'over which they are split ("world" for all processes), or clip by model.clip_grad_norm_'
        )


def has_flat_shards(params: Sequence[Any]) -> bool:
    """Return whether parameters are one rank's shards of `FullyShardedDataParallel`, which are vectors.

    Without sharding (``ShardingStrategy.NO_SHARD``) its parameters are whole.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    flat = [p for p in params if getattr(p, "_is_flat_param", False)]
    if flat:
        return any(_is_sharded(p) for p in flat)
    flattened = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    return bool(flattened) and all(p.ndim == 1 for p in flattened)


def _is_sharded(flat: Any) -> bool:
    local, whole = getattr(flat, "_local_shard", None), getattr(flat, "_unpadded_unsharded_size", None)
    return local is None or whole is None or local.numel() != whole.numel()


def process_group(group: Any) -> Any:
    """Return the process group that `group` names: None is that of all processes."""
    return None if group == "world" else group


@torch.no_grad()
def reduced(x: Tensor, group: Any, maximum: bool = False) -> Tensor:
    """Return the sum, or the maximum, of a tensor over the ranks of `group`."""
    own = process_group(group)
    on_cuda = torch.distributed.get_backend(own) == "nccl" and not x.is_cuda
    there = (x.cuda() if on_cuda else x).clone()
    op = torch.distributed.ReduceOp.MAX if maximum else torch.distributed.ReduceOp.SUM
    torch.distributed.all_reduce(there, op=op, group=own)
    return there.to(x.device)
