"""Embeddings: rows of a table, by embedding or by table[ids]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..contributions import Contribution
from ..operation import Operation
from ..sample_layout import SampleLayout, by_sample
from ..sums import Sums, real
from ..tensor_state import TensorState
from .base import LayerKind, apply, mixed
from .loop import loop_over_samples
from .registry import handles


@dataclass
class EmbeddingContribution(Contribution):
    """Contributions to a table: ids (B, T), g (B, T, D)."""

    ids: Tensor
    g: Tensor
    padding_idx: int | None
    shape: torch.Size  #: (V, D)

    def __post_init__(self) -> None:
        self.batch = len(self.ids)

    def sums(self, squares: bool) -> Sums:
        sums = kernels.of(self.g).embedding_moments(
            self.ids, self.g, self.shape[0], padding_idx=self.padding_idx, squares=squares
        )
        return Sums(*sums)

    def _kept(self) -> Tensor:
        g = self.g.to(real(self.g.dtype))
        if self.padding_idx is None:
            return g
        return g.masked_fill((self.ids == self.padding_idx % self.shape[0])[..., None], 0)

    def sample(self, b: int) -> Tensor:
        g = self._kept()[b]
        return g.new_zeros(self.shape).index_add_(0, self.ids[b], g)

    def project(self, on: Tensor) -> Tensor:
        return (on[self.ids].double() * self._kept().double()).sum((1, 2))


class Embedding(LayerKind):
    """Rows of a table. Ids have no gradient."""

    def __init__(self, batch: int, block: int, padding_idx: int | None, shape: torch.Size) -> None:
        self.batch, self.block, self.padding_idx, self.shape = batch, block, padding_idx, shape

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return F.embedding(x, params[0], self.padding_idx), (x,)  # type: ignore[arg-type]

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], Contribution]:
        width = g.shape[-1]
        g_ = by_sample(g, self.block * width, self.batch, width)
        ids = by_sample(kept[0], self.block, self.batch, 1)
        assert g_ is not None
        assert ids is not None
        contribution = EmbeddingContribution(ids[..., 0], g_, self.padding_idx, self.shape)
        return lambda _: contribution


@handles("embedding", needs_batch=True)
def embedding(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.functional.embedding; torch.embedding has its arguments in another order."""
    if op.func is torch.embedding:
        weight, ids, padding_idx, scaled, sparse = op.bind(
            "weight indices padding_idx scale_grad_by_freq sparse", padding_idx=-1
        )
        padding_idx, max_norm, norm_type = None if padding_idx < 0 else padding_idx, None, 2.0
    else:
        ids, weight, padding_idx, max_norm, norm_type, scaled, sparse = op.bind(
            "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", norm_type=2.0
        )
    layout = tensors.layout(ids)
    if scaled and layout is not None:
        raise mixed(tensors, op.name, op.parameters[0], "scale_grad_by_freq counts ids of all samples")
    is_parameter = any(weight is p for p in op.parameters)
    if sparse:
        op.why = "sparse=True makes sparse gradients, which are not measured: use sparse=False"
    if layout is None or sparse or not is_parameter:
        return NotImplemented
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), ids.contiguous(), max_norm, norm_type)
    if padding_idx is not None:
        padding_idx %= weight.shape[0]
    use = tensors.use(op.name, [weight])
    out = apply(use, Embedding(use.batch, layout.block, padding_idx, weight.shape), ids, weight)
    tensors.mark(out, SampleLayout(layout.block * weight.shape[1], layout.certain))
    return out


@handles("__getitem__")
def index(tensors: TensorState, op: Operation) -> Any:
    """table[ids], where a row may have several dimensions: the matrix of an expert."""
    table, at = op.args
    if table is op.parameters[0] and isinstance(at, Tensor) and at.dtype in (torch.int64, torch.int32):
        return tensors.run(_rows_of, table, at)
    return loop_over_samples(tensors, op)


def _rows_of(table: Tensor, at: Tensor) -> Tensor:
    at = torch.where(at < 0, at + len(table), at)
    return (
        F.embedding(at, table) if table.dim() == 2 else F.embedding(at, table.flatten(1)).unflatten(-1, table.shape[1:])
    )
