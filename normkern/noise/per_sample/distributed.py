r"""Combines the sums of all processes that share a model, as if one process had the joint batch.

Process r has :math:`B_r` samples with gradients :math:`g_b`, their total :math:`D_r` and centred sum :math:`S_r`.

.. math::
    \bar g = \frac1B \sum_r D_r, \qquad S = \sum_r \bigl(S_r + |D_r - B_r \bar g|^2/B_r\bigr), \qquad B = \sum_r B_r

Every sample counts the same, also where processes have different numbers of them; then ``.grad``, the mean of the
processes' means, is not :math:`\bar g`.

Reference: Chan, Golub and LeVeque 1983, Am. Stat. 37(3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .record import ParameterRecord
from .sums import parts, real, sq_norm, wide

#: In place of a batch size.
NOT_FINITE = -1


@dataclass
class Joined:
    """The records with the sums of all processes, and the joint batch size."""

    records: list[ParameterRecord]
    batch: int


def agree(records: Sequence[ParameterRecord], batch: int, group: Any) -> list[int]:
    """Return every process's batch size; exclude the parameters that any process excluded. Every process calls this.

    Args:
        batch: this process's; 0: it measured nothing; NOT_FINITE: its loss is NaN or infinite.

    Raises:
        RuntimeError: a process has measured nothing.
        FloatingPointError: the loss of a process is not finite.
    """
    own = torch.tensor([batch] + [r.status == "excluded" for r in records], device=records[0].param.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    table = torch.stack(every).tolist()
    batches = [row[0] for row in table]
    if NOT_FINITE in batches:
        raise errors.rank_loss_not_finite(batches.index(NOT_FINITE))
    if 0 in batches:
        raise errors.rank_measured_nothing(batches.index(0))
    for i, r in enumerate(records):
        if any(row[i + 1] for row in table):
            r.status = "excluded"
    return batches


def join(
    records: list[ParameterRecord], batch: int, unit: float, batches: list[int], squares: bool, group: Any
) -> Joined:
    """Return records with the sums of all processes, by two collectives: of the totals, then about the joint mean.

    Every process calls this, with the same parameters. Contributions times `unit` are per-sample gradients; the sums of
    the returned records are of per-sample gradients.
    """
    whole = sum(batches)
    kind = torch.float64 if any(real(r.param.dtype) == torch.float64 for r in records) else torch.float32
    own = [parts(_total(r)).to(kind) * unit for r in records]
    totals = _added(own, group)
    spreads = [(d - t * (batch / whole)).div_(batch**0.5) for d, t in zip(own, totals, strict=True)]
    del own
    if squares:
        squared = [x.square_() for x in spreads]
        about_mean = [x.sum(-1) if r.param.is_complex() else x for x, r in zip(squared, records, strict=True)]
        for x, r in zip(about_mean, records, strict=True):
            of_own = r.sum_of_squares()
            if of_own is not None:
                x.add_(of_own.reshape(x.shape), alpha=unit**2)
        centred: list[Tensor | None] = list(_added(about_mean, group))
        norms: list[Tensor | None] = [None] * len(records)
    else:
        # One number for each parameter, from which |sum|^2 / B is subtracted, as in one process.
        between = [sq_norm(x) for x in spreads]
        within = [r.moment() - (r.square() / batch if r.about_zero else 0) for r in records]
        of_own_mean = [b + w * unit**2 for b, w in zip(between, within, strict=True)]
        about = _added([x.view(1) for x in of_own_mean], group)
        norms = [a.view(()) + sq_norm(t) / whole for a, t in zip(about, totals, strict=True)]
        centred = [None] * len(records)
    return Joined(
        [
            replace(
                r, status="exact", total=_whole(t, r.param.dtype), in_grad=None, total_sq=sq_norm(t), centred=c,
                scaled=None, centred_sum=None, sq_norms=[n * unit**2 for n in r.sq_norms], all_norms=n,
            )
            for r, t, c, n in zip(records, totals, centred, norms, strict=True)
        ],
        whole,
    )  # fmt: skip


def _total(r: ParameterRecord) -> Tensor:
    total = r.read_total()
    return torch.zeros(r.param.shape, dtype=r.param.dtype, device=r.param.device) if total is None else total


def _whole(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a joint sum as a parameter of this dtype has it: complex, where that is."""
    return torch.view_as_complex(total).to(wide(dtype)) if dtype.is_complex else total.to(real(dtype))


def _added(own: list[Tensor], group: Any) -> list[Tensor]:
    """Return the sums over all processes, by one collective."""
    flat = torch.cat([x.reshape(-1).to(own[0].device) for x in own])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [x.numel() for x in own])
    return [part.view(x.shape).to(x.device) for part, x in zip(parts, own, strict=True)]
