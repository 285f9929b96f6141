"""Types of arguments and results: dtypes, statistics and their columns, gauges, low-precision storage."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..names import did_you_mean
from . import _binary

#: The dtypes that kernels read and write, in the order of the binary's codes.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Those of 16 bits, whose arithmetic is in float32.
LOW_PRECISION = tuple(dtype for dtype in DTYPES if dtype.itemsize == 2)
#: Those that kernels compute in; means and deviations are returned in them.
COMPUTE_DTYPES = tuple(dtype for dtype in DTYPES if dtype not in LOW_PRECISION)

Stats: TypeAlias = Literal["tensor", "row"] | None
_STATS_CODE = {None: 0, "tensor": 1, "row": 2}

#: Which norms a step keeps: that of each tensor, or those of its rows, the indices of its first dimension.
Norm: TypeAlias = Literal["keep", "keep_rows"] | None
NORMS = ("keep", "keep_rows")

#: Columns of the table of sums, in order.
SUMS = ("weight_sq", "grad_sq", "weight_grad_dot", "update_sq", "weight_update_dot")
#: The columns that a pair of gradients adds to them: <g1,g2>, |g1-g2|^2, |g1|^2, |g2|^2.
PAIR_SUMS = ("pair_dot", "pair_difference_sq", "first_sq", "second_sq")

GaugeStep: TypeAlias = _binary.GaugeStep
LrMultipliers: TypeAlias = _binary.LrMultipliers

#: lr, weight_decay, grad_scale, found_inf and, of Adam, beta1 and beta2 where they lie on a device, else None.
OnDevice: TypeAlias = tuple[Tensor | None, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the module: "float32"."""
    return str(dtype).removeprefix("torch.")


def one_of(dtypes: Sequence[torch.dtype] = DTYPES) -> str:
    """Return how a sentence lists dtypes: "float64, float32, bfloat16 or float16"."""
    *most, last = map(dtype_name, dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that kernels compute in for tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_code(stats: Stats, where: str) -> int:
    """Return the binary's code of a choice of statistics; `where` begins the sentence for an unknown one."""
    try:
        return _STATS_CODE[stats]
    except (KeyError, TypeError):
        near = did_you_mean(stats, ("tensor", "row"))
        raise ValueError(f'{where}: stats expected None, "tensor" or "row", got {stats!r}{near}') from None


def check_norm(norm: Norm, where: str) -> None:
    """Raise ValueError for an unknown choice of norms to keep; `where` begins the sentence."""
    if norm is not None and norm not in NORMS:
        near = did_you_mean(norm, NORMS)
        raise ValueError(f'{where}: norm expected None, "keep" or "keep_rows", got {norm!r}{near}')


def check_lr_on_sphere(lr: float, where: str) -> None:
    """Raise ValueError for a learning rate that is no step on a sphere: at 1 the weights may vanish on the way."""
    if not 0 <= lr < 1:
        raise ValueError(
            f"{where}: lr expected a number of at least 0 and below 1 with norm=, where it is the step relative to the "
            f"weights' norm, got {lr!r}"
        )


def column(table: Tensor, name: str, columns: Sequence[str] = SUMS + PAIR_SUMS) -> Tensor:
    """Return a column of a table of sums by its name. A step's table begins with `SUMS`; `PAIR_SUMS` may follow."""
    return table[:, columns.index(name)]


class Rounding(NamedTuple):
    """Stochastic rounding of bfloat16 weights: Philox4x32-7 with the seed as key; see csrc/core/philox.h."""

    seed: int
    step: int  #: the number of steps taken before
    first: int = 0  #: the first parameter's index in the optimizer


#: How the binary takes a group's storage: the buffers' dtype, (seed, step), the index of the first parameter.
Precision: TypeAlias = tuple[int | None, tuple[int, int] | None, int]


def precision(state_dtype: torch.dtype | None, rounding: Rounding | None, first: int) -> Precision:
    """Return a group's storage as the binary takes it."""
    numbers = None if rounding is None else (rounding.seed, rounding.step % 2**32)
    return None if state_dtype is None else DTYPES.index(state_dtype), numbers, first


class Buffers(IntEnum):
    """The state of a param group's momentum buffers when a step begins."""

    NONE = 0  #: none, and momentum is 0
    FIRST = 1  #: none yet: the step makes them
    KEPT = 2
    RESTING = 3  #: those of earlier steps, but momentum is 0


#: (scale, z, exponent): how weights without decay stand for those of the run with it. See `gauge_step`.
Gauge: TypeAlias = tuple[float, float, int]
NEW_GAUGE: Gauge = (1.0, 0.0, 0)
