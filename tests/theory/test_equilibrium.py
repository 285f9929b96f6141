"""theory of equilibria and of the way there: every number of a doctest, and more, from a simulation; what is refused."""

import math
from pathlib import Path

import pytest
import torch
from support.noise_model import Invariant, simulate, simulate_signs

from normkern.theory import (
    adamw_equilibrium_angle,
    adamw_equilibrium_weight_sq,
    effective_lr,
    effective_lr_after,
    equilibrium_angle,
    equilibrium_effective_lr,
    equilibrium_grad_ratio,
    equilibrium_residual,
    equilibrium_weight_sq,
    intrinsic_lr,
    least_unit_grad_bound,
    lion_equilibrium_angle,
    lion_equilibrium_weight_sq,
    lr_drop_recovery,
    lr_drop_rescaling,
    mean_log_secant,
    next_norms,
    power_decay_effective_lr,
    power_decay_weight_sq,
    sgdw_equilibrium_angle,
    sgdw_equilibrium_weight_sq,
    step_angle,
    steps_after_lr_drop,
    steps_to_equilibrium,
    svag_equilibrium,
    weight_sq_after,
)

from .arguments import GOOD, NEVER, WRONG

PERCENT = 0.01

# --- at equilibrium (T6.1, T6.2) --------------------------------------------------------------------------------------

RUNS = [
    {"lr": 0.5, "weight_decay": 0.02, "momentum": 0.0, "q": 0.0796},
    {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "q": 4.0},
    {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9, "nesterov": True, "q": 4.0},
    {"lr": 0.5, "weight_decay": 0.5, "momentum": 0.0, "q": 7.0},  # large steps
    {"lr": 0.5, "weight_decay": 0.2, "momentum": 0.5, "q": 1.0},
    {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.5, "nesterov": True, "q": 1.0},
    {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9, "q": 1.0, "memory": -0.3},  # gradients that pull back
    {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9, "nesterov": True, "q": 1.0, "memory": -0.3},
    {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.8, "nesterov": True, "q": 1.0, "memory": 0.5},
]


@pytest.mark.parametrize("run", RUNS, ids=lambda r: "-".join(map(str, r.values())))
def test_lengths_and_angles_are_those_of_a_simulation(run):
    run = dict(run)
    q, memory = run.pop("q"), run.pop("memory", 0.0)
    expected = equilibrium_weight_sq(**run, unit_grad_sq=q)
    rate = 4 * run["lr"] * run["weight_decay"] / (1 - run["momentum"])
    burn, steps = math.ceil(20 / rate), math.ceil(60 / rate) + 400
    told = simulate(**run, unit_grad_sq=q, weight_sq=expected, memory=memory, burn=burn, steps=steps)
    r = told.dot / told.grad_sq
    assert (abs(r) > 0.1) == (memory != 0)
    run["correlation"] = r if memory else 0.0
    n = equilibrium_weight_sq(**run, unit_grad_sq=q)
    assert math.sqrt(sum(x**2 for x in told.curve[burn:]) / (steps + 1)) == pytest.approx(n, rel=PERCENT)
    assert told.weight_sq == pytest.approx(n, rel=PERCENT)
    assert told.update == pytest.approx(equilibrium_angle(**run), rel=PERCENT)
    assert told.angle == pytest.approx(equilibrium_angle(**run), rel=0.03 if run["weight_decay"] == 0.5 else PERCENT)
    assert told.grad_sq / told.weight_sq == pytest.approx(equilibrium_grad_ratio(**run), rel=PERCENT)
    assert equilibrium_residual(**run, weight_sq=told.weight_sq, grad_sq=told.grad_sq) == pytest.approx(0, abs=PERCENT)
    lr = run.pop("lr")
    intrinsic = lr * run.pop("weight_decay")
    e = equilibrium_effective_lr(intrinsic_lr=intrinsic, unit_grad_sq=q, **run)
    assert lr / told.weight_sq == pytest.approx(e, rel=PERCENT)


def test_only_the_product_of_lr_and_decay_counts():
    """eta = .4, .1, .025 at the same intrinsic lr; the doctest's 0.0632."""
    for lr in (0.4, 0.1, 0.025):
        n = equilibrium_weight_sq(lr=lr, weight_decay=0.002 / lr, momentum=0, unit_grad_sq=1)
        told = simulate(lr=lr, weight_decay=0.002 / lr, weight_sq=n, burn=500, steps=1000)
        assert lr / told.weight_sq == pytest.approx(0.0632, rel=PERCENT)
        e = equilibrium_effective_lr(intrinsic_lr=0.002, momentum=0, unit_grad_sq=1)
        assert effective_lr(lr=lr, weight_sq=n) == pytest.approx(e, rel=1e-12)
        assert lr / told.weight_sq == pytest.approx(e, rel=PERCENT)


