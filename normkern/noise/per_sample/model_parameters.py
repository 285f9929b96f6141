"""A model's modules and parameters, as a context needs them: which are trained and which are constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...names import strip_all
from . import errors
from .parallel import Shards
from .record import ParameterRecord


@dataclass
class ModelParameters:
    """The modules and parameters of one model, at one time."""

    modules: list[nn.Module]
    records: list[ParameterRecord]  #: of the parameters that require a gradient, named as by `normkern.names`
    known: set[int]  #: ids of those parameters, and of their shards
    constants: set[int]  #: ids of the others, and of buffers
    has_batchnorm: bool
    shards: Shards
    group: Any  #: of the processes that have the shards; None: all, or no shards

    @classmethod
    def of(cls, model: nn.Module) -> ModelParameters:
        """Collect those of a model.

        Raises:
            RuntimeError: a module is scripted.
            NotImplementedError: a parameter is sharded in a way that cannot be measured.
        """
        modules: list[nn.Module] = []
        trained: dict[int, tuple[str, str, Tensor]] = {}
        constants: set[int] = set()
        seen: set[nn.Module] = set()
        waiting = [("", model)]
        while waiting:  # model.named_modules() takes several times as long
            path, module = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, torch.jit.ScriptModule):
                raise errors.scripted(path)
            modules.append(module)
            dot = path and path + "."
            for name, p in module._parameters.items():
                if p is None or id(p) in trained:
                    continue
                if p.requires_grad:
                    trained[id(p)] = (dot + name, f"{path or 'the model'} ({type(module).__name__})", p)
                else:
                    constants.add(id(p))
            constants.update([id(b) for b in module._buffers.values() if b is not None])
            waiting += [(dot + name, m) for name, m in reversed(module._modules.items()) if m is not None]
        shards = Shards.of(modules)
        names = strip_all([name for name, _, _ in trained.values()])
        records = [
            ParameterRecord(name, where, shards.whole(name, p))
            for name, (_, where, p) in zip(names, trained.values(), strict=True)
        ]
        constants.update(id(p._unsharded_param) for i, p in shards.managed.items() if i in constants)
        return cls(
            modules,
            records,
            set(trained).union(id(r.param) for r in records),
            constants,
            any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules),
            shards,
            shards.group(zip(names, (p for _, _, p in trained.values()), strict=True)),
        )


def batch_norms(model: nn.Module) -> str:
    """Return the names of the layers that use batch statistics now, for an error."""
    kind = nn.modules.batchnorm._BatchNorm
    found = [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, kind) and (m.training or m.running_mean is None)
    ]
    return ", ".join(found) or "batch_norm(training=True)"
