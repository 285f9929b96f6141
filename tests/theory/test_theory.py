"""theory: every formula against exact algebra or a simulation that does not use it; the numbers of its doctests too."""

import decimal
import inspect
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from normkern import theory
from normkern.theory import (
    beta_by_samples,
    decay_timescale,
    exponential_decay,
    exponential_factor,
    linear_scaling,
    max_linear_scaling,
    nsr_condition,
    square_root_scaling,
    square_root_weight_decay,
    svag_adam,
    svag_adam_fraction,
    svag_coefficients,
    svag_effective_steps,
    svag_equilibrium,
    svag_fraction,
    svag_steps,
)

from .arguments import GOOD as EQUILIBRIA

SQRT2 = math.sqrt(2)
LS = st.floats(0.5, 1e6)
patient = settings(deadline=None)  # a slow machine is no failure of a property
COUNTS = st.integers(0, 10**7)
FUNCTIONS = [getattr(theory, name) for name in theory.__all__ if inspect.isfunction(getattr(theory, name))]


# --- SVAG's coefficients ----------------------------------------------------------------------------------------------


@patient
@given(LS)
@pytest.mark.parametrize("l", [None, 0.5, 1.5, 1.0, 5, 1e300])
def test_coefficients_keep_the_mean_and_multiply_the_cumulants(l, drawn):
    l = drawn if l is None else l
    c1, c2 = svag_coefficients(l)
    size = abs(c1) + abs(c2)
    assert c1 + c2 == pytest.approx(1, abs=4e-16 * size)
    assert c1**2 + c2**2 == pytest.approx(l, rel=1e-14)
    if l < 1e90:
        assert c1**3 + c2**3 == pytest.approx((3 * l - 1) / 2, abs=1e-14 * size**3)
    assert c1 >= 0.5 >= c2


def test_coefficients_at_known_points():
    assert svag_coefficients(1) == (1.0, 0.0)  # SGD on the first batch, to the bit
    assert svag_coefficients(0.5) == (0.5, 0.5)  # one batch of 2B
    assert svag_coefficients(l=5) == (2.0, -1.0)


@patient
@given(st.floats(-1e-3, 1e-3))
def test_second_coefficient_is_accurate_where_it_vanishes(d):
    l = 1 + d
    d = Fraction(l) - 1  # sqrt(1 + 2d) = 1 + d - d^2/2 + d^3/2 - 5 d^4/8 + ...
    series = -(d - d**2 / 2 + d**3 / 2 - 5 * d**4 / 8 + 7 * d**5 / 8 - 21 * d**6 / 16) / 2
    assert svag_coefficients(l).c2 == pytest.approx(float(series), rel=1e-14, abs=0)


def quadratic(l, eta=0.8, h=1.0, t=4.0, x0=2.0, skew=1.0):
    """E x^2 and the third cumulant after time t of SVAG on h (x - xi)^2 / 2, E xi^2 = 1, E xi^3 = skew: by recursion."""
    c1, c2 = svag_coefficients(l)
    a, mean, variance, third = 1 - h * eta / l, x0, 0.0, 0.0
    for _ in range(svag_steps(steps=round(t / eta), l=l)):
        mean *= a
        variance = a**2 * variance + (eta * h / l) ** 2 * (c1**2 + c2**2)
        third = a**3 * third + (eta * h / l) ** 3 * (c1**3 + c2**3) * skew
    return mean, variance, third


def sde(eta=0.8, h=1.0, t=4.0, x0=2.0):
    """Mean and variance of dx = -h x dt + sqrt(eta) h dW after time t; its third cumulant is 0."""
    return x0 * math.exp(-h * t), eta * h / 2 * (1 - math.exp(-2 * h * t))


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def test_quadratic_converges_to_the_sde_with_order_one():
    m, v = sde()
    errors = []
    for l in (1, 2, 4, 8, 16, 32, 64):
        mean, variance, _ = quadratic(l)
        a, steps = 1 - 0.8 / l, 5 * l
        exact = a ** (2 * steps) * 4 + 0.64 / l * (1 - a ** (2 * steps)) / (1 - a**2)
        assert mean**2 + variance == pytest.approx(exact, rel=1e-12)
        errors.append(abs(exact - m**2 - v))
    assert errors == pytest.approx([0.266, 0.0989, 0.0437, 0.0206, 0.0100, 0.00495, 0.00246], rel=5e-3)
    assert orders(errors) == pytest.approx([1.42, 1.18, 1.08, 1.04, 1.02, 1.01], abs=5e-3)


