"""Where parameters meet samples: for each operation, the layer that it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import sample_layout as rows
from ..propagation import tensors_in
from ..sample_layout import Lost, Rows
from ..words import words
from . import base as layers
from . import recurrent as cells

if TYPE_CHECKING:
    from ..tracer import Capture

Samples = list[tuple[Tensor, Rows]]
Join = Callable[..., Any]

#: Repeat a tensor, perhaps once for every sample.
WIDENS = words("expand expand_as broadcast_to repeat tile")
#: Draw numbers: what is drawn cannot be drawn again.
OPAQUE = words("dropout alpha_dropout feature_alpha_dropout bernoulli multinomial gumbel_softmax rrelu")
#: Element by element, with broadcasting.
BROADCASTS = words(
    """add sub subtract mul multiply div divide true_divide floor_divide __add__ __radd__ __sub__ __rsub__ __mul__
    __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ rsub where lerp addcmul addcdiv pow float_power maximum
    minimum fmax fmin max min atan2 hypot logaddexp logaddexp2 xlogy copysign expand_as clamp clip clamp_min
    clamp_max masked_fill fmod remainder"""
)
#: Each sample by itself, whatever else they do.
ALONE = words(
    """einsum bilinear matmul __matmul__ __rmatmul__ mm bmm baddbmm addbmm addmm mv tensordot inner __getitem__
    index_select gather take take_along_dim cdist pairwise_distance cosine_similarity scaled_dot_product_attention
    embedding_bag"""
)


def find(name: str) -> Join | None:
    """What joins there; None: nothing known."""
    found = _JOINS.get(name)
    if found is None and name in BROADCASTS:
        return broadcast
    return alone if found is None and name in ALONE else found


def bound(names: str, args: Sequence[Any], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Arguments in the order of their names."""
    order = names.split()
    if len(args) == len(order):
        return list(args)
    of = {**defaults, **dict(zip(order, args, strict=False)), **kwargs}
    return [of.get(name) for name in order]


def _rows(capture: Capture, t: Any) -> Rows | None:
    state = capture.state(t) if isinstance(t, Tensor) else None
    return state if isinstance(state, Rows) else None


def _dense(capture: Capture, *params: Tensor | None) -> bool:
    """Whether contributions of large tensors can go back one by one."""
    for p in params:
        d = None if p is None else capture.derived(p)
        if d is not None and not (d.selects or d.elementwise):
            return False
    return True


def _target(capture: Capture, t: Any) -> Tensor | None:
    """A parameter, or what was made of some; None: neither."""
    if isinstance(t, Tensor) and (capture.ledger.knows(t) or capture.derived(t) is not None):
        return t
    return None


def _shape(t: Tensor | None) -> torch.Size:
    return torch.Size() if t is None else t.shape


def _refuse(capture: Capture, name: str, target: Tensor | None, why: str) -> None:
    assert target is not None
    root, _ = capture.roots(target)[0]
    capture.ledger.refuse_lost(capture.ledger.record(root), name, why)


# ---- Linear ---------------------------------------------------------------------------------------------------------


