r"""Of all processes of a `DistributedDataParallel` model together.

A process r measures contributions c_b to its own gradient; `.grad` becomes the mean of W of them, so that a sample
contributes c_b/W. With totals :math:`d_r` of :math:`B_r` samples and their centred sums :math:`S_r`

.. math::
    d = \tfrac1W \sum_r d_r, \qquad S = \tfrac1{W^2} \sum_r \bigl(S_r + |d_r - B_r \bar c|^2/B_r\bigr), \qquad
    \bar c = \sum_r d_r / \sum_r B_r
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .ledger import Record
from .sums import real, sq_norm


@dataclass
class Joined:
    """Records with the sums of all processes."""

    records: list[Record]
    batch: int


def join(records: list[Record], batch: int, squares: bool) -> Joined:
    """Every process calls this, with the same parameters."""
    world = dist.get_world_size()
    counts = torch.tensor([batch], device=records[0].param.device)
    dist.all_reduce(counts)
    whole = int(counts)
    return Joined([_joined(r, batch, whole, world, squares) for r in records], whole)


def _joined(r: Record, batch: int, whole: int, world: int, squares: bool) -> Record:
    own = r.read_total()
    kind = real(r.param.dtype)
    own = torch.zeros(r.param.shape, dtype=kind, device=r.param.device) if own is None else own.to(kind)
    total = own.clone().contiguous()
    dist.all_reduce(total)
    centred: Tensor | None = None
    norms: Tensor | None = None
    if squares or r.centred is not None or r.status == "estimated":
        centred = (own - total * (batch / whole)).square_().div_(batch)
        of_own = r.sum_of_squares()
        if of_own is not None:
            centred += of_own.reshape(centred.shape)
        dist.all_reduce(centred)
        centred /= world**2
    else:
        norms = torch.cat(r.sq_norms).sum() / world**2
        dist.all_reduce(norms)
    total /= world
    own_norms = [n / world**2 for n in r.sq_norms]
    return replace(
        r, total=total, in_grad=None, total_sq=sq_norm(total), centred=centred, scaled=None, centred_sum=None,
        sq_norms=own_norms, all_norms=norms,
    )  # fmt: skip