def test_skewness_decays_with_order_one():
    thirds = [quadratic(l)[2] for l in (8, 16, 32, 64, 128, 256)]
    assert orders(thirds) == pytest.approx([1] * 5, abs=0.07)
    assert orders(thirds)[-2:] == pytest.approx([1] * 2, abs=0.011)
    m, v = sde()  # and so does the error of E x^3 = m^3 + 3 m v + third
    errors = [abs(a**3 + 3 * a * b + c - m**3 - 3 * m * v) for a, b, c in map(quadratic, (64, 128, 256))]
    assert orders(errors) == pytest.approx([1] * 2, abs=0.02)


def test_half_is_the_double_batch_at_the_double_rate():
    g1, g2 = torch.randn(2, 100, dtype=torch.float64)
    c1, c2 = svag_coefficients(0.5)
    torch.testing.assert_close(0.1 / 0.5 * (c1 * g1 + c2 * g2), 0.2 * (g1 + g2) / 2)


@pytest.mark.parametrize("l", [0.5, 1, 1.5, 4])
def test_covariance_of_the_combination_is_l_sigma(l):
    """Linear regression, every pair of batches enumerated."""
    x, y, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.ones(3).double()
    per_sample = (x @ w - y)[:, None] * x
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    batches = (per_sample[pairs[:, 0]] + per_sample[pairs[:, 1]]) / 2  # every batch of two, with replacement
    c1, c2 = svag_coefficients(l)
    combined = (c1 * batches[:, None] + c2 * batches[None, :]).reshape(-1, 3)
    torch.testing.assert_close(combined.mean(0), batches.mean(0))
    torch.testing.assert_close(combined.T.cov(correction=0), l * batches.T.cov(correction=0))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "l", "expected"),
    [(10, 1.1, 11), (10, 0.7, 7), (3, 5 / 3, 5), (3, 1.5, 5), (1, 0.5, 1), (10**9, 1.1, 1_100_000_000), (0, 2, 0),
     (7, Fraction(8, 7), 8), (100, 1.15, 115), (1000, 4.35, 4350), (10**12, 2, 2 * 10**12)],
)  # fmt: skip
def test_steps(steps, l, expected):
    assert svag_steps(steps=steps, l=l) == expected