def _linear(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, swapped: bool, samples: Samples) -> Any:
    r = _rows(capture, x)
    width = x.shape[-1] if x.dim() else 0
    if r is None or not width or len(samples) > 1:
        return NotImplemented
    if r.block % width or x.numel() % (r.block * capture.follower.batch):
        _refuse(capture, "linear", weight if _target(capture, weight) is not None else bias, "its features are samples")
    d = capture.derived(weight)
    if d is not None and d.transposed is not None:
        weight, swapped = capture.ledger.record(d.transposed).param, not swapped
    if not _dense(capture, weight):
        return NotImplemented
    use = capture.use("linear", [_target(capture, weight), _target(capture, bias)])
    layer = layers.Linear(use.batch, r.block, swapped, [weight.shape, _shape(bias)])
    out = layers.Layer.apply(use, layer, x, weight, bias)
    capture.mark(out, Rows(r.block // width * out.shape[-1], r.certain))
    return out


def linear(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """torch.nn.functional.linear."""
    x, weight, bias = bound("input weight bias", args, kwargs)
    if any(weight is t for t, _ in samples):
        return NotImplemented
    return _linear(capture, x, weight, bias, False, samples)


def matmul(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """matmul, mm and @, with the parameter on either side."""
    a, b = bound("self other", args, {"other": kwargs.get("other", kwargs.get("mat2", kwargs.get("tensor2")))} if
                 len(args) < 2 else {})  # fmt: skip
    if name == "__rmatmul__":
        a, b = b, a
    if len(mine) == 1 and b is mine[0] and b.dim() <= 2 and a.dim() > 1:
        out = _linear(capture, a, b, None, True, samples)
        if out is not NotImplemented:
            return capture.run(torch.squeeze, out, -1) if b.dim() == 1 else out
    elif len(mine) == 1 and a is mine[0] and a.dim() == 2 and b.dim() > 1:
        turned = capture.run(torch.transpose, b, -1, -2)
        out = _linear(capture, turned, a, None, False, [(turned, r) for r in [_rows(capture, turned)] if r])
        if out is not NotImplemented:
            return capture.run(torch.transpose, out, -1, -2)
    return alone(capture, name, func, args, kwargs, samples, mine)


def addmm(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """bias + x @ W."""
    bias, x, weight, beta, alpha = bound("input mat1 mat2 beta alpha", args, kwargs, beta=1, alpha=1)
    if beta == alpha == 1 and isinstance(bias, Tensor) and bias.dim() == 1 and any(weight is m for m in mine):
        out = _linear(capture, x, weight, bias, True, samples)
        if out is not NotImplemented:
            return out
    return alone(capture, name, func, args, kwargs, samples, mine)


# ---- Convolution ----------------------------------------------------------------------------------------------------


def _several(x: Any, n: int) -> list[int]:
    return [int(x)] * n if isinstance(x, int) else [int(v) for v in x] * (n if len(x) == 1 else 1)


def convolution(
    capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]
) -> Any:
    """Convolutions of one to three dimensions, plain and transposed."""
    transposed = "transpose" in name
    if transposed:
        x, weight, bias, stride, padding, extra, groups, dilation = bound(
            "input weight bias stride padding output_padding groups dilation", args, kwargs,
            stride=1, padding=0, output_padding=0, groups=1, dilation=1,
        )  # fmt: skip
    else:
        x, weight, bias, stride, padding, dilation, groups = bound(
            "input weight bias stride padding dilation groups", args, kwargs, stride=1, padding=0, dilation=1, groups=1
        )
        extra = 0
    n = weight.dim() - 2
    if _rows(capture, x) is None or len(samples) > 1 or not _dense(capture, weight):
        return NotImplemented
    if x.dim() != n + 2:
        _refuse(capture, name, mine[0], "they are its channels")
    stride, dilation, extra = _several(stride, n), _several(dilation, n), _several(extra, n)
    if isinstance(padding, str):
        padding, x = _same(capture, padding, x, list(weight.shape[2:]), dilation)
    padding = _several(padding, n)
    r = _rows(capture, x)
    assert r is not None
    found = rows.axis(x.shape, r.block, capture.follower.batch)
    if found is None or found[0] != 0:
        _refuse(capture, name, mine[0], "they are not in its first dimension")
        return NotImplemented
    use = capture.use(name, [_target(capture, weight), _target(capture, bias)])
    layer = layers.Convolution(
        use.batch, found[1], stride, padding, dilation, transposed, extra, groups, [weight.shape, _shape(bias)]
    )
    out = layers.Layer.apply(use, layer, x, weight, bias)
    capture.mark(out, Rows(rows.block_on(out.shape, 0, found[1]), r.certain))
    return out


def _same(
    capture: Capture, padding: str, x: Tensor, kernel: list[int], dilation: list[int]
) -> tuple[list[int], Tensor]:
    """ "same" and "valid" as numbers; what is odd goes to the right, as torch has it."""
    if padding == "valid":
        return [0] * len(kernel), x
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = capture.run(F.pad, x, [v for t in reversed(total) for v in (0, t % 2)])
    return [t // 2 for t in total], x


# ---- Embedding ------------------------------------------------------------------------------------------------------


def embedding(
    capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]
) -> Any:
    """torch.nn.functional.embedding; torch.embedding has its arguments in another order."""
    if func is torch.embedding:
        weight, ids, padding_idx, scaled, sparse = bound(
            "weight indices padding_idx scale_grad_by_freq sparse", args, kwargs, padding_idx=-1
        )
        padding_idx, max_norm, norm_type = None if padding_idx < 0 else padding_idx, None, 2.0
    else:
        ids, weight, padding_idx, max_norm, norm_type, scaled, sparse = bound(
            "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs, norm_type=2.0
        )
    r = _rows(capture, ids)
    if scaled and r is not None:
        _refuse(capture, name, mine[0], "scale_grad_by_freq counts ids of all samples")
    if r is None or sparse or not any(weight is m for m in mine) or not _dense(capture, weight):
        return NotImplemented
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), ids.contiguous(), max_norm, norm_type)
    if padding_idx is not None:
        padding_idx %= weight.shape[0]
    use = capture.use(name, [weight])
    layer = layers.Embedding(use.batch, r.block, padding_idx, weight.shape)
    out = layers.Layer.apply(use, layer, ids, weight)
    capture.mark(out, Rows(r.block * weight.shape[1], r.certain))
    return out


def index(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """table[ids]."""
    table, at = args
    if table is mine[0] and isinstance(at, Tensor) and at.dtype in (torch.int64, torch.int32) and table.dim() == 2:
        return capture.run(F.embedding, torch.where(at < 0, at + len(table), at), table)
    return alone(capture, name, func, args, kwargs, samples, mine)


# ---- Normalisations -------------------------------------------------------------------------------------------------


def last_norm(
    capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]
) -> Any:
    """layer_norm and rms_norm."""
    rms = name == "rms_norm"
    if rms:
        x, over, weight, eps = bound("input normalized_shape weight eps", args, kwargs)
        bias = None
    else:
        x, over, weight, bias, eps = bound("input normalized_shape weight bias eps", args, kwargs, eps=1e-5)
    r = _rows(capture, x)
    over = [over] if isinstance(over, int) else list(over)
    width = 1
    for n in over:
        width *= n
    if r is None or len(samples) > 1:
        return NotImplemented
    if r.block % width:
        _refuse(capture, name, mine[0], "it goes over them")
    use = capture.use(name, [_target(capture, weight), _target(capture, bias)])
    layer = layers.LastNorm(use.batch, r.block, [_shape(weight), _shape(bias)], over, eps, rms)
    out = layers.Layer.apply(use, layer, x, weight, bias)
    capture.mark(out, r)
    return out


def uses_batch_statistics(args: Any, kwargs: Any) -> bool:
    """Of batch_norm, in either order of arguments: normalises with the batch's own mean and variance."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def channel_norm(
    capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]
) -> Any:
    """group_norm, instance_norm and batch_norm."""
    own = True
    mean = var = None
    momentum = 0.1
    groups = 1
    if name == "group_norm":
        x, groups, weight, bias, eps = bound("input num_groups weight bias eps", args, kwargs, eps=1e-5)
    else:
        order = (
            "weight bias running_mean running_var"
            if getattr(func, "__module__", None) != F.__name__
            else ("running_mean running_var weight bias")
        )
        flag = "use_input_stats" if name == "instance_norm" else "training"
        names = f"input {order} {flag} momentum eps"
        of = dict(
            zip(
                names.split(), bound(names, args, kwargs, eps=1e-5, momentum=0.1, **{flag: name[0] == "i"}), strict=True
            )
        )
        x, weight, bias, mean, var = (of[k] for k in ("input", "weight", "bias", "running_mean", "running_var"))
        own, momentum, eps = of[flag], of["momentum"], of["eps"]
    if name == "batch_norm" and own:
        capture.ledger.refuse_batch_norm()
    r = _rows(capture, x)
    found = None if r is None else rows.axis(x.shape, r.block, capture.follower.batch)
    if r is None or len(samples) > 1:
        return NotImplemented
    if found is None or found[0] != 0:
        _refuse(capture, name, mine[0], "they are not in its first dimension")
        return NotImplemented
    if name == "instance_norm" and own:
        groups = x.shape[1]
        if mean is not None:  # it learns its running statistics on the way
            with torch.no_grad(), layers.without_modes():
                F.instance_norm(x.detach(), mean, var, None, None, True, momentum, eps)
    use = capture.use(name, [_target(capture, weight), _target(capture, bias)])
    shapes = [_shape(weight), _shape(bias)]
    layer: layers.ChannelNorm
    if own:
        layer = layers.GroupNorm(use.batch, found[1], shapes, groups, eps)
    else:
        assert mean is not None
        assert var is not None
        layer = layers.FixedNorm(use.batch, found[1], shapes, eps, mean, var)
    out = layers.Layer.apply(use, layer, x, weight, bias)
    capture.mark(out, r)
    return out


# ---- Broadcasting ---------------------------------------------------------------------------------------------------


def _spread(capture: Capture, q: Tensor, name: str, rank: int, dim: int, outer: int, inner: int) -> Tensor:
    use = capture.use(name, [q])
    out: Tensor = layers.Spread.apply(use, q, use.batch, rank, dim, outer, inner)
    capture.mark(out, Rows(rows.block_on(out.shape, dim, inner), True))
    return out


def broadcast(
    capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]
) -> Any:
    """Element by element: every parameter once per sample, along the samples' dimension."""
    batch = capture.follower.batch
    operands = list(tensors_in((*args, *kwargs.values())))
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in operands))
    except RuntimeError:
        return NotImplemented
    blocks = {rows.broadcast(t.shape, r.block, shape, batch) for t, r in samples}
    block = blocks.pop() if len(blocks) == 1 else None
    found = None if block is None else rows.axis(shape, block, batch)
    if found is None:
        return NotImplemented
    dim, inner = found
    outer = shape[dim] // (batch * inner)
    instead: dict[int, Tensor] = {}
    for q in mine:
        if id(q) in instead:
            continue
        at = dim - (len(shape) - q.dim())
        if at < 0 or q.shape[at] == 1:
            instead[id(q)] = _spread(capture, q, name, len(shape), dim, outer, inner)
        else:  # its entries are the samples' own
            use = capture.use(name, [q])
            instead[id(q)] = layers.Own.apply(use, q, at, outer, inner)
            capture.mark(instead[id(q)], Rows(rows.block_on(q.shape, at, inner), True))
    changed = [instead.get(id(a), a) if isinstance(a, Tensor) else a for a in args]
    return capture.run(func, *changed, **{k: instead.get(id(v), v) for k, v in kwargs.items()})


