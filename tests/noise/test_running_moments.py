"""RunningMoments: what torch says of all gradients side by side, and what sampling says of the estimates."""

import itertools

import pytest
import torch
from support.memory import same_bits
from torch import nn

from normkern import ops, reference
from normkern.noise.pairs import noise_from_pair
from normkern.noise.running_moments import RunningMoments

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(40, 3, 3, 3), (7,), (5, ops.CHUNK + 3), (), (2, 3), (0, 4), (1,)]
SCALARS = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr_batch", "gns")


def zeros(shapes, dtype=torch.float32):
    return [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]


def fed(params, batches, **options):
    """The moments of `batches`, lists of gradients."""
    moments = RunningMoments(params, **options)
    for grads in batches:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        moments.update()
    return moments


def of_rows(rows, **options):
    """The moments of the rows of a float64 matrix."""
    w = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    return fed([w], [[row] for row in rows], **options)


def flat(x):
    x = x.to_dense() if x.layout != torch.strided else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.double().flatten()


def assert_moments(result, batches, tolerance):
    """Every field, from all gradients side by side in float64."""
    m = len(batches)
    norms, expected = [], {"trace_sigma": [], "grad_sq_norm": [], "grad_sq_norm_unbiased": []}
    for i, grads in enumerate(zip(*batches, strict=True)):
        wide = torch.complex128 if grads[0].is_complex() else torch.float64
        x = torch.stack([g.to(wide).to_dense() for g in grads])
        mean, variance = x.mean(0), x.var(0) if x.numel() else torch.zeros(x.shape[1:], dtype=torch.float64)
        scale = x.abs().max() if x.numel() else 1.0
        kept = torch.float64 if grads[0].dtype in (torch.float64, torch.complex128) else torch.float32
        assert result.mean[i].dtype == (kept.to_complex() if wide.is_complex else kept)
        assert result.variance[i].dtype == kept
        torch.testing.assert_close(result.mean[i].to(wide), mean, rtol=0, atol=tolerance * scale)
        torch.testing.assert_close(result.variance[i].double(), variance, rtol=0, atol=tolerance * scale**2)
        norms.append(torch.stack([flat(g).square().sum() for g in grads]))
        expected["trace_sigma"].append(variance.sum())
        expected["grad_sq_norm"].append(flat(mean).square().sum())
        expected["grad_sq_norm_unbiased"].append(flat(mean).square().sum() - variance.sum() / m)
    expected = {name: torch.stack(x) for name, x in expected.items()}
    size = torch.stack(norms).sum(1) + 1e-300
    for name, x in expected.items():
        of_slots = getattr(result, f"slot_{name}")
        assert ((of_slots - x).abs() / size).max() < tolerance, name
        assert ((getattr(result, name) - x.sum()).abs() / size.sum()) < tolerance, name
        assert of_slots.dtype == getattr(result, name).dtype == torch.float64
        assert getattr(result, name).shape == ()
    torch.testing.assert_close(result.sq_norms, torch.stack(norms).sum(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.nsr_batch, result.trace_sigma / result.grad_sq_norm_unbiased, rtol=1e-15, atol=0)
    slots = result.slot_trace_sigma / result.slot_grad_sq_norm_unbiased
    torch.testing.assert_close(result.slot_nsr_batch, slots, equal_nan=True, rtol=1e-15, atol=0)


@pytest.fixture
def no_eager_path(monkeypatch):
    """Whatever is on the CPU goes through the kernel."""
    for name in ("welford_", "pair_sums"):
        monkeypatch.delattr(reference, name)


# ---- Against torch ----------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("m", range(2, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_field(isa, dtype, m):
    batches = [[(0.3 + torch.randn(s, dtype=torch.float64)).to(dtype) for s in SHAPES] for _ in range(m)]
    result = fed(zeros(SHAPES, dtype), batches, batch_size=32).result()
    assert_moments(result, batches, 1e-14 if dtype == torch.float64 else 2e-6)
    assert (result.count, result.batch_size, result.population) == (m, 32, None)
    torch.testing.assert_close(result.gns, 32 * result.nsr_batch)
    assert result.sq_norms.shape == (m,)
    assert result.names == [str(i) for i in range(len(SHAPES))]
    assert result.slots["2"] == slice(2, 3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
@pytest.mark.usefixtures("no_eager_path")
def test_every_layout(dtype):
    """Transposed, sliced, expanded, sparse and channels-last gradients, another layout in each micro-batch."""
    shape = (4, 6, 5, 3)
    plain = [torch.randn(shape, dtype=torch.complex128).to(dtype) if dtype.is_complex else torch.randn(shape).to(dtype) for _ in range(5)]  # fmt: skip
    laid = [
        plain[0].transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([plain[1], torch.full_like(plain[1], torch.nan)], dim=-1)[..., 0],
        plain[2].contiguous(memory_format=torch.channels_last),
        plain[3].to_sparse(),
        plain[4][:1, :, :, :1].expand(shape),
    ]
    plain[4] = laid[4].contiguous()
    for order in (range(5), reversed(range(5)), (2, 4, 0)):
        w = nn.Parameter(torch.zeros(shape, dtype=dtype))
        order = list(order)
        result = fed([w], [[laid[i]] for i in order]).result()
        assert_moments(result, [[plain[i]] for i in order], 1e-14 if dtype.to_real() == torch.float64 else 2e-6)
        assert result.mean[0].shape == result.variance[0].shape == shape


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_with_indices_twice():
    w = nn.Parameter(torch.zeros(3, 2))
    indices, values = torch.tensor([[1, 1, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    twice = torch.sparse_coo_tensor(indices, values, (3, 2), is_coalesced=False)
    dense = torch.tensor([[0.0, 0.0], [4.0, 6.0], [5.0, 6.0]])
    result = fed([w], [[twice], [torch.eye(3, 2)]]).result()
    assert_moments(result, [[dense], [torch.eye(3, 2)]], 1e-6)
    table = nn.Embedding(10, 3, sparse=True)
    moments = RunningMoments(table.parameters())
    for words in ([1, 1, 4], [2, 4, 4]):
        table.zero_grad()
        table(torch.tensor(words)).square().sum().backward()
        moments.update()
    assert moments.result().variance[0][[0, 3]].eq(0).all()
    assert moments.result().variance[0][1].ne(0).all()


@pytest.mark.usefixtures("no_eager_path")
def test_conjugated_and_negated_views():
    z = [torch.randn(5, dtype=torch.complex64).conj() for _ in range(3)]
    assert z[0].imag.is_neg()
    assert_moments(fed(zeros([5], torch.complex64), [[x] for x in z]).result(), [[x] for x in z], 2e-6)
    parts = [[x.imag] for x in z]
    assert_moments(fed(zeros([5]), parts).result(), [[x.resolve_neg()] for (x,) in parts], 2e-6)


def test_other_devices_are_read_by_torch(monkeypatch):
    """The path for tensors that no kernel takes: the same numbers."""
    batches = [[torch.randn(s) for s in SHAPES] for _ in range(4)]
    ours = fed(zeros(SHAPES), batches, batch_size=3).result()
    monkeypatch.setattr(ops, "kernels_take", lambda tensors: False)
    result = fed(zeros(SHAPES), batches, batch_size=3).result()
    assert_moments(result, batches, 2e-6)
    for name in SCALARS:
        torch.testing.assert_close(getattr(result, name), getattr(ours, name), rtol=1e-5, atol=0)


def test_another_device():
    w = nn.Parameter(torch.zeros(3, 4, device="meta"))
    result = fed([w], [[torch.zeros(3, 4, device="meta")] for _ in range(2)]).result()
    assert result.mean[0].device == result.trace_sigma.device == result.sq_norms.device == torch.device("meta")


@pytest.mark.parametrize(("mean", "noise"), [(1000.0, 0.01), (-3e4, 0.1), (1e10, 1e5)])
def test_a_large_mean_does_not_drown_a_small_variance(isa, mean, noise):
    """float32 cannot hold E[g^2] - E[g]^2 here; what is lost is the rounding of the mean, once per micro-batch."""
    rows = (mean + noise * torch.randn(7, 3000, dtype=torch.float64)).float()
    result = of_rows(rows).result()
    exact = rows.double()
    unit = torch.finfo(torch.float32).eps * abs(mean)
    assert (result.mean[0].double() - exact.mean(0)).abs().max() < 3.5 * unit
    lost = 7 * unit * (exact - exact.mean(0)).abs().amax(0) + 7 * unit**2
    assert ((result.variance[0].double() - exact.var(0)).abs() < lost).all()
    assert result.trace_sigma.item() == pytest.approx(exact.var(0).sum().item(), rel=1e-3)
    naive = (rows.square().mean(0) - rows.mean(0).square()).double().sum()
    assert abs(naive / exact.var(0).sum() - 1) > 1


def test_low_precision_is_never_summed_in_low_precision():
    """The hundredth gradient is a hundredth of the mean: in bfloat16 it would be lost."""
    batches = [[torch.full((3,), 1.0 + i / 128, dtype=torch.bfloat16)] for i in range(100)]
    result = fed(zeros([3], torch.bfloat16), batches).result()
    assert_moments(result, batches, 1e-6)
    assert result.mean[0].dtype == torch.float32


def test_float16_squares_do_not_overflow():
    batches = [[torch.tensor([6e4], dtype=torch.float16)], [torch.tensor([-6e4], dtype=torch.float16)]]
    assert fed(zeros([1], torch.float16), batches).result().trace_sigma.item() == pytest.approx(7.2e9, rel=1e-3)


def test_float32_norms_of_any_size():
    for size in (1e-30, 1e30):
        result = fed(zeros([4]), [[torch.full((4,), size)]] * 2).result()
        exact = 4 * torch.tensor(size).double().item() ** 2
        assert result.grad_sq_norm.item() == result.sq_norms[1].item() == pytest.approx(exact, rel=1e-12)
        assert result.trace_sigma.item() == 0


def test_a_model():
    """Micro-batches of a real model, against the gradients of autograd one by one."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    moments = RunningMoments(model.named_parameters(), batch_size=8)
    batches = []
    for i in range(3):
        model.zero_grad()
        (model(x[8 * i : 8 * i + 8]) - y[8 * i : 8 * i + 8]).square().mean().backward()
        moments.update()
        batches.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    result = moments.result()
    assert_moments(result, batches, 1e-14)
    for mean, p in zip(result.mean, model.parameters(), strict=True):
        torch.testing.assert_close(mean, p.grad)
    assert result.names == ["0.weight", "0.bias", "2.weight", "2.bias"]


# ---- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 7])
def test_mccandlish(m):
    """Equations A.2 and A.3 of arXiv 1812.06162, small batches of b and a big one of m b, are the same numbers."""
    b, rows = 8, 0.5 + torch.randn(m, 50, dtype=torch.float64)
    result = of_rows(rows, batch_size=b).result()
    small, big = rows.square().sum(1).mean(), rows.mean(0).square().sum()
    signal = (m * b * big - b * small) / (m * b - b)
    noise = (small - big) / (1 / b - 1 / (m * b))
    torch.testing.assert_close(result.grad_sq_norm_unbiased, signal, rtol=1e-12, atol=0)
    torch.testing.assert_close(b * result.trace_sigma, noise, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.gns, noise / signal, rtol=1e-12, atol=0)


def test_two_micro_batches_are_a_pair():
    a, b = ([torch.randn(s) for s in SHAPES] for _ in range(2))
    result, pair = fed(zeros(SHAPES), [a, b]).result(), noise_from_pair(a, b)
    for name in ("trace_sigma", "grad_sq_norm_unbiased", "nsr_batch"):
        torch.testing.assert_close(getattr(result, name), getattr(pair, name), rtol=1e-5, atol=0)
        assert result.slots == pair.slots


def test_one_parameter_or_many():
    """Cut into pieces, a gradient has the same totals; those of the pieces add up."""
    rows = torch.randn(5, 12, dtype=torch.float64)
    whole, cut = of_rows(rows, batch_size=4), fed(zeros([5, 4, 3], torch.float64), [row.split([5, 4, 3]) for row in rows], batch_size=4)  # fmt: skip
    for population in (None, 1000):
        a, b = whole.result(population=population), cut.result(population=population)
        for name in SCALARS:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(b.slot_trace_sigma.sum(), b.trace_sigma)
        torch.testing.assert_close(b.slot_grad_sq_norm_unbiased.sum(), b.grad_sq_norm_unbiased)
        torch.testing.assert_close(torch.cat(b.variance).sum(), b.trace_sigma)


@pytest.mark.parametrize("m", [2, 4])
def test_unbiased_with_the_variances_of_theory(m):
    """Gaussian gradients with known mean and covariance; 20000 draws as so many parameters, an estimate from each."""
    draws, p = 20_000, 6
    mean = torch.linspace(-0.5, 1, p, dtype=torch.float64)
    root = torch.tril(torch.randn(p, p, dtype=torch.float64))
    covariance = root @ root.t()
    x = mean + torch.randn(m, draws, p, dtype=torch.float64) @ root.t()
    result = fed(zeros([p] * draws, torch.float64), [list(batch) for batch in x]).result()
    trace, signal = result.slot_trace_sigma, result.slot_grad_sq_norm_unbiased
    for got, exact in ((trace, covariance.trace()), (signal, mean.square().sum())):
        assert abs((got.mean() - exact) / (got.std() / draws**0.5)) < 4
    squared = covariance.square().sum()
    theory = torch.tensor([
        [2 * squared / (m - 1), -2 * squared / (m * (m - 1))],
        [-2 * squared / (m * (m - 1)), 4 * mean @ covariance @ mean / m + 2 * squared / (m * (m - 1))],
    ])  # fmt: skip
    torch.testing.assert_close(torch.cov(torch.stack([trace, signal])), theory, rtol=0.08, atol=0, check_dtype=False)


def disjoint(n, size, count):
    """Every set of `count` disjoint batches of `size` out of n samples."""
    batches = itertools.combinations(range(n), size)
    return [s for s in itertools.combinations(batches, count) if len(set(sum(s, ()))) == size * count]


@pytest.mark.parametrize(("n", "size", "count"), [(6, 2, 2), (6, 2, 3), (6, 1, 3), (6, 3, 2), (7, 2, 3), (5, 2, 2)])
def test_finite_population_by_enumeration(n, size, count):
    """Over all ways to draw disjoint batches, each estimate is exactly right on average, and wrong uncorrected."""
    samples = 0.7 + torch.randn(n, 4, dtype=torch.float64)
    gradient = samples.mean(0)
    every = torch.stack([samples[list(b)].mean(0) for b in itertools.combinations(range(n), size)])
    covariance = (every - gradient).square().mean(0)
    of_sample = (samples - gradient).square().mean(0)
    torch.testing.assert_close(covariance, of_sample / size * (n - size) / (n - 1))  # the formula of the textbooks
    results, plain = [], []
    ways = disjoint(n, size, count)
    for batches in ways:
        moments = of_rows(torch.stack([samples[list(b)].mean(0) for b in batches]), batch_size=size)
        results.append(moments.result(population=n))
        plain.append(moments.result())

    def average(results, name):
        return torch.stack([getattr(r, name) for r in results]).mean()

    signal = gradient.square().sum()
    torch.testing.assert_close(average(results, "trace_sigma"), covariance.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(average(results, "grad_sq_norm_unbiased"), signal, rtol=1e-12, atol=0)
    variance = torch.stack([r.variance[0] for r in results]).mean(0)
    torch.testing.assert_close(variance, covariance, rtol=1e-12, atol=0)
    numerator = torch.stack([r.gns * r.grad_sq_norm_unbiased for r in results]).mean()
    torch.testing.assert_close(numerator, of_sample.sum(), rtol=1e-12, atol=0)
    for got in results:
        torch.testing.assert_close(got.nsr_batch, got.trace_sigma / got.grad_sq_norm_unbiased, rtol=1e-13, atol=0)
        torch.testing.assert_close(got.slot_trace_sigma[0], got.trace_sigma)
        torch.testing.assert_close(got.slot_grad_sq_norm_unbiased[0], got.grad_sq_norm_unbiased)
        assert got.population == n
    assert average(plain, "trace_sigma") > 1.1 * covariance.sum()
    assert average(plain, "grad_sq_norm_unbiased") < 0.999 * signal


def test_the_whole_population_leaves_nothing_to_correct():
    rows = torch.randn(4, 9, dtype=torch.float64)
    result = of_rows(rows, batch_size=5).result(population=20)
    assert result.grad_sq_norm_unbiased.item() == pytest.approx(rows.mean(0).square().sum().item(), rel=1e-14)


def test_a_large_population_is_no_population():
    moments = of_rows(torch.randn(4, 9, dtype=torch.float64), batch_size=5)
    finite, infinite = moments.result(population=10**15), moments.result()
    for name in SCALARS:
        torch.testing.assert_close(getattr(finite, name), getattr(infinite, name), rtol=1e-12, atol=0)


def test_negative_estimates_are_not_clipped():
    result = of_rows(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), batch_size=2).result()
    assert [getattr(result, name).item() for name in SCALARS] == [2, 0, -1, -2, -4]


# ---- What it holds, and what it leaves alone ----------------------------------------------------------------------------


def test_parameters_without_gradient():
    params = zeros([(2,), (3,), (2, 2)])
    moments = RunningMoments(zip("abc", params, strict=True), batch_size=2)
    for _ in range(3):
        params[0].grad, params[2].grad = torch.randn(2), torch.randn(2, 2)
        moments.update()
    result = moments.result()
    assert result.mean[1] is None
    assert result.variance[1] is None
    for name in ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr_batch"):
        assert getattr(result, f"slot_{name}").isnan().tolist() == [False, True, False]
        assert getattr(result, name).isfinite()
    assert result.slots == {"a": slice(0, 1), "b": slice(1, 2), "c": slice(2, 3)}
    torch.testing.assert_close(result.trace_sigma, result.slot_trace_sigma[[0, 2]].sum())


def test_gradients_are_left_alone():
    params = zeros([(3, 4), (5,), (6,)])
    params[1] = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    moments = RunningMoments(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p).detach()
        grads = [p.grad for p in params]
        before = [(g.clone(), g._version, p._version) for g, p in zip(grads, params, strict=True)]
        moments.update()
        for p, g, (values, of_grad, of_param) in zip(params, grads, before, strict=True):
            assert p.grad is g
            assert same_bits(g, values)
            assert (g._version, p._version) == (of_grad, of_param)


def test_first_micro_batch_is_not_aliased():
    """Gradients that are zeroed or written in place afterwards, and results that the user writes into."""
    params = zeros([(3,), (2,)])
    params[1] = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    moments = RunningMoments(params)
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])
    for p in params:
        p.grad = torch.zeros_like(p)
    for row in rows:
        params[0].grad.copy_(row)
        params[1].grad.copy_(row[:2])
        moments.update()
    kept = moments.result()
    for x in (*kept.mean, *kept.variance, kept.sq_norms):
        x.fill_(7)
    again = moments.result()
    assert again.mean[0].tolist() == [2, 2, 5]
    assert again.mean[1].tolist() == [2, 2]
    assert again.variance[0].tolist() == [2, 0, 8]
    assert again.variance[1].tolist() == [2, 0]
    assert again.sq_norms.tolist() == [14 + 5, 62 + 13]
    for p in params:
        p.grad.fill_(100)
    moments.update()
    assert again.mean[0].tolist() == [2, 2, 5]
    assert again.count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_graph_is_kept(dtype, mode):
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    moments = RunningMoments([w])
    for i in range(3):
        (w.grad,) = torch.autograd.grad((w**3).sum().abs() * (i + 1), w, create_graph=True)
        assert w.grad.requires_grad
        with mode():
            moments.update()
    for context in (mode, torch.enable_grad):
        with context():
            result = moments.result()
        assert not any(x.requires_grad for x in (*result.mean, *result.variance, result.trace_sigma, result.sq_norms))
        assert result.trace_sigma > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_whatever_the_threads(dtype):
    shapes = [(3, ops.CHUNK + 5), (70, 33), (7,)]
    batches = [[torch.randn(s).to(dtype) for s in shapes] for _ in range(3)]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(fed(zeros(shapes, dtype), batches, batch_size=4).result(population=100))
    first, *others = results
    for other in others:
        for name in (*SCALARS, "sq_norms", "slot_trace_sigma", "slot_grad_sq_norm_unbiased", "slot_nsr_batch"):
            assert same_bits(getattr(first, name), getattr(other, name)), name
        for a, b in zip((*first.mean, *first.variance), (*other.mean, *other.variance), strict=True):
            assert same_bits(a, b)


def test_reset():
    params = zeros([(3,), (2,)])
    moments = fed(params, [[torch.randn(3), torch.randn(2)]] * 3, batch_size=2)
    assert repr(moments) == "RunningMoments(2 parameters, 3 micro-batches)"
    moments.reset()
    assert repr(moments) == "RunningMoments(2 parameters, 0 micro-batches)"
    with pytest.raises(RuntimeError, match="at least 2 updates before it, got 0"):
        moments.result()
    batches = [[torch.randn(3)], [torch.randn(3)]]
    params[1].grad = None
    for (g,) in batches:
        params[0].grad = g
        moments.update()
    result = moments.result()
    assert (result.count, result.batch_size, result.mean[1]) == (2, 2, None)
    torch.testing.assert_close(result.mean[0], torch.stack([g for (g,) in batches]).mean(0))


def test_nan_and_infinity_show():
    params = zeros([(2,), (2,)])
    batches = [[torch.tensor([1.0, torch.nan]), torch.ones(2)], [torch.ones(2), torch.zeros(2)]]
    result = fed(params, batches).result()
    assert result.trace_sigma.isnan()
    assert result.grad_sq_norm_unbiased.isnan()
    assert result.slot_trace_sigma.isnan().tolist() == [True, False]
    assert result.variance[0].isnan().tolist() == [False, True]
    assert result.sq_norms.isnan().tolist() == [True, False]


def test_without_batch_size_there_is_no_noise_scale():
    result = of_rows(torch.randn(3, 4)).result()
    assert result.gns.isnan()
    assert result.nsr_batch.isfinite()
    assert result.batch_size is None


def test_result_is_frozen_and_short():
    result = of_rows(torch.randn(3, 4000)).result()
    with pytest.raises(AttributeError):
        result.count = 3
    assert "mean=" not in repr(result)
    assert len(repr(result)) < 1500


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda x: (p for p in x)])
def test_any_iterable_of_parameters(wrap):
    params = zeros([(2,), (3,)])
    named = [("a", params[0]), ("b", params[1])]
    for given, names in ((params, ["0", "1"]), (named, ["a", "b"])):
        moments = RunningMoments(wrap(given))
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            moments.update()
        assert moments.result().names == names


# ---- Refusals ---------------------------------------------------------------------------------------------------------


def test_refused_parameters():
    w = nn.Parameter(torch.ones(3))
    for params, error, sentence in (
        ([], ValueError, "RunningMoments: params is empty; expected at least one tensor"),
        (iter(()), ValueError, "RunningMoments: params is empty; expected at least one tensor"),
        (
            w,
            TypeError,
            r"RunningMoments: params is torch.float32 on cpu; expected several tensors, or pairs \(name, tensor\)",
        ),
        ([w, "w"], TypeError, r"RunningMoments: params\[1\] is str; expected a tensor or a pair \(name, tensor\)"),
        ([{"params": [w]}], TypeError, r"RunningMoments: params\[0\] is dict; expected a tensor or a pair"),
        ([(w, "w")], TypeError, r"RunningMoments: params\[0\] is tuple; expected a tensor or a pair"),
        ([("a", w), ("b", w)], ValueError, r"RunningMoments: params\[1\], 'b', is the same tensor as 'a'"),
        ([("a", w), ("a", torch.ones(2))], ValueError, r"RunningMoments: params\[1\] has the name 'a' of another one"),
    ):
        with pytest.raises(error, match=sentence):
            RunningMoments(params)


@pytest.mark.parametrize("batch_size", [0, -3, 2.0, True, "8"])
def test_refused_batch_size(batch_size):
    with pytest.raises(ValueError, match="RunningMoments: batch_size expected a whole number from 1, got"):
        RunningMoments(zeros([1]), batch_size=batch_size)


def test_refused_results():
    moments = of_rows(torch.randn(1, 4), batch_size=8)
    with pytest.raises(RuntimeError, match="RunningMoments.result: expected at least 2 updates before it, got 1"):
        moments.result()
    moments.update()
    moments.update()
    for population in (0, 64.0, True):
        with pytest.raises(ValueError, match="RunningMoments.result: population expected a whole number from 1, got"):
            moments.result(population=population)
    with pytest.raises(ValueError, match="population expected at least 24, 3 micro-batches of 8, got 23"):
        moments.result(population=23)
    moments.result(population=24)
    with pytest.raises(ValueError, match="population expected a batch_size at construction, got None"):
        of_rows(torch.randn(2, 4)).result(population=100)


def as_subclass(x):
    return x.as_subclass(type("Sub", (torch.Tensor,), {}))


@pytest.mark.parametrize(
    ("break_it", "error", "sentence"),
    [
        (lambda a, b: setattr(b, "grad", None), RuntimeError, "'b' has no gradient in micro-batch 2 but one in those before; expected one in all or in none"),
        (lambda a, b: (setattr(a, "grad", None), setattr(b, "grad", None)), RuntimeError, "expected a backward before it, but no parameter has a gradient"),
        (lambda a, b: setattr(b, "grad", as_subclass(torch.ones(2))), TypeError, "the gradient of 'b' is .*Sub.*; expected a plain torch.Tensor"),
        (lambda a, b: (b.__setattr__("data", torch.ones(2).double()), setattr(b, "grad", torch.ones(2).double())), ValueError, r"the gradient of 'b' is read as torch.float64 on cpu, \(2,\), but was read as torch.float32 on cpu, \(2,\), before"),
        (lambda a, b: (b.__setattr__("data", torch.ones(5)), setattr(b, "grad", torch.ones(5))), ValueError, r"the gradient of 'b' is read as torch.float32 on cpu, \(5,\), but was read as torch.float32 on cpu, \(2,\), before"),
    ],
)  # fmt: skip
def test_refused_updates_write_nothing(break_it, error, sentence):
    a, b = zeros([3, 2])
    moments = RunningMoments([("a", a), ("b", b)])
    for _ in range(2):
        a.grad, b.grad = torch.randn(3), torch.randn(2)
        moments.update()
    before = moments.result()
    a.grad, b.grad = torch.randn(3), torch.randn(2)
    break_it(a, b)
    with pytest.raises(error, match="RunningMoments.update: " + sentence):
        moments.update()
    after = moments.result()
    assert after.count == 2
    assert same_bits(after.trace_sigma, before.trace_sigma)
    assert all(same_bits(x, y) for x, y in zip(after.mean, before.mean, strict=True))


def test_a_late_gradient_is_refused():
    a, b = zeros([3, 2])
    moments = RunningMoments([("a", a), ("b", b)])
    a.grad = torch.ones(3)
    moments.update()
    b.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="'b' has a gradient in micro-batch 1 but none in those before"):
        moments.update()
    b.grad = None
    moments.update()
    assert moments.result().mean[0].tolist() == [1, 1, 1]


def test_a_refused_first_update_leaves_nothing():
    a, b = zeros([3, 2])
    moments = RunningMoments([("a", a), ("b", b)])
    a.grad, b.grad = torch.ones(3), as_subclass(torch.ones(2))
    with pytest.raises(TypeError):
        moments.update()
    b.grad = None
    moments.update()
    moments.update()
    assert moments.result().mean[1] is None


def test_welford_is_the_reference_op_by_op(isa):
    """The pass itself, in its own precision."""
    for dtype in DTYPES:
        m, s, e_m, e_s = (torch.zeros(ops.CHUNK + 9, dtype=d) for d in (dtype, dtype, torch.float64, torch.float64))
        for n in range(1, 5):
            x = torch.randn(ops.CHUNK + 9, dtype=torch.float64).to(dtype)
            reference.welford_([e_m], [x.double()], [e_s], n=n)
            ops.welford_([m], [x], [s], n=n)
        scale = torch.finfo(dtype).eps * 40
        torch.testing.assert_close(m.double(), e_m, rtol=0, atol=scale)
        torch.testing.assert_close(s.double(), e_s, rtol=0, atol=5 * scale)
