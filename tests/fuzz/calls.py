"""A call of one of the ops, from bytes. Either it succeeds, and writes what it should, or it refuses and writes nothing."""

import torch

from normkern import ops

from .junk import NO_NUMBERS, NUMBERS, SIZES, Memory
from .reading import Choices

#: What an op may raise: see the docstrings of `normkern.ops`.
REFUSALS = (TypeError, ValueError, RuntimeError)


def number(choices, *usual):
    """One of these, or any other number, or none at all."""
    if not choices.rarely():
        return choices.of(usual)
    if choices.rarely():
        return choices.of(NO_NUMBERS)
    x = choices.of(NUMBERS)
    return torch.tensor(x, dtype=torch.float64) if type(x) is float and choices.rarely() else x


def tensors(choices, memory, count, like=None, none=True):
    """A list; the i-th is usually of the i-th shape and dtype of `like`."""
    if choices.rarely(16):
        return choices.of(NO_NUMBERS)
    if choices.rarely(16):
        count = choices.below(5)
    made = []
    for i in range(count):
        model = like[i] if like is not None and i < len(like) and isinstance(like[i], torch.Tensor) else None
        if none and choices.rarely():
            made.append(None)
        elif model is None:
            made.append(memory.tensor(choices))
        else:
            made.append(memory.tensor(choices, tuple(model.shape), model.dtype))
    return made


def as_list(x):
    return x if isinstance(x, list) else []


def sgd_(c, m):
    count = 1 + c.below(3)
    params = tensors(c, m, count, none=False)
    like = as_list(params)
    buffers = tensors(c, m, count, like) if c.below(2) else None
    masters = tensors(c, m, count) if c.rarely(4) else None
    options = {
        "lr": number(c, 0.1), "momentum": number(c, 0.0, 0.9), "dampening": number(c, 0.0),
        "weight_decay": number(c, 0.0, 0.1), "nesterov": bool(c.below(2)), "maximize": bool(c.below(2)),
        "grad_scale": number(c, 1.0, 2.0), "stats": c.of((None, "tensor", "row", "all", 3)), "l": number(c, 1.0, 4.0),
        "held": tensors(c, m, count, like) if c.rarely(4) else None, "held_scale": number(c, 1.0),
        "lr_multipliers": [number(c, 1.0) for _ in range(count)] if c.rarely(4) else None,
        "state_dtype": c.of((None, torch.float32, torch.bfloat16, torch.int8, "f32")) if c.rarely(4) else None,
        "rounding": ops.Rounding(number(c, 0, 7), number(c, 0, 5), number(c, 0)) if c.rarely(4) else None,
        "clip_coef": m.tensor(c, (), torch.float64) if c.rarely() else None,
        "found_inf": m.tensor(c, (), torch.float32) if c.rarely(16) else None,
    }  # fmt: skip
    grads = tensors(c, m, count, like)
    before = [list(x) if isinstance(x, list) else x for x in (buffers, masters)]

    def unchanged():
        return all(
            not isinstance(x, list) or (len(x) == len(y) and all(a is b for a, b in zip(x, y, strict=True)))
            for x, y in zip((buffers, masters), before, strict=True)
        )

    return (
        lambda: ops.sgd_(params, grads, buffers, masters=masters, **options),
        [*like, *as_list(buffers), *as_list(masters)],
        unchanged,
    )