def prelu(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """max(x, 0) + w min(x, 0), a weight for each channel."""
    x, weight = bound("input weight", args, kwargs)
    if x is mine[0]:
        return NotImplemented
    if weight.numel() > 1:
        weight = capture.run(torch.Tensor.view, weight, [-1] + [1] * (x.dim() - 2))

    def formula() -> Tensor:
        return torch.where(x > 0, x, weight * x)

    return capture.run(formula)


def widens_to_batch(capture: Capture, mine: list[Tensor], func: Any, args: Any, kwargs: Any) -> int | None:
    """The dimension along which a parameter is repeated once per sample, plus one; None: none."""
    batch = capture.ledger.batch
    if batch is None or len(mine) != 1 or not args or args[0] is not mine[0]:
        return None
    sizes = _sizes(args, kwargs)
    if sizes is None or len(sizes) < mine[0].dim():
        return None
    own = [0] * (len(sizes) - mine[0].dim()) + list(mine[0].shape)
    found = [d for d, (n, m) in enumerate(zip(sizes, own, strict=True)) if n == batch and m in (0, 1)]
    return found[0] + 1 if found and (found[0] == 0 or len(found) == 1) else None


def _sizes(args: Any, kwargs: Any) -> list[int] | None:
    given = list(args[1:]) or list(kwargs.values())
    if len(given) == 1 and isinstance(given[0], Tensor):
        return list(given[0].shape)
    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return [int(n) for n in flat] if all(isinstance(n, int) for n in flat) else None


def widen(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """expand and repeat: the samples' copies of a parameter."""
    if samples:
        return broadcast(capture, name, func, args, kwargs, samples, mine) if name == "expand_as" else NotImplemented
    at, sizes = widens_to_batch(capture, mine, func, args, kwargs), _sizes(args, kwargs)
    assert at is not None
    assert sizes is not None
    dim = at - 1
    out = _spread(capture, mine[0], name, len(sizes), dim, 1, 1)
    if name in ("repeat", "tile"):
        sizes[dim] = 1
        return capture.run(torch.Tensor.repeat, out, sizes)
    return capture.run(torch.Tensor.expand, out, sizes)


# ---- Anything that treats samples alone -----------------------------------------------------------------------------


def alone(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """Sample by sample, once more in backward."""
    if name not in _SMALL and not _dense(capture, *mine):
        return NotImplemented
    batch = capture.follower.batch
    operands: list[Tensor] = []
    for t in tensors_in((*args, *kwargs.values())):
        if not any(t is o for o in operands):
            operands.append(t)
    params: list[Tensor] = []
    for t in mine:
        if not any(t is p for p in params):
            params.append(t)
    data = [t for t in operands if not any(t is p for p in params)]
    order = {id(t): i for i, t in enumerate([*data, *params])}

    def run(*tensors: Tensor) -> Tensor:
        def put(a: Any) -> Any:
            if isinstance(a, Tensor):
                return tensors[order[id(a)]]
            if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
                return type(a)(put(v) for v in a)
            return a

        out: Tensor = func(*map(put, args), **{k: put(v) for k, v in kwargs.items()})
        return out

    with torch.no_grad(), layers.without_modes():
        try:
            like = run(*(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (*data, *params)))
        except (RuntimeError, NotImplementedError):
            return NotImplemented
    if not isinstance(like, Tensor):
        return NotImplemented
    (state,) = capture.follower.after(name, func, args, kwargs, samples, like)
    axes: dict[int, tuple[int, int] | None] = {-1: None}
    if isinstance(state, Rows):
        axes[-1] = rows.axis(like.shape, state.block, batch)
    of = {id(t): r for t, r in samples}
    for i, t in enumerate(data):
        axes[i] = rows.axis(t.shape, of[id(t)].block, batch) if id(t) in of else None
        if id(t) in of and axes[i] is None:
            return NotImplemented
    if axes[-1] is None or isinstance(state, Lost):
        return NotImplemented

    def cut(t: Tensor, i: int, b: int) -> Tensor:
        at = axes[i]
        if at is None:
            return t
        return t.unflatten(at[0], (-1, batch, at[1])).select(at[0] + 1, b).flatten(at[0], at[0] + 1)

    use = capture.use(name, params)
    out = layers.PerSample.apply(use, run, cut, *data, *params)
    capture.mark(out, state)
    return out


def cell(capture: Capture, name: str, func: Any, args: Any, kwargs: Any, samples: Samples, mine: list[Tensor]) -> Any:
    """One step of a recurrent cell, as the linear layers that it is."""
    return capture.run(cells.FORMULAS[name], *args, **kwargs)


#: Of ALONE, those where what was made of a parameter is small: masks, tables.
_SMALL = words("scaled_dot_product_attention __getitem__ gather take take_along_dim index_select")
_JOINS: dict[str, Join] = {
    "linear": linear,
    "matmul": matmul,
    "__matmul__": matmul,
    "__rmatmul__": matmul,
    "mm": matmul,
    "addmm": addmm,
    **{f"conv{n}d": convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": convolution for n in (1, 2, 3)},
    "embedding": embedding,
    "__getitem__": index,
    "layer_norm": last_norm,
    "rms_norm": last_norm,
    "group_norm": channel_norm,
    "instance_norm": channel_norm,
    "batch_norm": channel_norm,
    "prelu": prelu,
    **dict.fromkeys(WIDENS, widen),
    **dict.fromkeys(cells.FORMULAS, cell),
}

#: Operations that are always of samples.
LAYERS = _JOINS.keys() - WIDENS - {"__getitem__", "prelu", "matmul", "__matmul__", "__rmatmul__", "mm"}
