"""outer_moments against float64, with a budget of errors."""

import pytest
import torch
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
# (B, T, I, O): a tile is 14 x 32 or 6 x 16, a unit 42 x 32, a block 504 x 512, a chunk 512 rows, at most 1024 of a sample.
SIZES = [
    (1, 1, 1, 1),
    (2, 1, 3, 2),
    (3, 2, 31, 5),
    (9, 5, 32, 6),
    (2, 33, 33, 7),
    (3, 5, 15, 13),
    (2, 2, 16, 14),
    (3, 33, 17, 15),
    (9, 2, 64, 41),
    (2, 5, 65, 42),
    (3, 1, 70, 43),
    (600, 1, 9, 12),
    (200, 3, 20, 20),
    (3, 130, 5, 29),
    (3, 1025, 6, 3),
    (2, 2100, 33, 15),
    (3, 2, 130, 515),
    (2, 3, 515, 130),
]


def operands(batch, steps, inputs, outputs, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(batch, steps, n, generator=make, dtype=torch.float64, device="cpu") for n in (inputs, outputs))
    # Means that differ from zero, and sizes over some octaves, so that nothing hides in its neighbour's rounding.
    a = a * torch.exp2(torch.randint(-4, 2, (inputs,), generator=make, device="cpu").double()) + 0.5
    return here(a.to(dtype)), here(g.to(dtype))