@patient
@given(st.integers(1, 10**6), st.integers(1, 10**6), COUNTS)
def test_fractions_are_recovered_from_their_floats(p, q, n):
    assume(2 * p >= q and p < 10**3 * q)
    l = Fraction(p, q)
    assert svag_fraction(p / q) == l
    assert svag_steps(steps=n, l=p / q) == -(-n * p // q)
    assert svag_effective_steps(steps=n, l=p / q) == n * q // p


@patient
@given(COUNTS, LS)
def test_a_schedule_is_run_through_and_not_beyond(n, l):
    """The steps 0 .. svag_steps - 1 stand at 0 .. n - 1; the step after them at n or later."""
    steps = svag_steps(steps=n, l=l)
    assert steps - 1 < n * svag_fraction(l) <= steps
    assert svag_effective_steps(steps=steps, l=l) >= n
    if n:
        assert svag_effective_steps(steps=steps - 1, l=l) < n
    if l >= 1:
        assert svag_effective_steps(steps=steps, l=l) == n


@patient
@given(COUNTS, LS)
def test_effective_steps_is_the_floor_of_the_quotient(k, l):
    whole = svag_effective_steps(steps=k, l=l)
    assert whole * svag_fraction(l) <= k < (whole + 1) * svag_fraction(l)


@patient
@given(LS)
def test_the_fraction_rounds_to_its_float(l):
    assert float(svag_fraction(l)) == l


def test_a_fraction_that_is_given_is_taken_as_it_is():
    third = Fraction(10**9 + 1, 10**9)
    assert svag_fraction(third) is third or svag_fraction(third) == third
    assert svag_fraction(np.int64(3)) == 3
    assert svag_fraction(0.5 + 1e-13) == Fraction(0.5 + 1e-13)  # no simple fraction rounds to it


# --- the equilibrium --------------------------------------------------------------------------------------------------

CHAINS, DIM = 500, 16


def equilibrium(*, lr, weight_decay, l, signal, noise, burn=None, steps=None):
    """Averages of |w|^2, |grad L|^2 and tr(Sigma) over an SVAG run on a scale-invariant field, and over many chains.

    The mean gradient is J w sqrt(signal) / |w|^2 with a rotation J by 90 degrees, the noise is Gaussian in the tangent
    space: <w, g> = 0, g ~ 1/|w|; |grad L|^2 = signal / |w|^2, tr(Sigma) = noise / |w|^2.
    """
    generator = torch.Generator().manual_seed(1)
    c1, c2 = svag_coefficients(l)
    w = torch.randn(CHAINS, DIM, generator=generator, dtype=torch.float64)
    rate = 4 * lr * weight_decay / l  # of relaxation
    burn, steps = burn or math.ceil(6 / rate), steps or math.ceil(12 / rate)
    w *= (lr * (noise + signal / l) / weight_decay) ** 0.25 / w.norm(dim=1, keepdim=True)  # near it, from either side
    sums = torch.zeros(3, dtype=torch.float64)
    for k in range(burn + steps):
        sq = w.square().sum(1, keepdim=True)
        mean = math.sqrt(signal) * torch.cat([w[:, DIM // 2 :], -w[:, : DIM // 2]], 1) / sq
        xi = torch.randn(2, CHAINS, DIM, generator=generator, dtype=torch.float64)
        xi -= (xi * w).sum(2, keepdim=True) / sq * w
        g1, g2 = mean + xi * (math.sqrt(noise / (DIM - 1)) / sq.sqrt())
        if k >= burn:
            sums += torch.stack([sq.mean(), (signal / sq).mean(), (noise / sq).mean()])
        w = w - lr / l * (c1 * g1 + c2 * g2 + weight_decay * w)
    return (sums / steps).tolist()


@pytest.mark.parametrize("l", [0.5, 1, 2, 8])
def test_equilibrium_is_that_of_a_simulation(l):
    """With the doctest's lr, weight_decay and ratio of noise to signal; R = 4 for l = 1 is its first line."""
    run = {"lr": 0.5, "weight_decay": 0.5, "l": l}
    measured, signal, noise = equilibrium(**run, signal=12.0, noise=16.0)
    assert svag_equilibrium(**run, grad_sq_norm=signal, trace_sigma=noise) == pytest.approx(measured, rel=0.01)
    if l == 1:
        assert (measured, signal, noise) == pytest.approx((4, 3, 4), rel=0.05)


@patient
@given(st.floats(1e-3, 1), st.floats(1e-3, 0.9), LS, st.floats(0, 10), st.floats(1e-6, 10))
def test_equilibrium_is_the_fixed_point_of_the_norm(lr, weight_decay, l, grad_sq_norm, trace_sigma):
    r = svag_equilibrium(lr=lr, weight_decay=weight_decay, l=l, grad_sq_norm=grad_sq_norm, trace_sigma=trace_sigma)
    decay = Fraction(lr) * Fraction(weight_decay) / Fraction(l)
    grown = (Fraction(lr) / Fraction(l)) ** 2 * (Fraction(grad_sq_norm) + Fraction(l) * Fraction(trace_sigma))
    assert float(grown / (1 - (1 - decay) ** 2)) == pytest.approx(r, rel=1e-12)


def test_equilibrium_tends_to_the_sde():
    numbers = {"lr": 0.5, "weight_decay": 0.5, "grad_sq_norm": 3.0, "trace_sigma": 4.0}
    limit = svag_equilibrium(l=math.inf, **numbers)
    assert limit == 0.5 * 4.0 / (2 * 0.5)
    gaps = [svag_equilibrium(l=l, **numbers) - limit for l in (64, 128, 256, 512)]
    assert orders(gaps) == pytest.approx([1] * 3, abs=0.02)


# --- when SGD can follow its SDE --------------------------------------------------------------------------------------

RATIOS = st.floats(0, 1)  # where in [1/C, C], on a logarithmic scale


def between(C, x):
    return C ** (2 * x - 1)


@patient
@given(st.floats(1.01, 5), st.floats(0.001, 1), st.floats(0, 1), RATIOS, RATIOS)
def test_nsr_condition_is_the_least_over_all_close_pairs(C, lr, weight_decay, a, b):
    """SGD with R = 1; an SDE whose R and N are any C-close ones fixes N, and the equilibrium fixes G."""
    assume(weight_decay > 1e-3)
    noise = 2 * weight_decay * between(C, a) / lr * between(C, b)
    signal = (2 / lr - weight_decay) * weight_decay - noise
    assume(signal > 1e-9 * noise)
    least = nsr_condition(C, lr=lr, weight_decay=weight_decay)
    assert noise / signal >= least * (1 - 1e-6)
    assert noise / signal >= nsr_condition(C) * (1 - 1e-6)


@patient
@given(st.floats(1.01, 5), st.floats(0.001, 1), st.floats(0, 1))
def test_nsr_condition_is_attained(C, lr, weight_decay):
    assume(weight_decay > 1e-3)
    noise = 2 * weight_decay / (lr * C**2)
    signal = (2 / lr - weight_decay) * weight_decay - noise
    expected = noise / signal if signal > 0 else math.inf
    assume(not abs(signal) < 1e-6 * noise)
    assert nsr_condition(C, lr=lr, weight_decay=weight_decay) == pytest.approx(expected, rel=1e-6)
    assert nsr_condition(C, lr=lr, weight_decay=0) == nsr_condition(C) == pytest.approx(1 / (C**2 - 1))


def test_nsr_condition_at_known_points():
    assert nsr_condition() == nsr_condition(SQRT2) == nsr_condition(C=SQRT2) == pytest.approx(1)
    assert nsr_condition(2, lr=0.5, weight_decay=0.5) == 0.4
    assert nsr_condition(SQRT2, lr=1, weight_decay=1) > 1e15  # C^2 (1 - 1/2) = 1: noise alone
    assert nsr_condition(SQRT2, lr=1, weight_decay=1.5) == math.inf


def test_nsr_condition_in_a_simulation():
    """In the field above the ratios are tied to each other, and SGD is exactly C from its SDE where the condition says."""
    C, lr, weight_decay = 1.5, 0.5, 0.4
    signal = 1.0
    noise = signal * nsr_condition(C, lr=lr, weight_decay=weight_decay)
    r, g, n = equilibrium(lr=lr, weight_decay=weight_decay, l=1, signal=signal, noise=noise)
    r_sde = math.sqrt(lr * noise / (2 * weight_decay))  # |w|^4 is constant along the SDE's equilibrium
    assert [r / r_sde, signal / r_sde / g, noise / r_sde / n] == pytest.approx([C, C, C], rel=0.01)
    assert r_sde == pytest.approx(
        svag_equilibrium(lr=lr, weight_decay=weight_decay, l=math.inf, grad_sq_norm=0, trace_sigma=noise / r_sde)
    )


@patient
@given(st.floats(1.01, 5), st.floats(0, 1e3), RATIOS, RATIOS, RATIOS)
def test_max_linear_scaling_bounds_every_close_pair(C, nsr, a, b, c):
    """Small run R = 1, G = 1, N = nsr, negligible lr * weight_decay: (1 + nsr) R_2 = k G_2 + k N_2, k N_2 like N."""
    k = ((1 + nsr) * between(C, a) - nsr * between(C, b)) / between(C, c)
    assert k <= max_linear_scaling(nsr_batch=nsr, C=C) * (1 + 1e-12)


@patient
@given(st.floats(1.01, 5), st.floats(0, 1e3))
def test_max_linear_scaling_is_attained_and_below_the_papers(C, nsr):
    k = max_linear_scaling(nsr_batch=nsr, C=C)
    assert k == pytest.approx(((1 + nsr) * C - nsr / C) * C)
    assert k <= C**2 * (1 + nsr) * (1 + 1e-12)


def test_max_linear_scaling_in_a_simulation():
    """The batch and lr times k = the limit: the large run is exactly C from the small one, up to lr * weight_decay."""
    C, lr, weight_decay, nsr = SQRT2, 0.02, 0.2, 2.0
    k = max_linear_scaling(nsr_batch=nsr, C=C)
    assert k == pytest.approx(4)
    small = svag_equilibrium(lr=lr, weight_decay=weight_decay, l=1, grad_sq_norm=1, trace_sigma=nsr)
    large_lr = linear_scaling(lr=lr, batch_size=10, new_batch_size=round(10 * k))
    r, g, n = equilibrium(
        lr=large_lr, weight_decay=weight_decay, l=1, signal=small, noise=small * nsr / k, burn=100, steps=300
    )
    assert [r / small, 1 / g, nsr / (k * n)] == pytest.approx([C, C, C], rel=0.015)


def test_max_linear_scaling_at_known_points():
    assert max_linear_scaling(nsr_batch=3.0, C=2) == 13
    assert max_linear_scaling(nsr_batch=10.5) == pytest.approx(12.5)
    assert max_linear_scaling(nsr_batch=math.inf) == math.inf
    assert max_linear_scaling(nsr_batch=0) == pytest.approx(2)


# --- scaling rules ----------------------------------------------------------------------------------------------------


@patient
@given(st.floats(1e-6, 10), st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**5))
def test_linear_scaling_keeps_lr_sigma_and_composes(lr, b, c, d):
    once = linear_scaling(lr=lr, batch_size=b, new_batch_size=c)
    assert once / c == pytest.approx(lr / b)  # Sigma ~ 1/B
    twice = linear_scaling(lr=once, batch_size=c, new_batch_size=d)
    assert twice == pytest.approx(linear_scaling(lr=lr, batch_size=b, new_batch_size=d))


@patient
@given(
    st.floats(1e-6, 10),
    st.tuples(st.just(0.0) | st.floats(1e-9, 0.9999), st.floats(1e-9, 0.9999)),
    st.floats(0, 1),
    st.integers(1, 1000),
    st.integers(1, 1000),
)
def test_square_root_scaling_composes_to_the_identity(lr, betas, eps, b, c):
    b, c = max(b, c), min(b, c)  # to the smaller batch and back
    there = square_root_scaling(lr=lr, betas=betas, eps=eps, batch_size=b, new_batch_size=c)
    back = square_root_scaling(**there._asdict(), batch_size=c, new_batch_size=b)
    assert (back.lr, back.eps) == pytest.approx((lr, eps))
    assert back.betas == pytest.approx(betas, abs=2e-13)
    k = c / b
    assert (there.lr**2 / c, there.eps**2 * c) == pytest.approx((lr**2 / b, eps**2 * b))
    assert [1 - x for x in there.betas] == pytest.approx([k * (1 - x) for x in betas])


def test_square_root_scaling_reaches_zero_and_not_below():
    at = {"lr": 1e-3, "eps": 1e-8, "batch_size": 1}
    assert square_root_scaling(betas=(0.95, 0.999), new_batch_size=20, **at).betas[0] == 0.0
    with pytest.raises(ValueError, match=r"betas\[0\] expected to stay in \[0, 1\), got -0.05 from 0.95 at 21 times"):
        square_root_scaling(betas=(0.95, 0.999), new_batch_size=21, **at)
    with pytest.raises(ValueError, match=r"betas\[0\] expected to stay in \[0, 1\), got 1.0 from 0.5 at"):
        square_root_scaling(lr=1e-3, betas=(0.5, 0.999), eps=0, batch_size=2**60, new_batch_size=1)


def test_square_root_scaling_is_what_adam_takes():
    scaling = square_root_scaling(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, batch_size=8, new_batch_size=32)
    group = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], **scaling._asdict()).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.002, (0.6, 0.996), 5e-9)


