"""Convolutions of one to three dimensions, plain and transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..contributions import Contribution, Loop, Matrix
from ..operation import Operation
from ..sample_layout import SampleLayout, axis, block_on
from ..sums import Sums
from ..tensor_state import TensorState
from .base import LayerKind, apply, autocast, mixed, shape_of
from .registry import handles


@dataclass
class ConvContribution(Contribution):
    """Contributions to a kernel: x (B, C, ...), g (B, O, ...); a transposed convolution has x and g swapped."""

    x: Tensor
    g: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  #: at the lower end of each dimension
    dilation: tuple[int, ...]
    groups: int
    shape: torch.Size

    def __post_init__(self) -> None:
        self.batch = len(self.x)

    def _of(self, x: Tensor, g: Tensor, squares: bool) -> Sums:
        x, g = kernels.one_dtype(x, g)
        sums = kernels.of(x, g).conv_moments(
            x, g, self.kernel_size, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, squares=squares,
        )  # fmt: skip
        return Sums(*sums).reshape(self.shape)

    def sums(self, squares: bool) -> Sums:
        return self._of(self.x, self.g, squares)

    def sample(self, b: int) -> Tensor:
        return self._of(self.x[b : b + 1], self.g[b : b + 1], False).total


@dataclass
class Convolution(LayerKind):
    """A convolution, with the arguments of torch.convolution; `inner` consecutive images are of one sample."""

    batch: int
    inner: int
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int
    shapes: Sequence[torch.Size]

    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight, *rest = params
        x_, w, b = autocast(x, weight, rest[0] if rest else None)
        assert x_ is not None
        assert w is not None
        return torch.convolution(x_, w, b, *self._geometry()), (x_, w)

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, i: int) -> Tensor:
        """Return the gradient of x (i = 0) or of w (i = 1)."""
        needed = [i == 0, i == 1, False]
        grad: Tensor = torch.ops.aten.convolution_backward(g, x, w, None, *self._geometry(), needed)[i]
        return grad

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        x, w = kept
        return self._backward(g, x, w, 0)

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], Contribution]:
        return lambda i: self._contribution(i, g, *kept)

    def _contribution(self, i: int, g: Tensor, x: Tensor, w: Tensor) -> Contribution:
        folded = len(x) != self.batch
        if i == 1:
            channels = g.shape[1]
            sums = g.flatten(2).sum(2)  # (N, O)
            if folded:
                sums = sums.reshape(-1, self.batch, self.inner, channels).sum((0, 2))
            return Matrix(sums, self.shapes[1])
        kernel, geometry = list(w.shape[2:]), [self.stride, self.padding, self.dilation]
        if folded:
            if len(kernel) == 3:
                return self._one_by_one(g, x, w)
            x, g = _as_samples(x, g, self.batch, self.inner)
            kernel = [1, *kernel]
            geometry = [[n, *of] for n, of in zip((1, 0, 1), geometry, strict=True)]
        stride, padding, dilation = (tuple(v) for v in geometry)
        if self.transposed:
            x, g = g, x
        return ConvContribution(x, g, tuple(kernel), stride, padding, dilation, self.groups, self.shapes[0])

    def _one_by_one(self, g: Tensor, x: Tensor, w: Tensor) -> Contribution:
        """Return the contributions of volumes folded into the batch, for which the kernels lack a dimension."""

        def images(t: Tensor, b: int) -> Tensor:
            return t.reshape(-1, self.batch, self.inner, *t.shape[1:])[:, b].flatten(0, 1)

        def one(b: int) -> Tensor:
            return self._backward(images(g, b), images(x, b), w, 1).reshape(self.shapes[0])

        return Loop(self.batch, self.shapes[0], one)


def _as_samples(x: Tensor, g: Tensor, batch: int, inner: int) -> tuple[Tensor, Tensor]:
    """Return images folded into the batch with one more dimension of space: (N, C, ...) to (B, C, N/B, ...)."""

    def unfold(t: Tensor) -> Tensor:
        outer = len(t) // (batch * inner)
        t = t.reshape(outer, batch, inner, *t.shape[1:]).transpose(0, 1)  # B, outer, inner, C, ...
        return t.reshape(batch, outer * inner, *t.shape[3:]).transpose(1, 2)

    return unfold(x), unfold(g)


@handles(*(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), needs_batch=True)
def convolution(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.functional.conv1d … conv_transpose3d."""
    transposed = "transpose" in op.name
    if transposed:
        x, weight, bias, stride, padding, extra, groups, dilation = op.bind(
            "input weight bias stride padding output_padding groups dilation",
            stride=1, padding=0, output_padding=0, groups=1, dilation=1,
        )  # fmt: skip
    else:
        x, weight, bias, stride, padding, dilation, groups = op.bind(
            "input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1, groups=1
        )
        extra = 0
    n = weight.dim() - 2
    if tensors.layout(x) is None or len(op.samples) > 1:
        return NotImplemented
    if x.dim() != n + 2:
        raise mixed(tensors, op.name, op.parameters[0], "they are its channels")
    stride, dilation, extra = _several(stride, n), _several(dilation, n), _several(extra, n)
    if isinstance(padding, str):
        padding, x = _same(tensors, padding, x, list(weight.shape[2:]), dilation)
    padding = _several(padding, n)
    layout = tensors.layout(x)
    assert layout is not None
    found = axis(x.shape, layout.block, tensors.rules.batch)
    if found is None or found[0] != 0:
        raise mixed(tensors, op.name, op.parameters[0], "they are not in its first dimension")
    use = tensors.use(op.name, [weight, bias])
    kind = Convolution(
        use.batch, found[1], stride, padding, dilation, transposed, extra, groups, [weight.shape, shape_of(bias)]
    )
    out = apply(use, kind, x, weight, bias)
    tensors.mark(out, SampleLayout(block_on(out.shape, 0, found[1]), layout.certain))
    return out


def _several(x: Any, n: int) -> list[int]:
    return [int(x)] * n if isinstance(x, int) else [int(v) for v in x] * (n if len(x) == 1 else 1)


def _same(
    tensors: TensorState, padding: str, x: Tensor, kernel: list[int], dilation: list[int]
) -> tuple[list[int], Tensor]:
    """Return "same" or "valid" as numbers, and x with one more zero at the upper end where torch pads unevenly."""
    if padding == "valid":
        return [0] * len(kernel), x
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = tensors.run(F.pad, x, [v for t in reversed(total) for v in (0, t % 2)])
    return [t // 2 for t in total], x
