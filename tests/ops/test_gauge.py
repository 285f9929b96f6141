"""Steps by a gauge: against the float64 run with weight decay that they stand for, and bit for bit among each other."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.memory import Fenced, here, same_bits

from normkern import ops, reference
from normkern.ops import Buffers

from .test_sgd import DTYPES, random_case

ROOT = 2**0.5
NEW = ops.NEW_GAUGE
SIZES = (0, 1, 15, 16, 17, 33, 513, ops.CHUNK - 1, ops.CHUNK + 1)
#: gauge, options of the step, buffers, leave. Among them every shift from -1 to 6.
CASES = {
    "plain": ((0.9, 0.0, 3), {"lr": 0.1, "weight_decay": 0.1}, Buffers.NONE, False),
    "plain shift": ((0.708, 0.0, 3), {"lr": 0.1, "weight_decay": 0.1}, Buffers.NONE, False),
    "six at once": ((1.0, 0.0, 0), {"lr": 1.0, "weight_decay": 0.985}, Buffers.NONE, False),
    "no decay": ((1.3, 0.0, -2), {"lr": 0.1, "maximize": True}, Buffers.NONE, False),
    "first": (NEW, {"lr": 0.02, "momentum": 0.9, "dampening": 0.7, "weight_decay": 0.1}, Buffers.FIRST, False),
    "first shift": (
        (0.7072, 5.0, 3), {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "grad_scale": 8.0}, Buffers.FIRST, False,
    ),
    "kept": ((1.2, 0.7, 3), {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}, Buffers.KEPT, False),
    "kept shift": (
        (0.7072, 0.7, 3),
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3, "maximize": True, "grad_scale": 8.0},
        Buffers.KEPT, False,
    ),
    "growing": (
        (1.41, -0.5, 3), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 3.0}, Buffers.KEPT, False,
    ),
    "resting": ((1.2, 0.7, 3), {"lr": 0.1, "weight_decay": 0.1}, Buffers.RESTING, False),
    "resting shift": ((0.7072, 0.7, 3), {"lr": 0.1, "weight_decay": 0.1, "grad_scale": 3.0}, Buffers.RESTING, False),
    "nesterov first": (
        NEW, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, Buffers.FIRST, False,
    ),
    "nesterov": (
        (1.2, 0.7, 3), {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, Buffers.KEPT, False,
    ),
    "nesterov shift": (
        (0.7072, 0.7, 3),
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True, "grad_scale": 3.0},
        Buffers.KEPT, False,
    ),
    "nesterov half": (
        (0.8, 0.3, 3), {"lr": 0.8, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True}, Buffers.KEPT, False,
    ),
    "leave plain": ((0.8, 0.0, 3), {"lr": 0.1, "weight_decay": 0.1}, Buffers.NONE, True),
    "leave resting": ((0.8, 0.7, 3), {"lr": 0.1, "weight_decay": 0.1}, Buffers.RESTING, True),
    "leave first": ((1.3, 0.7, 3), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, Buffers.FIRST, True),
    "leave kept": (
        (0.8, 0.7, 3), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}, Buffers.KEPT, True,
    ),
    "leave nesterov": (
        (0.8, 0.7, 3), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, Buffers.KEPT, True,
    ),
}  # fmt: skip
# Halves of a unit of arithmetic precision, of the largest intermediate result: each coefficient is rounded once, each
# multiply-add once (twice without FMA hardware). The oracle goes a longer way, through the true weights.
BUDGET_ULP, BUDGET_ULP_V2, BUDGET_ULP_OF_ORACLE = 5.0, 8.0, 16.0


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def gauge_of(name):
    gauge, options, buffers, leave = CASES[name]
    step = ops.gauge_step(
        gauge, options["lr"], options.get("momentum", 0.0), options.get("dampening", 0.0),
        options.get("weight_decay", 0.0), options.get("nesterov", False), buffers, leave,
    )  # fmt: skip
    assert step is not None
    return step


def magnitude(step, w, g, v, grad_scale=1.0):
    """The largest size that the intermediate results of each coordinate can have: (of v', of w'), as stored."""
    w, g = w.abs(), g.abs() / grad_scale
    old = 0 * w if v is None else abs(step.momentum) * v.abs()
    new = old + abs(step.grad_to_buffer) * g + abs(step.weight_to_buffer) * w
    return new, abs(step.keep) * w + abs(step.grad_to_weight) * g + abs(step.buffer_to_weight) * new


def assert_within(got, exact, size, backend, what):
    real = torch.float64 if got.dtype == torch.float64 else torch.float32
    budget = (BUDGET_ULP_V2 if backend == "v2" else BUDGET_ULP) + (BUDGET_ULP_OF_ORACLE if real == torch.float64 else 0)
    allowed = 0.5 * budget * torch.finfo(real).eps * size
    if got.dtype != real:
        info = torch.finfo(got.dtype)
        allowed = allowed + 0.5 * info.eps * exact.abs() * (1 + 1e-6) + 0.5 * info.smallest_normal * info.eps
    error = (got.double() - exact).abs()
    worst = (error - allowed).max() if error.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"{what}: error {error.max():.3e}, over its budget by {worst:.3e}"


def assert_sums(table, before, grad, after, step, what):
    """Of the true weights, to what is left of double precision."""
    scale, new_scale = step.scale, step.next[0]
    w, g, w_new = scale * before.double(), grad.double() / scale, new_scale * after.double()
    sums = reference.step_sums(w, g, w_new, "tensor")
    size = reference.step_sums(w.abs(), g.abs(), w.abs() * 2 + w_new.abs(), "tensor").abs() + 1e-300
    assert ((table[:, :5] - sums).abs() / size).max() < 1e-13, what


@pytest.mark.pairwise
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gauged_step_against_reference(backend, name, dtype):
    """T5.1, a single step: every dtype, ISA, size and alignment; new buffers are never read."""
    step, options, first = gauge_of(name), CASES[name][1], CASES[name][2] == Buffers.FIRST
    for size in SIZES:
        for offset in (0, 3):
            w, g, v = random_case(size, dtype, seed=size)
            fenced = [Fenced(x, offset) for x in (w, g, torch.full_like(v, torch.nan) if first else v)]
            fw, fg, fv = (f.tensor for f in fenced)
            plan = ops.Pass()
            plan.begin()
            has_buffer = step.has_buffer
            numbers = {name: value for name, value in options.items() if name != "grad_scale"}
            hyper = ops.Hyper(**numbers, inverse_scale=1 / options.get("grad_scale", 1.0), gauge=step)
            assert not plan.add("sgd_", [fw], [fg], [[fv]] if has_buffer else None, [0] if first else [], hyper, 1)
            plan.check(None)
            table = ops.new_table(1, like=plan.like)
            plan.run(table, ops.new_scratch(plan))

            exact_w, exact_g, exact_v = (x.double() for x in (w, g, v))
            buffers = [exact_v if has_buffer and not first else None]
            sizes = magnitude(step, exact_w, exact_g, buffers[0], options.get("grad_scale", 1.0))
            exact, buffers = exact_w.clone(), [None if b is None else b.clone() for b in buffers]
            reference.sgd_([exact], [exact_g], buffers, gauge=step, **options)
            what = f"{name} {dtype} size {size} offset {offset}"
            # Decay takes most of w away in one step: the oracle loses what cancels there.
            lost = step.scale / step.next[0] * exact_w.abs() if dtype == torch.float64 else 0.0
            assert_within(fw, exact, sizes[1] + lost, backend, what + " w")
            if has_buffer:
                # So it does where z w is taken out of the true buffer.
                lost = abs(step.next[0] ** 2 * step.next[1]) * sizes[1] if dtype == torch.float64 else 0.0
                assert_within(fv, buffers[0], sizes[0] + lost, backend, what + " v")
            else:
                assert same_bits(fv, v), "a buffer was written"
            assert same_bits(fg, g), "the gradient was written"
            assert all(f.is_intact() for f in fenced), "memory outside the tensors was written"
            assert_sums(table, w, g.double() / options.get("grad_scale", 1.0), fw, step, what)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "name", ["plain shift", "first", "kept shift", "resting shift", "nesterov shift", "leave kept"]
)
@pytest.mark.parametrize("l", [1, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gauged_pairs_against_reference(backend, name, l, dtype):
    """SVAG's combination first, the gauge after it; what pairs measure is of the true scale."""
    step, options, buffers = gauge_of(name), dict(CASES[name][1]), CASES[name][2]
    options |= {"grad_scale": 3.0, "held_scale": 2.0, "l": l}
    for size in (1, 33, ops.CHUNK + 17):
        w, g, v = random_case(size, dtype, seed=size)
        h = random_case(size, dtype, seed=size + 1)[1]
        got, kept = w.clone(), [v.clone() if buffers in (Buffers.KEPT, Buffers.RESTING) else None]
        exact, exact_kept = w.double(), [None if x is None else x.double().clone() for x in kept]
        table = ops.sgd_([got], [g], kept, held=[h], gauge=step, **options)
        sums = reference.sgd_([exact], [g.double()], exact_kept, held=[h.double()], gauge=step, **options)
        combined = math.sqrt(2 * l - 1) * (h.double().abs() / 2 + g.double().abs() / 3)
        sizes = magnitude(step, w.double(), 2 * combined, None if buffers == Buffers.FIRST else v.double())
        assert_within(got, exact, 2 * sizes[1], backend, f"{name} {size} w")
        if step.has_buffer:
            assert_within(kept[0], exact_kept[0], 2 * sizes[0] + 2 * sizes[1], backend, f"{name} {size} v")
        assert table.shape == (1, 9)
        torch.testing.assert_close(table[:, 5:], sums[:, 5:], rtol=1e-5, atol=1e-5 * float(sums[:, 7:].sum()))
        torch.testing.assert_close(table[:, :2], sums[:, :2], rtol=1e-5, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("name", ["kept shift", "leave nesterov"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gauged_rows_are_tensor_sums_of_each_row(backend, name, dtype):
    step, options = gauge_of(name), CASES[name][1]
    shapes = [(7, 3), (3, ops.CHUNK + 17), (ops.CHUNK + 1, 2), (5,), (), (4, 0)]
    params = [random_case(math.prod(s), dtype, seed=1)[0].view(s) for s in shapes]
    grads = [random_case(math.prod(s), dtype, seed=2)[1].view(s) for s in shapes]
    buffers = [random_case(math.prod(s), dtype, seed=3)[2].view(s) for s in shapes]
    before, expected = [p.clone() for p in params], [p.clone() for p in params]
    twins = [b.clone() for b in buffers]
    table = ops.sgd_(params, grads, buffers, stats="row", gauge=step, **options)
    ops.sgd_(expected, grads, twins, gauge=step, **options)
    assert all(same_bits(a, b) for a, b in zip(params, expected, strict=True)), "measuring changed the step"
    scale = options.get("grad_scale", 1.0) * step.scale
    sums = [
        reference.step_sums(step.scale * w.double(), g.double() / scale, step.next[0] * p.double(), "row")
        for w, g, p in zip(before, grads, params, strict=True)
    ]
    torch.testing.assert_close(table, torch.cat(sums), rtol=1e-11, atol=1e-11)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "name", ["plain shift", "first shift", "kept shift", "resting shift", "nesterov shift", "leave kept"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(backend, name, dtype):
    step, options, buffers = gauge_of(name), CASES[name][1], CASES[name][2]
    shape = (6, 5, 7, 31)
    w, g, v = (x.view(shape) for x in random_case(math.prod(shape), dtype))
    kept = buffers in (Buffers.KEPT, Buffers.RESTING)
    plain, plain_v = w.clone(), [v.clone() if kept else None]
    sums = ops.sgd_([plain], [g], plain_v, gauge=step, stats="row", **options)

    def turned(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    other, other_v = turned(w), [turned(v) if kept else None]
    table = ops.sgd_([other], [turned(g)], other_v, gauge=step, stats="row", **options)
    assert same_bits(other.contiguous(), plain)
    assert not step.has_buffer or same_bits(other_v[0].contiguous(), plain_v[0])
    torch.testing.assert_close(table, sums, rtol=1e-12, atol=0)


# ---- Bit for bit ------------------------------------------------------------------------------------------------------------

WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]


def steps(dtype, stats="tensor", nesterov=False):
    """Enough steps to cross a rescaling, of tensors large enough for the thread pool: (tensors, last sums, shifts)."""
    make = torch.Generator().manual_seed(1)
    shapes = [(1,), (9,), (4097,), (ops.CHUNK,), (5 * ops.CHUNK + 3,), (300, 77)]
    params, buffers = ([here(torch.randn(s, generator=make, device="cpu").to(dtype)) for s in shapes] for _ in range(2))
    gauge, shifts, options = (0.73, 0.2, 5), 0, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.3, "nesterov": nesterov}
    for _ in range(3):
        step = ops.gauge_step(gauge, 0.1, 0.5, 0.0, 0.3, nesterov)
        grads = [here(torch.randn(s, generator=make, device="cpu").to(dtype)) for s in shapes]
        table = ops.sgd_(params, grads, buffers, grad_scale=3.0, stats=stats, gauge=step, **options)
        gauge, shifts = step.next, shifts + step.shift
    assert shifts == 1
    return [*params, *buffers], table


def assert_same(a, b):
    assert all(same_bits(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert a[1] is None or b[1] is None or same_bits(a[1], b[1])


@pytest.mark.skipif(
    len(WITH_FMA) < 2, reason="this machine runs one level with FMA hardware; two are needed to compare"
)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_isa_levels_agree(dtype, nesterov):
    chosen, results = ops.isa(), []
    try:
        for name in WITH_FMA:
            ops.select_isa(name)
            results.append(steps(dtype, "row", nesterov))
    finally:
        ops.select_isa(chosen)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_measuring_change_nothing(backend, dtype):
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(steps(dtype))
    for other in (*results[1:], steps(dtype, None)):
        assert_same(results[0], other)


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", [None, "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_shift_is_invisible_to_the_bit(backend, dtype, momentum, stats):
    """T5.6: beside a step of the same numbers without weight decay, whose lr takes up the powers of two."""
    w, g, v = random_case(3 * ops.CHUNK + 5, dtype)
    ours, theirs = w.clone(), w.clone()
    our_v, their_v = [v.clone()], [v.clone()]
    gauge, buffers, exponent = (0.72, 0.0, 0), Buffers.KEPT if momentum else Buffers.NONE, 0
    for _ in range(12):
        step = ops.gauge_step(gauge, 0.5, momentum, 0.0, 0.6 if momentum == 0 else 0.005, False, buffers)
        f, q = gauge[0], step.moved
        lr = math.ldexp(0.5 / (f * f * q), 2 * gauge[2])
        scaled = torch.ldexp(g, torch.tensor(gauge[2]))  # the gradient at weights that are 2^-exponent of theirs
        ops.sgd_([ours], [scaled], our_v if momentum else None, lr=0.5, momentum=momentum, stats=stats, gauge=step)
        ops.sgd_([theirs], [g], their_v if momentum else None, lr=lr, momentum=momentum)
        gauge = step.next
        exponent = gauge[2]
        assert same_bits(torch.ldexp(ours, torch.tensor(exponent)), theirs)
        assert same_bits(torch.ldexp(our_v[0], torch.tensor(-exponent)), their_v[0]) or not momentum
    assert exponent >= (1 if momentum else 6)


def test_infinite_and_missing_numbers_stay_where_they_are(backend):
    """A coefficient of 0 is no 0 * inf: what is infinite stays infinite, and NaN stays in its place."""
    for name in ("plain", "plain shift", "first", "kept", "kept shift"):
        step, options = gauge_of(name), CASES[name][1]
        w, g, v = torch.ones(40), torch.ones(40), torch.ones(40)
        w[3], g[7] = torch.inf, torch.nan
        ops.sgd_([w], [g], [v], gauge=step, **options)
        assert w[3] == torch.inf, name
        assert w[7].isnan(), name
        assert w.isfinite().sum() == 38, name


# ---- The numbers of a step ------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw):
    """A gauge and a schedule within the bound; momentum, decay and lr may be 0."""

    def number(least, most):
        return draw(st.one_of(st.just(0.0), st.floats(least, most)))

    momentum = number(1e-3, 0.999)
    most, weight_decay = (1 - math.sqrt(momentum)) ** 2, number(1e-8, 1e4)
    share = number(1e-6, 1.0) if momentum else number(1e-6, 0.999)
    lr = share * most / weight_decay if weight_decay else number(1e-8, 10.0)
    gauge = (draw(st.floats(0.5**0.5, ROOT, exclude_max=True)), number(1e-8, 1e3), draw(st.integers(-100, 10**6)))
    nesterov = draw(st.booleans())
    dampening = 0.0 if nesterov else number(0.01, 1.0)
    buffers = draw(st.sampled_from([Buffers.FIRST, Buffers.KEPT] if momentum else [Buffers.NONE, Buffers.RESTING]))
    return gauge, lr, momentum, dampening, weight_decay, nesterov, buffers


@settings(deadline=None, max_examples=500)
@given(schedules())
def test_gauge_step_is_the_recurrence_of_one_number(case):
    """`reference.gauge_step`, the optimizer itself on w = 1 with gradient 0; and the same in exact fractions."""
    gauge, lr, momentum, dampening, weight_decay, nesterov, buffers = case
    step = ops.gauge_step(*case)
    z = Fraction(gauge[1]) if buffers == Buffers.KEPT else Fraction(0)
    left = 1 - Fraction(dampening) if buffers == Buffers.KEPT else 1
    wd, mu, eta = Fraction(weight_decay), Fraction(momentum), Fraction(lr)
    z_new = mu * z + left * wd
    drop = eta * (wd + mu * z_new if nesterov and momentum else z_new)
    q = 1 - drop
    assume(abs(q) > 1e-9)
    if q <= 0:
        assert step is None
        return
    assert step is not None
    scale, new_z, exponent = step.next
    assert 0.5**0.5 <= scale < ROOT
    assert exponent == gauge[2] + step.shift
    assert step.before == gauge
    tolerance = 1e-13 * float(1 + drop) / float(q)
    assert math.ldexp(scale, -step.shift) == pytest.approx(gauge[0] * float(q), rel=tolerance)
    assert new_z == pytest.approx(float(z_new / q) if momentum else 0.0, rel=tolerance)
    assert step.keep * step.unkeep == 1
    assert math.frexp(step.keep)[0] == 0.5
    other = reference.gauge_step(*case)
    assert math.ldexp(other[0], exponent - other[2]) == pytest.approx(scale, rel=tolerance)
    assert other[1] == pytest.approx(new_z, rel=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_bound(momentum, nesterov):
    """T5.3: exactly (1 - sqrt(momentum))^2 can go on for ever; a billionth more cannot be had."""
    most = (1 - math.sqrt(momentum)) ** 2
    assert ops.most_decay(momentum) == pytest.approx(most, rel=1e-14)
    for lr in (1e-3, 0.1, 3.0):
        buffers = Buffers.KEPT if momentum else Buffers.NONE
        assert ops.gauge_step(NEW, lr, momentum, 0.0, most * (1 + 1e-9) / lr, nesterov, buffers) is None
        gauge = NEW
        if momentum == 0:
            continue  # q is 0 there
        for _ in range(3000):
            step = ops.gauge_step(gauge, lr, momentum, 0.0, most / lr, nesterov, buffers)
            assert step is not None
            gauge = step.next
    assert ops.gauge_step(NEW, math.nan, momentum, 0.0, 0.1) is None
    assert ops.gauge_step(NEW, 0.1, momentum, 0.0, math.nan) is None
    assert ops.gauge_step(NEW, math.inf, momentum, 0.0, 0.1) is None
    assert ops.gauge_step(NEW, 0.1, -0.5, 0.0, 0.1) is None
    assert ops.gauge_step(NEW, 0.1, math.nan, 0.0, 0.1) is None


@pytest.mark.parametrize("nesterov", [False, True])
def test_constant_numbers_settle_at_the_root_of_the_paper(nesterov):
    """T5.2: alpha^2 - (1 + mu - lr wd) alpha + mu = 0, and the polynomial of nesterov (theory 5.4)."""
    lr, momentum, weight_decay = 0.1, 0.9, 5e-3
    gauge = NEW
    for _ in range(3000):
        step = ops.gauge_step(gauge, lr, momentum, 0.0, weight_decay, nesterov)
        gauge = step.next
    keep = 1 - lr * weight_decay
    b, c = ((1 + momentum) * keep, momentum * keep) if nesterov else (momentum + keep, momentum)
    alpha = (b + math.sqrt(b * b - 4 * c)) / 2
    assert step.moved == pytest.approx(alpha, rel=1e-13)


def million(count, seed):
    """Random schedules within the bound for `count` steps: the last gauge, and log2 a by a recurrence of its own."""
    rng = random.Random(seed)
    gauge, z, logs, has_buffers = NEW, 0.0, [], False
    momentum, weight_decay, lr, dampening, nesterov = 0.9, 0.1, 0.01, 0.0, False
    smallest, largest = 1.0, 1.0
    for t in range(count):
        if t % 7 == 0:
            momentum = 0.0 if rng.random() < 0.1 else rng.random() * 0.95
            weight_decay = 0.0 if rng.random() < 0.1 else rng.random()
            # Half the bound: what an earlier momentum still carries comes on top.
            lr = 0.5 * rng.random() * (1 - math.sqrt(momentum)) ** 2 / 20
            nesterov = rng.random() < 0.3
            dampening = 0.0 if nesterov else rng.random()
        buffers = (Buffers.KEPT if has_buffers else Buffers.FIRST) if momentum else (
            Buffers.RESTING if has_buffers else Buffers.NONE)  # fmt: skip
        step = ops.gauge_step(gauge, lr, momentum, dampening, weight_decay, nesterov, buffers)
        left = 1 - dampening if buffers == Buffers.KEPT else 1.0
        z_new = momentum * z + left * weight_decay
        drop = lr * (weight_decay + momentum * z_new if nesterov and momentum else z_new)
        z = z_new / (1 - drop) if momentum else 0.0
        logs.append(math.log1p(-drop))
        has_buffers = has_buffers or momentum != 0
        gauge = step.next
        smallest, largest = min(smallest, gauge[0]), max(largest, gauge[0])
    assert smallest >= 0.5**0.5
    assert largest < ROOT
    return gauge, z, math.fsum(logs) / math.log(2)


def test_a_million_steps_lose_nothing():
    """The scale stays in its range, and the sum of all logarithms is kept to 1e-9."""
    gauge, z, log2_a = million(1_000_000, seed=5)
    assert gauge[2] > 500
    assert math.log2(gauge[0]) - gauge[2] == pytest.approx(log2_a, abs=1e-9)
    assert gauge[1] == pytest.approx(z, rel=1e-9)


def test_a_long_way_down_and_up_again():
    """Weights that nobody decays stay; dampening above 1 lets them grow, and the exponent falls."""
    gauge = (1.0, 0.0, 0)
    for _ in range(2000):
        gauge = ops.gauge_step(gauge, 0.1, 0.5, 3.0, 0.5).next
    assert gauge[2] < -100
    assert 0.5**0.5 <= gauge[0] < ROOT
    still = ops.gauge_step((0.9, 0.0, 7), 0.1, 0.9, 0.0, 0.0)
    assert still.next == (0.9, 0.0, 7)
    assert still.keep == 1


# ---- Refusals ---------------------------------------------------------------------------------------------------------------


def test_a_step_with_buffers_needs_them():
    step = gauge_of("kept")
    w = torch.ones(3)
    with pytest.raises(ValueError, match="expected momentum_buffers, got None"):
        ops.sgd_([w], [torch.ones(3)], lr=0.02, momentum=0.9, weight_decay=0.1, gauge=step)
    assert w.tolist() == [1, 1, 1]


def test_a_gauge_is_three_numbers():
    for gauge in (None, (1.0, 0.0), (1.0, 0.0, 0.5), "abc"):
        with pytest.raises(TypeError):
            ops.gauge_step(gauge, 0.1, 0.0, 0.0, 0.1)


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.5, 2.0, math.inf, math.nan])
def test_a_scale_that_no_step_leaves_is_refused(scale):
    with pytest.raises(ValueError, match=r"gauge_step: gauge expected a scale from sqrt\(1/2\) to sqrt\(2\), got "):
        ops.gauge_step((scale, 0.0, 0), 0.1, 0.9, 0.0, 0.01)