def test_square_root_scaling_keeps_the_noise_of_adam():
    """Adam on pure noise, k = 4: the path after equal time has the same variance, to the 1 % that 20000 walkers show."""

    def spread(lr, betas, eps, sigma, steps):
        generator = torch.Generator().manual_seed(0)
        w, m, v = torch.zeros(3, 20000, dtype=torch.float64)
        v += sigma**2
        for _ in range(steps):
            g = w * 0.05 + sigma * torch.randn(w.shape, generator=generator, dtype=torch.float64)
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            w = w - lr * m / (v.sqrt() + eps)
        return w.std().item()

    here = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 0.5}
    there = square_root_scaling(**here, batch_size=1, new_batch_size=4)
    assert spread(**there._asdict(), sigma=0.5, steps=200) == pytest.approx(
        spread(**here, sigma=1.0, steps=800), rel=0.03
    )


def test_decay_per_sample_and_half_life_in_samples_stay():
    here = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    there = square_root_scaling(**here, batch_size=8, new_batch_size=72)
    decay = square_root_weight_decay(weight_decay=0.1, batch_size=8, new_batch_size=72)
    assert there.lr * decay / 72 == pytest.approx(here["lr"] * 0.1 / 8)
    beta = beta_by_samples(beta=0.999, batch_size=8, new_batch_size=72)
    assert 72 * math.log(0.5) / math.log(beta) == pytest.approx(8 * math.log(0.5) / math.log(0.999))
    assert beta_by_samples(beta=0.0, batch_size=8, new_batch_size=1) == 0.0
    assert beta_by_samples(beta=0.9, batch_size=3, new_batch_size=3) == 0.9