def adamw_(c, m):
    count = 1 + c.below(3)
    params = tensors(c, m, count, none=False)
    like = as_list(params)
    averages = [tensors(c, m, count, like) for _ in range(2)]
    steps = [m.tensor(c, (), torch.float32) if c.below(2) else None for _ in range(count)]
    masters = tensors(c, m, count) if c.rarely(4) else None
    options = {
        "lr": number(c, 0.1), "beta1": number(c, 0.9), "beta2": number(c, 0.99), "eps": number(c, 1e-8),
        "weight_decay": number(c, 0.0, 0.1), "decoupled": bool(c.below(2)), "maximize": bool(c.below(2)),
        "grad_scale": number(c, 1.0, 2.0), "stats": c.of((None, "tensor", "row", "all", 3)),
        "lr_multipliers": [number(c, 1.0) for _ in range(count)] if c.rarely(4) else None,
        "state_dtype": c.of((None, torch.float32, torch.bfloat16, torch.int8, "f32")) if c.rarely(4) else None,
        "rounding": ops.Rounding(number(c, 0, 7), number(c, 0, 5), number(c, 0)) if c.rarely(4) else None,
        "clip_coef": m.tensor(c, (), torch.float64) if c.rarely() else None,
        "found_inf": m.tensor(c, (), torch.float32) if c.rarely(16) else None,
    }  # fmt: skip
    grads = tensors(c, m, count, like)
    lists = (*averages, steps, masters)
    before = [list(x) if isinstance(x, list) else x for x in lists]

    def unchanged():
        return all(
            not isinstance(x, list) or (len(x) == len(y) and all(a is b for a, b in zip(x, y, strict=True)))
            for x, y in zip(lists, before, strict=True)
        )

    return (
        lambda: ops.adamw_(params, grads, *averages, steps, masters=masters, **options),
        [*like, *as_list(averages[0]), *as_list(averages[1]), *steps, *as_list(masters)],
        unchanged,
    )


def pair(c, m):
    count = 1 + c.below(3)
    a = tensors(c, m, count)
    return a, tensors(c, m, count, as_list(a))


def grad_sq_norms(c, m):
    a, b = pair(c, m)
    scale, l, other = number(c, 1.0, 2.0), number(c, 1.0, 3.0), number(c, 1.0)
    held = b if c.below(2) else None
    return lambda: ops.grad_sq_norms(a, grad_scale=scale, held=held, l=l, held_scale=other), []


def svag_combine_(c, m):
    a, b = pair(c, m)
    l = number(c, 2.0, 1.0)
    return lambda: ops.svag_combine_(a, b, l), as_list(a)


def pair_sums(c, m):
    a, b = pair(c, m)
    stats = c.of(("tensor", "row", None, "all"))
    return lambda: ops.pair_sums(a, b, stats), []


def welford_(c, m):
    means, samples = pair(c, m)
    squares = tensors(c, m, len(as_list(means)), as_list(means), none=False)
    n, stats = number(c, 1, 2), c.of((None, "tensor", "row"))
    return lambda: ops.welford_(means, samples, squares, n=n, stats=stats), as_list(means) + as_list(squares)


def outer_moments(c, m):
    batch, time, dtype = c.of(SIZES), c.of(SIZES), c.of((torch.float32, torch.float64, torch.bfloat16))
    a, g = (m.tensor(c, (batch, time, c.of(SIZES)), dtype) for _ in range(2))
    squares = bool(c.below(2))
    return lambda: ops.outer_moments(a, g, squares=squares), []


def conv_moments(c, m):
    space = 1 + c.below(3)
    kernel, stride, dilation = (tuple(number(c, 1, 2, 3) for _ in range(space)) for _ in range(3))
    padding = tuple(number(c, 0, 1) for _ in range(space))
    groups, batch = number(c, 1, 2), c.of((2, 1, 0))
    x = m.tensor(c, (batch, c.of((2, 4, 1)), *(c.of((5, 3, 1, 0)) for _ in range(space))), torch.float32)
    g = m.tensor(c, (batch, c.of((2, 4, 1)), *(c.of((4, 3, 1, 0)) for _ in range(space))), torch.float32)
    squares = bool(c.below(2))
    numbers = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return lambda: ops.conv_moments(x, g, kernel, **numbers, squares=squares), []


def moments(c, m):
    x = m.tensor(c) if c.below(2) else tensors(c, m, 1 + c.below(3), none=False)
    squares, factor = bool(c.below(2)), number(c, 1.0)
    totals = m.tensor(c, (2,), torch.float64) if c.below(2) else None
    return lambda: ops.moments(x, squares=squares, factor=factor, totals=totals), [totals]


def row_sums(c, m):
    x = m.tensor(c, (c.of(SIZES), c.of(SIZES)))
    op = c.of((ops.row_sums, ops.row_sq_norms))
    return lambda: op(x), []


