"""The table of jobs: what is done to a case, how much memory that must move, and how a peer's result is checked.

Jobs that share a `prepare` share its data and are measured in one interleaved run. A new kernel adds a `Job` here, its
check to right.py, its peers to peers.py, and names the job in the cases that it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .arrays import adam_arrays, arrays, matrix
from .cases import Shape
from .right import adamw_fault, clipped_fault, moments_fault, sgd_fault, sgd_statistics_fault, svag_fault


@dataclass(frozen=True)
class Job:
    """One task that peers are timed on.

    prepare: (shapes, dtype) -> the argument of a peer's maker.
    streams: how many times every coordinate must be read or written; the bytes moved follow from it.
    limit: the loop of limits.py that moves memory in this way.
    anchor: the peer whose time is the unit for the others.
    fault: (maker, dtype) -> what is wrong with its numbers, or "".
    """

    name: str
    prepare: Callable[[Sequence[Shape], torch.dtype], Any]
    streams: int
    limit: str
    anchor: str
    fault: Callable[[Callable[..., Any], torch.dtype], str]


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("step", arrays, 5, "five-stream loop", "normkern", sgd_fault),
        # The sums come from numbers that the step reads anyway: no further stream.
        Job("step + statistics", arrays, 5, "five-stream loop", "normkern", sgd_statistics_fault),
        # All gradients are read before the first weight can be written.
        Job("clipped step", arrays, 6, "six-stream loop", "normkern clipped", clipped_fault),
        Job("SVAG step", arrays, 6, "six-stream loop", "normkern SVAG", svag_fault),
        Job("AdamW step", adam_arrays, 7, "seven-stream loop", "normkern AdamW", adamw_fault),
        Job("moments", matrix, 1, "sum-of-squares read", "normkern moments", moments_fault),
    )
}