def test_timescale_is_that_of_the_weights_average():
    lr, weight_decay = 1e-3, 0.5
    weights, steps = 1.0, 0
    while weights > math.exp(-1):
        weights, steps = weights * (1 - lr * weight_decay), steps + 1
    assert decay_timescale(lr=lr, weight_decay=weight_decay) == pytest.approx(steps, rel=1e-3)


def test_svag_adam_is_the_square_root_rule_backwards():
    """l^2 steps from batches as if 1/l^2 as large: the noise of the combination, with decay and betas to match."""
    here = {"lr": 0.002, "betas": (0.9, 0.996), "eps": 1e-8}
    rule = square_root_scaling(**here, batch_size=4, new_batch_size=1)
    svag = svag_adam(**here, l=2, weight_decay=0.1)
    assert svag[:3] == rule
    assert svag.weight_decay == square_root_weight_decay(weight_decay=0.1, batch_size=4, new_batch_size=1)
    assert svag_adam(**here, l=2, weight_decay=0.1, decoupled=False).weight_decay == 0.1
    assert svag_adam(**here, l=1, weight_decay=0.1) == (*here.values(), 0.1)
    assert svag_adam(**{**here, "lr": 0}, l=3).lr == 0.0


def test_svag_adam_is_what_adamw_takes():
    svag = svag_adam(lr=0.002, betas=(0.9, 0.996), eps=1e-8, l=2, weight_decay=0.1)
    group = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **svag._asdict()).param_groups[0]
    assert {key: group[key] for key in svag._fields} == svag._asdict()


