"""Tensors of more than 2^31 elements, and strides that reach further: no index, size or sum overflows.

The data repeat with a prime period, so that an index that wraps at any power of two lands on another value; what each
coordinate and each sum must be then follows from a step of one period.
"""

import pytest
import torch
from support.memory import same_bits

from normkern import ops

pytestmark = pytest.mark.slow

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PERIOD = 4099
REPEATS = 4096  # how many periods are filled or compared at a time
ROWS, ROW = 100_003, 21_477
SIZE = ROWS * ROW  # odd, a multiple of 3, and 280,783 more than 2^31
FENCE = 65  # odd: the tensor is not aligned to a vector
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def needs(gib):
    """Skip where the machine cannot hold `gib` GiB, and 2 more for what is compared."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration):
        pytest.skip("this system does not say how much memory is available")
    if free < gib + 2:
        pytest.skip(f"needs {gib + 2:.0f} GiB of available memory, there are {free:.1f}")


class Repeated:
    """`size` elements between two fences of NaN: one period of `values`, again and again."""

    def __init__(self, values, size):
        self.block = torch.empty(size + 2 * FENCE, dtype=values.dtype)
        self.block[:FENCE] = self.block[-FENCE:] = torch.nan
        self.tensor = self.block[FENCE:-FENCE]
        for at, expected in self.slices(values):
            self.tensor[at : at + len(expected)] = expected

    def slices(self, values):
        tile, size = values.repeat(REPEATS), len(self.tensor)
        for at in range(0, size, len(tile)):
            yield at, tile[: size - at]

    def repeats(self, values):
        """Every coordinate has the bits it should have."""
        return all(same_bits(self.tensor[at : at + len(x)], x) for at, x in self.slices(values))

    def is_fenced(self):
        return bool(self.block[:FENCE].isnan().all() and self.block[-FENCE:].isnan().all())


def sums_of_repeats(w, g, w_new, rows, row):
    """The five sums of each of `rows` stretches of `row` coordinates, from one period; and how large they can be."""
    w, g, w_new = (x.double() for x in (w, g, w_new))
    u = w_new - w
    terms = torch.stack([w * w, g * g, w * g, u * u, w * u], dim=1)
    first = torch.arange(rows) * row % PERIOD
    for x in (terms, terms.abs()):
        up_to = torch.cat([torch.zeros(1, 5, dtype=torch.float64), x.repeat(2, 1).cumsum(0)])
        yield row // PERIOD * x.sum(0) + up_to[first + row % PERIOD] - up_to[first]


def assert_sums(table, w, g, w_new, rows, row):
    expected, size = sums_of_repeats(w, g, w_new, rows, row)
    assert table.shape == expected.shape
    assert ((table - expected).abs() / size).max() < 1e-12


def dense_steps(dtype, with_buffer):
    """As one tensor, as three long rows, as many short ones: coordinates, sums, fences."""
    w, g, v = (torch.randn(PERIOD).to(dtype) for _ in range(3))
    big_w, big_g = Repeated(w, SIZE), Repeated(g, SIZE)
    big_v = Repeated(v, SIZE) if with_buffer else None
    options = OPTIONS if with_buffer else {"lr": 0.1, "weight_decay": 0.01}
    for shape, stats in (((SIZE,), "tensor"), ((3, SIZE // 3), "row"), ((ROWS, ROW), "row")):
        before = w.clone()
        ops.sgd_([w], [g], [v] if with_buffer else None, **options)
        buffers = [big_v.tensor.view(shape)] if with_buffer else None
        table = ops.sgd_([big_w.tensor.view(shape)], [big_g.tensor.view(shape)], buffers, stats=stats, **options)
        rows = 1 if stats == "tensor" else shape[0]
        assert_sums(table, before, g, w, rows, SIZE // rows)
        assert big_w.repeats(w)
        assert not with_buffer or big_v.repeats(v)
    assert big_g.repeats(g), "the gradient was written"
    assert all(x.is_fenced() for x in (big_w, big_g, big_v) if x is not None), "memory outside was written"


def test_bfloat16_with_momentum():
    """2^31 + 280,783 bfloat16 weights, gradients and buffers: every coordinate, every sum, by tensor and by row."""
    needs(3 * 4.01)
    dense_steps(torch.bfloat16, with_buffer=True)


def test_float32():
    """The same in float32 without a buffer: byte offsets beyond 2^33."""
    needs(2 * 8.01)
    dense_steps(torch.float32, with_buffer=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_expanded_gradient(dtype):
    """A gradient of three elements, expanded to more than 2^31: the walk over strides finds each one's own."""
    needs(SIZE * dtype.itemsize / 2**30)
    w, g = torch.randn(PERIOD).to(dtype), torch.randn(3, 1).to(dtype)
    big_w = Repeated(w, SIZE)
    # Each third starts where the period happens to be.
    turned = [w.roll(-(r * (SIZE // 3) % PERIOD)) for r in range(3)]
    after = [x.clone() for x in turned]
    for x, value in zip(after, g, strict=True):
        ops.sgd_([x], [value.expand(PERIOD)], lr=0.1, weight_decay=0.01)
    shape = (3, SIZE // 3)
    table = ops.sgd_([big_w.tensor.view(shape)], [g.expand(shape)], lr=0.1, weight_decay=0.01, stats="row")
    for r in range(3):
        assert_sums(table[r : r + 1], turned[r], g[r].expand(PERIOD), after[r], 1, SIZE // 3)
        third = big_w.tensor.view(shape)[r]
        tile = after[r].repeat(REPEATS)
        for at in range(0, len(third), len(tile)):
            part = third[at : at + len(tile)]
            assert same_bits(part, tile[: len(part)]), f"third {r}, from {at}"
    assert big_w.is_fenced()


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("operand", ["params", "grads", "momentum_buffers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_that_reach_beyond_2_31(isa, dtype, operand, by_column):
    """Four stretches, 0.8 * 10^9 elements apart: the same bits as next to each other, and nothing around them written.

    Memory that nobody touches costs nothing, so this needs little of it.
    """
    far, count, fence = 3 * 2**28 + 11, 1001, 8
    try:
        room = torch.empty(3 * far + count + 2 * fence, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"this system does not lend memory in advance: {error}")
    for k in range(4):
        room[k * far : k * far + count + 2 * fence] = torch.nan
    shape, strides = ((count, 4), (1, far)) if by_column else ((4, count), (far, 1))
    spread = room.as_strided(shape, strides, fence)
    near = {name: torch.randn(shape).to(dtype) for name in ("params", "grads", "momentum_buffers")}
    spread.copy_(near[operand])
    tensors = {**{name: x.clone() for name, x in near.items()}, operand: spread}
    expected = ops.sgd_(*[[x] for x in near.values()], stats="row", **OPTIONS)
    table = ops.sgd_(*[[x] for x in tensors.values()], stats="row", **OPTIONS)
    assert all(same_bits(tensors[name], near[name]) for name in near)
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=0)
    for k in range(4):
        assert room[k * far : k * far + fence].isnan().all()
        assert room[k * far + fence + count :][:fence].isnan().all()
