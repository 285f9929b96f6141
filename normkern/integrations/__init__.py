"""Callbacks and registrations for frameworks. `import normkern` does not import this package, nor any framework.

A name is loaded, with its framework, when it is first used:

* `LightningCallback`: statistics of steps and gradient noise into the loggers of a Lightning ``Trainer``;
* `HuggingFaceCallback`: the same for the ``Trainer`` of the transformers library;
* `UltralyticsCallback`: the same for the trainers of Ultralytics YOLO;
* `register_with_timm`: normkern's optimizers by name in timm's ``create_optimizer_v2``;
* `unwrap_optimizer`: the optimizer inside wrappers of accelerate, Lightning, timm, Opacus and torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..optim.unwrap import unwrap_optimizer
    from .huggingface import HuggingFaceCallback
    from .lightning import LightningCallback
    from .timm import register_with_timm
    from .ultralytics import UltralyticsCallback

__all__ = [
    "HuggingFaceCallback",
    "LightningCallback",
    "UltralyticsCallback",
    "register_with_timm",
    "unwrap_optimizer",
]

_FILES = {
    "HuggingFaceCallback": ".huggingface",
    "LightningCallback": ".lightning",
    "UltralyticsCallback": ".ultralytics",
    "register_with_timm": ".timm",
    "unwrap_optimizer": "..optim.unwrap",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FILES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