@pytest.mark.pairwise
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("decay", [0.01, 0.3])
@pytest.mark.parametrize("r", [0.0, -0.2, 0.4])
def test_equilibrium_is_the_fixed_point_of_the_norms(momentum, nesterov, decay, r):
    """Iterate the exact recurrence with |g|^2 and <b,g> that never change."""
    lr, g = 0.5, 2.0
    options = {"lr": lr, "weight_decay": decay, "momentum": momentum, "nesterov": nesterov}
    ratio = 1 / equilibrium_grad_ratio(**options, correlation=r)
    norms, before = next_norms(
        weight_sq=ratio * g, weight_buffer_dot=0, buffer_sq=0, grad_sq=g, buffer_grad_dot=0, **options
    ), None  # fmt: skip
    for _ in range(20000):
        before, norms = norms, next_norms(**norms._asdict(), grad_sq=g, buffer_grad_dot=r * g, **options)
        if max(abs(a - b) / (abs(b) + 1e-30) for a, b in zip(norms, before, strict=True)) < 1e-15:
            break
    assert norms.weight_sq == pytest.approx(ratio * g, rel=1e-8)
    assert equilibrium_residual(weight_sq=norms.weight_sq, grad_sq=g, **options, correlation=r) == pytest.approx(
        0, abs=1e-8
    )
    if momentum == 0:
        theta = step_angle(weight_sq=norms.weight_sq, grad_sq=g, lr=lr, weight_decay=decay)
        assert 2 * math.sin(theta / 2) == pytest.approx(equilibrium_angle(**options), rel=1e-7)
        secant = mean_log_secant(first_weight_sq=1, last_weight_sq=1, steps=1, lr=lr, weight_decay=decay)
        assert -math.log(math.cos(theta)) == pytest.approx(secant, rel=1e-7)
        assert svag_equilibrium(lr=lr, weight_decay=decay, l=1, grad_sq_norm=g / 2, trace_sigma=g / 2) == pytest.approx(ratio * g, rel=1e-12)  # fmt: skip
    elif not nesterov:
        # cos = 1 - lr wd/(1 + mu), from <w,w'> = n - lr <w,b'>
        wb = momentum * norms.weight_buffer_dot + decay * norms.weight_sq
        u_sq = equilibrium_angle(**options) ** 2
        assert lr * wb / norms.weight_sq == pytest.approx(u_sq / 2, rel=1e-7)
        assert u_sq == pytest.approx(2 * lr * decay / (1 + momentum), rel=1e-12)


def test_residual_is_the_fourth_power_of_the_length():
    run = {"lr": 0.5, "weight_decay": 0.5, "momentum": 0.0}
    residual = equilibrium_residual(weight_sq=2.0, grad_sq=1.5, **run)
    balanced = equilibrium_weight_sq(unit_grad_sq=3.0, **run)
    assert residual == pytest.approx(balanced**2 / 4 - 1, rel=1e-12)


def test_nesterov_is_heavy_ball_without_momentum():
    run = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.0}
    for f, more in (
        (equilibrium_angle, {}),
        (equilibrium_weight_sq, {"unit_grad_sq": 2.0}),
        (equilibrium_grad_ratio, {}),
    ):
        assert f(**run, **more, nesterov=True) == pytest.approx(f(**run, **more), rel=1e-14)


# --- decoupled decay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "decay", "momentum", "q"), [(0.1, 0.1, 0.9, 4.0), (0.5, 0.1, 0.5, 1.0)])
def test_sgdw_is_that_of_a_simulation(lr, decay, momentum, q):
    n = sgdw_equilibrium_weight_sq(lr=lr, weight_decay=decay, momentum=momentum, unit_grad_sq=q)
    told = simulate(lr=lr, weight_decay=decay, momentum=momentum, decoupled=True, unit_grad_sq=q, weight_sq=n,
                    burn=300, steps=1500)  # fmt: skip
    assert told.weight_sq == pytest.approx(n, rel=PERCENT)
    assert told.update == pytest.approx(
        sgdw_equilibrium_angle(lr=lr, weight_decay=decay, momentum=momentum), rel=PERCENT
    )
    if momentum == 0.9:
        assert told.weight_sq == pytest.approx(13.5475, rel=PERCENT)
        assert told.update == pytest.approx(0.03252, rel=PERCENT)


