"""moments: the kernel against its float64 reference, and what the public function says of samples of every kind."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.memory import Fenced, here, same_bits, same_sums
from torch import nn

import normkern
from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
ROWS = (1, 2, 3, 7, 8, 9, 17, 128, 129, 300)  # eight at a time, 128 to a group
COLUMNS = (0, 1, 7, 9, 15, 16, 17, 33, 1023, 1024, 1025, 2100)  # 8 or 16 at a time, 1024 to a row's sum


def samples(rows, *shape, dtype=torch.float32, seed=0):
    """Columns of every scale, with means of every size against their spread."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, *shape), generator=make, dtype=torch.float64, device="cpu")
    x = x + torch.randn(shape, generator=make, dtype=torch.float64, device="cpu") * 2
    return here((x * torch.exp2(torch.randint(-6, 6, shape, generator=make, device="cpu").double())).to(dtype))


def assert_near(got, x, squares=True):
    """Against a float64 reference: 25 roundings on the way of a row into its sums, and the loss of the shift."""
    mean, centred, norms = got
    exact_mean, exact_centred, exact_norms = reference.moments(x.double())
    eps = torch.finfo(mean.dtype).eps
    # The reference has roundings of its own.
    few = 16 * eps if mean.dtype == torch.float32 else 1000 * eps
    spread = (exact_centred / len(x)).sqrt()
    assert ((mean.double() - exact_mean).abs() <= eps * exact_mean.abs() + few * spread).all()
    if squares:
        assert ((centred.double() - exact_centred).abs() <= 3 * few * exact_centred).all()
    else:
        assert centred is None
    assert ((norms - exact_norms).abs() <= few * exact_norms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel(backend, dtype):
    for rows in ROWS:
        for columns, offset in zip(COLUMNS, (0, 1, 3, 0, 1, 0, 5, 7, 1, 0, 3, 0), strict=True):
            x = samples(rows, columns, dtype=dtype)
            fenced, totals = Fenced(x, offset), torch.full((2,), torch.nan, dtype=torch.float64)
            mean, centred, norms = ops.moments(fenced.tensor, totals=totals)
            real = torch.float64 if dtype == torch.float64 else torch.float32
            assert mean.dtype == centred.dtype == real
            assert norms.dtype == torch.float64
            assert_near((mean, centred, norms), x)
            near = {"rtol": 1e-13 if dtype == torch.float64 else 1e-6, "atol": 0}
            torch.testing.assert_close(totals[0], mean.double().square().sum(), **near)
            torch.testing.assert_close(totals[1], centred.double().sum(), **near)
            assert same_bits(fenced.tensor, x)
            assert fenced.is_intact()
            halved, of_halved = ops.moments(x, factor=0.5, totals=totals), totals.clone()
            assert same_bits(halved[0], mean)
            assert same_bits(halved[1], centred / 2)
            assert of_halved.isfinite().all()
            plain = ops.moments(x, squares=False, totals=totals)
            assert same_bits(plain[0], mean)
            assert plain[1] is None
            assert same_sums(backend, plain[2], norms)
            assert totals[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_do_not_depend_on_what_was_in_memory(backend, dtype):
    """Without squares nothing is read of where they would be."""
    x = samples(16, 300, dtype=dtype)
    mean, norms = ops.moments(x)[::2]
    ops.moments(torch.full_like(x, torch.nan))  # leaves its NaN on the stack
    plain = ops.moments(x, squares=False)
    assert same_bits(plain[0], mean)
    assert same_sums(backend, plain[2], norms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_stay_inside(backend, dtype, monkeypatch):
    """The kernel writes its columns and nothing beside them."""
    made = []

    def fenced(like, dtype=None):
        made.append(Fenced(torch.zeros_like(like, dtype=dtype), len(made)))
        return made[-1].tensor

    monkeypatch.setattr(torch, "empty_like", fenced)
    for columns in (1, 7, 16, 1023, 1025, 2100):
        ops.moments(samples(9, columns, dtype=dtype))
    assert len(made) == 12
    assert all(f.is_intact() for f in made)


def layouts(x):
    """The same values, each in another place."""
    yield "transposed", x.t().contiguous().t()
    yield "every other column", torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    yield "every other row", torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
    yield "upside down", x.flip(0).clone().flip(0)
    yield "no alignment", Fenced(x, 3).tensor
    yield "part of wider rows", torch.nn.functional.pad(x, (3, 5), value=torch.nan)[:, 3:-5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_no_bit(backend, dtype):
    for rows, columns in ((2, 1), (5, 40), (19, 1030), (130, 17)):
        x = samples(rows, columns, dtype=dtype)
        expected = ops.moments(x)
        for name, y in layouts(x):
            assert torch.equal(x, y)
            got = ops.moments(y)
            assert all(map(same_bits, got[:2], expected[:2])), f"{name} {rows} x {columns}"
            assert same_sums(backend, got[2], expected[2]), f"{name} {rows} x {columns}"


def test_expanded_samples(backend):
    row, column = samples(1, 40), samples(6, 1)
    for x in (row.expand(6, 40), column.expand(6, 40), samples(1, 1).expand(6, 40)):
        assert all(map(same_bits, ops.moments(x), ops.moments(x.clone())))


def test_rows_of_every_shape(backend):
    """Permuted and sliced rows: means are of the rows' shape, whatever their memory."""
    x = samples(5, 3, 4, 6, 7)
    views = [
        x,
        x.contiguous(memory_format=torch.channels_last_3d),
        x.permute(4, 0, 1, 2, 3),
        x.permute(0, 4, 2, 1, 3),
        x[:, 1:, ::2, 1:5, ::3],
        x[:, :, :, :, :1],
        x[:, :1].expand(5, 4, 4, 6, 7),
        x.flatten(1)[:, :0].view(5, 0, 3),
        samples(5),
        x.permute(3, 4, 0, 2, 1)[:, ::2],
    ]
    for view in views:
        got = ops.moments(view)
        exact = reference.moments(view.double())
        for a, b in zip(got, exact, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_list_is_one_problem(backend, dtype):
    shapes = [(3, 5), (), (2000,), (0, 4), (1,), (2, 1030)]
    tensors = [samples(9, *s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    flat = torch.cat([x.reshape(9, x[0].numel()) for x in tensors], 1)
    totals, of_flat = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.float64)
    means, centred, norms = ops.moments(tensors, totals=totals)
    mean, squares, flat_norms = ops.moments(flat, totals=of_flat)
    assert [m.shape for m in means] == [c.shape for c in centred] == [x.shape[1:] for x in tensors]
    assert same_bits(torch.cat([m.flatten() for m in means]), mean)
    assert same_bits(torch.cat([c.flatten() for c in centred]), squares)
    near = {"rtol": 1e-13 if dtype == torch.float64 else 1e-6, "atol": 0}
    torch.testing.assert_close(norms, flat_norms, **near)
    torch.testing.assert_close(totals, of_flat, **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_wide_tiles(backend, dtype):
    """Many columns are taken more at a time, and none of them knows."""
    x = samples(10, 1025, dtype=dtype).repeat(1, 1025)[:, 7:]
    x[:, 500_000] = 1e-30
    mean, centred, norms = ops.moments(x)
    for begin in (0, 2000, 4090, 499_990, x.shape[1] - 1000):
        part = slice(begin, begin + 1000)
        expected = ops.moments(x[:, part])
        assert same_bits(mean[part], expected[0])
        assert same_bits(centred[part], expected[1])
    torch.testing.assert_close(norms, x.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_everywhere(dtype):
    """Whatever the number of threads, and on every level with FMA hardware."""
    x = samples(140, 20_000, dtype=dtype)
    lists = [x[:, :5], x[:, 5:9000], x[:, 9000:].t().contiguous().t()]
    # A column, a row and a tile that floats cannot hold are run in double.
    if dtype in (torch.float32, torch.bfloat16):
        x[:, 3], x[7], x[:, 4096:5120] = 1e30, 1e-30, x[:, 4096:5120] * 1e-25
    chosen, results = ops.isa(), []
    try:
        for name in WITH_FMA or [chosen]:
            ops.select_isa(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                totals = torch.empty(2, dtype=torch.float64)
                means, centred, norms = ops.moments(lists, totals=totals)
                results.append([*ops.moments(x), *means, *centred, norms, totals])
    finally:
        ops.select_isa(chosen)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# ---- Numbers that are hard --------------------------------------------------------------------------------------------


def test_tiny_noise_on_a_constant(backend):
    """The input's own rounding is all that may be lost: the samples that came are measured to float32's precision."""
    for rows in (2, 50, 128, 1000):
        x = (1000 + 0.01 * torch.randn(rows, 3000, dtype=torch.float64)).float()
        result, exact = normkern.moments(x), x.double().var(0)
        torch.testing.assert_close(result.variance.double(), exact, rtol=2e-6, atol=0)
        torch.testing.assert_close(result.mean.double(), x.double().mean(0), rtol=1e-7, atol=0)
        torch.testing.assert_close(result.trace_sigma, exact.sum(), rtol=1e-6, atol=0)


def test_constant_columns_have_no_variance(backend):
    for dtype in DTYPES:
        x = torch.tensor([0.1, -1234.567, 1e-3, 0.0, 3e4]).to(dtype).expand(333, 5)
        result = normkern.moments(x)
        assert torch.equal(result.mean, x[0].to(result.mean.dtype))
        assert not result.variance.any()
        assert result.trace_sigma == 0
        assert result.nsr == 0


@pytest.mark.parametrize("rows", [16, 129, 40_000])
def test_first_rows_are_no_measure_of_the_rest(backend, rows):
    """Outliers among the rows that give the first shift, a drift, blocks of other means, and zeros before noise."""
    noise = torch.randn(rows, 64, dtype=torch.float64)
    cases = {
        "one outlier": noise + 1e4 * (torch.arange(rows) == 0)[:, None],
        "eight outliers": 1 + 1e-3 * noise + 1e3 * (torch.arange(rows) < 8)[:, None],
        "drift": torch.arange(rows)[:, None] + noise,
        "blocks": (torch.arange(rows) // 100 % 3)[:, None] * 50 + noise,
        "late": (torch.arange(rows) >= rows - 3)[:, None] * (1000 + noise),
    }
    for name, x in cases.items():
        x = x.float()
        mean, centred, _ = ops.moments(x)
        exact_mean, exact_centred, _ = reference.moments(x.double())
        spread = (exact_centred / rows).sqrt()
        assert ((centred.double() / exact_centred - 1).abs() <= 1e-5).all(), name
        assert ((mean.double() - exact_mean).abs() <= 1e-6 * spread + 1e-7 * exact_mean.abs()).all(), name


@settings(max_examples=40, deadline=None)
@given(exponent=st.integers(-140, 118), rows=st.sampled_from([2, 9, 130]), offset=st.sampled_from([0, 3]))
@example(exponent=61, rows=130, offset=0)  # the variance is a float32, the sum of squares is none
def test_scale_changes_nothing(exponent, rows, offset):
    """Norms and scalars, in float64, are right for any float32, though its squares may be none."""
    x = ((offset + torch.randn(rows, 1030)) * 2.0**exponent).float()  # subnormal ones are rounded to fewer digits
    result, wide = normkern.moments(x), normkern.moments(x.double())
    near = {"rtol": 3e-6, "atol": 0}
    torch.testing.assert_close(result.sq_norms, wide.sq_norms, **near)
    for name in ("trace_sigma", "grad_sq_norm", "nsr", "nsr_batch"):
        torch.testing.assert_close(getattr(result, name), getattr(wide, name), **near)
    smallest = 2.0**-149 * 2
    torch.testing.assert_close(result.variance.double(), wide.variance.float().double(), rtol=3e-6, atol=smallest)


def test_small_and_large_side_by_side(backend):
    """A sample and a column out of float's range, among others that are not; rows and columns of zeros."""
    x = torch.randn(20, 3000)
    x[3] *= 1e-30
    x[4] = 0
    x[5] *= 1e25
    x[:, 7] *= 1e-22
    x[:, 1024:2048] = 0
    result, wide = normkern.moments(x), normkern.moments(x.double())
    for name in ("sq_norms", "trace_sigma", "grad_sq_norm"):
        torch.testing.assert_close(getattr(result, name), getattr(wide, name), rtol=3e-6, atol=0)
    assert not result.variance[1024:2048].any()
    normal = wide.variance.float().abs() > 1e-37
    torch.testing.assert_close(
        result.variance[normal].double(), wide.variance[normal].float().double(), rtol=3e-6, atol=0
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 200])
def test_infinities_and_nan_stay_where_they_are(backend, dtype, rows):
    x = samples(rows, 40, dtype=dtype)
    x[0, 1], x[rows - 1, 2], x[2, 3], x[1, 4], x[2, 4] = math.inf, -math.inf, math.nan, math.inf, -math.inf
    result, exact = normkern.moments(x), x.double()
    torch.testing.assert_close(result.mean.double(), exact.mean(0), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(result.variance.double(), exact.var(0), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(result.sq_norms, exact.square().sum(1), rtol=1e-5, atol=0, equal_nan=True)
    assert result.trace_sigma.isnan()
    assert result.grad_sq_norm.isnan()


# ---- normkern.moments -------------------------------------------------------------------------------------------------


def assert_moments(result, rows, near):
    """Every field, from the definitions, of a float64 matrix."""
    b = len(rows)
    mean, variance = rows.mean(0), rows.var(0)
    trace, mean_sq = variance.sum(), mean.square().sum()
    assert result.batch_size == b
    got = [torch.cat([x.flatten() for x in part]) if isinstance(part, list) else part
           for part in (result.mean, result.variance)]  # fmt: skip
    size = rows.abs().max()
    torch.testing.assert_close(got[0].double(), mean, rtol=0, atol=near * size)
    torch.testing.assert_close(got[1].double(), variance, rtol=near, atol=near * size**2 * near)
    expected = {
        "sq_norms": rows.square().sum(1),
        "trace_sigma": trace,
        "grad_sq_norm": mean_sq,
        "grad_sq_norm_unbiased": mean_sq - trace / b,
        "nsr": trace / mean_sq,
        "nsr_batch": trace / mean_sq / b,
        "gns": trace / (mean_sq - trace / b),
    }
    for name, value in expected.items():
        field = getattr(result, name)
        assert field.dtype == torch.float64
        assert field.shape == value.shape
        torch.testing.assert_close(field, value, rtol=4 * near, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_field(backend, dtype):
    near = 1e-13 if dtype == torch.float64 else 3e-6
    x = (1 + torch.randn(30, 1500, dtype=torch.float64)).to(dtype)
    assert_moments(normkern.moments(x), x.double(), near)
    for kind in (list, tuple):
        result = normkern.moments(kind([x[:, :6].view(30, 2, 3), x[:, 6], x[:, 7:].t().contiguous().t()]))
        assert [m.shape for m in result.mean] == [v.shape for v in result.variance] == [(2, 3), (), (1493,)]
        assert isinstance(result.mean, list)
        assert isinstance(result.variance, list)
        assert_moments(result, x.double(), near)


def test_what_torch_func_gives():
    """Per-sample gradients of a small network."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params, x, y):
        out = torch.func.functional_call(net, params, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    result = normkern.moments(list(grads.values()))
    nn.functional.cross_entropy(net(x), y).backward()
    for mean, p in zip(result.mean, net.parameters(), strict=True):
        torch.testing.assert_close(mean, p.grad)
    assert_moments(result, torch.cat([g.flatten(1) for g in grads.values()], 1).double(), 1e-5)


def test_graphs_are_left_alone():
    w = nn.Parameter(torch.randn(6, 5))
    for x in (w, w * 2, torch.randn(6, 5, requires_grad=True)):
        result = normkern.moments(x)
        assert not any(t.requires_grad for t in (result.mean, result.variance, result.sq_norms, result.nsr))
        assert x._version == 0
    with torch.inference_mode():
        assert normkern.moments(torch.ones(2, 2)).grad_sq_norm == 2


def test_negative_views():
    z = torch.randn(6, 5, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    assert same_bits(normkern.moments(x).mean, normkern.moments(x.resolve_neg()).mean)


def test_torch_path(monkeypatch):
    """Where no kernel runs, the eager twin says the same."""
    x = [samples(9, 40), samples(9, 3, 4)]
    fast = normkern.moments(x)
    monkeypatch.setattr(ops, "kernel_takes", lambda tensor: False)
    slow = normkern.moments(x)
    for name in ("sq_norms", "trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr", "nsr_batch", "gns"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-5, atol=0)
    for a, b in zip((*fast.mean, *fast.variance), (*slow.mean, *slow.variance), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_memory_stays_small():
    """Nothing of the size of the samples is allocated, whatever their layout."""
    x = torch.randn(256, 40_000)
    for y in (x, x.t().contiguous().t(), x[:, ::2]):
        with torch.profiler.profile(profile_memory=True) as profile:
            normkern.moments(y)
        allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
        assert allocated <= 4 * 4 * y.shape[1] + 8 * 1000


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (3, TypeError, "moments: x is int; expected a tensor"),
        ({"w": torch.ones(2, 2)}, TypeError, "moments: x is dict; expected a tensor"),
        ([torch.ones(2, 2), None], TypeError, "moments: x[1] is NoneType; expected a tensor"),
        ([], ValueError, "moments: x is an empty list"),
        ((), ValueError, "moments: x is an empty list"),
        (torch.ones(()), ValueError, "moments: x has shape (); expected (B, P)"),
        (torch.ones(4), ValueError, "moments: x has shape (4,); expected (B, P)"),
        (torch.ones(4, 3, 2), ValueError, "moments: x has shape (4, 3, 2); expected (B, P)"),
        ([torch.ones(())], ValueError, "moments: x[0] has shape (); expected (B, *shape) with B > 0"),
        (torch.ones(0, 5), ValueError, "moments: x has shape (0, 5); expected (B, *shape) with B > 0"),
        (torch.ones(1, 5), ValueError, "moments: x has shape (1, 5); expected at least 2 samples"),
        ([torch.ones(1, 5), torch.ones(1)], ValueError, "moments: x[0] has shape (1, 5); expected at least 2 samples"),
        (torch.ones(3, 0), ValueError, "moments: x has shape (3, 0); expected at least one column"),
        ([torch.ones(3, 0)], ValueError, "moments: x[0] has shape (3, 0); expected at least one column"),
        ([torch.ones(3, 2), torch.ones(4, 2)], ValueError, "moments: x[1] has 4 samples but x[0] has 3"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "moments: x is torch.int64 on cpu; expected a plain, strided"),
        (torch.ones(3, 2, dtype=torch.bool), TypeError, "moments: x is torch.bool on cpu"),
        (torch.ones(3, 2, dtype=torch.complex64), TypeError, "moments: x is torch.complex64 on cpu"),
        (torch.ones(3, 2).to(torch.float8_e4m3fn), TypeError, "moments: x is torch.float8_e4m3fn on cpu"),
        (torch.ones(3, 2).to_sparse(), TypeError, "moments: x is torch.float32 on cpu, torch.sparse_coo"),
        (torch.ones(3, 2, device="meta"), TypeError, "moments: x is torch.float32 on meta"),
        (torch.ones(3, 2).as_subclass(Subclass), TypeError, "moments: x is Subclass of torch.float32 on cpu"),
        (
            [torch.ones(3, 2), torch.ones(3, 2).double()], TypeError,
            "moments: x[1] is torch.float64 on cpu but x[0] is torch.float32 on cpu; expected one dtype and one device",
        ),
    ],
)  # fmt: skip
def test_refusals(x, error, sentence):
    with pytest.raises(error) as raised:
        normkern.moments(x)
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (3, TypeError, "moments: x is int; expected a torch.Tensor (B, *shape)"),
        ([torch.ones(2, 2), 3], TypeError, "moments: x[1] is int; expected a torch.Tensor (B, *shape)"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError,
         "moments: x is torch.int64 on cpu; expected a torch.Tensor of float64, float32, bfloat16 or float16 on cpu"),
        ([torch.ones(3, 2).to_sparse()], TypeError, "moments: x[0] is torch.float32 on cpu, torch.sparse_coo"),
        (torch.ones(0, 2), ValueError, "moments: x has shape (0, 2); expected (B, *shape) with B > 0"),
        ([], ValueError, "moments: x is an empty list"),
    ],
)  # fmt: skip
def test_op_refusals(x, error, sentence):
    with pytest.raises(error) as raised:
        ops.moments(x)
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    ("totals", "error", "sentence"),
    [
        (torch.zeros(2), TypeError, "moments: totals is torch.float32 on cpu; expected a torch.Tensor of float64 on cpu"),
        ([0.0, 0.0], TypeError, "moments: totals is list; expected a torch.Tensor of float64"),
        (torch.zeros(1).double(), ValueError, "moments: totals has shape (1,) and strides (1,); expected (2,), contiguous"),
        (torch.zeros(4).double()[::2], ValueError, "moments: totals has shape (2,) and strides (2,); expected (2,)"),
        (torch.zeros(1).double().expand(2), ValueError, "moments: totals has shape (2,) and strides (0,); expected (2,)"),
    ],
)  # fmt: skip
def test_totals_that_have_no_room_are_refused_and_not_written_past(totals, error, sentence):
    with pytest.raises(error) as raised:
        ops.moments(torch.ones(3, 2), totals=totals)
    assert str(raised.value).startswith(sentence)
    assert not any(totals)


@pytest.mark.parametrize("name", ["row_sums", "row_sq_norms"])
def test_sums_of_rows_refuse_what_is_no_matrix(name):
    op = getattr(ops, name)
    with pytest.raises(ValueError, match=rf"{name}: x has shape \(2, 3, 4\); expected \(B, P\)"):
        op(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=f"{name}: x is .*int32"):
        op(torch.ones(2, 3, dtype=torch.int32))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["row_sums", "row_sq_norms"])
def test_sums_of_rows(backend, dtype, name):
    op, twin = getattr(ops, name), getattr(reference, name)
    edges = [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 32767, 32768, 32769, 70000]
    for shape in ((1, 1), (3, 7), (129, 33), (2, 5000), (0, 5), *((3, n) for n in edges)):
        x = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 1 : shape[1] + 1]  # misaligned, rows of another stride
        measured = op(x)
        torch.testing.assert_close(measured, twin(x), rtol=1e-14, atol=1e-11 if name == "row_sums" else 0)
        assert same_sums(backend, measured, op(x.contiguous()))
        assert same_sums(backend, measured, op(x.t().contiguous().t()))


def test_row_sq_norms_do_not_depend_on_threads_or_on_the_level(isa):
    x = torch.randn(5, 300001, dtype=torch.float64)
    torch.set_num_threads(1)
    alone = ops.row_sq_norms(x)
    torch.set_num_threads(2)
    assert torch.equal(alone, ops.row_sq_norms(x))
    ops.select_isa(ops.supported_isas()[-1])
    assert torch.equal(alone, ops.row_sq_norms(x))


def test_row_sq_norms_of_what_float32_cannot_square():
    x = torch.tensor([[1e30, 1e30], [1e-30, 1e-30], [float("inf"), 1.0], [float("nan"), 1.0]])
    torch.testing.assert_close(ops.row_sq_norms(x), reference.row_sq_norms(x), rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (33, 40), (5, 70001)], ids=str)
def test_recentre_is_the_reference(backend, dtype, shape):
    c = torch.randn(9, *shape, dtype=dtype) + 0.5
    raw, total = c.square().sum(0), c.sum(0)
    measured, expected = raw.clone(), raw.clone()
    assert ops.recentre_(measured, total, 9, 1e-3) == reference.recentre_(expected, total, 9, 1e-3)
    torch.testing.assert_close(
        measured, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * float(raw.amax()) if raw.numel() else 0
    )
    if len(shape) == 2:  # of transposed layouts
        turned = raw.t().contiguous().t()
        ops.recentre_(turned, total.t().contiguous().t(), 9, 1e-3)
        assert torch.equal(turned, measured)


@pytest.mark.parametrize("at", [0, 40000, 99999])
def test_recentre_tells_of_lost_digits_and_keeps_nan(backend, at):
    raw, total = torch.full((100000,), 2.0), torch.full((100000,), 1.0)
    assert ops.recentre_(raw.clone(), total, 2, 0.5)
    total[at] = 2.0  # c_1 = c_2 = 1: nothing is left
    assert not ops.recentre_(raw, total, 2, 0.5)
    assert raw[at] == 0
    total[at] = float("nan")
    ops.recentre_(raw, total, 2, 0.5)
    assert raw[at].isnan()
    assert raw.isnan().sum() == 1


def test_recentre_refusals():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="raw is .*bfloat16.*expected a torch.Tensor of float64 or float32 on cpu"):
        ops.recentre_(x.bfloat16(), x, 2, 0.1)
    with pytest.raises(TypeError, match="raw is .*float32.* but total is .*float64.*expected one dtype"):
        ops.recentre_(x, x.double(), 2, 0.1)
    with pytest.raises(ValueError, match=r"raw has shape \(2, 3\) .*expected one dense layout"):
        ops.recentre_(x, x.t().contiguous().t(), 2, 0.1)
    with pytest.raises(ValueError, match="expected one dense layout"):
        ops.recentre_(x[:, :2], x[:, :2], 2, 0.1)
    with pytest.raises(ValueError, match="count expected at least 1, got 0"):
        ops.recentre_(x, x, 0, 0.1)
    assert torch.equal(x, torch.ones(2, 3))
