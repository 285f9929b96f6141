"""Finds the processes that share a model, and the part of its parameters that each process has.

A `DistributedDataParallel` model has whole parameters in every process. FSDP2 (`fully_shard`) keeps shards and puts
whole parameters into the modules for the forward and the backward: these are measured. Every other way of sharding
gives a process only a part of each sample's gradient, and is refused.

The wrapper is often out of sight: Lightning and the HF Trainer give a callback the module inside.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ...tracing import isinstance_if_imported
from . import errors


def is_ddp(module: Any) -> bool:
    """Return whether this is a `DistributedDataParallel`."""
    return isinstance_if_imported(module, "torch.nn.parallel.distributed", "DistributedDataParallel")


def running_ddp(parameters: set[int]) -> nn.Module | None:
    """Return the `DistributedDataParallel` whose forward runs now, if it has one of the parameters with these ids."""
    loaded = sys.modules.get("torch.nn.parallel.distributed")
    ddp = None if loaded is None else loaded.DistributedDataParallel._get_active_ddp_module()
    return ddp if ddp is not None and _has(ddp, parameters) else None


def find_ddp(parameters: set[int]) -> nn.Module | None:
    """Return a `DistributedDataParallel` of this process that has one of the parameters with these ids.

    This looks at every object of the process, which takes some 50 ms, if there are several processes.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    # type(), because isinstance() asks proxies for their class
    found = [x for x in gc.get_objects() if issubclass(type(x), nn.parallel.DistributedDataParallel)]
    return next((ddp for ddp in found if _has(ddp, parameters)), None)


def _has(ddp: nn.Module, parameters: set[int]) -> bool:
    return any(id(p) in parameters for p in ddp.parameters())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that only run it elsewhere."""
    while is_ddp(model) or isinstance_if_imported(model, "torch.nn.parallel.data_parallel", "DataParallel"):
        model = model.get_submodule("module")
    return model


# ---- FSDP2


@dataclass
class Shards:
    """The parameters of a model that `fully_shard` manages, by the ids of their shards."""

    managed: dict[int, Any] = field(default_factory=dict)  #: torch's FSDPParam

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Shards:
        """Collect those of a model; make their whole parameters, if no forward has made them yet."""
        found = cls()
        loaded = sys.modules.get("torch.distributed.fsdp._fully_shard")
        if loaded is None:
            return found
        for module in modules:
            if not isinstance(module, loaded.FSDPModule):
                continue
            groups = module._get_fsdp_state()._fsdp_param_groups
            managed = [p for group in groups for p in group.fsdp_params]
            if not all(hasattr(p, "_unsharded_param") for p in managed):
                module.unshard()
                module.reshard()
            found.managed.update({id(p.sharded_param): p for p in managed})
        return found

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """Return the whole parameter that the forward uses, in place of a shard.

        Raises:
            NotImplementedError: no whole parameter is put together from this shard.
        """
        if getattr(shard, "_fsdp_flattened", False):
            raise errors.fully_sharded_1(name)
        if not is_dtensor(shard):
            return shard
        managed = self.managed.get(id(shard))
        if managed is None:
            raise errors.tensor_parallel(name)
        if is_dtensor(managed._unsharded_param):
            raise errors.tensor_parallel(name)
        return managed._unsharded_param

    def group(self, names: Iterable[tuple[str, Tensor]]) -> Any:
        """Return the process group over which the shards of these parameters lie; None: all processes."""
        meshes: list[Any] = []
        for name, shard in names:
            managed = self.managed.get(id(shard))
            if managed is None:
                continue
            mesh = managed.mesh_info.mesh
            if meshes and mesh != meshes[0]:
                raise errors.fsdp_mesh(name)
            if not meshes and mesh.ndim > 1 and mesh.size() != dist.get_world_size():
                raise errors.fsdp_mesh(name)
            meshes = [mesh]
        return meshes[0].get_group() if meshes and meshes[0].ndim == 1 else None


def is_dtensor(x: Any) -> bool:
    """Return whether x is a DTensor, without importing the module: until it is imported there are none."""
    return isinstance_if_imported(x, "torch.distributed.tensor", "DTensor")