@pytest.mark.parametrize(("lr", "decay", "beta1"), [(0.01, 0.1, 0.9), (0.01, 0.5, 0.5)])
def test_adamw_is_that_of_a_simulation(lr, decay, beta1):
    at = {"lr": lr, "weight_decay": decay, "beta1": beta1}
    told = simulate_signs("adamw", **at, beta2=0.999, weight_sq=lr * 256 / (2 * decay), burn=1500, steps=3000)
    assert told.weight_sq == pytest.approx(adamw_equilibrium_weight_sq(**at, size=256), rel=PERCENT)
    assert told.update == pytest.approx(adamw_equilibrium_angle(**at), rel=PERCENT)
    if beta1 == 0.9:
        assert told.weight_sq / 2.56 == pytest.approx(4.956, rel=PERCENT)
        assert told.update == pytest.approx(0.01026, rel=PERCENT)


@pytest.mark.parametrize(
    ("lr", "decay", "betas"), [(0.01, 0.1, (0.9, 0.99)), (0.02, 0.2, (0.9, 0.95)), (0.01, 0.2, (0.5, 0.5))]
)
def test_lion_is_that_of_a_simulation(lr, decay, betas):
    at = {"lr": lr, "weight_decay": decay, "beta1": betas[0], "beta2": betas[1]}
    n = lion_equilibrium_weight_sq(**at, size=256)
    told = simulate_signs("lion", **at, weight_sq=n, burn=1000, steps=4000)
    assert told.weight_sq == pytest.approx(n, rel=PERCENT)
    assert told.update == pytest.approx(lion_equilibrium_angle(**at), rel=PERCENT)
    if lr == 0.01 and decay == 0.1:
        assert told.weight_sq / 2.56 == pytest.approx(209.39, rel=PERCENT)
        assert told.update == pytest.approx(0.00684, rel=PERCENT)


def test_lion_of_signs_without_memory():
    """beta1 = 0 takes the sign of the gradient itself: steps are independent."""
    at = {"lr": 0.1, "weight_decay": 0.2}
    lion = lion_equilibrium_weight_sq(**at, beta1=0, beta2=0.99, size=10)
    assert lion == pytest.approx(adamw_equilibrium_weight_sq(**at, beta1=0, size=10), rel=1e-12)
    assert lion_equilibrium_angle(**at, beta1=0, beta2=0.99) == pytest.approx(
        adamw_equilibrium_angle(**at, beta1=0), rel=1e-12
    )


# --- the way there (T6.3 to T6.6) -------------------------------------------------------------------------------------


def test_relaxation_without_momentum():
    """The curve of |w|^4, from above and below; the doctest's 1.7348 at step 50."""
    run = {"lr": 0.5, "weight_decay": 0.02, "unit_grad_sq": 0.0796}
    for begin in (4.0, 0.25):
        told = simulate(**run, weight_sq=begin, steps=150)
        for t in range(0, 151, 10):
            predicted = weight_sq_after(weight_sq=begin, steps=t, momentum=0, **run)
            # A squared angle of up to 1/4 at the beginning is not small.
            assert told.curve[t] == pytest.approx(predicted, rel=0.003 if begin == 4 else 0.03), t
        if begin == 4:
            assert told.curve[50] == pytest.approx(1.7348, rel=0.003)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.001), (0.5, 0.02), (0.9, 0.0)])
def test_relaxation_with_momentum(momentum, nesterov, decay):
    """From when buffers are in step with the weights."""
    run = {"lr": 0.1, "weight_decay": decay, "momentum": momentum, "unit_grad_sq": 1.0}
    there, burn = equilibrium_weight_sq(**{**run, "weight_decay": decay or 0.001}), 60
    for begin in (3 * there, there / 2):
        told = simulate(**run, nesterov=nesterov, weight_sq=begin, steps=460)
        for t in (0, 25, 50, 100, 200, 400):
            predicted = weight_sq_after(weight_sq=told.curve[burn], steps=t, nesterov=nesterov, **run)
            assert told.curve[burn + t] == pytest.approx(predicted, rel=PERCENT if decay else 0.015), t