def recentre_(c, m):
    raw = m.tensor(c, None, torch.float32)
    like = raw if isinstance(raw, torch.Tensor) else torch.ones(2)
    total = m.tensor(c, tuple(like.shape), like.dtype)
    count, least = number(c, 2, 5), number(c, 0.01)
    return lambda: ops.recentre_(raw, total, count, least), [raw]


def norm_sums(c, m):
    shape, dtype = (c.of(SIZES), c.of(SIZES), c.of(SIZES)), c.of((torch.float32, torch.float64, torch.float16))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    g, x = (m.tensor(c, shape, dtype) for _ in range(2))
    mean, rstd = (m.tensor(c, shape[:2], real) for _ in range(2))
    mean, channels = mean if c.below(2) else None, c.of(("last", "first", None))
    return lambda: ops.norm_sums(g, x, mean, rstd, channels=channels), []


def embedding_moments(c, m):
    batch, time, rows = c.of((2, 1, 5, 0)), c.of((3, 1, 0)), number(c, 4, 1)
    rows = 2**52 if type(rows) is int and 2**20 < rows < 2**52 else rows  # what fits into memory takes a while
    ids = torch.tensor(
        [[c.of((0, 1, 2, 3, -1, 4, 2**31, 2**63 - 1, -(2**63))) for _ in range(time)] for _ in range(batch)]
    )
    ids = ids.reshape(batch, time).to(c.of((torch.int64, torch.int64, torch.int32, torch.float32)))
    ids = m.tensor(c) if c.rarely(16) else ids.t().contiguous().t() if c.rarely() else ids
    g = m.tensor(c, (batch, time, c.of((2, 1, 0, 300))))
    padding, squares = number(c, None, 0, -1), bool(c.below(2))
    return lambda: ops.embedding_moments(ids, g, rows, padding_idx=padding, squares=squares), []


def clip_coef(c, m):
    norms, limit = m.tensor(c, (c.of(SIZES),), torch.float64), number(c, 1.0, 0.0)
    found = m.tensor(c, (), torch.float32) if c.rarely() else None
    return lambda: ops.clip_coef(norms, limit, found_inf=found), []


def gauge_step(c, m):
    gauge = (number(c, 1.0, 0.8), number(c, 0.0, 0.1), number(c, 0, 3))
    gauge = gauge if not c.rarely(16) else c.of(NO_NUMBERS)
    numbers = {name: number(c, 0.1, 0.5, 0.0) for name in ("lr", "momentum", "dampening", "weight_decay")}
    more = {"nesterov": bool(c.below(2)), "buffers": c.of((0, 1, 2, 3, -1)), "leave": bool(c.below(2))}
    return lambda: ops.gauge_step(gauge, **numbers, **more), []


OPS = (
    sgd_, grad_sq_norms, svag_combine_, pair_sums, welford_, outer_moments, conv_moments, moments, row_sums, recentre_,
    norm_sums, embedding_moments, clip_coef, gauge_step, adamw_,
)  # fmt: skip


def call(data: bytes) -> str:
    """What became of the call: "done", or the refusal.

    Raises:
        AssertionError: an op has written what it should not. Whatever else an op raises, that it should not.
    """
    choices, memory = Choices(data), Memory()
    try:
        op = choices.of(OPS)
        act, written, *more = op(choices, memory)
    except (RuntimeError, TypeError, ValueError, OverflowError) as no_argument:
        return f"no call: {no_argument}"  # torch does not make such a tensor
    try:
        act()
    except REFUSALS as refusal:
        if memory.was_written():
            raise AssertionError(f"{op.__name__} has written, and then refused: {refusal}") from refusal
        if not all(unchanged() for unchanged in more):
            raise AssertionError(f"{op.__name__} has changed a list, and then refused: {refusal}") from refusal
        return f"{type(refusal).__name__}: {refusal}"
    written = [
        x for x in written if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"
    ]
    assert not memory.outside_was_written(written), f"{op.__name__} has written what is none of its results"
    return "done"
