"""Every kernel over samples as a call: inputs in every place that a kernel tells apart, and what it says of them."""

import contextlib
from unittest import mock

import torch

from normkern import ops


def real_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def numbers(make, shape, dtype):
    return (1 + torch.randn(shape, generator=make, dtype=torch.float64)).to(dtype)


def out_of_alignment(x):
    room = torch.full((x.numel() + 8,), torch.nan, dtype=x.dtype)
    return room[1 : 1 + x.numel()].copy_(x.flatten()).view(x.shape)


def moments(dtype, squares):
    """Whole tiles and what is left of them, out of alignment (each row, or one), strided; few rows, and many."""
    make = torch.Generator().manual_seed(0)
    of = lambda *shape: numbers(make, shape, dtype)  # noqa: E731
    lists = [
        [of(1, 260)], [of(5, 300), of(5, 257), of(5, 0), of(5, 3), out_of_alignment(of(5, 40)), of(5)],
        [of(140, 512), of(140, 6, 5).transpose(1, 2), of(140, 7).t().contiguous().t()],
    ]  # fmt: skip
    results = []
    for tensors in lists:
        totals = torch.zeros(2, dtype=torch.float64)
        yield tensors
        means, centred, norms = ops.moments(tensors, squares=squares, factor=0.5, totals=totals)
        results += [*means, *(centred or []), Near(norms), Near(totals.nan_to_num(-1.0))]
    yield results


def norm_sums(dtype, channels):
    """Rows of a warp and of a block, tiles and what is left of them, out of alignment, with and without a mean."""
    make = torch.Generator().manual_seed(0)
    results = []
    shapes = [(2, 3, 5), (3, 140, 300), (1, 9, 256)] if channels == "last" else [(2, 11, 300), (2, 2, 4100), (1, 3, 7)]
    for shape in shapes:
        for place in (lambda x: x, out_of_alignment):
            g, x = (place(numbers(make, shape, dtype)) for _ in range(2))
            mean, rstd = (numbers(make, shape[:2], real_of(dtype)) for _ in range(2))
            yield [g, x, mean, rstd]
            for centre in (mean, None):
                sums = ops.norm_sums(g, x, centre, rstd, channels=channels)
                results += sums if channels == "last" else map(Near, sums)
    yield results


def row_sums(dtype, op):
    """Rows of a warp, of a block, of several; out of alignment, all or some."""
    make = torch.Generator().manual_seed(0)
    results = []
    for shape in ((1, 1), (9, 7), (3, 1000), (2, 4100), (2, 32768), (2, 32775)):
        for x in (numbers(make, shape, dtype), out_of_alignment(numbers(make, shape, dtype))):
            yield [x]
            results.append(Near(op(x)))
    yield results


def embedding_moments(dtype, squares):
    """Ids that one sample has twice, that all have, that nobody has; a row that counts for nothing."""
    make = torch.Generator().manual_seed(0)
    results = []
    for b, t, d, v in ((1, 1, 1, 1), (3, 9, 300, 5), (4, 5, 256, 40), (2, 300, 7, 3), (2, 0, 3, 2)):
        ids = torch.randint(v, (b, t), generator=make)
        for place, padding in ((lambda x: x, None), (out_of_alignment, 0)):
            g = place(numbers(make, (b, t, d), dtype))
            yield [ids, g]
            total, centred, norms = ops.embedding_moments(ids, g, v, padding_idx=padding, squares=squares)
            results += [total, *([centred] if squares else []), Near(norms)]
    yield results


class Near:
    """A sum whose order is a kernel's own: near the CPU's, and the same every time."""

    def __init__(self, tensor):
        self.tensor = tensor


CALLS = {
    "moments": (moments, True),
    "moments, no squares": (moments, False),
    "norm_sums, last": (norm_sums, "last"),
    "norm_sums, first": (norm_sums, "first"),
    "row_sq_norms": (row_sums, ops.row_sq_norms),
    "row_sums": (row_sums, ops.row_sums),
    "embedding_moments": (embedding_moments, True),
    "embedding_moments, no squares": (embedding_moments, False),
}


def run(name, dtype, before=lambda tensors: None):
    """What the call says. `before` is told of the inputs of each of its launches."""
    function, choice = CALLS[name]
    *_, results = _all(function(dtype, choice), before)
    return results


def _all(steps, before):
    for step in steps:
        before(step)
        yield step


@contextlib.contextmanager
def blank_memory(blank):
    """Whatever ops make for results and scratch is unwritten memory."""

    def unwritten(function):
        def made(*args, **kwargs):
            tensor = function(*args, **kwargs)
            blank(tensor)
            return tensor

        return made

    with contextlib.ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, unwritten(getattr(owner, name))))
        yield
