"""Low-precision storage of a param group: the dtype of buffers, stochastic rounding, master weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .options import MASTER, RADIUS, At, place

#: The group key that counts the steps that were rounded at random.
ROUNDING_STEP = "rounding_step"
#: Group keys and their defaults.
PRECISION: dict[str, Any] = {
    "state_dtype": None,
    "stochastic_rounding": False,
    "rounding_seed": 0,
    "master_weights": False,
}
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)


def check_precision(group: Mapping[str, Any], where: str | At) -> None:
    """Check a group's options for storage.

    Raises:
        ValueError: an option is of a wrong kind; both stochastic rounding and master weights are chosen.
    """
    dtype, seed, step = group["state_dtype"], group["rounding_seed"], group.get(ROUNDING_STEP, 0)
    if not any(dtype is known for known in _STATE_DTYPES):
        raise ValueError(f"{place(where)}: state_dtype expected None, torch.float32 or torch.bfloat16, got {dtype!r}")
    for name in ("stochastic_rounding", "master_weights"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{place(where)}: {name} expected True or False, got {group[name]!r}")
    for name, number, bits in (("rounding_seed", seed, 64), (ROUNDING_STEP, step, 63)):
        if type(number) is not int or not 0 <= number < 1 << bits:
            raise ValueError(f"{place(where)}: {name} expected a whole number from 0 to 2^{bits} - 1, got {number!r}")
    if group["stochastic_rounding"] and group["master_weights"]:
        raise ValueError(
            f"{place(where)}: expected stochastic_rounding or master_weights, got both: of a weight with a master copy "
            "no rounding is lost"
        )


class GroupPrecision:
    """The storage of one param group during one step; nothing is written before `commit`."""

    __slots__ = ("first", "has_masters", "rounding", "state_dtype")

    def __init__(self, options: dict[str, Any], at: At, first: int) -> None:
        """`first`: the index in the optimizer of the group's first parameter.

        Raises:
            ValueError: an option is unknown, or does not fit a parameter or the group.
            RuntimeError: random numbers would be captured in a graph.
        """
        check_precision(options, at)
        self.first, self.state_dtype = first, options["state_dtype"]
        self.has_masters: bool = options["master_weights"]
        self.rounding: ops.Rounding | None = None
        if options["stochastic_rounding"]:
            self.rounding = ops.Rounding(options["rounding_seed"], options.get(ROUNDING_STEP, 0), first)
        if options["differentiable"]:
            raise ValueError(
                f"{place(at)}: differentiable expected False with state_dtype, stochastic_rounding or "
                "master_weights, got True"
            )
        for i, p in enumerate(options["params"]):
            if self.state_dtype is not None and p.dtype not in (torch.float32, *ops.LOW_PRECISION):
                raise ValueError(
                    f"{place(at)}: state_dtype expected float32, bfloat16 or float16 parameters, but params[{i}] is "
                    f"{ops.describe(p)}"
                )
            if self.rounding is not None and p.dtype == torch.float16:
                raise ValueError(
                    f"{place(at)}: stochastic_rounding expected bfloat16 parameters, or of 32 and 64 bits, which "
                    f"are stored as always, but params[{i}] is {ops.describe(p)}"
                )
            if self.rounding is not None and p.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{place(at)}: stochastic_rounding expected no CUDA graph: every replay would round with the "
                    "same random numbers"
                )

    def code(self, i: int = 0) -> ops.Precision:
        """Return the storage as the binary takes it, for a list that begins with parameter i of the group."""
        return ops.precision(self.state_dtype, self.rounding, self.first + i)

    def buffer_dtype(self, p: Tensor) -> torch.dtype:
        """Return the dtype of a new buffer of a parameter."""
        return self.state_dtype or p.dtype

    def masters(self, params: list[Any], grads: list[Any], state: Any) -> tuple[list[Any] | None, list[int]]:
        """Return the master copies of the parameters that have gradients, and which of them are new."""
        if not self.has_masters:
            return None, []
        masters: list[Any] = [None] * len(params)
        new = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is None or p.dtype not in ops.LOW_PRECISION:
                continue
            masters[i] = state.get(p, {}).get(MASTER)
            if masters[i] is None:
                masters[i] = p.detach().float()
                new.append(i)
        return masters, new

    def convert(self, params: list[Any], grads: list[Any], buffers: list[Any]) -> list[int]:
        """Replace buffers of another dtype than `state_dtype` in the list, and return their positions."""
        if self.state_dtype is None:
            return []
        old = [i for i, b in enumerate(buffers) if b is not None and grads[i] is not None]
        old = [i for i in old if buffers[i].dtype != self.state_dtype]
        for i in old:
            buffers[i] = buffers[i].to(self.state_dtype)
        return old

    def commit(self, group: dict[str, Any]) -> None:
        """Count the step in the param group."""
        if self.rounding is not None:
            group[ROUNDING_STEP] = self.rounding.step + 1


def group_precision(options: dict[str, Any], at: At, first: int) -> GroupPrecision | None:
    """Return the storage of a group; None where everything is stored as the parameters are."""
    if options["state_dtype"] is None and not options["stochastic_rounding"] and not options["master_weights"]:
        return None
    return GroupPrecision(options, at, first)


def restore_precision(
    state: Any, groups: list[dict[str, Any]], saved: Mapping[str, Any], buffers: Iterable[str]
) -> None:
    """Load again from the checkpoint what `torch.optim.Optimizer.load_state_dict` has cast to the parameters' dtype.

    A buffer, by its name, is loaded as a step would make a new one; a master copy in float32, a radius in float64.
    """
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        for p, key in zip(group["params"], saved_group["params"], strict=True):
            entry, given = state.get(p, {}), saved["state"].get(key, {})
            wanted = dict.fromkeys(buffers, group["state_dtype"]) | {MASTER: torch.float32, RADIUS: torch.float64}
            for name, dtype in wanted.items():
                if isinstance(entry.get(name), Tensor) and dtype is not None:
                    entry[name] = given[name].to(dtype=dtype, device=entry[name].device)
