"""`RunState`: everything that changes while an optimizer runs, in one object.

Frameworks wrap an optimizer in an object that reads its attributes and keeps what is assigned: a class made at run time
with a forwarding ``__getattr__`` (Lightning, Fabric), or a copy of ``__dict__``. A method called on such a wrapper
must find the optimizer's own state, so it is made once, at construction, and is never assigned again.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import ops
from .clip_options import ClipOptions
from .options import At

if TYPE_CHECKING:
    from .followers import Followers
    from .step_stats import Measured
    from .written_behind import Versions


class RunState:
    """The mutable state of an optimizer beyond ``state`` and ``param_groups``."""

    __slots__ = (
        "clip_options",
        "dlpack_refs",
        "found_inf",
        "grad_norm",
        "grad_scale",
        "loaded",
        "lock",
        "measured",
        "model",
        "names",
        "owner",
        "part_of",
        "places",
        "plan",
        "warned",
        "whole",
        "whole_for",
        "written",
    )

    def __init__(self, optimizer: Any, clip_options: ClipOptions, part_of: str | None) -> None:
        """`part_of`: the wrapper that has given this optimizer a part of all parameters; None: it has all of them."""
        self.owner = weakref.ref(optimizer)
        self.plan, self.lock = ops.Pass(), threading.Lock()
        self.clip_options, self.part_of = clip_options, part_of
        # Of a GradScaler, for the duration of its step.
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        # Of the last step.
        self.measured: Measured | None = None
        self.grad_norm: Tensor | None = None
        self.written: tuple[Tensor, ...] | None = None
        self.dlpack_refs: list[object] = []
        #: What `check_whole` has accepted: the tensors of the step; whether they are measured, clipped, kept in norm.
        self.whole: tuple[Tensor, ...] | None = None
        self.whole_for = (False, False, False)
        #: What the loading hooks have made of a state dict, while it is loaded.
        self.loaded: dict[str, Any] | None = None
        self.warned: set[str] = set()
        self.places: list[At] = []
        #: The name of each parameter that has one, and the model that it is from.
        self.names: dict[Tensor, str] = {}
        self.model: nn.Module | None = None


class SgdState(RunState):
    """The mutable state of an `SGD`."""

    __slots__ = ("followers", "true_weights", "versions")

    def __init__(self, optimizer: Any, clip_options: ClipOptions, part_of: str | None) -> None:
        super().__init__(optimizer, clip_options, part_of)
        # Of groups with decay="exponential", by position.
        self.followers: dict[int, Followers] = {}
        self.versions: dict[int, Versions] = {}
        self.true_weights = False


def scaler_attribute(value: Tensor | None, name: str) -> Tensor:
    """Return what a GradScaler has set; without it there is no such attribute, as the scaler expects.

    Raises:
        AttributeError: it has set nothing.
    """
    if value is None:
        raise AttributeError(name)
    return value
