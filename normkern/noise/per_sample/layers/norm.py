"""Normalisations: layer_norm, rms_norm, group_norm, instance_norm, and batch_norm with running statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors, kernels, sample_layout
from ..contributions import Contribution, Matrix
from ..operation import Operation
from ..tensor_state import TensorState
from .base import LayerKind, apply, mixed, shape_of, without_modes
from .registry import handles, refuses


class Norm(LayerKind):
    """Normalisations: the contributions to weight and bias are sums of g (x - mean) rstd and of g."""

    def __init__(self, batch: int, block: int, shapes: Sequence[torch.Size]) -> None:
        self.batch, self.block, self.shapes = batch, block, shapes

    def sums(self, g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contributions to the weight and to the bias, (B, parameters)."""
        raise NotImplementedError

    def contributions(self, g: Tensor, *kept: Any) -> Callable[[int], Contribution]:
        sums = functools.cache(functools.partial(self.sums, g, *kept[:3]))  # of weight and bias in one pass
        return lambda i: Matrix(sums()[i], self.shapes[i])


class LastNorm(Norm):
    """Normalisation over the last dimensions: LayerNorm, RMSNorm."""

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
            out = sample_layout.by_sample(t, self.block // width * wide, self.batch, wide)
            assert out is not None
            return out

        kind = torch.promote_types(g.dtype, x.dtype)
        real = torch.promote_types(kind, torch.float32)
        stats = [None if t is None else by_sample(t.to(real), 1)[..., 0] for t in (mean, rstd)]
        assert stats[1] is not None
        g_, x_ = by_sample(g.to(kind), width), by_sample(x.to(kind), width)
        return kernels.of(g_, x_).norm_sums(g_, x_, stats[0], stats[1], channels="last")


class ChannelNorm(Norm):
    """Normalisation of channels, dimension 1; `block` consecutive images are of one sample."""

    def sums(self, g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
        images, channels = x.shape[:2]
        kind = torch.promote_types(g.dtype, x.dtype)
        real = torch.promote_types(kind, torch.float32)

        def of_channels(t: Tensor) -> Tensor:
            """Return statistics of every channel from (images, groups) or (channels,)."""
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
    """The statistics are those of each image's groups of channels; with groups of one channel: InstanceNorm."""

    def __init__(self, batch: int, inner: int, shapes: Sequence[torch.Size], groups: int, eps: float) -> None:
        super().__init__(batch, inner, shapes)
        self.groups, self.eps = groups, eps

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
    """The statistics are given: BatchNorm in eval."""

    def __init__(
        self, batch: int, inner: int, shapes: Sequence[torch.Size], eps: float, mean: Tensor, var: Tensor
    ) -> None:
        super().__init__(batch, inner, shapes)
        self.eps, self.mean, self.var = eps, mean, var

    def forward(self, x: Tensor, *params: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weight, bias = (*params, None)[:2]
        out = F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, self.eps)
        real = torch.promote_types(self.var.dtype, torch.float32)
        return out, (x, self.mean.to(real), (self.var.to(real) + self.eps).rsqrt(), weight)

    def input_grad(self, g: Tensor, *kept: Any) -> Tensor:
        x, _, rstd, weight = kept
        scale = rstd if weight is None else rstd * weight
        return (g * scale.view(-1, *(1,) * (x.dim() - 2))).to(x.dtype)


@handles("layer_norm", "rms_norm", needs_batch=True)
def last_norm(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.functional.layer_norm and rms_norm."""
    rms = op.name == "rms_norm"
    if rms:
        x, over, weight, eps = op.bind("input normalized_shape weight eps")
        bias = None
    else:
        x, over, weight, bias, eps = op.bind("input normalized_shape weight bias eps", eps=1e-5)
    layout = tensors.layout(x)
    over = [over] if isinstance(over, int) else list(over)
    if layout is None or len(op.samples) > 1:
        return NotImplemented
    if layout.block % math.prod(over):
        raise mixed(tensors, op.name, op.parameters[0], "it goes over them")
    use = tensors.use(op.name, [weight, bias])
    kind = LastNorm(use.batch, layout.block, [shape_of(weight), shape_of(bias)], over, eps, rms)
    out = apply(use, kind, x, weight, bias)
    tensors.mark(out, layout)
    return out


@refuses("batch_norm")
def batch_statistics(tensors: TensorState, op: Operation) -> None:
    """Refuse batch_norm with the batch's own mean and variance, in either order of its arguments."""
    if op.argument(5, "training", False):
        raise errors.batch_statistics(tensors.accumulator.batch_norms())


@handles("group_norm", "instance_norm", "batch_norm", needs_batch=True)
def channel_norm(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.functional.group_norm, instance_norm and batch_norm, and those of torch."""
    own = True  # whether the statistics are those of the images
    mean = var = None
    momentum = 0.1
    groups = 1
    if op.name == "group_norm":
        x, groups, weight, bias, eps = op.bind("input num_groups weight bias eps", eps=1e-5)
    else:
        is_functional = getattr(op.func, "__module__", None) == F.__name__
        order = "running_mean running_var weight bias" if is_functional else "weight bias running_mean running_var"
        flag = "use_input_stats" if op.name == "instance_norm" else "training"
        names = f"input {order} {flag} momentum eps"
        values = op.bind(names, eps=1e-5, momentum=0.1, **{flag: op.name == "instance_norm"})
        of = dict(zip(names.split(), values, strict=False))
        x, weight, bias, mean, var = (of[k] for k in ("input", "weight", "bias", "running_mean", "running_var"))
        own, momentum, eps = of[flag], of["momentum"], of["eps"]
    if op.name == "batch_norm" and own:
        raise errors.batch_statistics(tensors.accumulator.batch_norms())
    layout = tensors.layout(x)
    if layout is None or len(op.samples) > 1:
        return NotImplemented
    found = sample_layout.axis(x.shape, layout.block, tensors.rules.batch)
    if found is None or found[0] != 0:
        raise mixed(tensors, op.name, op.parameters[0], "they are not in its first dimension")
    if op.name == "instance_norm" and own:
        groups = x.shape[1]
        if mean is not None:  # the layer learns its running statistics here
            with torch.no_grad(), without_modes():
                F.instance_norm(x.detach(), mean, var, None, None, True, momentum, eps)
    use = tensors.use(op.name, [weight, bias])
    shapes = [shape_of(weight), shape_of(bias)]
    kind: ChannelNorm
    if own:
        kind = GroupNorm(use.batch, found[1], shapes, groups, eps)
    else:
        assert mean is not None
        assert var is not None
        kind = FixedNorm(use.batch, found[1], shapes, eps, mean, var)
    out = apply(use, kind, x, weight, bias)
    tensors.mark(out, layout)
    return out