def outer_products(a, g):
    a, g = a.double(), g.double()
    with one_thread():
        return torch.einsum("bto,bti->boi", g, a), torch.einsum("bto,bti->boi", g.abs(), a.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_against_reference(backend, dtype):
    for size in SIZES:
        a, g = operands(*size, dtype)
        c, size_of_c = outer_products(a, g)
        what = f"{dtype} {size}"
        got = ops.outer_moments(a, g, squares=True)
        assert_right(got, c, size_of_c, size[1], dtype, backend, what)
        without = ops.outer_moments(a, g, squares=False)
        assert without[1] is None
        assert same_bits(without[0], got[0]), what
        assert same_bits(without[2], got[2]), what


def test_every_width_of_a_tile(backend):
    for n in range(1, 71):
        a, g = operands(2, 3, n, 71 - n, seed=n)
        c, size_of_c = outer_products(a, g)
        assert_right(ops.outer_moments(a, g, squares=True), c, size_of_c, 3, torch.float32, backend, f"I {n}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reference_is_a_loop_over_samples(dtype):
    a, g = operands(5, 4, 3, 2, dtype)
    c = torch.stack([y.T @ x for x, y in zip(a, g, strict=True)])
    total, centred, sq_norms = reference.outer_moments(a, g, squares=True)
    torch.testing.assert_close(total, c.sum(0))
    torch.testing.assert_close(centred, c.var(0) * 4)
    torch.testing.assert_close(sq_norms, c.double().flatten(1).norm(dim=1) ** 2, rtol=1e-6, atol=0)


def test_total_is_what_autograd_gives(backend):
    layer, x, weight = torch.nn.Linear(70, 45), torch.randn(4, 6, 70), torch.randn(4, 6, 45)
    (layer(x) * weight).sum().backward()
    total, _, _ = ops.outer_moments(x, weight, squares=False)
    torch.testing.assert_close(total, layer.weight.grad, rtol=1e-5, atol=1e-4)


# ---- Memory -----------------------------------------------------------------------------------------------------------


def layouts(x):
    """The same values, differently laid out."""
    batch, steps, n = x.shape
    wide = torch.full((batch, steps, n + 7), torch.nan, dtype=x.dtype)
    wide[:, :, 3 : n + 3] = x
    yield "middle of rows", wide[:, :, 3 : n + 3]
    yield "steps first", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "last dimension strided", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "every other sample", torch.stack([x, torch.full_like(x, torch.nan)], dim=1)[:, 0]
    room = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    room[1:] = x.flatten()
    yield "misaligned", room[1:].view(x.shape)
    yield "parameter", torch.nn.Parameter(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_of_any_layout_gives_the_same_bits(backend, dtype):
    a, g = operands(3, 9, 37, 45, dtype)
    expected = ops.outer_moments(a, g, squares=True)
    for (what, x), (_, y) in zip(layouts(a), layouts(g), strict=True):
        for got in (ops.outer_moments(x, g, squares=True), ops.outer_moments(a, y, squares=True)):
            assert all(same_bits(p, q) for p, q in zip(got, expected, strict=True)), what


def test_outer_of_expanded_operands(backend):
    a, g = operands(1, 1, 37, 45)
    wide_a, wide_g = a.expand(4, 3, 37), g.expand(4, 3, 45)
    got = ops.outer_moments(wide_a, wide_g, squares=True)
    expected = ops.outer_moments(wide_a.contiguous(), wide_g.contiguous(), squares=True)
    assert all(same_bits(p, q) for p, q in zip(got, expected, strict=True))
    one = torch.ones(()).expand(2, 3, 4)  # stride 0 along the last dimension too
    assert ops.outer_moments(one, one, squares=False)[0].tolist() == [[6.0] * 4] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_writes_its_results_and_nothing_else(backend, dtype):
    for size in ((3, 5, 37, 45), (2, 3, 515, 7), (2, 3, 1, 71), (70, 7, 65, 3)):
        a, g = (Fenced(x, 3).tensor for x in operands(*size, dtype))  # what lies around the operands is NaN
        batch, _, inputs, outputs = size
        total, centred = (Fenced(torch.zeros(outputs, inputs, dtype=real_of(dtype)), 1) for _ in range(2))
        norms = Fenced(torch.zeros(batch, dtype=torch.float64), 1)
        rooms = Rooms()
        ops.binary.outer_moments(a, g, total.tensor, centred.tensor, norms.tensor, rooms)
        assert all(x.is_intact() for x in (total, centred, norms, *rooms.made))
        expected = ops.outer_moments(a.clone(), g.clone(), squares=True)
        got = (total.tensor, centred.tensor, norms.tensor)
        assert all(same_bits(p, q) for p, q in zip(got, expected, strict=True))


# ---- Bit for bit ------------------------------------------------------------------------------------------------------


def several(dtype):
    return [
        ops.outer_moments(*operands(*size, dtype), squares=True)
        for size in [*SIZES, (9, 20, 260, 300), (2, 3, 1100, 900)]
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_is_the_same_for_any_number_of_threads(isa, dtype):
    assert_all_same(on_thread_counts(lambda: several(dtype)))


@pytest.mark.skipif(len(WITH_FMA) < 2, reason="this machine runs one level with FMA hardware; two are needed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_is_the_same_on_all_levels(dtype):
    assert_all_same(on_all_levels(lambda: several(dtype)))


# ---- Numbers that are hard --------------------------------------------------------------------------------------------


def test_constant_and_tiny_noise(backend):
    """Contributions of 1000 +- 0.01: sums of squares have lost the noise, a sum of squared deviations has not."""
    batch = 64
    make = torch.Generator().manual_seed(1)
    a = torch.ones(batch, 1, 40)
    g = here((1000 + 0.01 * torch.randn(batch, 1, 50, generator=make, dtype=torch.float64, device="cpu")).float())
    _, centred, _ = ops.outer_moments(a, g, squares=True)
    exact = (g.double() - g.double().mean(0)).square().sum(0).T.expand(50, 40)
    torch.testing.assert_close(centred.double(), exact, rtol=0.02, atol=0)
    raw = g.square().sum(0) - g.sum(0) ** 2 / batch
    assert ((raw.T - exact).abs() / exact).max() > 1, "the case is too easy"


def test_equal_samples_have_no_spread(backend):
    a, g = operands(1, 7, 33, 20)
    _, centred, _ = ops.outer_moments(a.expand(2, 7, 33), g.expand(2, 7, 20), squares=True)
    assert centred.tolist() == torch.zeros(20, 33).tolist()


@pytest.mark.pairwise
@pytest.mark.parametrize("steps", [1, 5, 1100])
@pytest.mark.parametrize("size", [1e-30, 1e-21, 1e-18, 1e-12, 1e12, 1e18, 1e21, 1e30])
def test_norms_outside_the_range_of_float32_squares(backend, size, steps):
    a, g = operands(4, steps, 37, 45)
    root = size**0.5
    a[1], g[1] = a[1] * root, g[1] * root
    a[2] = 0
    _, _, sq_norms = ops.outer_moments(a, g, squares=False)
    exact = torch.einsum("bto,bti->boi", g.double(), a.double()).flatten(1).square().sum(1)
    torch.testing.assert_close(sq_norms, exact, rtol=1e-5, atol=0)
    assert sq_norms[2] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_number_stays_where_it_is(backend, value):
    a, g = operands(4, 9, 70, 45)
    expected = ops.outer_moments(a, g, squares=True)
    a[2, 5, 33] = value
    total, centred, sq_norms = ops.outer_moments(a, g, squares=True)
    assert (sq_norms[2] == torch.inf) if value == torch.inf else sq_norms[2].isnan()
    others = torch.arange(70) != 33
    assert same_bits(total[:, others], expected[0][:, others])
    assert same_bits(centred[:, others], expected[1][:, others])
    assert not total[:, 33].isfinite().any()
    assert centred[:, 33].isnan().all()
    keep = torch.tensor([0, 1, 3])
    assert same_bits(sq_norms[keep], expected[2][keep])


def test_an_infinite_gradient_is_an_infinite_norm(backend):
    """Not NaN, which infinity times the zeros that fill up a tile would be."""
    a, g = operands(3, 5, 37, 45)
    g[1, 2, 7] = torch.inf
    total, _, sq_norms = ops.outer_moments(a, g, squares=True)
    assert sq_norms.isinf().tolist() == [False, True, False]
    assert total[7].isinf().all()
    assert total[torch.arange(45) != 7].isfinite().all()


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("squares", [False, True])
def test_outer_of_nothing_is_zero(backend, shape, squares):
    batch, steps, inputs, outputs = shape
    total, centred, sq_norms = ops.outer_moments(
        torch.ones(batch, steps, inputs), torch.ones(batch, steps, outputs), squares=squares
    )
    assert total.tolist() == torch.zeros(outputs, inputs).tolist()
    assert total.shape == (outputs, inputs)
    assert (centred is not None) == squares
    assert centred is None or centred.tolist() == total.tolist()
    assert sq_norms.tolist() == [0.0] * batch


# ---- Refusals ---------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("a", "g", "error", "sentence"),
    [
        (X, None, TypeError, "outer_moments: g is NoneType; expected a torch.Tensor of float64, float32, bfloat16 or float16 on cpu"),
        ("a", X, TypeError, "outer_moments: a is str; expected a torch.Tensor"),
        (X.int(), X, TypeError, "outer_moments: a is torch.int32 on cpu; expected"),
        (X.to(torch.complex64), X, TypeError, "outer_moments: a is torch.complex64 on cpu; expected"),
        (X.to("meta"), X, TypeError, "outer_moments: a is torch.float32 on meta; expected"),
        (X.to_sparse(), X, TypeError, "outer_moments: a is torch.float32 on cpu, torch.sparse_coo; expected"),
        (torch._neg_view(X), X, TypeError, "outer_moments: a is torch.float32 on cpu, with its negative bit set; expected"),
        (X, X.double(), TypeError, "outer_moments: g is torch.float64 on cpu but a is torch.float32 on cpu; expected one dtype"),
        (X[0], X, ValueError, "outer_moments: a expected shape (B, T, I), got (3, 4)"),
        (X, X[None], ValueError, "outer_moments: g expected shape (B, T, O), got (1, 2, 3, 4)"),
        (X, X[:1], ValueError, "outer_moments: g has shape (1, 3, 4) but a has (2, 3, 4); expected the same (B, T)"),
        (X, X[:, :2], ValueError, "outer_moments: g has shape (2, 2, 4) but a has (2, 3, 4); expected the same (B, T)"),
    ],
)  # fmt: skip
def test_outer_refuses(a, g, error, sentence):
    with pytest.raises(error) as refused:
        ops.outer_moments(a, g, squares=True)
    assert sentence in str(refused.value)


def test_binary_refuses_results_that_do_not_fit():
    good = [torch.full((4, 4), 7.0), torch.full((4, 4), 7.0), torch.full((2,), 7.0, dtype=torch.float64)]
    bad = {"total": torch.ones(4, 3), "centred": torch.ones(4, 4).double(), "sq_norms": torch.ones(2)}
    for i, (name, wrong) in enumerate(bad.items()):
        results = [*good]
        results[i] = wrong
        with pytest.raises(ValueError, match=f"outer_moments: {name} expected"):
            ops.binary.outer_moments(X, X, *results)
    with pytest.raises(ValueError, match=r"dense along their last dimension, got a stride of 2"):
        ops.binary.outer_moments(torch.ones(2, 3, 8)[..., ::2], X, *good)
    assert all((x == 7).all() for x in good), "something was written"
