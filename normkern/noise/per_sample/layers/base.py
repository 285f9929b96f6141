"""The layers: an autograd function for each kind, whose backward hands every parameter's contributions on.

Forward computes what torch computes; backward gives the input's gradient by torch's own kernels and asks the capture
what the parameters' gradients are, for those come out of the same pass as their statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import contributions as parts
from .. import kernels
from .. import sample_layout as rows

if TYPE_CHECKING:
    from ..tracer import Use

without_modes = torch._C.DisableTorchFunction


class Layer(torch.autograd.Function):
    """A layer's function: `use` knows the parameters, `layer` the arithmetic."""

    @staticmethod
    def forward(ctx: Any, use: Use, layer: Arithmetic, x: Tensor, *params: Tensor | None) -> Tensor:
        ctx.use, ctx.layer = use, layer
        with without_modes():
            out, kept = layer.forward(x, *params)
            if out._is_view() or out is x:  # an in-place operation on a view that leaves a function is refused
                out = torch.ops.aten._unsafe_view(out, out.shape)
        ctx.again = Again(layer, x, params) if use.ledger.checking else None
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        return (_layer_backward_once if torch.is_grad_enabled() else _layer_backward)(ctx, g)


def _layer_backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    use, layer = ctx.use, ctx.layer
    needs_x, *needs = ctx.needs_input_grad[2:]
    if g is None:
        return (None,) * (3 + len(needs))
    with without_modes():
        kept = ctx.saved_tensors
        dx = layer.input_grad(g, *kept) if needs_x else None
        use.begin()
        part = layer.contributions(g, *kept)
        grads = [use.measure(i, functools.partial(part, i)) if needed else None for i, needed in enumerate(needs)]
        if ctx.again is not None and not use.ledger.estimating:
            ctx.again.compare(use, g, grads)
            ctx.again = None  # the graph may live longer, and holds x
        return (None, None, dx, *grads)


#: With create_graph=True. The decorator takes time.
_layer_backward_once = once_differentiable(_layer_backward)