def test_growth_without_decay_of_the_doctest():
    told = simulate(lr=0.1, weight_decay=0, momentum=0.5, weight_sq=1.0, steps=1000)
    assert told.curve[-1] == pytest.approx(9.0, rel=PERCENT)


@pytest.mark.parametrize(("decay", "tolerance"), [(0.002, 0.02), (0.01, 0.04)])
def test_steps_to_equilibrium_are_the_fall_to_a_part_of_e(decay, tolerance):
    run = {"lr": 0.5, "weight_decay": decay, "momentum": 0.5}
    steps = steps_to_equilibrium(**run)
    assert steps == pytest.approx(0.25 / decay, rel=1e-15)  # the doctest's 25
    there = equilibrium_weight_sq(**run, unit_grad_sq=0.05)
    span = round(1.6 * steps)
    told = simulate(**run, unit_grad_sq=0.05, weight_sq=3 * there, steps=10 + span)
    gap = [n**2 - there**2 for n in told.curve]
    assert math.log(gap[10] / gap[10 + span]) * steps == pytest.approx(span, rel=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_effective_lr_relaxes_by_the_intrinsic_lr(momentum):
    for lr in (2.0, 0.25):
        for begin in (0.5, 0.03):
            told = simulate(
                lr=lr, weight_decay=0.005 / lr, momentum=momentum, weight_sq=lr / begin, steps=200, chains=16
            )
            for t in (20, 100, 200):
                start = 0 if momentum == 0 else 10
                e = effective_lr_after(
                    effective_lr=lr / told.curve[start], steps=t - start, intrinsic_lr=0.005, momentum=momentum, unit_grad_sq=1
                )  # fmt: skip
                # Without the square of the first angles, 1/2 and more.
                assert lr / told.curve[t] == pytest.approx(e, rel=0.03 if begin == 0.5 else PERCENT)
                if (t, momentum, begin) == (100, 0, 0.5):
                    assert lr / told.curve[t] == pytest.approx(0.1072, rel=0.03)


def test_a_falling_lr_is_a_negative_intrinsic_lr():
    """A schedule eta_t = eta_0 exp(-t s): gamma obeys the same equation with the term of the schedule."""
    fall = 0.01
    at = intrinsic_lr(lr=0.8, weight_decay=0.002, next_lr=0.8 * math.exp(-fall))
    assert at == pytest.approx(0.0016 - fall / 2)
    lr = lambda t: 0.8 * math.exp(-fall * t)  # noqa: E731
    # Without decay the term is the same at every step.
    told = simulate(lr=lr, weight_decay=0, weight_sq=8.0, steps=200)
    for t in (50, 200):
        e = effective_lr_after(effective_lr=0.1, steps=t, intrinsic_lr=-fall / 2, momentum=0, unit_grad_sq=1)
        assert lr(t) / told.curve[t] == pytest.approx(e, rel=PERCENT)
    assert effective_lr_after(effective_lr=0.1, steps=10**6, intrinsic_lr=-1.0, momentum=0, unit_grad_sq=1) == 0.0
    flat = effective_lr_after(effective_lr=0.1, steps=100, intrinsic_lr=0, momentum=0.5, unit_grad_sq=2)
    assert flat == pytest.approx((100 + 2 * 100 * 2 / 0.25) ** -0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_lr_drop_and_recovery(momentum):
    """From equilibrium, lr / 4: the effective lr falls to 1/4, and comes back to 1/2; the doctest's 0.3447 at 100."""
    run = {"lr": 0.5, "weight_decay": 0.02, "momentum": momentum, "unit_grad_sq": 0.05}
    before = equilibrium_weight_sq(**run)
    burn = 100
    lr = lambda t: 0.5 if t < burn else 0.125  # noqa: E731
    told = simulate(**{**run, "lr": lr}, weight_sq=before, steps=burn + 400, chains=64)
    drop = {"factor": 4, "lr": 0.5, "weight_decay": 0.02, "momentum": momentum}
    e = 0.5 / told.curve[burn]
    for t in (0, 20, 50, 100, 200, 400):
        assert 0.125 / told.curve[burn + t] / e == pytest.approx(lr_drop_recovery(steps=t, **drop), rel=PERCENT)
    if momentum == 0:
        assert 0.125 / told.curve[burn + 100] / e == pytest.approx(0.3447, rel=PERCENT)
    there = steps_after_lr_drop(tolerance=0.05, **drop)
    assert 0.125 / told.curve[burn + round(there)] / e == pytest.approx(0.5 * 0.95, rel=PERCENT)
    assert lr_drop_recovery(steps=10**6, **drop) == pytest.approx(0.5)
    assert steps_after_lr_drop(tolerance=0.6, **drop) == 0.0


def test_rescaled_weights_are_at_the_new_equilibrium_at_once():
    run = {"lr": 0.125, "weight_decay": 0.02, "momentum": 0.0, "unit_grad_sq": 0.05}
    before = equilibrium_weight_sq(**{**run, "lr": 0.5})
    told = simulate(**run, weight_sq=before * lr_drop_rescaling(factor=4) ** 2, steps=300)
    after = equilibrium_weight_sq(**run)
    assert all(n == pytest.approx(after, rel=0.005) for n in told.curve)
    assert lr_drop_rescaling(factor=16) == 0.5


@pytest.mark.parametrize("c", [2.0**10, 2.0**-7])
def test_scaling_lr_decay_and_weights_changes_nothing(c):
    """(lr, wd, w) against (c^2 lr, wd/c^2, c w): the same to the bit, for powers of two."""
    runs = []
    for scale in (1.0, c):
        model = Invariant(norm=2.0)
        with torch.no_grad():
            model.first.mul_(scale)
        opt = torch.optim.SGD(model.parameters(), lr=0.1 * scale**2, weight_decay=0.05 / scale**2, momentum=0.9)
        losses = []
        for t in range(300):
            opt.zero_grad()
            loss = model(t)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        runs.append((losses, model.first.detach() / scale))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


# --- auto rate tuning (T4.4) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 1.0])
def test_power_decay_is_that_of_a_simulation(a):
    told = simulate(lr=lambda t: 0.3 * (t + 1) ** -a, weight_decay=0, weight_sq=1.0, steps=1000)
    for t in (100, 1000):
        n = power_decay_weight_sq(weight_sq=1.0, steps=t, lr=0.3, exponent=a, unit_grad_sq=1.0)
        assert told.curve[t] == pytest.approx(n, rel=PERCENT)
    if a == 0.25:
        assert told.curve[1000] == pytest.approx(3.482, rel=PERCENT)


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 0.7, 2.0])
def test_power_decay_adds_up_its_terms(a):
    for steps in (0, 1, 31, 32, 33, 1000):
        n = power_decay_weight_sq(weight_sq=2.0, steps=steps, lr=1.0, exponent=a, unit_grad_sq=0.5)
        assert n == pytest.approx(math.sqrt(4 + sum(t ** (-2 * a) for t in range(1, steps + 1))), rel=1e-9)


