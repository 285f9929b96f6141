"""Ops on two gradients, and Welford's update: every ISA x dtype x size x layout against the float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import Fenced, here, same_bits

from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 33, 513, ops.CHUNK - 1, ops.CHUNK + 1, 2 * ops.CHUNK + 5)
LS = (0.5, 1, 1.5, 8, 1000.0)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]


def values(size, dtype, seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=make, dtype=torch.float64, device="cpu")
    octaves = torch.randint(-3, 3, (size,), generator=make, device="cpu").double()
    return here((x * torch.exp2(octaves)).to(dtype))


def assert_near(got, exact, size, what):
    """Within six roundings of arithmetic of the largest intermediate result `size`, and one of storage."""
    real = torch.float64 if got.dtype == torch.float64 else torch.float32
    allowed = 3 * torch.finfo(real).eps * size * (2 if real == torch.float64 else 1)
    if got.dtype != real:
        info = torch.finfo(got.dtype)
        allowed = allowed + 0.5 * info.eps * exact.abs() * (1 + 1e-6) + info.smallest_normal * info.eps
    over = ((got.double() - exact).abs() - allowed).max() if got.numel() else -1
    assert over <= 0, f"{what}: over its budget by {over:.3e}"


def combined_size(a, b, l):
    return (a.abs() + b.abs()) * (0.5 + math.sqrt(2 * l - 1) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_svag_combine(backend, dtype):
    for size in SIZES:
        for offset, l in zip((0, 1, 3, 5, 0), LS, strict=True):
            a, b = values(size, dtype, 1), values(size, dtype, 2)
            fenced = [Fenced(x, offset) for x in (a, b)]
            ops.svag_combine_([fenced[0].tensor], [fenced[1].tensor], l)
            exact = a.double()
            reference.svag_combine_([exact], [b.double()], l)
            assert_near(fenced[0].tensor, exact, combined_size(a.double(), b.double(), l), f"{dtype} {size} l={l}")
            assert l != 1 or same_bits(fenced[0].tensor, a)
            assert same_bits(fenced[1].tensor, b), "the second gradient was written"
            assert all(f.is_intact() for f in fenced), "memory outside the tensors was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair_sums(backend, dtype):
    for size in SIZES:
        for offset in (0, 1):
            fenced = [Fenced(values(size, dtype, seed), offset) for seed in (1, 2)]
            a, b = (f.tensor for f in fenced)
            before = a.clone()
            got, exact = ops.pair_sums([a], [b]), reference.pair_sums([a.double()], [b.double()])
            # The difference is rounded to the arithmetic's precision where it is formed in double from exact values.
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-9)
            assert same_bits(a, before), "a gradient was written"
            assert a._version == 0 or a._version == fenced[0].block._version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_welford(backend, dtype):
    """Means and squared deviations of four samples, step by step."""
    for size in SIZES:
        samples = [values(size, dtype, seed) for seed in range(4)]
        fenced = [Fenced(torch.zeros(size, dtype=dtype), 3) for _ in range(2)]
        mean, squares = (f.tensor for f in fenced)
        for n, x in enumerate(samples, start=1):
            exact_mean, exact_squares = mean.double().clone(), squares.double().clone()
            was = exact_mean.clone()
            table = ops.welford_([mean], [x], [squares], n=n, stats="tensor")
            expected = reference.welford_([exact_mean], [x.double()], [exact_squares], n=n, stats="tensor")
            scale = was.abs() + x.double().abs()
            assert_near(mean, exact_mean, scale, f"mean {dtype} {size} n={n}")
            assert_near(
                squares, exact_squares, exact_squares.abs() + 4 * scale.square(), f"squares {dtype} {size} n={n}"
            )
            torch.testing.assert_close(table[:, :3], expected[:, :3], rtol=1e-12, atol=1e-9)
        assert all(f.is_intact() for f in fenced)


@pytest.mark.pairwise
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_of_a_pair(backend, dtype, nesterov, first):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov, "maximize": nesterov}
    for size in SIZES:
        for offset, l in zip((0, 1, 3, 5), (0.5, 1, 4.0, 33), strict=True):
            tensors = [values(size, dtype, seed) for seed in range(4)]
            w, g, v, h = [Fenced(x, offset) for x in tensors]
            table = ops.sgd_(
                [w.tensor], [g.tensor], [None if first else v.tensor], l=l, held=[h.tensor], grad_scale=2.0,
                held_scale=4.0, **options,
            )  # fmt: skip
            ew, eg, ev, eh = (x.double() for x in tensors)
            exact = reference.sgd_(
                [ew], [eg], [None if first else ev], l=l, held=[eh], grad_scale=2.0, held_scale=4.0, **options
            )
            d = combined_size(tensors[3].double() / 4, tensors[1].double() / 2, l) + tensors[0].double().abs() * 0.01
            reach = tensors[0].double().abs() + 0.1 * 2 * (d + tensors[2].double().abs())
            what = f"{dtype} size {size} l={l}"
            assert_near(w.tensor, ew, 2 * reach, what)
            torch.testing.assert_close(table[:, [0, 5, 7, 8]], exact[:, [0, 5, 7, 8]], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(table[:, 6], exact[:, 6], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(table[:, 1], exact[:, 1], rtol=1e-4, atol=1e-4)
            assert same_bits(g.tensor, tensors[1])
            assert same_bits(h.tensor, tensors[3])
            assert all(f.is_intact() for f in (w, g, v, h)), "memory outside the tensors was written"


def layouts(x):
    yield x.clone()
    yield x.t().contiguous().t()
    yield torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_no_bit(dtype, stats):
    """Every combination of layouts of w, g, v, h walks the coordinates in one order, and rows are rows."""
    base = [values(6 * 50, dtype, seed).view(6, 50) for seed in range(4)]
    expected = None
    for w in layouts(base[0]):
        for g in layouts(base[1]):
            for h in layouts(base[3]):
                v = base[2].clone()
                table = ops.sgd_([w], [g], [v], held=[h], l=3, lr=0.1, momentum=0.9, stats=stats)
                got = [w.contiguous(), v, table]
                expected = expected or [x.clone() for x in got]
                if all(x.is_contiguous() for x in (w, g, h)) or stats == "row":
                    assert all(same_bits(x, y) for x, y in zip(got[:2], expected[:2], strict=True))
                torch.testing.assert_close(got[2], expected[2], rtol=1e-12, atol=1e-12)
                assert table.shape == ((6 if stats == "row" else 1), 9)
                w = w.copy_(base[0])


def run_all(dtype):
    shapes = [(n,) for n in (1, 9, 100, 4097, 3 * ops.CHUNK + 3)] + [(300, 77)]
    lists = [[values(math.prod(s), dtype, 10 * k + i).view(s) for i, s in enumerate(shapes)] for k in range(4)]
    w, g, v, h = lists
    table = ops.sgd_(w, g, v, held=h, l=5, lr=0.1, momentum=0.9, weight_decay=0.01, stats="row")
    sums = ops.pair_sums(g, h, "row")
    ops.welford_(v, g, w, n=3)
    ops.svag_combine_(g, h, 7)
    return [*w, *g, *v, table, sums]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_everywhere(dtype):
    """Whatever the number of threads, and on every level with FMA hardware."""
    chosen, results = ops.isa(), []
    try:
        for name in WITH_FMA or [chosen]:
            ops.select_isa(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run_all(dtype))
    finally:
        ops.select_isa(chosen)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_missing_partners_and_mixed_lists():
    """Entries without a pair are plain steps in the same table; entries without a gradient are skipped."""
    w = [torch.ones(2), torch.ones(3), torch.ones(4)]
    table = ops.sgd_(w, [torch.ones(2), torch.ones(3), None], held=[torch.ones(2) * 3, None, None], l=5, lr=0.1)
    assert table.shape == (3, 9)
    assert table[0, 5:].tolist() == [6, 8, 18, 2]
    assert table[1, 1] == 3
    assert table[1, 5:].isnan().all()
    assert table[2].isnan().all()
    exact = [torch.ones(2), torch.ones(3), torch.ones(4)]
    reference_table = reference.sgd_(
        exact, [torch.ones(2), torch.ones(3), None], held=[torch.ones(2) * 3, None, None], l=5, lr=0.1
    )
    torch.testing.assert_close(table[:, 5:], reference_table[:, 5:], equal_nan=True)
    assert all(torch.allclose(a, b) for a, b in zip(w, exact, strict=True))


@settings(max_examples=60, deadline=None)
@given(l=st.floats(0.5, 1e6), a=st.floats(-1e3, 1e3), b=st.floats(-1e3, 1e3))
def test_combination_is_stable(l, a, b):
    """c1 a + c2 b, and exactly a where both are a: a large l does not cancel."""
    x = [torch.tensor([a, a], dtype=torch.float64)]
    ops.svag_combine_(x, [torch.tensor([b, a], dtype=torch.float64)], l)
    root = math.sqrt(2 * l - 1)
    assert x[0][0].item() == pytest.approx((a + b) / 2 + root / 2 * (a - b), rel=1e-12, abs=1e-9)
    assert x[0][1].item() == a


# ---- Refusals ----------------------------------------------------------------------------------------------------------

ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.svag_combine_([ONE], [ONE], 0.4), ValueError, "svag_combine_: l expected a number of at least 1/2, got 0.4"),
        (lambda: ops.svag_combine_([ONE], [], 1), ValueError, "svag_combine_: grads_b has 0 entries but grads_a has 1"),
        (lambda: ops.svag_combine_([ONE], [None], 1), TypeError, r"grads_b\[0\] is None but its partner is not"),
        (lambda: ops.svag_combine_([ONE], [torch.ones(3)], 1), ValueError, r"grads_b\[0\] has shape \(3,\) but grads_a\[0\]"),
        (lambda: ops.svag_combine_([ONE], [ONE.double()], 1), TypeError, r"grads_b\[0\] is torch.float64 on cpu but grads_a"),
        (lambda: ops.svag_combine_([ONE.int()], [ONE.int()], 1), TypeError, r"grads_a\[0\] is torch.int32 on cpu; expected"),
        (lambda: ops.svag_combine_([torch.ones(1).expand(2)], [ONE], 2), ValueError, r"grads_a\[0\] of shape \(2,\) is expanded"),
        (lambda: ops.pair_sums([ONE], [ONE], "all"), ValueError, 'pair_sums: stats expected None, "tensor" or "row", got'),
        (lambda: ops.pair_sums([ONE], [[1.0]]), TypeError, r"grads_b\[0\] is list; expected"),
        (lambda: ops.welford_([ONE], [ONE], [ONE.clone()], n=0), ValueError, "welford_: n expected a whole number from 1, got 0"),
        (lambda: ops.welford_([ONE], [ONE.clone()], [], n=1), ValueError, "welford_: squares has 0 entries but means has 1"),
        (lambda: ops.welford_([ONE], [torch.ones(3)], [ONE.clone()], n=1), ValueError, r"samples\[0\] has shape \(3,\) but means"),
        (lambda: ops.welford_([ONE], [ONE.clone()], [ONE], n=1), ValueError, r"squares\[0\] is the same memory as means\[0\]"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=0.1, held=[]), ValueError, "sgd_: held has 0 entries but params has 1"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=0.1, held=[torch.ones(3)]), ValueError, r"held\[0\] has shape \(3,\)"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=0.1, held=[ONE.half()]), TypeError, r"held\[0\] is torch.float16 on cpu"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=0.1, held=[ONE], l=0), ValueError, "sgd_: l expected a number"),
        (lambda: ops.svag_combine_([ONE], [ONE], 10**400), ValueError, "svag_combine_: l expected a number of at least 1/2"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=0.1, grad_scale=0), ValueError, "sgd_: grad_scale expected a number that is not 0, got 0"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=0.1, held=[ONE], held_scale="x"), ValueError, "sgd_: held_scale expected a number that is not 0, got 'x'"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=10**400, weight_decay=torch.tensor(0.1)), ValueError, "sgd_: lr expected one number, got 1000"),
        (lambda: ops.sgd_([ONE], [ONE.clone()], lr=torch.ones(2)), ValueError, "sgd_: lr expected one number, got tensor"),
        (lambda: ops.grad_sq_norms([ONE], grad_scale=0.0), ValueError, "grad_sq_norms: grad_scale expected a number that is not 0, got 0.0"),
    ],
)  # fmt: skip
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
    assert ONE.tolist() == [1, 1]


def test_refuses_a_pair_on_the_same_memory():
    w, g = torch.ones(4), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"sgd_: the held gradient of params\[0\] and its new one share memory"):
        ops.sgd_([w], [g], held=[g], l=2, lr=0.1)
    assert w.tolist() == [1] * 4
