"""noise_from_pair and its averages: what sampling says of the estimates, and a direct sum of the weights."""

import math

import pytest
import torch

import normkern
from normkern import ops
from normkern.noise.pairs import NoiseAverage, _Average, noise_from_pair, pair_sums_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(40, 3, 3, 3), (7,), (5, ops.CHUNK + 3), (), (2, 3), (0, 4)]
DRAWS = 20_000


def flat(x):
    x = x.to_dense() if x.layout != torch.strided else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.double().flatten()


def assert_noise(noise, a, b):
    """Every estimate, from float64 copies."""
    dots = torch.stack([flat(x) @ flat(y) for x, y in zip(a, b, strict=True)])
    traces = torch.stack([(flat(x) - flat(y)).square().sum() / 2 for x, y in zip(a, b, strict=True)])
    size = torch.stack([flat(x).norm() * flat(y).norm() for x, y in zip(a, b, strict=True)])
    assert ((noise.slot_grad_sq_norm_unbiased - dots).abs() <= 1e-13 * size).all()
    assert abs(noise.grad_sq_norm_unbiased - dots.sum()) <= 1e-13 * size.sum()
    torch.testing.assert_close(noise.slot_trace_sigma, traces, rtol=1e-13, atol=0)
    torch.testing.assert_close(noise.trace_sigma, traces.sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(noise.nsr_batch, noise.trace_sigma / noise.grad_sq_norm_unbiased, rtol=1e-15, atol=0)
    slots = noise.slot_trace_sigma / noise.slot_grad_sq_norm_unbiased
    torch.testing.assert_close(noise.slot_nsr_batch, slots, rtol=1e-15, atol=0, equal_nan=True)
    for name in ("grad_sq_norm_unbiased", "trace_sigma", "nsr_batch"):
        assert getattr(noise, name).dtype == getattr(noise, f"slot_{name}").dtype == torch.float64
        assert getattr(noise, name).shape == ()
        assert getattr(noise, f"{name}_stderr").isnan()
        assert getattr(noise, f"slot_{name}").shape == (len(a),)
    assert noise.count == 1
    assert noise.names == [str(i) for i in range(len(a))]
    assert noise.slots == {str(i): slice(i, i + 1) for i in range(len(a))}


# ---- One pair ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_field(isa, dtype):
    a, b = ([(0.3 + torch.randn(s, dtype=torch.float64)).to(dtype) for s in SHAPES] for _ in range(2))
    before = [x._version for x in (*a, *b)]
    assert_noise(noise_from_pair(a, b), a, b)
    assert [x._version for x in (*a, *b)] == before


def layouts():
    x, z = torch.randn(6, 5), torch.randn(6, 5, dtype=torch.complex64)
    return {
        "transposed": x.t().contiguous().t(),
        "sliced": torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
        "row, expanded": x[0].expand(6, 5),
        "number, expanded": torch.tensor(2.0).expand(6, 5),
        "sparse": x.to_sparse(),
        "bfloat16": x.bfloat16(),
        "bfloat16, expanded": x[0].bfloat16().expand(6, 5),
        "bfloat16, sparse": x.bfloat16().to_sparse(),
        "complex": z,
        "conjugated": z.conj(),
        "negated": z.conj().imag,
        "parameter": torch.nn.Parameter(x),
        "with a graph": torch.nn.Parameter(x) * 2,
    }


@pytest.mark.parametrize("kind", layouts())
def test_every_layout(kind):
    a, b = layouts()[kind], 2 * layouts()[kind]
    if not kind.startswith(("sparse", "bfloat16, sparse")):
        b = b.detach() + 1
    noise = noise_from_pair([a, torch.ones(3)], [b, torch.zeros(3)])
    assert_noise(noise, [a.detach(), torch.ones(3)], [b.detach(), torch.zeros(3)])
    assert not noise.trace_sigma.requires_grad
    if b.layout != a.layout or kind == "sparse":
        dense = [b.to_dense(), torch.zeros(3)]
        assert_noise(noise_from_pair([a, torch.ones(3)], dense), [a.detach(), torch.ones(3)], dense)


def test_any_sequence():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    expected = noise_from_pair(list(a), list(b)).trace_sigma
    for given in ((tuple(a), tuple(b)), (a, b), (iter(a), iter(b)), ((x for x in a), list(b))):
        assert noise_from_pair(*given).trace_sigma == expected


def test_negative_estimates_are_not_clipped():
    noise = noise_from_pair([torch.tensor([1.0, 1.0]), torch.ones(1)], [torch.tensor([-1.0, -3.0]), torch.ones(1)])
    assert noise.grad_sq_norm_unbiased.item() == -3
    assert noise.slot_grad_sq_norm_unbiased.tolist() == [-4, 1]
    assert noise.trace_sigma.item() == 10
    assert noise.nsr_batch.item() == pytest.approx(-10 / 3)


@pytest.mark.parametrize(("a", "b", "ratio"), [([1.0, 0.0], [0.0, 1.0], math.inf), ([0.0], [0.0], math.nan), ([2.0], [2.0], 0.0)])  # fmt: skip
def test_ratio_without_signal_or_noise(a, b, ratio):
    noise = noise_from_pair([torch.tensor(a)], [torch.tensor(b)])
    assert noise.nsr_batch.item() == pytest.approx(ratio, nan_ok=True)
    assert noise.slot_nsr_batch.item() == pytest.approx(ratio, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_entries_without_a_pair(dtype):
    a, b = (torch.randn(4, dtype=dtype) for _ in range(2))
    noise, alone = noise_from_pair([None, a, None], [None, b, None]), noise_from_pair([a], [b])
    for name in ("grad_sq_norm_unbiased", "trace_sigma", "nsr_batch"):
        assert getattr(noise, f"slot_{name}").isnan().tolist() == [True, False, True]
        assert getattr(noise, f"slot_{name}")[1] == getattr(alone, f"slot_{name}")[0]
        assert getattr(noise, name) == getattr(alone, name)


@pytest.mark.parametrize("given", [[], [None]], ids=str)
def test_no_pair_at_all(given):
    noise = noise_from_pair(given, given)
    assert noise.trace_sigma.item() == noise.grad_sq_norm_unbiased.item() == 0
    assert noise.nsr_batch.isnan()
    assert noise.slot_trace_sigma.shape == (len(given),)
    assert noise.slot_trace_sigma.isnan().all()


def test_entries_without_a_pair_on_another_device():
    x = torch.zeros(3, device="meta")
    assert pair_sums_of([None, x], [None, x]).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("other", ["number", "nan"])
@pytest.mark.parametrize("beside", ["nothing", "a pair", "none"])
def test_a_gradient_with_nan_shows(dtype, other, beside):
    """Also where both have it, and beside an entry that has no pair."""
    a = torch.tensor([1.0, torch.nan], dtype=dtype)
    b = a if other == "nan" else torch.ones(2, dtype=dtype)
    more = {"nothing": [], "a pair": [torch.ones(2)], "none": [None]}[beside]
    noise = noise_from_pair([a, *more], [b, *more])
    assert noise.trace_sigma.isnan()
    assert noise.grad_sq_norm_unbiased.isnan()
    assert noise.nsr_batch.isnan()
    assert noise.slot_trace_sigma[0].isnan()


def test_float16_and_float32_squares_do_not_overflow():
    for dtype, large in ((torch.float16, 6e4), (torch.float32, 3e38)):
        a = torch.full((4,), large, dtype=dtype)
        assert noise_from_pair([a], [-a]).trace_sigma.item() == pytest.approx(8 * float(a[0]) ** 2, rel=1e-12)


def test_refused_pairs():
    x, eager = torch.ones(3), torch.ones(3, dtype=torch.complex64)
    for a, b, error, sentence in (
        ([x], [x, x], ValueError, "grads_b has 2 entries but grads_a has 1"),
        ([x], [torch.ones(4)], ValueError, r"grads_b\[0\] has shape \(4,\) but grads_a\[0\] has \(3,\)"),
        ([x, x], [x, x.double()], TypeError, r"grads_b\[1\] is torch.float64 on cpu but grads_a\[1\] is torch.float32 on cpu; expected one dtype"),
        ([x, None], [x, x], TypeError, r"grads_a\[1\] is None but its partner is not; expected both or neither"),
        ([x, x], [x, None], TypeError, r"grads_b\[1\] is None but its partner is not; expected both or neither"),
        ([eager, x], [eager, torch.ones(4)], ValueError, r"grads_b\[1\] has shape \(4,\) but grads_a\[1\] has \(3,\)"),
        ([eager], [x], TypeError, r"grads_b\[0\] is torch.float32 on cpu but grads_a\[0\] is torch.complex64 on cpu"),
        ([eager, x], [eager, None], TypeError, r"grads_b\[1\] is None but its partner is not; expected both or neither"),
        (["x"], [x], TypeError, r"noise_from_pair: grads_a\[0\] is str; expected a torch.Tensor or None"),
        ([x, x], [x, 1.0], TypeError, r"noise_from_pair: grads_b\[1\] is float; expected a torch.Tensor or None"),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            noise_from_pair(a, b)


# ---- What sampling says -----------------------------------------------------------------------------------------------


def estimates(a, b):
    """(2, draws): signal and noise of each pair of rows."""
    noise = noise_from_pair(list(a), list(b))
    return torch.stack([noise.slot_grad_sq_norm_unbiased, noise.slot_trace_sigma])


def z_scores(got, exact):
    return ((got.mean(1) - exact) / (got.std(1) / got.shape[1] ** 0.5)).abs()


@pytest.mark.parametrize("batch", [1, 4])
def test_unbiased_for_a_linear_model(batch):
    r"""y = <w*, x> + noise of deviation s, x ~ N(0, C), squared loss, w = w* + d: a sample's gradient x (<x, d> - noise)
    has mean Cd and, by Isserlis' theorem, covariance C (<d, Cd> + s^2) + Cd (Cd)^T. A batch's has 1/batch of that."""
    p, s = 5, 0.7
    root = torch.tril(torch.randn(p, p, dtype=torch.float64))
    c, d = root @ root.t(), torch.linspace(-0.6, 0.5, p, dtype=torch.float64)
    gradient = c @ d
    trace = ((d @ gradient + s**2) * c.trace() + gradient.square().sum()) / batch
    x = torch.randn(2, DRAWS, batch, p, dtype=torch.float64) @ root.t()
    residual = x @ d - s * torch.randn(2, DRAWS, batch, dtype=torch.float64)
    a, b = (x * residual[..., None]).mean(2)
    got = estimates(a, b)
    assert z_scores(got, torch.stack([gradient.square().sum(), trace])).max() < 5
    if batch > 1:  # the norm of a batch's gradient is not an estimate of the gradient's norm
        assert z_scores(a.square().sum(1)[None], gradient.square().sum()).max() > 20


def test_variances_of_theory():
    r"""Gaussian gradients: Var <a,b> = 2 G^T S G + tr S^2, Var |a-b|^2/2 = 2 tr S^2, their covariance -tr S^2."""
    p = 6
    root = torch.tril(torch.randn(p, p, dtype=torch.float64))
    s, g = root @ root.t(), torch.linspace(-1, 1.5, p, dtype=torch.float64)
    got = estimates(*(g + torch.randn(2, DRAWS, p, dtype=torch.float64) @ root.t()))
    assert z_scores(got, torch.stack([g.square().sum(), s.trace()])).max() < 5
    squared = s.square().sum()
    of_signal, of_noise, between = torch.cov(got)[[0, 1, 0], [0, 1, 1]]
    assert of_signal.item() == pytest.approx((2 * g @ s @ g + squared).item(), rel=0.07)
    assert of_noise.item() == pytest.approx((2 * squared).item(), rel=0.07)
    assert between.item() == pytest.approx(-squared.item(), rel=0.1)


# ---- Averages ---------------------------------------------------------------------------------------------------------


def sums_of(signal, noise):
    """The table of a step whose slots have these estimates."""
    signal, noise = (torch.as_tensor(x, dtype=torch.float64) for x in (signal, noise))
    return torch.stack([signal, 2 * noise, torch.ones_like(signal), torch.ones_like(signal)], dim=1)


def averaged(tables, decay):
    average = NoiseAverage(decay)
    for table in tables:
        average.add(table)
    names = [f"p{i}" for i in range(tables[0].shape[0])]
    return average.result(names, {name: slice(i, i + 1) for i, name in enumerate(names)})


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_weights(decay, steps):
    """Against the weighted sums as they are written down; the first steps are not drawn towards zero."""
    x = 3 + torch.randn(steps, 4, 2, dtype=torch.float64)
    noise = averaged([sums_of(*t.unbind(1)) for t in x], decay)
    weights = torch.tensor([decay ** (steps - 1 - t) for t in range(steps)], dtype=torch.float64)
    weights /= weights.sum()
    slots, totals = torch.einsum("t,tsk->sk", weights, x), weights @ x.sum(1)
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(noise.slot_grad_sq_norm_unbiased, slots[:, 0], **close)
    torch.testing.assert_close(noise.slot_trace_sigma, slots[:, 1], **close)
    torch.testing.assert_close(noise.slot_nsr_batch, slots[:, 1] / slots[:, 0], **close)
    torch.testing.assert_close(noise.grad_sq_norm_unbiased, totals[0], **close)
    torch.testing.assert_close(noise.trace_sigma, totals[1], **close)
    torch.testing.assert_close(noise.nsr_batch, totals[1] / totals[0], **close)  # of averages, not an average of ratios
    assert noise.count == steps
    stderrs = [noise.grad_sq_norm_unbiased_stderr, noise.trace_sigma_stderr, noise.nsr_batch_stderr]
    if steps == 1 or decay == 0:
        assert all(x.isnan() for x in stderrs)
        return
    away = x.sum(1) - totals
    covariance = (weights[:, None] * away).t() @ away
    squares = weights.square().sum()
    covariance *= squares / (1 - squares)
    ratio = totals[1] / totals[0]
    slope = torch.stack([-ratio, torch.ones_like(ratio)]) / totals[0]
    expected = [covariance[0, 0].sqrt(), covariance[1, 1].sqrt(), (slope @ covariance @ slope).sqrt()]
    torch.testing.assert_close(torch.stack(stderrs), torch.stack(expected), rtol=1e-9, atol=0)


def test_equal_weights_have_the_textbook_standard_error():
    """decay 1 is the plain mean, whose standard error everybody knows."""
    x = torch.randn(50, dtype=torch.float64)
    average = _Average(1.0)
    for value in x.tolist():
        average.add(value, 1.0)
    assert average.standard_errors()[0] == pytest.approx((x.std() / 50**0.5).item(), rel=1e-12)
    assert average.standard_errors()[1] == 0


def test_standard_errors_are_as_large_as_the_errors():
    """Over many runs: their mean square is the variance of the estimate, and two of them hold the truth as often as
    Student says for as many observations as the weights are worth."""
    runs, steps, decay, truth, ratio = 3000, 80, 0.9, 2.0, 1.5
    make = torch.Generator().manual_seed(3)
    normal = torch.randn(2, steps, runs, generator=make, dtype=torch.float64)
    # Correlated, and little of it against the signal: the ratio's error is a first-order one.
    signal = (truth + 0.4 * normal[0]).tolist()
    noise = (ratio * truth + 0.3 * normal[0] + 0.5 * normal[1]).tolist()
    averages = [_Average(decay) for _ in range(runs)]
    for s, n in zip(signal, noise, strict=True):
        for average, a, b in zip(averages, s, n, strict=True):
            average.add(a, b)
    got = torch.tensor([x.estimates() for x in averages], dtype=torch.float64)
    claimed = torch.tensor([x.standard_errors() for x in averages], dtype=torch.float64)
    error = got - torch.tensor([truth, ratio * truth, ratio], dtype=torch.float64)
    torch.testing.assert_close(claimed.square().mean(0), error.square().mean(0), rtol=0.08, atol=0)
    # (1 + decay)/(1 - decay) = 19 equal observations: of Student's t with 18 degrees 93.9% lie within 2 * 0.98.
    covered = (error.abs() < 1.96 * claimed).double().mean(0)
    assert ((covered > 0.91) & (covered < 0.96)).all(), covered


def test_slots_without_a_pair_keep_their_average():
    nothing, decay = math.nan, 0.5
    x = torch.tensor([[[1.0, 2.0], [10.0, 20.0]], [[nothing] * 2, [30.0, 10.0]], [[4.0, 8.0], [50.0, 30.0]], [[nothing] * 2, [70.0, 20.0]]], dtype=torch.float64)  # fmt: skip
    tables = [sums_of(*t.unbind(1)) for t in x]
    for table in tables:
        table[table[:, 0].isnan()] = nothing
    noise = averaged(tables, decay)
    # The first slot was seen twice: weights 1/2 and 1, whatever came between.
    assert noise.slot_grad_sq_norm_unbiased[0].item() == pytest.approx((0.5 * 1 + 4) / 1.5, rel=1e-14)
    assert noise.slot_trace_sigma[0].item() == pytest.approx((0.5 * 2 + 8) / 1.5, rel=1e-14)
    weights = torch.tensor([0.125, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert noise.slot_trace_sigma[1].item() == pytest.approx((weights @ x[:, 1, 1] / weights.sum()).item(), rel=1e-14)
    # What is not there adds nothing to the total of its step.
    totals = weights @ x.nan_to_num().sum(1) / weights.sum()
    assert noise.grad_sq_norm_unbiased.item() == pytest.approx(totals[0].item(), rel=1e-14)
    assert noise.trace_sigma.item() == pytest.approx(totals[1].item(), rel=1e-14)


def test_a_slot_never_seen_is_nan():
    table = sums_of([1.0, 2.0], [3.0, 4.0])
    table[1] = math.nan
    noise = averaged([table, table], 0.9)
    assert noise.slot_trace_sigma.isnan().tolist() == [False, True]
    assert noise.slot_nsr_batch.isnan().tolist() == [False, True]
    assert noise.trace_sigma.item() == pytest.approx(3)


def test_nan_in_a_pair_shows_in_the_averages():
    """Beside a slot without a pair too, which is nothing but NaN."""
    table = sums_of([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])
    table[1], table[2, :3] = math.nan, math.nan
    noise = averaged([sums_of([1.0] * 3, [1.0] * 3), table], 0.9)
    assert noise.trace_sigma.isnan()
    assert noise.grad_sq_norm_unbiased.isnan()
    assert noise.slot_trace_sigma.isnan().tolist() == [False, False, True]
    assert noise.slot_trace_sigma[1].item() == 1


def test_negative_averages_are_not_clipped():
    noise = averaged([sums_of([1.0, -3.0], [1.0, 1.0]), sums_of([-2.0, -3.0], [2.0, 1.0])], 0.9)
    assert noise.grad_sq_norm_unbiased.item() == pytest.approx((0.9 * -2 - 5) / 1.9)
    assert noise.slot_grad_sq_norm_unbiased[0].item() == pytest.approx((0.9 * 1 - 2) / 1.9)
    assert noise.nsr_batch.item() < 0
    assert noise.nsr_batch_stderr.item() > 0


def test_large_offsets_do_not_cancel():
    """Of 1e8 +- 1, a variance from squares would have lost every digit."""
    x = 1e8 + torch.randn(200, dtype=torch.float64)
    average = _Average(1.0)
    for value in x.tolist():
        average.add(value, value)
    assert average.standard_errors()[0] == pytest.approx((x.std() / 200**0.5).item(), rel=1e-6)


def test_a_result_is_not_written_by_later_steps():
    average = NoiseAverage(0.9)
    average.add(sums_of([1.0, 2.0], [3.0, 4.0]))
    first = average.result(["a", "b"], {})
    average.add(sums_of([5.0, 6.0], [7.0, 8.0]))
    assert first.slot_trace_sigma.tolist() == [3, 4]
    assert first.trace_sigma.item() == 7
    assert (first.count, average.count) == (1, 2)


def test_fits():
    average = NoiseAverage(0.9)
    assert average.slots == 0
    assert average.fits(7)
    average.add(sums_of([1.0, 2.0], [3.0, 4.0]))
    assert average.slots == 2
    assert average.fits(2)
    assert not average.fits(3)


def test_public():
    assert normkern.noise_from_pair is noise_from_pair


def test_pair_of_unequal_lengths_names_the_function_that_was_called():
    with pytest.raises(ValueError, match="^noise_from_pair: grads_b has 2 entries but grads_a has 1$"):
        noise_from_pair([torch.ones(1)], [torch.ones(1)] * 2)
