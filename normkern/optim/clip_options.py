"""`ClipOptions`: how an optimizer clips gradients, as its constructor and its checkpoints say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops

#: The entry of a state dict that holds them, and the options in it.
CLIPPING = "clipping"
_SAVED = ("max_norm", "norm_type", "error_if_nonfinite")


@dataclass
class ClipOptions:
    """Options of the optimizer as a whole, not of its groups.

    Attributes:
        max_norm: what every step clips the global norm to; None: a step clips only where its caller says so.
        norm_type: p of the norm, at least 1, or infinity.
        error_if_nonfinite: a clipped step raises where the norm is not finite.
        group: the process group over whose ranks the parameters are split; "world" is all processes.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ClipOptions:
        return ClipOptions(**self.state(), group=self.group)  # a process group is no value

    def check(self, where: str) -> None:
        """Check the options, and turn numbers into floats.

        Raises:
            TypeError: an option is of a wrong kind. ValueError: it is out of range.
        """
        if self.max_norm is not None:
            self.max_norm = ops.check_max_norm(self.max_norm, where)
        self.norm_type = check_norm_type(self.norm_type, where)
        if not isinstance(self.error_if_nonfinite, bool):
            raise TypeError(f"{where}: error_if_nonfinite expected True or False, got {self.error_if_nonfinite!r}")
        if self.group is not None and self.group != "world":
            is_available = torch.distributed.is_available()
            if not (is_available and isinstance(self.group, torch.distributed.ProcessGroup)):
                raise TypeError(
                    f'{where}: group expected a torch.distributed.ProcessGroup, "world" or None, got {self.group!r}'
                )

    def without_own_keys(self, param_group: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return a new param group without these options, which wrappers such as ZeroRedundancyOptimizer put into it.

        Raises:
            ValueError: it has another value of one than the optimizer.
        """
        keys = {*_SAVED} if self.group is None else {*_SAVED, "group"}
        for key in keys & param_group.keys():
            own, value = getattr(self, key), param_group[key]
            if value is not own and value != own:
                raise ValueError(
                    f"{where}: {key} is an option of the whole optimizer, not of a param group: expected {own!r} as at "
                    f"its construction, got {value!r}"
                )
        return {key: x for key, x in param_group.items() if key not in keys}

    def state(self) -> dict[str, Any]:
        """Return what a state dict has of them."""
        return {name: getattr(self, name) for name in _SAVED}

    def loaded(self, state: Any, where: str) -> ClipOptions:
        """Return these options with those of a state dict in place of its own.

        Raises:
            ValueError: it is no such entry, or an option is wrong.
        """
        if not isinstance(state, Mapping) or not set(state) <= set(_SAVED):
            raise ValueError(f"{where}: {CLIPPING} expected a dict of {', '.join(_SAVED)}, got {state!r}")
        options = ClipOptions(**{**self.state(), **state}, group=self.group)
        try:
            options.check(where)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return options


def check_norm_type(norm_type: Any, where: str) -> float:
    """Return the p of a norm as a float.

    Raises:
        TypeError: it is no number. ValueError: it is less than 1.
    """
    try:
        p = None if isinstance(norm_type, bool) else float(norm_type)
    except (TypeError, ValueError, OverflowError):
        p = None
    if p is None:
        raise TypeError(f"{where}: norm_type expected a number of at least 1 or infinity, got {norm_type!r}")
    if not p >= 1:
        raise ValueError(f"{where}: norm_type expected a number of at least 1 or infinity, got {norm_type!r}")
    return p
