"""A model's modules and parameters, as a context needs them: which are trained and which are constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import errors
from .record import ParameterRecord


@dataclass
class ModelParameters:
    """The modules and parameters of one model, at one time."""

    modules: list[nn.Module]
    records: list[ParameterRecord]  #: of the parameters that require a gradient, by their names in named_parameters()
    constants: set[int]  #: ids of the others, and of buffers

    @classmethod
    def of(cls, model: nn.Module) -> ModelParameters:
        """Collect those of a model.

        Raises:
            RuntimeError: a module is scripted.
        """
        modules: list[nn.Module] = []
        records: dict[int, ParameterRecord] = {}
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
                if p is None or id(p) in records:
                    continue
                if p.requires_grad:
                    records[id(p)] = ParameterRecord(dot + name, f"{path or 'the model'} ({type(module).__name__})", p)
                else:
                    constants.add(id(p))
            constants.update(id(b) for b in module._buffers.values() if b is not None)
            waiting += [(dot + name, m) for name, m in reversed(module._modules.items()) if m is not None]
        return cls(modules, list(records.values()), constants)


def batch_norms(model: nn.Module) -> str:
    """Return the names of the layers that use batch statistics now, for an error."""
    kind = nn.modules.batchnorm._BatchNorm
    found = [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, kind) and (m.training or m.running_mean is None)
    ]
    return ", ".join(found) or "batch_norm(training=True)"