@pytest.mark.parametrize("wrong", [None, "eps", "lr"])
def test_svag_adam_converges_to_the_sde_with_order_one_over_l_squared(wrong):
    """E x^2 of Adam where noise dominates, sqrt(v) = l sigma: x and m are linear, and their moments are exact."""
    at = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.3, "weight_decay": 0.2}
    slope, sigma, time = 1.0, 1.0, 20

    def mean_square(l):
        square = float(svag_adam_fraction(l))
        lr, betas, eps, weight_decay = svag_adam(**at, l=l)
        lr, eps = (lr / l if wrong == "lr" else lr), (at["eps"] if wrong == "eps" else eps)
        rate = lr / (l * sigma + eps)
        xx, xm, mm = 1.0, 0.0, 0.0
        for _ in range(round(time * square)):
            c = 1 - betas[0]
            # m' = beta m + c (slope x + l sigma noise), x' = keep x - rate m'
            keep = 1 - lr * weight_decay
            new_mm = betas[0] ** 2 * mm + 2 * betas[0] * c * slope * xm + c**2 * (slope**2 * xx + square * sigma**2)
            x_m = betas[0] * xm + c * slope * xx
            xx, xm, mm = keep**2 * xx - 2 * keep * rate * x_m + rate**2 * new_mm, keep * x_m - rate * new_mm, new_mm
        return xx

    values = [mean_square(2.0 ** (k / 2)) for k in range(3, 12)]
    errors = [abs(x - values[-1]) for x in values]
    orders = [math.log2(errors[k] / errors[k + 1]) for k in range(4)]  # l^2 doubles
    assert (min(orders) > 0.95 and max(orders) < 1.1) == (wrong is None), orders


def test_svag_adam_fraction_is_a_square_or_what_has_this_root():
    assert [svag_adam_fraction(l) for l in (1, 2, 1.5, 1.1)] == [1, 4, Fraction(9, 4), Fraction(121, 100)]
    assert [svag_adam_fraction(math.sqrt(n)) for n in (0.5, 2, 3, 5, 6.25, 8)] == [0.5, 2, 3, 5, 6.25, 8]
    assert svag_adam_fraction(Fraction(4, 3)) == Fraction(16, 9)
    assert svag_steps(steps=5, l=svag_adam_fraction(math.sqrt(2))) == 10


# --- exponential learning rates ---------------------------------------------------------------------------------------

MOMENTA = st.floats(0, 0.999)


@patient
@given(st.floats(1e-300, 10), st.floats(0, 1), MOMENTA)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.5, 0.9, 0.99, 1 - 2**-40])
def test_exponential_decay_is_the_smaller_root_and_keeps_its_digits(momentum, lr, share, drawn):
    momentum = drawn if momentum is None else momentum
    with decimal.localcontext(decimal.Context(prec=60)):
        most = (1 - decimal.Decimal(momentum).sqrt()) ** 2
        weight_decay = float(most * decimal.Decimal(share) / decimal.Decimal(lr))
        assume(weight_decay < math.inf)
        c = decimal.Decimal(lr * weight_decay)
        b = 1 - decimal.Decimal(momentum) + c
        square = max(decimal.Decimal(0), b * b - 4 * c)
        exact = 2 * c / (b + square.sqrt())
        # Where the roots meet, they are as the root of what rounding leaves of their distance.
        near = float(square / (b * b))
        arguments = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        decay, tolerance = exponential_decay(**arguments), 1e-15 + min(1e-16 / max(near, 1e-17), 1e-7)
        assert decay == pytest.approx(float(exact), rel=4 * tolerance, abs=5e-324)
        alpha = exponential_factor(**arguments)
        assert alpha == 1 - decay
        assert math.sqrt(momentum) * (1 - 1e-7) - 1e-7 <= alpha <= 1  # alpha itself is rounded as 1 is