class Again:
    """A layer once more, the gradients of its parameters by autograd: what the contributions must add up to.

    A few rows at a time, which every layer treats by themselves: the check takes little memory however large the batch.
    """

    AT_A_TIME = 1 << 18  # numbers of the output

    def __init__(self, layer: Arithmetic, x: Tensor, params: Sequence[Tensor | None]) -> None:
        self.layer, self.x, self.params = layer, x.detach(), params
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)

    def compare(self, use: Use, g: Tensor, grads: Sequence[Tensor | None]) -> None:
        """RuntimeError: they do not."""
        wanted = [i for i, d in enumerate(grads) if d is not None]
        if not wanted:
            return
        enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(g.device.type, dtype, enabled=enabled):
            leaves = {i: p.detach().requires_grad_() for i, p in enumerate(self.params) if p is not None}
            plain: list[Tensor] = []
            rows = max(1, self.AT_A_TIME * len(g) // max(1, g.numel()))
            for x, d in zip(self.x.split(rows), g.split(rows), strict=True):
                out, _ = self.layer.forward(x, *(leaves.get(i) for i in range(len(self.params))))
                some = torch.autograd.grad(out, [leaves[i] for i in wanted], d.to(out.dtype))
                plain = [a.add_(b) for a, b in zip(plain, some, strict=True)] if plain else list(some)
        for i, d in zip(wanted, plain, strict=True):
            use.compare(i, grads[i], d, g, self.x)


class Arithmetic:
    """What a kind of layer computes."""

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The output, and what backward needs."""
        raise NotImplementedError

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        """dL/dx."""
        raise NotImplementedError

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], parts.Part]:
        """What the i-th parameter's gradient is made of, as a function of i; of one backward, and nothing is kept."""
        raise NotImplementedError


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors as autocast casts them for layers that it runs in low precision."""
    kind = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


class Linear(Arithmetic):
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

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], parts.Part]:
        x = kept[0]
        x_ = rows.by_sample(x, self.block, self.batch, x.shape[-1])
        g_ = rows.by_sample(g, self.block // x.shape[-1] * g.shape[-1], self.batch, g.shape[-1])
        assert x_ is not None
        assert g_ is not None
        norms = None
        if g_.shape[1] == 1 and x.dtype == g.dtype:  # of the weight and of the bias
            norms = functools.cache(functools.partial(kernels.of(g_).row_sq_norms, g_[:, 0]))

        def part(i: int) -> parts.Part:
            if i == 1:
                return parts.Matrix(g_[:, 0] if g_.shape[1] == 1 else g_.sum(1), self.shapes[1], norms)
            if self.swapped:
                return parts.Outer(g_, x_, self.shapes[0])
            return parts.Outer(x_, g_, self.shapes[0], norms)

        return part


class Convolution(Arithmetic):
    """Convolutions of one to three dimensions, and transposed ones."""

    def __init__(
        self,
        batch: int,
        inner: int,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        shapes: Sequence[torch.Size],
    ) -> None:
        self.batch, self.inner = batch, inner
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.transposed, self.output_padding, self.groups = transposed, output_padding, groups
        self.shapes = shapes

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight, *rest = params
        x_, w, b = autocast(x, weight, rest[0] if rest else None)
        assert x_ is not None
        assert w is not None
        out = torch.convolution(
            x_, w, b, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )
        return out, (x_, w)

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        x, w = kept
        grad: Tensor = torch.ops.aten.convolution_backward(
            g,
            x,
            w,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [True, False, False],
        )[0]
        return grad

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], parts.Part]:
        return lambda i: self._part(i, g, *kept)

    def _part(self, i: int, g: Tensor, x: Tensor, w: Tensor) -> parts.Part:
        folded = len(x) != self.batch
        if i == 1:
            channels = g.shape[1]
            sums = g.flatten(2).sum(2)  # (N, O)
            if folded:
                sums = sums.reshape(-1, self.batch, self.inner, channels).sum((0, 2))
            return parts.Matrix(sums, self.shapes[1])
        kernel, geometry = list(w.shape[2:]), [self.stride, self.padding, self.dilation]
        if folded:
            if len(kernel) == 3:
                return self._one_by_one(g, x, w)
            x, g = parts.conv_as_samples(x, g, self.batch, self.inner)
            kernel = [1, *kernel]
            geometry = [[n, *of] for n, of in zip((1, 0, 1), geometry, strict=True)]
        stride, padding, dilation = (tuple(v) for v in geometry)
        if self.transposed:
            x, g = g, x
        return parts.Conv(x, g, tuple(kernel), stride, padding, dilation, self.groups, self.shapes[0])

    def _one_by_one(self, g: Tensor, x: Tensor, w: Tensor) -> parts.Part:
        """Volumes folded into the batch: there is no fourth dimension of space."""

        def images(t: Tensor, b: int) -> Tensor:
            return t.reshape(-1, self.batch, self.inner, *t.shape[1:])[:, b].flatten(0, 1)

        def one(b: int) -> Tensor:
            grad: Tensor = torch.ops.aten.convolution_backward(
                images(g, b),
                images(x, b),
                w,
                None,
                self.stride,
                self.padding,
                self.dilation,
                self.transposed,
                self.output_padding,
                self.groups,
                [False, True, False],
            )[1]
            return grad.reshape(self.shapes[0])

        return parts.Loop(self.batch, self.shapes[0], one)


class Embedding(Arithmetic):
    """Rows of a table."""

    def __init__(self, batch: int, block: int, padding_idx: int | None, shape: torch.Size) -> None:
        self.batch, self.block, self.padding_idx, self.shape = batch, block, padding_idx, shape

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return F.embedding(x, params[0], self.padding_idx), (x,)  # type: ignore[arg-type]

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], parts.Part]:
        width = g.shape[-1]
        g_ = rows.by_sample(g, self.block * width, self.batch, width)
        ids = rows.by_sample(kept[0], self.block, self.batch, 1)
        assert g_ is not None
        assert ids is not None
        lookup = parts.Lookup(ids[..., 0], g_, self.padding_idx, self.shape)
        return lambda _: lookup


class Norm(Arithmetic):
    """Normalisations: their weight and bias see x as (x - mean) rstd."""

    channels: str

    def __init__(self, batch: int, block: int, shapes: Sequence[torch.Size]) -> None:
        self.batch, self.block, self.shapes = batch, block, shapes

    def sums(self, g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Of weight and of bias, (B, parameters)."""
        raise NotImplementedError

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], parts.Part]:
        sums = functools.cache(functools.partial(self.sums, g, *kept[:3]))  # of weight and bias in one pass
        return lambda i: parts.Matrix(sums()[i], self.shapes[i])