def test_auto_tuned_lr_falls_as_the_root_whatever_it_was():
    """log n against log t: 0.50; the effective lr: the same for lr 0.1 to 10, and the doctest's at 5000."""
    slopes = []
    for lr in (0.1, 1.0, 10.0):
        told = simulate(lr=lr, weight_decay=0, weight_sq=0.5 * lr, steps=5000, chains=4)
        slopes.append(math.log(told.curve[4096] / told.curve[256]) / math.log(16))
        assert told.curve[4096] == pytest.approx(lr * math.sqrt(2 * 4096), rel=PERCENT)
        e = lr / told.curve[5000]
        assert e == pytest.approx(power_decay_effective_lr(steps=5000, exponent=0, unit_grad_sq=1), rel=PERCENT)
    assert slopes == pytest.approx([0.5] * 3, abs=0.01)
    rate = lambda t: 3.0 * (t + 1) ** -0.25  # noqa: E731
    told = simulate(lr=rate, weight_decay=0, weight_sq=1.5, steps=5000, chains=4)
    assert rate(4999) / told.curve[5000] == pytest.approx(0.007071, rel=PERCENT)


@pytest.mark.parametrize("a", [0.0, 0.25, 0.4, 0.5])
def test_the_limit_of_the_effective_lr(a):
    errors = []
    for t in (10**3, 10**6, 10**12):
        n = power_decay_weight_sq(weight_sq=1.0, steps=t, lr=1.0, exponent=a, unit_grad_sq=2.0)
        errors.append(abs(t**-a / n / power_decay_effective_lr(steps=t, exponent=a, unit_grad_sq=2.0) - 1))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (0.015 if a == 0.5 else 0.02)


