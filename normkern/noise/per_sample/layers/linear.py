"""Linear layers: linear, matmul, mm, @ and addmm with a parameter on either side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..contributions import Contribution, Matrix
from ..operation import Operation, Samples
from ..sample_layout import SampleLayout, by_sample
from ..sums import Sums, real
from ..tensor_state import TensorState
from .base import LayerKind, apply, autocast, mixed, shape_of
from .loop import loop_over_samples
from .registry import handles


@dataclass
class LinearContribution(Contribution):
    r""":math:`c_b = \sum_t g_{bt} a_{bt}^\top`; a (B, T, I), g (B, T, O)."""

    a: Tensor
    g: Tensor
    shape: torch.Size  #: (O, I), or one of as many entries
    g_norms: Callable[[], Tensor] | None = None  #: of T = 1: the squared norms of g, where the bias needs them too

    def __post_init__(self) -> None:
        self.batch = self.a.shape[0]

    def sums(self, squares: bool) -> Sums:
        return Sums(*kernels.outer(self.a, self.g, squares, self.g_norms)).reshape(self.shape)

    def total(self) -> Tensor:
        kind = real(self.a.dtype)
        a, g = self.a.to(kind).reshape(-1, self.a.shape[2]), self.g.to(kind).reshape(-1, self.g.shape[2])
        return (g.t() @ a).reshape(self.shape)

    def sample(self, b: int) -> Tensor:
        kind = real(self.a.dtype)
        return (self.g[b].to(kind).t() @ self.a[b].to(kind)).reshape(self.shape)

    def project(self, on: Tensor) -> Tensor:
        kind = real(self.a.dtype)
        on = on.to(kind).reshape(self.g.shape[2], self.a.shape[2])
        return ((self.a.to(kind) @ on.t()).double() * self.g.double()).sum((1, 2))

    def merge(self, others: Sequence[Contribution]) -> LinearContribution | None:
        """Concatenate the time steps of all."""
        every = [self]
        for c in others:
            if type(c) is not LinearContribution or not self._is_like(c):
                return None
            every.append(c)
        return LinearContribution(torch.cat([c.a for c in every], 1), torch.cat([c.g for c in every], 1), self.shape)

    def _is_like(self, other: LinearContribution) -> bool:
        return (
            other.shape == self.shape
            and other.a.shape[2] == self.a.shape[2]
            and other.g.shape[2] == self.g.shape[2]
            and self.a.dtype == self.g.dtype == other.a.dtype == other.g.dtype
        )


class Linear(LayerKind):
    """y = x W^T + b; with `swapped`, the parameter is W^T."""

    def __init__(self, batch: int, block: int, swapped: bool, shapes: Sequence[torch.Size]) -> None:
        self.batch, self.block, self.swapped, self.shapes = batch, block, swapped, shapes

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight, *rest = params
        assert weight is not None
        x_, w, b = autocast(x, weight, rest[0] if rest else None)
        assert x_ is not None
        assert w is not None
        if w.dim() == 1:
            w = w[None]
        elif self.swapped:
            w = w.t()
        return F.linear(x_, w, b), (x_, w)

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        return g.matmul(kept[1])

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], Contribution]:
        x = kept[0]
        x_ = by_sample(x, self.block, self.batch, x.shape[-1])
        g_ = by_sample(g, self.block // x.shape[-1] * g.shape[-1], self.batch, g.shape[-1])
        assert x_ is not None
        assert g_ is not None
        norms = None
        if g_.shape[1] == 1 and x.dtype == g.dtype:  # of the weight and of the bias
            norms = functools.cache(functools.partial(kernels.of(g_).row_sq_norms, g_[:, 0]))

        def contribution(i: int) -> Contribution:
            if i == 1:
                return Matrix(g_[:, 0] if g_.shape[1] == 1 else g_.sum(1), self.shapes[1], norms)
            if self.swapped:
                return LinearContribution(g_, x_, self.shapes[0])
            return LinearContribution(x_, g_, self.shapes[0], norms)

        return contribution


def _linear(
    tensors: TensorState, x: Tensor, weight: Tensor, bias: Tensor | None, swapped: bool, samples: Samples
) -> Any:
    if x.is_complex() or weight.is_complex():
        return NotImplemented
    layout = tensors.layout(x)
    width = x.shape[-1] if x.dim() else 0
    if layout is None or not width or len(samples) > 1:
        return NotImplemented
    if layout.block % width or x.numel() % (layout.block * tensors.rules.batch):
        owner = weight if tensors.target(weight) is not None else bias
        raise mixed(tensors, "linear", owner, "its features are samples")
    d = tensors.derived(weight)
    if d is not None and d.transposed is not None:
        weight, swapped = tensors.accumulator.record(d.transposed).param, not swapped
    use = tensors.use("linear", [weight, bias])
    kind = Linear(use.batch, layout.block, swapped, [weight.shape, shape_of(bias)])
    out = apply(use, kind, x, weight, bias)
    tensors.mark(out, SampleLayout(layout.block // width * out.shape[-1], layout.certain))
    return out


@handles("linear", needs_batch=True, takes_complex=True)
def linear(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.functional.linear."""
    x, weight, bias = op.bind("input weight bias")
    if any(weight is t for t, _ in op.samples):
        return NotImplemented
    if any(t.is_complex() for t in op.tensors()):
        return loop_over_samples(tensors, op)
    return _linear(tensors, x, weight, bias, False, op.samples)


@handles("matmul", "__matmul__", "__rmatmul__", "mm", takes_complex=True)
def matmul(tensors: TensorState, op: Operation) -> Any:
    """matmul, mm and @, with the parameter on either side."""
    a, b = op.args[:2] if len(op.args) > 1 else (op.argument(0, "input", op.kwargs.get("self")), _other(op.kwargs))
    if op.name == "__rmatmul__":
        a, b = b, a
    if len(op.parameters) == 1 and b is op.parameters[0] and b.dim() <= 2 and a.dim() > 1:
        out = _linear(tensors, a, b, None, True, op.samples)
        if out is not NotImplemented:
            return tensors.run(torch.squeeze, out, -1) if b.dim() == 1 else out
    elif len(op.parameters) == 1 and a is op.parameters[0] and a.dim() == 2 and b.dim() > 1:
        turned = tensors.run(torch.transpose, b, -1, -2)
        layout = tensors.layout(turned)
        out = _linear(tensors, turned, a, None, False, [] if layout is None else [(turned, layout)])
        if out is not NotImplemented:
            return tensors.run(torch.transpose, out, -1, -2)
    return loop_over_samples(tensors, op)


def _other(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("other", kwargs.get("mat2", kwargs.get("tensor2")))


@handles("addmm", needs_batch=True, takes_complex=True)
def addmm(tensors: TensorState, op: Operation) -> Any:
    """bias + x @ W."""
    bias, x, weight, beta, alpha = op.bind("input mat1 mat2 beta alpha", beta=1, alpha=1)
    if beta == alpha == 1 and isinstance(bias, Tensor) and bias.dim() == 1 and any(weight is p for p in op.parameters):
        out = _linear(tensors, x, weight, bias, True, op.samples)
        if out is not NotImplemented:
            return out
    return loop_over_samples(tensors, op)