class LastNorm(Norm):
    """Over the last dimensions: LayerNorm, RMSNorm."""

    def __init__(
        self, batch: int, block: int, shapes: Sequence[torch.Size], over: Sequence[int], eps: float | None, rms: bool
    ) -> None:
        super().__init__(batch, block, shapes)
        self.over, self.eps, self.rms = list(over), eps, rms

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight = params[0]
        if not self.rms:
            bias = params[1] if len(params) > 1 else None
            out, mean, rstd = torch.native_layer_norm(x, self.over, weight, bias, self.eps)  # type: ignore[arg-type]
            return out, (x, mean, rstd, weight)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        rstd = (wide.flatten(x.dim() - len(self.over)).square().mean(-1) + eps).rsqrt()
        return F.rms_norm(x, self.over, weight, self.eps), (x, None, rstd, weight)

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        x, mean, rstd, weight = kept
        if not self.rms:
            grad: Tensor = torch.ops.aten.native_layer_norm_backward(
                g, x, self.over, mean, rstd, weight, None, [True, False, False]
            )[0]
            return grad
        width = math.prod(self.over)
        kind = torch.promote_types(x.dtype, torch.float32)
        d = (g if weight is None else g * weight).to(kind).reshape(-1, width)
        x_, r = x.to(kind).reshape(-1, width), rstd.reshape(-1, 1)
        inner = (d * x_).mean(-1, keepdim=True)
        return (r * (d - x_ * (r * r * inner))).reshape(x.shape).to(x.dtype)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
        width = math.prod(self.over)

        def by_sample(t: Tensor, wide: int) -> Tensor:
            out = rows.by_sample(t, self.block // width * wide, self.batch, wide)
            assert out is not None
            return out

        kind = torch.promote_types(g.dtype, x.dtype)
        real = torch.promote_types(kind, torch.float32)
        stats = [None if t is None else by_sample(t.to(real), 1)[..., 0] for t in (mean, rstd)]
        assert stats[1] is not None
        g_, x_ = by_sample(g.to(kind), width), by_sample(x.to(kind), width)
        return kernels.of(g_, x_).norm_sums(g_, x_, stats[0], stats[1], channels="last")


class ChannelNorm(Norm):
    """Over channels, dimension 1: GroupNorm, InstanceNorm, BatchNorm with running statistics."""

    def __init__(self, batch: int, inner: int, shapes: Sequence[torch.Size], groups: int, eps: float) -> None:
        super().__init__(batch, inner, shapes)
        self.groups, self.eps = groups, eps

    def sums(self, g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
        images, channels = x.shape[:2]
        kind = torch.promote_types(g.dtype, x.dtype)
        real = torch.promote_types(kind, torch.float32)

        def of_channels(t: Tensor) -> Tensor:
            """(images, groups) statistics, or (channels,), for every channel."""
            t = t.to(real)
            if t.dim() == 1:
                return t.expand(images, channels)
            return t.repeat_interleave(channels // t.shape[1], 1)

        g_, x_ = (t.to(kind).reshape(images, channels, -1) for t in (g, x))
        of = kernels.of(g_, x_).norm_sums(
            g_, x_, None if mean is None else of_channels(mean), of_channels(rstd), channels="first"
        )
        if images == self.batch:
            return of
        weight, bias = (t.reshape(-1, self.batch, self.block, channels).sum((0, 2)) for t in of)
        return weight, bias


class GroupNorm(ChannelNorm):
    """The statistics of each image's groups of channels; of its own channels: InstanceNorm."""

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight, bias = (*params, None)[:2]
        x = x.contiguous()
        n, c = x.shape[:2]
        out, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, x[0, 0].numel(), self.groups, self.eps)
        return out, (x, mean.view(n, -1), rstd.view(n, -1), weight)

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        x, mean, rstd, weight = kept
        n, c = x.shape[:2]
        grad: Tensor = torch.ops.aten.native_group_norm_backward(
            g.contiguous(), x, mean, rstd, weight, n, c, x[0, 0].numel(), self.groups, [True, False, False]
        )[0]
        return grad


class FixedNorm(ChannelNorm):
    """Statistics that are given: BatchNorm in eval."""

    def __init__(
        self, batch: int, inner: int, shapes: Sequence[torch.Size], eps: float, mean: Tensor, var: Tensor
    ) -> None:
        super().__init__(batch, inner, shapes, 1, eps)
        self.mean, self.var = mean, var

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight, bias = (*params, None)[:2]
        out = F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, self.eps)
        real = torch.promote_types(self.var.dtype, torch.float32)
        return out, (x, self.mean.to(real), (self.var.to(real) + self.eps).rsqrt(), weight)

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        x, _, rstd, weight = kept
        scale = rstd if weight is None else rstd * weight
        return (g * scale.view(-1, *(1,) * (x.dim() - 2))).to(x.dtype)


class Spread(torch.autograd.Function):
    """A parameter, once for every sample, laid along the samples' dimension of what it meets.

    What it meets is any operation with broadcasting: its gradient arrives with a contribution for each sample.
    """

    @staticmethod
    def forward(ctx: Any, use: Use, q: Tensor, batch: int, rank: int, dim: int, outer: int, inner: int) -> Tensor:
        ctx.use, ctx.batch, ctx.dim, ctx.folds, ctx.shape = use, batch, dim, (outer, inner), q.shape
        with without_modes():
            shape = [1] * (rank - q.dim()) + list(q.shape)
            out = q.reshape(shape).unsqueeze(dim).unsqueeze(dim)  # outer, batch, inner at dim
            out = out.expand(*shape[:dim], outer, batch, inner, *shape[dim + 1 :])
            return out.reshape(*shape[:dim], outer * batch * inner, *shape[dim + 1 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        with without_modes():
            outer, inner = ctx.folds
            g = g.unflatten(ctx.dim, (outer, ctx.batch, inner)).sum((ctx.dim, ctx.dim + 2))
            matrix = g.movedim(ctx.dim, 0).reshape(ctx.batch, -1)
            ctx.use.begin()
            grad = ctx.use.measure(0, lambda: parts.Matrix(matrix, ctx.shape))
            return (None, grad, *(None,) * 5)


class Own(torch.autograd.Function):
    """A tensor whose entries along one dimension already are the samples' own."""

    @staticmethod
    def forward(ctx: Any, use: Use, q: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        ctx.use, ctx.at = use, (dim, outer, inner)
        return q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        dim, outer, inner = ctx.at
        use: Use = ctx.use

        def one(b: int) -> Tensor:
            out = torch.zeros_like(g)
            index = (slice(None),) * (dim + 1) + (b,)
            folds = (outer, use.batch, inner)
            out.unflatten(dim, folds)[index] = g.unflatten(dim, folds)[index]
            return out

        with without_modes():
            use.begin()
            return (None, use.measure(0, lambda: parts.Loop(use.batch, g.shape, one)), None, None, None)


class PerSample(torch.autograd.Function):
    """Any operation that treats samples alone: done for the batch, and in backward once more for each."""

    @staticmethod
    def forward(ctx: Any, use: Use, run: Callable[..., Tensor], cut: Callable[[Tensor, int, int], Tensor],
                *tensors: Tensor) -> Tensor:  # fmt: skip
        """`run` of (data…, parameters…), of which the first are cut by `cut(tensor, position, b)`; position -1: out."""
        ctx.use, ctx.run, ctx.cut = use, run, cut
        ctx.save_for_backward(*tensors)
        with without_modes():
            out = run(*tensors)
            return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        needs = ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors
        with without_modes():
            count = len(use.targets)
            data, params = tensors[: len(tensors) - count], tensors[len(tensors) - count :]
            dx: list[Tensor | None] = [None] * len(data)
            wanted = [i for i in range(len(data)) if needs[i]]
            if wanted:
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(data)]
                    out = ctx.run(*leaves, *(p.detach() for p in params))
                for i, d in zip(wanted, torch.autograd.grad(out, [leaves[i] for i in wanted], g), strict=True):
                    dx[i] = d

            def one(i: int, b: int) -> Tensor:
                with torch.enable_grad():
                    leaf = params[i].detach().requires_grad_()
                    cut = [ctx.cut(t.detach(), k, b) for k, t in enumerate(data)]
                    out = ctx.run(*cut, *(leaf if k == i else p.detach() for k, p in enumerate(params)))
                return torch.autograd.grad(out, leaf, ctx.cut(g, -1, b))[0]

            def part(i: int) -> parts.Part:
                return parts.Loop(use.batch, params[i].shape, functools.partial(one, i))

            use.begin()
            grads = [use.measure(i, functools.partial(part, i)) if needs[len(data) + i] else None for i in range(count)]
            return (None, None, None, *dx, *grads)
