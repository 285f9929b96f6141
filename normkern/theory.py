r"""Closed formulas of normalised networks: plain numbers in, plain numbers out, Python's `math` and nothing else.

Words and units. ``lr``, ``weight_decay``, ``momentum`` as in `torch.optim.SGD`. Squared norms are of whole parameter
vectors: ``grad_sq_norm`` is :math:`|\nabla L|^2`, the square of the *mean* gradient; ``trace_sigma`` is
:math:`\operatorname{tr}\Sigma`, the trace of the covariance of the gradient of one *batch* (not of one sample);
``nsr_batch`` is their ratio :math:`\operatorname{tr}\Sigma / |\nabla L|^2`. ``l`` is SVAG's parameter: 1 is SGD,
infinity the stochastic differential equation (SDE). Functions with one subject take it by position too; all others take
keywords.

Where a step count or :math:`1-\beta` is made from a float, the float stands for the simplest fraction that rounds to
it: 1.1 is 11/10, not 11/10 + 2e-16.

Every function raises ValueError for what is no number (booleans and text are none) or outside the range it names.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# ======================================================================================================================
# SVAG: stochastic variance-amplified gradient (Li, Malladi, Arora 2021, arXiv 2102.12470). Not to be confused with
# Balles & Hennig's stochastic variance-adapted gradient, which shares the letters.
# ======================================================================================================================


class SvagCoefficients(NamedTuple):
    """The weights of the two batch gradients."""

    c1: float
    c2: float


def svag_coefficients(l: float) -> SvagCoefficients:
    r"""The weights of the two independent batch gradients in an SVAG step.

    .. math::
        c_{1,2} = \frac{1 \pm \sqrt{2l-1}}{2}, \qquad w' = w - \frac{\eta}{l} (c_1 g_1 + c_2 g_2)

    so that :math:`c_1+c_2 = 1`, :math:`c_1^2+c_2^2 = l`, :math:`c_1^3+c_2^3 = (3l-1)/2`: the mean of the gradient
    stays, its covariance grows l times, and with l times as many steps of size lr/l the noise per unit of time is that
    of SGD.

    Args:
        l: a finite number >= 1/2. 1 is SGD on the first batch; 1/2 is exactly SGD with both batches as one at twice the
            learning rate, the linear scaling rule's first step; the paper uses 1, 2, 4, 8, ...

    Returns:
        (c1, c2), c1 >= 1/2 >= c2. c2 is accurate around l = 1, where it vanishes.

    Reference: arXiv 2102.12470, the definition of SVAG; l < 1 is ours.

    >>> svag_coefficients(5)
    SvagCoefficients(c1=2.0, c2=-1.0)
    """
    l = _number("svag_coefficients", "l", l, _L)
    half_root = math.sqrt(l / 2 - 0.25)  # of 2l - 1, halved
    return SvagCoefficients(0.5 + half_root, (1 - l) / (1 + 2 * half_root))


def svag_steps(*, steps: int, l: float | Fraction) -> int:
    r"""How many steps of SVAG a run of `steps` steps becomes: :math:`\lceil l \cdot steps \rceil`.

    Exact: no product is formed in floating point. Each of these steps, counted from 0, stands at
    `svag_effective_steps` < `steps` of the original run's schedule.

    Args:
        steps: an integer >= 0.
        l: a finite number >= 1/2; a `fractions.Fraction` is taken as it is.

    Reference: arXiv 2102.12470, theorem 4.3: time is lr times steps for SGD, lr/l times steps for SVAG.

    >>> svag_steps(steps=10, l=1.1)
    11
    """
    steps = _integer("svag_steps", "steps", steps, 0)
    return math.ceil(steps * _svag_fraction("svag_steps", l))


def svag_effective_steps(*, steps: int, l: float | Fraction) -> int:
    r"""Where in the original run SVAG stands after `steps` steps: :math:`\lfloor steps / l \rfloor`, exactly.

    SVAG step k, counted from 0, uses the hyperparameters of the original run's step ``svag_effective_steps(steps=k,
    l=l)``; `normkern.schedules.SvagSchedule` does so.

    Args:
        steps: an integer >= 0.
        l: a finite number >= 1/2; a `fractions.Fraction` is taken as it is.

    Reference: arXiv 2102.12470, the number of effective steps.

    >>> [svag_effective_steps(steps=k, l=1.5) for k in range(7)]
    [0, 0, 1, 2, 2, 3, 4]
    """
    steps = _integer("svag_effective_steps", "steps", steps, 0)
    return math.floor(steps / _svag_fraction("svag_effective_steps", l))


def svag_fraction(l: float | Fraction) -> Fraction:
    """SVAG's l as the exact number that steps are counted with: the simplest fraction that rounds to the float.

    "Simplest" is a denominator up to a million; a float that no such fraction rounds to is taken as it is.

    Args:
        l: a finite number >= 1/2; a `fractions.Fraction` is taken as it is.

    >>> svag_fraction(1.1)
    Fraction(11, 10)
    """
    return _svag_fraction("svag_fraction", l)


def svag_equilibrium(*, lr: float, weight_decay: float, l: float, grad_sq_norm: float, trace_sigma: float) -> float:
    r"""The squared weight norm :math:`R = |w|^2` of SVAG at equilibrium, from the gradient measured there.

    .. math::
        \left(\frac{2}{\eta} - \frac{\lambda}{l}\right) \lambda R = N + \frac{G}{l},
        \qquad G = |\nabla L|^2, \quad N = \operatorname{tr}\Sigma

    for a loss that is scale-invariant in w, coupled or decoupled weight decay, no momentum. l = 1 is SGD; l = infinity
    is the SDE, :math:`2 \lambda R = \eta N`. What lies between them is discretisation: G/l, and lr * weight_decay / l.
    It is the stationary point of :math:`R' = (1 - \eta\lambda/l)^2 R + (\eta/l)^2 (G + l N)`; R, G, N are averages over
    steps at equilibrium, all at the same weights, those of that run.

    Args:
        lr: finite, > 0, that of the original run (SVAG steps with lr/l).
        weight_decay: finite, > 0, with lr * weight_decay < 2 l: else no norm is stable.
        l: >= 1/2; `math.inf` for the SDE.
        grad_sq_norm: finite, >= 0. :math:`|\nabla L|^2`: the unbiased estimate, not the square of a batch gradient.
        trace_sigma: finite, >= 0, of the gradient of one batch, not of SVAG's combination.

    Reference: arXiv 2102.12470, the section on the equilibrium of scale-invariant networks; l = 1 is theorem 2 of Wan
    et al. for momentum 0.

    >>> svag_equilibrium(lr=0.5, weight_decay=0.5, l=1, grad_sq_norm=3.0, trace_sigma=4.0)
    4.0
    >>> svag_equilibrium(lr=0.5, weight_decay=0.5, l=math.inf, grad_sq_norm=3.0, trace_sigma=4.0)
    2.0
    """
    name = "svag_equilibrium"
    lr = _number(name, "lr", lr, _POSITIVE)
    weight_decay = _number(name, "weight_decay", weight_decay, _POSITIVE)
    l = _number(name, "l", l, _L_OR_SDE)
    grad_sq_norm = _number(name, "grad_sq_norm", grad_sq_norm, _NOT_NEGATIVE)
    trace_sigma = _number(name, "trace_sigma", trace_sigma, _NOT_NEGATIVE)
    decay = lr * weight_decay / l
    if decay >= 2:
        raise ValueError(
            f"{name}: lr * weight_decay / l expected < 2, got {lr!r} * {weight_decay!r} / {l!r} = {decay!r}"
        )
    return lr * (trace_sigma + grad_sq_norm / l) / (weight_decay * (2 - decay))


# ======================================================================================================================
# When SGD can follow its SDE (same paper). Two runs are C-close if the ratios of their |w|^2, |grad L|^2 and tr(Sigma)
# at equilibrium all lie in [1/C, C]. The conditions are necessary, not sufficient.
# ======================================================================================================================


def nsr_condition(C: float = math.sqrt(2), *, lr: float | None = None, weight_decay: float | None = None) -> float:
    r"""The least noise-to-signal ratio N/G of the batch gradient with which SGD can be C-close to its SDE.

    .. math::
        \frac{N}{G+N} \ge \frac{1}{C^2 (1 - \eta\lambda/2)} \ge \frac{1}{C^2},
        \qquad\text{that is}\quad \frac{N}{G} \ge \frac{1}{C^2 (1 - \eta\lambda/2) - 1} \ge \frac{1}{C^2 - 1}

    N and G at the equilibrium of SGD on a scale-invariant loss. With `lr` and `weight_decay` the first, exact form;
    without them the second, which every run must meet. Proof: with the SDE's R_s, N_s, which are C-close to R, N,
    :math:`N \ge N_s/C = 2\lambda R_s/(\eta C) \ge 2\lambda R/(\eta C^2) = (G+N)/(C^2(1-\eta\lambda/2))`.

    Args:
        C: finite, > 1. sqrt(2), the usual choice, asks for N >= G.
        lr: finite, > 0; together with `weight_decay`.
        weight_decay: finite, >= 0, with lr * weight_decay < 2.

    Returns:
        The ratio to compare `nsr_batch` with; `math.inf` where lr * weight_decay is so large that no noise is enough.

    Reference: arXiv 2102.12470, the necessary condition for C-closeness, there with N and G of the SDE.

    >>> round(nsr_condition(), 12)
    1.0
    >>> nsr_condition(2, lr=0.5, weight_decay=0.5)
    0.4
    """
    C = _number("nsr_condition", "C", C, _CLOSENESS)
    if (lr is None) != (weight_decay is None):
        missing = "weight_decay" if weight_decay is None else "lr"
        raise ValueError(f"nsr_condition: {missing} expected a number, as the other of the two is given, got None")
    decay = 0.0
    if lr is not None:
        lr = _number("nsr_condition", "lr", lr, _POSITIVE)
        weight_decay = _number("nsr_condition", "weight_decay", weight_decay, _NOT_NEGATIVE)
        decay = lr * weight_decay
        if decay >= 2:
            raise ValueError(
                f"nsr_condition: lr * weight_decay expected < 2, got {lr!r} * {weight_decay!r} = {decay!r}"
            )
    excess = C * C * (1 - decay / 2) - 1
    return 1 / excess if excess > 0 else math.inf


def max_linear_scaling(*, nsr_batch: float, C: float = math.sqrt(2)) -> float:
    r"""How many times the batch may grow under the linear scaling rule: the largest k that can stay C-close.

    .. math::
        k \le C^2 + (C^2 - 1) \frac{N}{G} = C^2 \left(1 + \frac{N}{G}\right) - \frac{N}{G}

    N/G measured at the equilibrium of the run with the *small* batch, on a scale-invariant loss; the batch grows from B
    to kB and lr to k lr. C-close is meant for the noise in units of time, lr tr(Sigma), which the rule keeps. Proof,
    with the two runs' R, G, N: :math:`(k G_1 + N_1)/C \le k (G_2 + N_2) = (2/\eta - k\lambda)\lambda R_2 \le C (2/\eta
    - \lambda)\lambda R_1 = C (G_1 + N_1)`.

    The paper's form is "not C-close if :math:`k > C^2 (1 + N/G)`"; ours is smaller by N/G, from the same proof, because
    it keeps the N_1 of the left side.

    Args:
        nsr_batch: >= 0; `math.inf` where there is no signal, and then no limit.
        C: finite, > 1.

    Returns:
        k, > 1, not rounded.

    Reference: arXiv 2102.12470, the section on the failure of the linear scaling rule; this form is ours.

    >>> max_linear_scaling(nsr_batch=3.0, C=2)
    13.0
    """
    nsr_batch = _number("max_linear_scaling", "nsr_batch", nsr_batch, _RATIO)
    C = _number("max_linear_scaling", "C", C, _CLOSENESS)
    return C * C + (C * C - 1) * nsr_batch


# ======================================================================================================================
# Scaling rules: how hyperparameters follow the batch size
# ======================================================================================================================


class AdamScaling(NamedTuple):
    """Hyperparameters of Adam at a new batch size, named as torch's: ``Adam(params, **scaling._asdict())``."""

    lr: float
    betas: tuple[float, float]
    eps: float


def linear_scaling(*, lr: float, batch_size: int, new_batch_size: int) -> float:
    r"""The learning rate of SGD at another batch size, by the linear scaling rule.

    .. math::
        B \to kB: \quad \eta \to k\eta, \quad \text{steps} \to \text{steps}/k

    Weight decay and momentum stay. The SDE of both runs is the same, as :math:`\eta\Sigma_B` is; whether SGD still
    follows it at k times the batch is what `max_linear_scaling` bounds.

    Args:
        lr: finite, > 0.
        batch_size, new_batch_size: integers >= 1; k is their ratio, which may be below 1.

    Returns:
        The new lr.

    Reference: Goyal et al. 2017, arXiv 1706.02677; arXiv 2102.12470 for the SDE's view.

    >>> linear_scaling(lr=0.1, batch_size=128, new_batch_size=512)
    0.4
    """
    name = "linear_scaling"
    lr = _number(name, "lr", lr, _POSITIVE)
    k = _ratio(name, batch_size, new_batch_size)
    return _number(name, "the new lr", lr * k, _POSITIVE)


def square_root_scaling(
    *, lr: float, betas: tuple[float, float], eps: float, batch_size: int, new_batch_size: int
) -> AdamScaling:
    r"""The hyperparameters of Adam at another batch size, by the square root scaling rule.

    .. math::
        B \to kB: \quad \eta \to \sqrt{k}\,\eta, \quad 1-\beta_i \to k (1-\beta_i), \quad
        \epsilon \to \epsilon/\sqrt{k}, \quad \text{steps} \to \text{steps}/k

    for RMSprop as well (beta_2 is its alpha). Valid where the noise dominates the gradient, NSR >> 1. The weight decay
    of `torch.optim.Adam`, which is part of the gradient, stays; that of AdamW becomes sqrt(k) times itself, so that
    the decay per sample, lr * weight_decay / B, stays.

    Args:
        lr: finite, > 0.
        betas: two numbers in [0, 1).
        eps: finite, >= 0.
        batch_size, new_batch_size: integers >= 1; k is their ratio, which may be below 1.

    Returns:
        `AdamScaling`: lr, betas, eps.

    Raises:
        ValueError: a new beta leaves [0, 1): k is larger than 1/(1 - beta), the steps that the average spans.

    Reference: Malladi, Lyu, Panigrahi, Arora 2022, arXiv 2205.10287, the square root scaling rule; for AdamW ours.

    >>> square_root_scaling(lr=0.001, betas=(0.9, 0.999), eps=1e-8, batch_size=256, new_batch_size=1024)
    AdamScaling(lr=0.002, betas=(0.6, 0.996), eps=5e-09)
    """
    name = "square_root_scaling"
    lr = _number(name, "lr", lr, _POSITIVE)
    eps = _number(name, "eps", eps, _NOT_NEGATIVE)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}: betas expected two numbers, got {betas!r}")
    old = [_number(name, f"betas[{i}]", beta, _BETA) for i, beta in enumerate(betas)]
    k = _ratio(name, batch_size, new_batch_size)
    root = math.sqrt(k)
    new = [float(1 - k * (1 - _simplest(beta))) for beta in old]
    for i, beta in enumerate(new):
        if not 0 <= beta < 1:
            raise ValueError(
                f"{name}: betas[{i}] expected to stay in [0, 1), got {beta!r} from "
                f"{old[i]!r} at {float(k):g} times the batch"
            )
    return AdamScaling(
        _number(name, "the new lr", lr * root, _POSITIVE),
        (new[0], new[1]),
        _number(name, "the new eps", eps / root, _NOT_NEGATIVE),
    )


# ======================================================================================================================
# What arguments must be
# ======================================================================================================================


class _Range(NamedTuple):
    """Which numbers are welcome: in words, and as a test that NaN fails."""

    words: str
    holds: Callable[[float], bool]


_POSITIVE = _Range("a finite number > 0", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE = _Range("a finite number >= 0", lambda x: 0 <= x < math.inf)
_RATIO = _Range("a number >= 0", lambda x: x >= 0)
_BETA = _Range("a number in [0, 1)", lambda x: 0 <= x < 1)
_CLOSENESS = _Range("a finite number > 1", lambda x: 1 < x < math.inf)
_L = _Range("a finite number >= 1/2", lambda x: 0.5 <= x < math.inf)
_L_OR_SDE = _Range("a number >= 1/2 (math.inf: the SDE)", lambda x: x >= 0.5)

#: Above every count of steps or samples, and a float can hold it.
_COUNT_END = 2**63
#: A float stands for the fraction with a denominator up to this that rounds to it.
_DENOMINATORS = 10**6


def _number(function: str, name: str, value: Any, range_: _Range) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:  # an integer or a fraction
            x = math.nan
        if range_.holds(x):
            return x
    raise ValueError(f"{function}: {name} expected {range_.words}, got {value!r}")


def _integer(function: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < _COUNT_END:
        return int(value)
    raise ValueError(f"{function}: {name} expected an integer >= {least} and < 2**63, got {value!r}")


def _ratio(function: str, batch_size: Any, new_batch_size: Any) -> Fraction:
    old = _integer(function, "batch_size", batch_size, 1)
    return Fraction(_integer(function, "new_batch_size", new_batch_size, 1), old)


def _svag_fraction(function: str, l: Any) -> Fraction:
    x = _number(function, "l", l, _L)
    return Fraction(int(l.numerator), int(l.denominator)) if isinstance(l, Rational) else _simplest(x)


@lru_cache(maxsize=64)  # a schedule asks at every step
def _simplest(x: float) -> Fraction:
    simple = Fraction(x).limit_denominator(_DENOMINATORS)
    return simple if float(simple) == x else Fraction(x)
