"""Launching: allocates what a pass writes, runs it, or hands a call to torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._binary import Pass
from .types import SUMS

_CPU = torch.device("cpu")


def new_table(slots: int, columns: int = len(SUMS), like: Tensor | None = None) -> Tensor:
    """Return an unwritten table of sums, (slots, columns) float64 on the device of `like`, or the CPU."""
    return torch.empty(slots, columns, dtype=torch.float64, device=_CPU if like is None else like.device)


def new_scratch(step: Pass) -> Tensor | None:
    """Return the memory in which a `Pass` puts sums that come in parts; None where it needs none."""
    return new_table(step.scratch_rows, step.columns, step.like) if step.like is not None else None


def scratch_beside(x: Tensor) -> Callable[[int], Tensor]:
    """Return a function that allocates float64 memory on x's device, for what a kernel's blocks leave each other."""
    return lambda size: torch.empty(size, dtype=torch.float64, device=x.device)


def with_dense_rows(x: Tensor) -> Tensor:
    """Return `x`, or a copy, such that the numbers of the last dimension lie side by side."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.detach().contiguous()


def run_pass(step: Pass, measured: bool, may_skip: bool = False) -> Tensor | None:
    """Check and run a `Pass`, and return its sums if `measured`; NaN in them where the kernel `may_skip` the step."""
    written = step.check(None)
    table = new_table(step.slots, step.columns, step.like) if measured else None
    if table is not None and may_skip:
        table.fill_(torch.nan)
    step.run(table, new_scratch(step) if measured else None)
    torch.autograd.graph.increment_version(written)
    return table


def torch_op(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an op of ``torch.ops.normkern``, which a tracer can record; it cannot see what a kernel writes."""
    op: Any = torch.ops.normkern
    for part in name.split("."):
        op = getattr(op, part)
    return op(*args, **kwargs)
