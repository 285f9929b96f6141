"""`summarise`: the result of what a context has accumulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed, errors
from .accumulator import Accumulator
from .record import ParameterRecord, spreads
from .result import Coverage, GradientNoiseResult, scalars


def summarise(
    accumulator: Accumulator, stats: Sequence[str], reduction: str, batches: list[int] | None, group: Any
) -> GradientNoiseResult:
    """Return the result of a context.

    Args:
        accumulator: of at least one backward.
        stats, reduction: as `GradientNoise` was told.
        batches: the batch sizes of all processes of the group, if their numbers are to be combined.

    Raises:
        RuntimeError: a statistic cannot be given.
    """
    if any(r.status == "estimated" for r in accumulator.records) and {"norms", "projections"} & set(stats):
        raise errors.estimated_samples()
    if batches is not None and accumulator.projects:
        raise errors.joint_projections()
    batch = sum(accumulator.batches)
    unit = float(batch) if reduction == "mean" else 1.0
    measured: list[ParameterRecord] = [r for r in accumulator.records if r.status != "excluded"]
    if not measured:
        raise errors.all_excluded()
    if batches is not None:
        joined = distributed.join(measured, batch, unit, batches, accumulator.squares, group)
        measured, batch, unit = joined.records, joined.batch, 1.0
    device = measured[0].param.device
    squares = torch.stack([r.square().to(device) for r in measured])
    traces = spreads(measured, squares, batch) * (unit**2 / (batch - 1))
    signals = squares * (unit / batch) ** 2
    whole = scalars(traces.sum(), signals.sum(), batch)
    norms = None
    if "norms" in stats:
        norms = {r.name: torch.cat(r.sq_norms) * unit**2 for r in measured}
    projections = None
    if accumulator.projects:
        projections = _sum(r.all_projections for r in measured if r.all_projections is not None)
        projections = projections * (unit**2 / batch)
    return GradientNoiseResult(
        **vars(whole),
        batch_size=batch,
        batchnorm="eval" if accumulator.has_batchnorm else None,
        _sq_norms=None if norms is None else _sum(n.to(device) for n in norms.values()),
        _sq_norms_per_param=norms,
        _projections=projections,
        _variance={r.name: r.variance(unit**2 / (batch - 1)) for r in measured} if accumulator.squares else None,
        _names=[r.name for r in measured],
        _traces=traces,
        _signals=signals,
        _read_mean=_means(accumulator, measured, unit / batch),
        _read_coverage=_coverage(accumulator.records),
    )


def _means(accumulator: Accumulator, measured: list[ParameterRecord], factor: float) -> Callable[[], dict[str, Tensor]]:
    """Return a function that reads the means, as long as the context has had no further backward."""
    backwards = len(accumulator.batches)

    def read() -> dict[str, Tensor]:
        if len(accumulator.batches) != backwards:
            raise errors.mean_of_earlier_backwards()
        return {r.name: r.mean(factor) for r in measured}

    return read


def _coverage(records: Sequence[ParameterRecord]) -> Callable[[], Coverage]:
    """Return a function that computes the coverage as it is now."""
    kinds = {r.name: r.status if r.used or r.status != "exact" else "unused" for r in records}
    sizes = {r.name: r.param.numel() for r in records}
    squares = {r.name: r.total_sq for r in records}

    def read() -> Coverage:
        return Coverage.of(kinds, sizes, {n: 0.0 if x is None else float(x) for n, x in squares.items()})

    return read


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *rest = list(values)
    for x in rest:
        first = first + x
    return first