def test_exponential_factor_at_known_points():
    per_epoch = exponential_factor(lr=0.1, weight_decay=5e-4, momentum=0.9) ** -782
    assert per_epoch == pytest.approx(1.48123, abs=5e-6)  # the authors' "0.1 x 1.481^t"
    assert exponential_factor(lr=0.5, weight_decay=0.5, momentum=0) == 0.75
    assert exponential_factor(lr=0.1, weight_decay=0, momentum=0.9) == 1.0
    assert exponential_factor(lr=1, weight_decay=1, momentum=0) == 0.0
    assert exponential_decay(lr=1e-9, weight_decay=1e-9, momentum=0.75) == pytest.approx(4e-18, rel=1e-15)
    assert exponential_decay(lr=1e-320, weight_decay=1e-10, momentum=0.9) == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_exponential_factor_up_to_the_bound_of_real_roots(momentum):
    most = (1 - math.sqrt(momentum)) ** 2
    for excess in (0, 5e-13, -5e-13):  # rounding decides on which side a product at the bound falls
        alpha = exponential_factor(lr=most * (1 + excess), weight_decay=1, momentum=momentum)
        assert alpha == pytest.approx(math.sqrt(momentum), abs=2e-6)
    with pytest.raises(ValueError, match="exponential_factor: lr \\* weight_decay expected at most"):
        exponential_factor(lr=most * (1 + 1e-11), weight_decay=1, momentum=momentum)


@patient
@given(st.floats(0.01, 1), st.floats(0.001, 0.99), st.floats(0, 0.98))
def test_exponential_factor_is_what_weights_without_gradient_shrink_by(lr, share, momentum):
    weight_decay = share * (1 - math.sqrt(momentum)) ** 2 / lr
    alpha = exponential_factor(lr=lr, weight_decay=weight_decay, momentum=momentum)
    w, buffer = 1.0, (1 - alpha) / (alpha * lr)  # the buffer that goes with it
    for _ in range(5):
        buffer = momentum * buffer + weight_decay * w
        old, w = w, w - lr * buffer
        assert w / old == pytest.approx(alpha, rel=1e-9)
        assume(w > 1e-3)


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = {
    svag_coefficients: {"l": 2},
    svag_steps: {"steps": 3, "l": 2},
    svag_effective_steps: {"steps": 3, "l": 2},
    svag_fraction: {"l": 2},
    svag_equilibrium: {"lr": 0.1, "weight_decay": 0.1, "l": 2, "grad_sq_norm": 1, "trace_sigma": 1},
    nsr_condition: {"C": 2, "lr": 0.1, "weight_decay": 0.1},
    max_linear_scaling: {"nsr_batch": 1, "C": 2},
    exponential_factor: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5},
    exponential_decay: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5},
    linear_scaling: {"lr": 0.1, "batch_size": 1, "new_batch_size": 2},
    square_root_scaling: {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "batch_size": 1, "new_batch_size": 2},
    square_root_weight_decay: {"weight_decay": 0.1, "batch_size": 1, "new_batch_size": 2},
    beta_by_samples: {"beta": 0.9, "batch_size": 1, "new_batch_size": 2},
    decay_timescale: {"lr": 0.1, "weight_decay": 0.1},
    svag_adam: {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "l": 2, "weight_decay": 0.1},
    svag_adam_fraction: {"l": 2},
}
WRONG = {
    "l": [0.49, 0, -1],
    "C": [1, 0.5, 0, -2, math.inf],
    "lr": [0, -0.1, math.inf],
    "weight_decay": [-0.1, math.inf],
    "momentum": [1, 1.5, -0.1],
    "grad_sq_norm": [-1, math.inf],
    "trace_sigma": [-1, math.inf],
    "nsr_batch": [-1e-9, -math.inf],
    "steps": [-1, 1.0, 2.5, 2**63],
    "batch_size": [0, -1, 1.0, 2**63],
    "new_batch_size": [0, -1, 1.0],
    "betas": [0.9, (0.9,), (0.9, 0.99, 0.999)],
    "betas[0]": [1, -0.1],
    "betas[1]": [1, -0.1],
    "eps": [-1e-8, math.inf],
    "beta": [1, 1.5, -0.1],
}
NEVER = [math.nan, True, False, "1", None, 1j, [1], torch.ones(2), 10**400]
CASES = [
    (f, name, value)
    for f, good in GOOD.items()
    for name in [*good, *(["betas[0]", "betas[1]"] if "betas" in good else [])]
    for value in [*WRONG[name], *([] if name == "betas" else NEVER), *([math.inf] if f in (svag_coefficients, svag_steps) and name == "l" else [])]
    if (f, name, str(value)) not in {(nsr_condition, "lr", "None"), (svag_adam, "lr", "0")}
]  # fmt: skip


def test_every_function_is_here():
    assert {*GOOD, *EQUILIBRIA} == {*FUNCTIONS}
    assert not {*GOOD} & {*EQUILIBRIA}