def test_bound_of_the_doctest():
    assert least_unit_grad_bound(first_weight_sq=1, last_weight_sq=4, lr_sq_sum=300) == pytest.approx(
        math.sqrt(4 * 3 / 300)
    )


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_refusals_name_function_argument_expectation_and_value(function):
    good = GOOD[function]
    for name in good:
        allowed = getattr(function, "__kwdefaults__", None) or {}
        for value in [*WRONG[name], *NEVER]:
            if (name == "nesterov" and isinstance(value, bool)) or (value is None and allowed.get(name, 0) is None):
                continue
            with pytest.raises(ValueError) as caught:
                function(**{**good, name: value})
            sentence = str(caught.value)
            assert sentence.startswith(f"{function.__name__}: {name} expected "), sentence
            assert sentence.endswith(f", got {value!r}")
    assert math.isfinite(function(**good)[0] if isinstance(function(**good), tuple) else function(**good))


@pytest.mark.parametrize("function", [f for f in GOOD if {"lr", "weight_decay", "momentum"} <= set(GOOD[f])], ids=lambda f: f.__name__)  # fmt: skip
def test_no_decay_and_no_lr_have_no_equilibrium(function):
    good = GOOD[function]
    if function in (next_norms, weight_sq_after):
        function(**{**good, "weight_decay": 0})  # has none, and needs none
        return
    with pytest.raises(
        ValueError, match="weight_decay expected a finite number > 0, as without decay there is no equilibrium, got 0"
    ):
        function(**{**good, "weight_decay": 0})
    with pytest.raises(ValueError, match="lr expected a finite number > 0, got 0"):
        function(**{**good, "lr": 0})
    with pytest.raises(ValueError, match="lr \\* weight_decay expected a float > 0 and finite, got 0.0"):
        function(**{**good, "lr": 1e-200, "weight_decay": 1e-200})


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        (equilibrium_weight_sq, {"lr": 2.0, "weight_decay": 2.0, "momentum": 0.5}, "lr * weight_decay expected < 2 (1 + momentum) = 3.0, beyond which no length is stable, got 2.0 * 2.0 = 4.0"),
        (equilibrium_angle, {"lr": 1.0, "weight_decay": 2.0, "momentum": 0.5, "nesterov": True}, "lr * weight_decay expected < 2 (1 + momentum) / (1 + 2 momentum) = 1.5, beyond which no length is stable, got 1.0 * 2.0 = 2.0"),
        (equilibrium_effective_lr, {"intrinsic_lr": 4.0, "momentum": 0.5, "nesterov": False}, "intrinsic_lr expected < 2 (1 + momentum) = 3.0, beyond which no length is stable, got 4.0"),
        (equilibrium_grad_ratio, {"momentum": 0.5, "correlation": -2.0}, "correlation expected one that leaves an update, got -2.0"),
        (weight_sq_after, {"lr": 1.0, "weight_decay": 0.5, "momentum": 0.25, "nesterov": False}, "lr * weight_decay expected at most 0.25 with momentum 0.25, beyond which norms oscillate, got 1.0 * 0.5 = 0.5"),
        (sgdw_equilibrium_angle, {"lr": 1.0, "weight_decay": 1.0}, "lr * weight_decay expected < 1, got 1.0 * 1.0 = 1.0"),
        (mean_log_secant, {"lr": 1.0, "weight_decay": 1.0}, "lr * weight_decay expected < 1, got 1.0 * 1.0 = 1.0"),
        (next_norms, {"nesterov": True, "dampening": 0.5}, "dampening expected 0 with nesterov, got 0.5"),
        (least_unit_grad_bound, {"first_weight_sq": 2.0, "last_weight_sq": 1.0}, "last_weight_sq expected a finite number >= first_weight_sq, got 1.0"),
        (steps_after_lr_drop, {"factor": 1.0}, "factor expected a finite number > 1, got 1.0"),
    ],
)  # fmt: skip
def test_combinations_out_of_range(function, arguments, sentence):
    with pytest.raises(ValueError) as caught:
        function(**{**GOOD[function], **arguments})
    assert str(caught.value) == f"{function.__name__}: {sentence}"


def test_formulas_need_no_torch():
    import normkern.theory

    for name in ("equilibrium", "relaxation", "recurrences", "decoupled", "auto_rate"):
        assert "torch" not in (Path(normkern.theory.__file__).parent / f"{name}.py").read_text().replace(
            "torch.optim", ""
        ).replace("torch's", "").replace("as torch", "")
