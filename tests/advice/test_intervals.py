"""Intervals cover as often as they say, and have no upper end where the signal is lost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkern.advice.intervals import (
    Interval,
    Mean,
    RatioOfMeans,
    covariance_of_means,
    degrees_of_freedom,
    further_measurements,
)
from normkern.advice.student import two_sided

#: Cornish-Fisher and tables: degrees of freedom -> t at 95 % and at 99 %.
TABLE = {1: (12.7062, 63.6567), 2: (4.3027, 9.9248), 3: (3.1824, 5.8409), 10: (2.2281, 3.1693), 120: (1.9799, 2.6174)}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    assert two_sided(0.95, freedom) == pytest.approx(TABLE[freedom][0], abs=6e-5)
    assert two_sided(0.99, freedom) == pytest.approx(TABLE[freedom][1], abs=6e-5)


def test_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 8, 77, 199, 200, 3000):
        for confidence in (0.1, 0.5, 0.9, 0.999):
            assert two_sided(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-7)


def autoregressive(runs, n, phi, generator):
    """Stationary series of variance 1, (runs, n)."""
    x = torch.randn(runs, generator=generator, dtype=torch.float64)
    columns = []
    for _ in range(n):
        x = phi * x + math.sqrt(1 - phi * phi) * torch.randn(runs, generator=generator, dtype=torch.float64)
        columns.append(x)
    return torch.stack(columns, 1)


def pairs(runs, n, nsr, phi, generator, size=40):
    """Estimates of noise and signal from pairs of gradients; the signal's strength is correlated in time."""
    strength = (1 + 0.3 * autoregressive(runs, n, phi, generator)).clamp(min=0.1)
    mean = torch.zeros(runs, n, size, dtype=torch.float64)
    mean[..., 0] = strength.sqrt()
    a, b = (
        mean + math.sqrt(nsr / size) * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return (a - b).square().sum(-1) / 2, (a * b).sum(-1)


@pytest.mark.parametrize(("n", "nsr", "phi"), [(12, 1.0, 0.0), (60, 5.0, 0.0), (150, 20.0, 0.9), (150, 200.0, 0.5)])
def test_intervals_of_ratios_cover_as_often_as_they_say(n, nsr, phi):
    runs = 400
    noise, signal = pairs(runs, n, nsr, phi, torch.Generator().manual_seed(0))
    intervals = [RatioOfMeans.of_series(x, y).interval(0.95) for x, y in zip(noise, signal, strict=True)]
    covered = sum(i.low <= nsr <= i.high for i in intervals) / runs
    assert 0.92 <= covered <= 0.99  # 2.7 standard errors below 95 %
    if nsr == 200:
        assert sum(math.isinf(i.high) for i in intervals) > runs / 3, "the signal is lost in noise in many runs"


def test_intervals_of_means_cover_although_measurements_are_correlated():
    x = autoregressive(400, 400, 0.9, torch.Generator().manual_seed(1))
    intervals = [Mean.of_series(row).interval(0.9) for row in x]
    covered = sum(i.low <= 0 <= i.high for i in intervals) / len(x)
    assert 0.86 <= covered <= 0.95
    naive = x.std(1) / math.sqrt(400) * 1.645
    assert (x.mean(1).abs() < naive).double().mean() < 0.5, "the test could not see a missing correlation"


def test_covariance_is_that_of_a_slow_sum():
    """Against the definition, for one cosine."""
    z = torch.tensor([[1.0, 2.0], [4.0, -1.0], [2.0, 0.5]], dtype=torch.float64)
    assert degrees_of_freedom(3) == 1
    waves = [math.cos(math.pi * (t + 0.5) / 3) for t in range(3)]
    projected = [math.sqrt(2 / 3) * sum(w * float(row[i]) for w, row in zip(waves, z, strict=True)) for i in range(2)]
    expected = torch.tensor([[p * q / 3 for q in projected] for p in projected], dtype=torch.float64)
    torch.testing.assert_close(covariance_of_means(z), expected)


def test_a_drift_widens_the_interval():
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still, moving = (Mean.of_series(noise + slope * torch.arange(100)).interval(0.95) for slope in (0.0, 0.1))
    assert moving.high - moving.low > 5 * (still.high - still.low)


NUMBERS = st.floats(-100, 100, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), NUMBERS), min_size=2, max_size=30),
    st.floats(0.5, 0.99),
    st.integers(-300, 300),
)
def test_fieller_interval_is_the_set_of_ratios_that_are_not_rejected(rows, confidence, power):
    x, y = (torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True))
    ratio = RatioOfMeans.of_series(x, y)
    low, high = ratio.interval(confidence)[1:]
    assert 0 <= low <= high

    def surplus(r):
        """By how much r is accepted, as a part of the numbers that this is the difference of."""
        t2 = two_sided(confidence, ratio.freedom) ** 2
        terms = [ratio.numerator**2, -2 * r * ratio.numerator * ratio.denominator, (r * ratio.denominator) ** 2]
        spread = [ratio.of_numerator, -2 * r * ratio.covariance, r * r * ratio.of_denominator]
        size = sum(map(abs, terms)) + t2 * sum(map(abs, spread))
        return (t2 * sum(spread) - sum(terms)) / size if size else 0.0

    for r in (0.01, 0.3, 1.0, 7.0, 500.0):
        if low <= r <= high:
            # An interval is the hull of the set: where it has no upper end, a part in its middle may be rejected.
            assert surplus(r) > -1e-9 or (low == 0 and high == math.inf)
        else:
            assert surplus(r) < 1e-9
    if ratio.estimate == ratio.estimate:
        assert low <= ratio.estimate * (1 + 1e-9)
        assert high >= ratio.estimate * (1 - 1e-9)
    # Units do not matter; powers of 2 are exact.
    scaled = RatioOfMeans.of_series(torch.ldexp(x, torch.tensor(power)), y).interval(confidence)
    assert scaled.low == math.ldexp(low, power)