@pytest.mark.parametrize(("function", "name", "value"), CASES, ids=lambda x: getattr(x, "__name__", repr(x)[:20]))
def test_refusals_name_function_argument_expectation_and_value(function, name, value):
    arguments = dict(GOOD[function])
    if name.startswith("betas["):
        arguments["betas"] = (value, 0.9) if name == "betas[0]" else (0.9, value)
    else:
        arguments[name] = value
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    sentence = str(caught.value)
    assert sentence.startswith(f"{function.__name__}: {name} expected ")
    assert sentence.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        (svag_equilibrium, {"lr": 2.0, "weight_decay": 2.0}, "lr * weight_decay / l expected < 2, got 2.0 * 2.0 / 2.0 = 2.0"),
        (nsr_condition, {"lr": 2.0, "weight_decay": 1.0}, "lr * weight_decay expected < 2, got 2.0 * 1.0 = 2.0"),
        (nsr_condition, {"lr": None}, "lr expected a number, as the other of the two is given, got None"),
        (exponential_factor, {"lr": 2.0, "weight_decay": 0.5, "momentum": 0.25}, "lr * weight_decay expected at most (1 - sqrt(momentum))**2 = 0.25, got 2.0 * 0.5 = 1.0"),
        (exponential_decay, {"lr": 2.0, "weight_decay": 1.0, "momentum": 0}, "lr * weight_decay expected at most (1 - sqrt(momentum))**2 = 1.0, got 2.0 * 1.0 = 2.0"),
        (exponential_decay, {"lr": 1e200, "weight_decay": 1e200, "momentum": 0}, "lr * weight_decay expected at most (1 - sqrt(momentum))**2 = 1.0, got 1e+200 * 1e+200 = inf"),
        (linear_scaling, {"lr": 1e308, "new_batch_size": 100}, "the new lr expected a finite number > 0, got inf"),
        (linear_scaling, {"lr": 5e-324, "batch_size": 100}, "the new lr expected a finite number > 0, got 0.0"),
        (square_root_scaling, {"eps": 1e308, "batch_size": 1000}, "the new eps expected a finite number >= 0, got inf"),
        (square_root_weight_decay, {"weight_decay": 1.7e308}, "the new weight decay expected a finite number >= 0, got inf"),
        (beta_by_samples, {"beta": 0.5, "batch_size": 2**60}, "the new beta expected a number in [0, 1), got 1.0"),
        (decay_timescale, {"lr": 2.0, "weight_decay": 0.5}, "lr * weight_decay expected < 1, got 2.0 * 0.5 = 1.0"),
        (decay_timescale, {"weight_decay": 0.0}, "weight_decay expected a finite number > 0, as without decay there is no equilibrium, got 0.0"),
        (decay_timescale, {"lr": 5e-324}, "the timescale expected a finite number > 0, got inf"),
        (svag_adam, {"l": 0.707}, "l expected a finite number >= sqrt(1/2), got 0.707"),
        (svag_adam_fraction, {"l": 0.707}, "l expected a finite number >= sqrt(1/2), got 0.707"),
        (svag_adam, {"eps": 1e308}, "the new eps expected a finite number >= 0, got inf"),
        (svag_adam, {"betas": (0.0, 0.99), "l": 0.8}, "betas[0] expected 1 - (1 - beta)/l^2 in [0, 1), got -0.5625 from 0.0 and l 0.8"),
        (square_root_scaling, {"lr": 1.7e308}, "the new lr expected a finite number > 0, got inf"),
    ],
)  # fmt: skip
def test_results_and_combinations_out_of_range(function, arguments, sentence):
    with pytest.raises(ValueError) as caught:
        function(**{**GOOD[function], **arguments})
    assert str(caught.value) == f"{function.__name__}: {sentence}"


def test_position_is_for_functions_with_one_subject():
    positional = {f for f in FUNCTIONS if any(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(f).parameters.values())}  # fmt: skip
    assert positional == {svag_coefficients, svag_fraction, svag_adam_fraction, nsr_condition}


@pytest.mark.parametrize("number", [np.float64(2), np.float32(2), np.int64(2), Fraction(2), 2], ids=lambda x: type(x).__name__)  # fmt: skip
def test_every_kind_of_number_is_welcome(number):
    for f in GOOD:
        if "l" in GOOD[f]:
            assert f(**{**GOOD[f], "l": number}) == f(**GOOD[f])


def test_no_torch_is_needed():
    for file in Path(theory.__file__).parent.glob("*.py"):
        lines = file.read_text().splitlines()
        imported = [line for line in lines if line.lstrip().startswith(("import", "from"))]
        assert not any("torch" in line or "from .." in line for line in imported), file
