"""A model's parts, as a context needs them: who is trained, what is constant, and what cannot be seen into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .accumulator import Record


@dataclass
class Anatomy:
    """Of one model, at one time."""

    modules: list[nn.Module]
    records: list[Record]  #: of the parameters that require a gradient, by their names in named_parameters()
    constants: set[int]  #: ids of the others, and of buffers

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """RuntimeError: it is scripted."""
        modules: list[nn.Module] = []
        records: dict[int, Record] = {}
        constants: set[int] = set()
        seen: set[nn.Module] = set()
        waiting = [("", model)]
        while waiting:  # as model.named_modules(), which takes several times as long
            path, module = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            _refuse_scripted(path, module)
            modules.append(module)
            dot = path and path + "."
            for name, p in module._parameters.items():
                if p is None or id(p) in records:
                    continue
                if p.requires_grad:
                    records[id(p)] = Record(dot + name, f"{path or 'the model'} ({type(module).__name__})", p)
                else:
                    constants.add(id(p))
            constants.update(id(b) for b in module._buffers.values() if b is not None)
            waiting += [(dot + name, m) for name, m in reversed(module._modules.items()) if m is not None]
        return cls(modules, list(records.values()), constants)


def _refuse_scripted(path: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError(
            f"GradientNoise: {path or 'the model'} is scripted or traced (torch.jit), so that its operations cannot be "
            "seen; expected the module that it was made of"
        )


def batch_norms(model: nn.Module) -> str:
    """The layers that use batch statistics now, for an error."""
    kind = nn.modules.batchnorm._BatchNorm
    found = [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, kind) and (m.training or m.running_mean is None)
    ]
    return ", ".join(found) or "batch_norm(training=True)"
