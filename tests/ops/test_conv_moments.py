"""conv_moments against torch's own weight gradients, sample by sample in float64, with a budget of errors."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contributions import (
    WITH_FMA,
    assert_all_same,
    assert_right,
    on_all_levels,
    on_thread_counts,
    one_thread,
    real_of,
)
from support.memory import Fenced, Rooms, here, same_bits

from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
TRANSPOSED = {
    1: torch.nn.functional.conv_transpose1d,
    2: torch.nn.functional.conv_transpose2d,
    3: torch.nn.functional.conv_transpose3d,
}


def numbers(kernel, stride=1, padding=0, dilation=1, groups=1):
    """What conv_moments takes besides tensors, from numbers that stand for all dimensions."""
    each = [(v,) * len(kernel) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    return {"stride": each[0], "padding": each[1], "dilation": each[2], "groups": groups}


# Every path, and every boundary of tiles (9 or 6 rows, 32 or 16 columns), units (36 x 32), blocks (504 x 512), chunks
# (512 positions, 1024 of a sample): (x, channels of g, size of g, kernel, numbers).
CASES = {
    "one": ((1, 1, 1), 1, (1,), (1,), {}),
    "3x3": ((3, 5, 9, 8), 33, (9, 8), (3, 3), {"padding": 1}),
    "3x3, 36 rows": ((2, 4, 5, 5), 32, (5, 5), (3, 3), {"padding": 1}),
    "3x3, 37 channels": ((2, 37, 4, 4), 31, (4, 4), (3, 3), {"padding": 1}),
    "3x3, several samples per chunk": ((40, 3, 4, 4), 8, (4, 4), (3, 3), {"padding": 1}),
    "3x3, stride 2": ((2, 9, 9, 10), 40, (5, 5), (3, 3), {"padding": 1, "stride": 2}),
    "3x3, dilation 2": ((2, 9, 9, 10), 40, (9, 10), (3, 3), {"padding": 2, "dilation": 2}),
    "stride 4, dilation 6": ((2, 3, 20, 21), 16, (5, 5), (3, 3), {"padding": 6, "stride": 4, "dilation": 6}),
    "7x7, stride 2": ((2, 3, 33, 33), 20, (17, 17), (7, 7), {"padding": 3, "stride": 2}),
    "1xk": ((2, 7, 6, 30), 17, (6, 26), (1, 5), {}),
    "kx1": ((2, 7, 30, 6), 17, (26, 6), (5, 1), {}),
    "patches": ((2, 3, 16, 16), 70, (4, 4), (4, 4), {"stride": 4}),
    "1x1": ((3, 37, 5, 6), 41, (5, 6), (1, 1), {}),
    "1x1, few outputs": ((3, 37, 5, 6), 3, (5, 6), (1, 1), {}),
    "1x1, stride 2": ((3, 37, 9, 8), 41, (5, 4), (1, 1), {"stride": 2}),
    "few outputs": ((2, 40, 8, 9), 3, (8, 9), (3, 3), {"padding": 1}),
    "few outputs, groups": ((2, 72, 5, 5), 4, (5, 5), (2, 3), {"groups": 2}),
    "groups": ((2, 24, 7, 7), 80, (7, 7), (3, 3), {"padding": 1, "groups": 2}),
    "depthwise": ((3, 35, 8, 7), 35, (8, 7), (3, 3), {"padding": 1, "groups": 35}),
    "depthwise, multiplier 2, stride 2": ((2, 33, 8, 7), 66, (4, 4), (5, 3), {"padding": (2, 1), "stride": 2, "groups": 33}),
    "many groups": ((2, 48, 6, 6), 64, (6, 6), (3, 3), {"padding": 1, "groups": 16}),
    "long": ((2, 3, 1300), 9, (1300,), (5,), {"padding": 2}),
    "long, dilated": ((2, 3, 1300), 9, (1200,), (3,), {"dilation": 50}),
    "large": ((2, 2, 40, 30), 9, (40, 30), (3, 3), {"padding": 1}),
    "wide": ((1, 2, 3, 1100), 9, (3, 1100), (3, 3), {"padding": 1}),
    "large, few outputs": ((2, 33, 40, 30), 2, (40, 30), (3, 3), {"padding": 1}),
    "large, depthwise": ((2, 20, 40, 30), 20, (40, 30), (3, 3), {"padding": 1, "groups": 20}),
    "3d": ((2, 3, 5, 6, 7), 10, (5, 6, 7), (3, 3, 3), {"padding": 1}),
    "3d, large": ((1, 2, 9, 11, 12), 5, (9, 11, 12), (1, 2, 3), {"padding": (0, 0, 1)}),
    "3d, slabs larger than a chunk": ((1, 2, 3, 34, 33), 5, (3, 34, 33), (3, 3, 3), {"padding": 1}),
    "3d, strided": ((2, 3, 7, 8, 9), 10, (4, 3, 5), (2, 3, 1), {"stride": (2, 3, 2), "dilation": (1, 2, 1)}),
    "same, left only": ((2, 3, 9), 5, (9,), (4,), {"padding": 3}),
    "same, right only": ((2, 3, 9), 5, (9,), (4,), {}),
    "cropped": ((2, 3, 12, 9), 5, (7, 6), (3, 3), {"padding": (-2, 1)}),
    "outside altogether": ((2, 3, 4), 5, (6,), (3,), {"padding": 20}),
    "many rows": ((2, 130, 4, 4), 6, (4, 4), (2, 2), {}),
    "many outputs": ((2, 3, 5, 5), 540, (5, 5), (2, 2), {}),
}  # fmt: skip


def case(name, dtype, seed=0):
    shape, channels, size, kernel, options = CASES[name]
    make = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=make, dtype=torch.float64, device="cpu") + 0.5).to(dtype)
    g = torch.randn(shape[0], channels, *size, generator=make, dtype=torch.float64, device="cpu").to(dtype)
    return here(x), here(g), kernel, numbers(kernel, **options)


def contributions(x, g, kernel, options):
    """c_b by the reference, one sample at a time, and the sizes of the terms."""

    def each(x, g):
        one = [
            reference.conv_moments(p[None], q[None], kernel, **options, squares=False)[0]
            for p, q in zip(x, g, strict=True)
        ]
        return torch.stack(one)

    with one_thread():
        x, g = x.double(), g.double()
        return each(x, g), each(x.abs(), g.abs())


@lru_cache
def contributions_of(name, dtype):
    x, g, *layer = case(name, dtype)
    return contributions(x.cpu(), g.cpu(), *layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_against_reference(backend, dtype):
    for name in CASES:
        x, g, kernel, options = case(name, dtype)
        c, size_of_c = map(here, contributions_of(name, dtype))
        got = ops.conv_moments(x, g, kernel, **options, squares=True)
        assert_right(got, c, size_of_c, g[0, 0].numel(), dtype, backend, name)
        without = ops.conv_moments(x, g, kernel, **options, squares=False)
        assert without[1] is None
        assert same_bits(without[0], got[0]), name
        assert same_bits(without[2], got[2]), name


@st.composite
def convolutions(draw):
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    few = [[1, 2, 3, 4, 5, 7, 11], [1, 2, 3, 5, 7], [1, 2, 3]][dims - 1]
    groups = draw(st.sampled_from([1, 1, 2, 3, 8, 33]))
    channels = [groups * draw(st.sampled_from([1, 2, 3] if groups > 3 else [1, 2, 3, 7, 17, 40])) for _ in range(2)]
    kernel, stride, dilation, padding, size = [], [], [], [], []
    for _ in range(dims):
        k, d = draw(st.sampled_from(few)), draw(st.integers(1, 3))
        p = draw(st.integers(0, 3))
        least = max(1, (k - 1) * d + 1 - 2 * p)
        kernel.append(k)
        dilation.append(d)
        padding.append(p)
        stride.append(draw(st.integers(1, 3)))
        size.append(least + draw(st.integers(0, [600, 20, 5][dims - 1])))
    return {
        "batch": draw(st.integers(1, 5)),
        "channels": channels,
        "size": size,
        "kernel": tuple(kernel),
        "options": {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups},
        "dtype": draw(st.sampled_from(DTYPES)),
        "isa": draw(st.sampled_from(ops.supported_isas())),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_conv_is_what_autograd_gives_each_sample(conv):
    make = torch.Generator().manual_seed(conv["seed"])
    (inputs, outputs), kernel, options, batch = conv["channels"], conv["kernel"], conv["options"], conv["batch"]
    forward = CONV[len(kernel)]
    x = torch.randn(batch, inputs, *conv["size"], generator=make, dtype=torch.float64).to(conv["dtype"])
    weight = torch.zeros(outputs, inputs // options["groups"], *kernel, dtype=torch.float64, requires_grad=True)
    g = torch.randn(forward(x.double(), weight, **options).shape, generator=make, dtype=torch.float64).to(conv["dtype"])
    with one_thread():
        c, size_of_c = (
            torch.stack(
                [
                    torch.autograd.grad(forward(one[None], weight, **options), weight, of_one[None])[0]
                    for one, of_one in zip(p, q, strict=True)
                ]
            )
            for p, q in ((x.double(), g.double()), (x.double().abs(), g.double().abs()))
        )
    before = ops.isa()
    ops.select_isa(conv["isa"])
    try:
        got = ops.conv_moments(x, g, kernel, **options, squares=True)
    finally:
        ops.select_isa(before)
    assert_right(got, c, size_of_c, g[0, 0].numel(), conv["dtype"], conv["isa"], "autograd")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_is_the_same_with_its_operands_swapped(backend, dims):
    options = numbers((3,) * dims, stride=2, padding=1, dilation=2, groups=2)
    x = torch.randn(4, 6, *(4,) * dims, dtype=torch.float64)
    weight = torch.randn(6, 5, *(3,) * dims, dtype=torch.float64, requires_grad=True)  # (inputs, outputs/groups, ...)
    y = TRANSPOSED[dims](x, weight, **options)
    g = torch.randn_like(y)
    c = torch.stack(
        [
            torch.autograd.grad(TRANSPOSED[dims](a[None], weight, **options), weight, b[None])[0]
            for a, b in zip(x, g, strict=True)
        ]
    )
    got = ops.conv_moments(g, x, (3,) * dims, **options, squares=True)
    for a, b in zip(got, reference.contribution_sums(c, squares=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- Memory -----------------------------------------------------------------------------------------------------------


def layouts(x):
    """The same values, differently laid out."""
    yield "last dimension strided", torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    yield "middle", torch.nn.functional.pad(x, (2, 3), value=torch.nan)[..., 2:-3]
    yield "channels first", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "channels last", x.contiguous(memory_format=torch.channels_last)
    room = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    room[1:] = x.flatten()
    yield "misaligned", room[1:].view(x.shape)


LAID_OUT = ("3x3", "3x3, stride 2", "1x1", "1x1, few outputs", "few outputs", "depthwise", "many groups", "large")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_of_any_layout_gives_the_same_bits(backend, dtype):
    for name in LAID_OUT:
        x, g, kernel, options = case(name, dtype)
        expected = ops.conv_moments(x, g, kernel, **options, squares=True)
        for (what, p), (_, q) in zip(layouts(x), layouts(g), strict=True):
            for got in (
                ops.conv_moments(p, g, kernel, **options, squares=True),
                ops.conv_moments(x, q, kernel, **options, squares=True),
            ):
                assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), f"{name}, {what}"


def test_conv_of_expanded_operands(backend):
    x, g = torch.randn(1, 1, 6, 7).expand(3, 4, 6, 7), torch.randn(1, 5, 1, 1).expand(3, 5, 6, 7)
    options = numbers((3, 3), padding=1)
    got = ops.conv_moments(x, g, (3, 3), **options, squares=True)
    expected = ops.conv_moments(x.contiguous(), g.contiguous(), (3, 3), **options, squares=True)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_writes_its_results_and_nothing_else(backend, dtype):
    for name in CASES:
        x, g, kernel, options = case(name, dtype)
        expected = ops.conv_moments(x, g, kernel, **options, squares=True)
        x, g = Fenced(x, 3).tensor, Fenced(g, 1).tensor  # what lies around the operands is NaN
        shape = expected[0].shape
        total, centred = (Fenced(torch.zeros(shape, dtype=real_of(dtype)), 1) for _ in range(2))
        norms = Fenced(torch.zeros(len(x), dtype=torch.float64), 1)
        layer = ops.binary.ConvNumbers(kernel, *(options[n] for n in ("stride", "padding", "dilation", "groups")))
        rooms = Rooms()
        ops.binary.conv_moments(x, g, layer, total.tensor, centred.tensor, norms.tensor, rooms)
        assert all(f.is_intact() for f in (total, centred, norms, *rooms.made)), name
        got = (total.tensor, centred.tensor, norms.tensor)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), name


# ---- Bit for bit ------------------------------------------------------------------------------------------------------


def several(dtype):
    results = []
    for name in CASES:
        x, g, kernel, options = case(name, dtype)
        results.append(ops.conv_moments(x, g, kernel, **options, squares=True))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_is_the_same_for_any_number_of_threads(isa, dtype):
    assert_all_same(on_thread_counts(lambda: several(dtype)))


@pytest.mark.skipif(len(WITH_FMA) < 2, reason="this machine runs one level with FMA hardware; two are needed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_is_the_same_on_all_levels(dtype):
    assert_all_same(on_all_levels(lambda: several(dtype)))


# ---- Numbers that are hard --------------------------------------------------------------------------------------------


def test_conv_with_constant_and_tiny_noise(backend):
    batch = 64
    make = torch.Generator().manual_seed(1)
    x = torch.ones(batch, 3, 1, 1)
    g = here((1000 + 0.01 * torch.randn(batch, 20, 1, 1, generator=make, dtype=torch.float64, device="cpu")).float())
    _, centred, _ = ops.conv_moments(x, g, (1, 1), **numbers((1, 1)), squares=True)
    exact = (g.double() - g.double().mean(0)).square().sum(0)[:, None].expand(20, 3, 1, 1)
    torch.testing.assert_close(centred.double(), exact, rtol=0.02, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("name", ["3x3", "few outputs", "depthwise", "large", "large, depthwise", "large, few outputs"])
@pytest.mark.parametrize("size", [1e-30, 1e-21, 1e21, 1e30])
def test_conv_norms_outside_the_range_of_float32_squares(backend, name, size):
    x, g, kernel, options = case(name, torch.float32)
    x[0], g[0] = x[0] * size**0.5, g[0] * size**0.5
    g[1] = 0
    _, _, sq_norms = ops.conv_moments(x, g, kernel, **options, squares=False)
    exact = contributions(x, g, kernel, options)[0].flatten(1).square().sum(1)
    torch.testing.assert_close(sq_norms, exact, rtol=1e-5, atol=0)
    assert sq_norms[1] == 0


@pytest.mark.parametrize("name", ["3x3", "few outputs", "depthwise", "1x1", "1x1, few outputs"])
def test_a_bad_number_stays_in_its_sample_and_its_channel(backend, name):
    x, g, kernel, options = case(name, torch.float32)
    expected = ops.conv_moments(x, g, kernel, **options, squares=True)
    g[1, 2, 3, 3] = torch.nan
    total, centred, sq_norms = ops.conv_moments(x, g, kernel, **options, squares=True)
    others = torch.arange(g.shape[1]) != 2
    assert same_bits(total[others], expected[0][others])
    assert same_bits(centred[others], expected[1][others])
    assert total[2].isnan().all()
    assert centred[2].isnan().all()
    assert sq_norms.isnan().tolist() == [b == 1 for b in range(len(x))]
    assert same_bits(sq_norms[0], expected[2][0])


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("shape", "g"),
    [
        ((0, 2, 4, 4), (0, 3, 4, 4)),
        ((2, 0, 4, 4), (2, 3, 4, 4)),
        ((2, 2, 4, 4), (2, 0, 4, 4)),
        ((2, 2, 0, 4), (2, 3, 4, 4)),
        ((2, 2, 4, 4), (2, 3, 4, 0)),
    ],
)
@pytest.mark.parametrize("squares", [False, True])
def test_conv_of_nothing_is_zero(backend, shape, g, squares):
    total, centred, sq_norms = ops.conv_moments(
        torch.ones(shape), torch.ones(g), (3, 3), **numbers((3, 3), padding=1), squares=squares
    )
    assert total.shape == (g[1], shape[1], 3, 3)
    assert total.abs().sum() == 0
    assert (centred is not None) == squares
    assert centred is None or centred.abs().sum() == 0
    assert sq_norms.tolist() == [0.0] * shape[0]


# ---- Refusals ---------------------------------------------------------------------------------------------------------

X, G = torch.ones(2, 4, 5, 5), torch.ones(2, 6, 5, 5)
GOOD = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


@pytest.mark.parametrize(
    ("x", "g", "changes", "error", "sentence"),
    [
        (None, G, {}, TypeError, "conv_moments: x is NoneType; expected a torch.Tensor of float64, float32, bfloat16 or float16 on cpu"),
        (X, G.long(), {}, TypeError, "conv_moments: g is torch.int64 on cpu; expected a torch.Tensor"),
        (X, G.double(), {}, TypeError, "conv_moments: g is torch.float64 on cpu but x is torch.float32 on cpu; expected one dtype"),
        (X[0, 0], G, {}, ValueError, "conv_moments: x expected shape (B, C, *space) with 1 to 3 space dimensions, got (5, 5)"),
        (X[None, None], G, {}, ValueError, "conv_moments: x expected shape (B, C, *space) with 1 to 3 space dimensions, got (1, 1, 2, 4, 5, 5)"),
        (X, G[0], {}, ValueError, "conv_moments: g expected shape (B, O, H, W), got (6, 5, 5)"),
        (X[0], G, {}, ValueError, "conv_moments: g expected shape (B, O, L), got (2, 6, 5, 5)"),
        (X, G[:1], {}, ValueError, "conv_moments: g has shape (1, 6, 5, 5) but x has (2, 4, 5, 5); expected the same B"),
        (X, G, {"kernel_size": (3,)}, ValueError, "conv_moments: kernel_size expected 2 whole numbers from 1"),
        (X, G, {"kernel_size": 3}, ValueError, "one for each space dimension, got 3"),
        (X, G, {"kernel_size": (3, 0)}, ValueError, "got (3, 0)"),
        (X, G, {"stride": (1, 2.0)}, ValueError, "conv_moments: stride expected 2 whole numbers from 1"),
        (X, G, {"stride": (1, True)}, ValueError, "got (1, True)"),
        (X, G, {"dilation": (0, 1)}, ValueError, "conv_moments: dilation expected 2 whole numbers from 1"),
        (X, G, {"dilation": (1, 10**30)}, ValueError, "conv_moments: dilation expected 2 whole numbers from 1"),
        (X, G, {"dilation": (2**20, 2**20), "kernel_size": (9, 9)}, ValueError, "conv_moments: kernel_size, stride and dilation expected to reach over at most 2^40 positions of x, got 70368"),
        (X, G, {"padding": "same"}, ValueError, "conv_moments: padding expected 2 whole numbers, one for each space dimension, got 'same'"),
        (X, G, {"groups": 3}, ValueError, "conv_moments: groups expected a divisor of the channels of x and of g, 4 and 6, got 3"),
        (X, G, {"groups": 0}, ValueError, "got 0"),
    ],
)  # fmt: skip
def test_conv_refuses(x, g, changes, error, sentence):
    with pytest.raises(error) as refused:
        ops.conv_moments(x, g, **{**GOOD, **changes}, squares=True)
    assert sentence in str(refused.value)


def test_binary_refuses_results_of_a_convolution_that_do_not_fit():
    good = [torch.full((6, 4, 3, 3), 7.0), torch.full((6, 4, 3, 3), 7.0), torch.full((2,), 7.0, dtype=torch.float64)]
    bad = {"total": torch.ones(6, 4, 3, 2), "centred": torch.ones(6, 4, 3, 3).double(), "sq_norms": torch.ones(2)}
    layer = ops.binary.ConvNumbers((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for i, (name, wrong) in enumerate(bad.items()):
        results = [*good]
        results[i] = wrong
        with pytest.raises(
            ValueError, match=f"conv_moments: {name} expected {math.prod((6, 4, 3, 3)) if i < 2 else 2} "
        ):
            ops.binary.conv_moments(X, G, layer, *results)
    with pytest.raises(ValueError, match=r"dense along their last dimension, got a stride of 2"):
        ops.binary.conv_moments(torch.ones(2, 4, 5, 10)[..., ::2], G, layer, *good)
    assert all((x == 7).all() for x in good), "something was written"