def test_gradients_of_any_size_give_the_same_ratio():
    x, y = (a[0] for a in pairs(1, 50, 3.0, 0.0, torch.Generator().manual_seed(2)))
    plain = RatioOfMeans.of_series(x, y).interval(0.95)
    for unit in (1e-150, 1e-30, 1e100):
        assert RatioOfMeans.of_series(x * unit, y * unit).interval(0.95) == pytest.approx(plain, rel=1e-9)


def test_negative_signal_bounds_nothing_and_is_named():
    x, y = torch.ones(40) + torch.arange(40) % 2, -torch.ones(40) - torch.arange(40) % 3
    ratio = RatioOfMeans.of_series(x, y)
    assert ratio.interval(0.95)[1:] == (0.0, math.inf)
    assert math.isnan(ratio.estimate)
    assert ratio.is_denominator_negative(0.95)


def test_zero_noise_and_zero_signal():
    ones, zeros = torch.ones(5), torch.zeros(5)
    assert RatioOfMeans.of_series(zeros, ones).interval(0.95) == (0.0, 0.0, 0.0)
    assert RatioOfMeans.of_series(ones, zeros).interval(0.95)[1:] == (0.0, math.inf)
    assert RatioOfMeans.of_series(2 * ones, ones).interval(0.95) == pytest.approx((2.0, 2.0, 2.0))


def test_missing_measurements_are_about_right():
    """With as many more as it asks for, most intervals are as narrow as was asked."""
    generator = torch.Generator().manual_seed(3)
    noise, signal = (a[0] for a in pairs(1, 60, 20.0, 0.0, generator))

    def enough(interval: Interval) -> bool:
        return interval.low > 0 and interval.high <= 1.5 * interval.low

    more = further_measurements(RatioOfMeans.of_series(noise, signal), 0.95, enough)
    assert more
    good = 0
    for x, y in zip(*pairs(20, 2 * (60 + more), 20.0, 0.0, generator), strict=True):
        good += enough(RatioOfMeans.of_series(x, y).interval(0.95))
    assert good >= 15
    assert not enough(RatioOfMeans.of_series(noise, signal).interval(0.95))


def test_missing_measurements_of_what_is_known_and_of_what_never_will_be():
    known = Mean(5.0, 0.01, 100)
    assert further_measurements(known, 0.95, lambda i: i.low > 0) == 0
    assert further_measurements(known, 0.95, lambda i: i.low > 5) is None
