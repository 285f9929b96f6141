"""Steps that keep norms, `sgd_` and `adamw_` with norm= and `apply_updates_`, against their equation in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import Fenced, same_bits

import normkern
from normkern import ops, reference
from normkern.ops import Rounding

from .test_sgd import DTYPES, random_case, strided_versions

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
CHUNK = ops.CHUNK
SIZES = (1, 15, 17, 33, 513, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
SHAPES = [(7, 3), (64, 3, 3, 3), (3, CHUNK + 17), (2, CHUNK), (CHUNK // 2 + 1, 3), (1, 5), (9, 1)]
RULES = {
    "sgd": {},
    "sgd_maximize": {"maximize": True, "grad_scale": 4.0},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "grad_scale": 8.0},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "adam": {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
    "adam_maximize": {"maximize": True, "eps": 0.0, "grad_scale": 4.0},
}
# Roundings of the arithmetic type on the way to w', in halves of its unit: `grow`, `move`, u, the products and the sum.
BUDGET = 40.0


def step(rule, w, g, state, **more):
    """One step; `state` is [v], or [m, v, t]: entries are made where they are None."""
    options = {"lr": 0.3, **RULES[rule], **more}
    if rule.startswith("adam"):
        m, v, t = ([x] for x in state)
        table = ops.adamw_([w], [g], m, v, t, **options)
        state[:] = m[0], v[0], t[0]
        return table
    buffers = [state[0]]
    table = ops.sgd_([w], [g], buffers, **options)
    state[0] = buffers[0]
    return table


def direction(rule, g, state):
    """u in float64, of the state as stored after the step."""
    options = RULES[rule]
    d = g.double() / options.get("grad_scale", 1.0) * (-1 if options.get("maximize") else 1)
    if rule.startswith("adam"):
        m, v, t = state
        root = v.double().sqrt() / math.sqrt(1 - options.get("beta2", 0.999) ** t.item())
        return torch.where(m == 0, 0, m.double() / (root + options.get("eps", 1e-8)))
    if "momentum" not in options:
        return d
    v = state[0].double()
    return d + options["momentum"] * v if options.get("nesterov") else v


def moved(w, u, lr, radius=None):
    """The equation, of one vector."""
    r = w.norm() if radius is None else radius
    x = w - lr * r * u / u.norm()
    return r * x / x.norm()


def of_each(norm, f, *tensors):
    return f(*tensors) if norm == "keep" else torch.stack([f(*rows) for rows in zip(*tensors, strict=True)])


def new_state(rule, like, seed=7):
    _, v, _ = random_case(like.numel(), F64, seed=seed)
    v = v.view(like.shape)
    if rule.startswith("adam"):
        return [(0.3 * v).to(like.dtype), (v.square() + 1e-3).to(like.dtype), torch.tensor(4.0)]
    return [v.to(like.dtype) if "momentum" in RULES[rule] else None]


def assert_kept(w_new, w, u, norm, lr, what):
    exact = of_each(norm, lambda a, b: moved(a, b, lr), w.double(), u)
    size = exact.abs() + 2 * w.double().abs()
    arithmetic = torch.finfo(F64 if w.dtype == F64 else F32).eps
    norms = reference.norms(w, norm), reference.norms(u, norm)
    ratio = (norms[0] / norms[1]).view(-1, *[1] * (w.ndim - 1)) if norm == "keep_rows" else norms[0] / norms[1]
    allowed = 0.5 * BUDGET * arithmetic * (size + lr * ratio * u.abs())
    if w.dtype not in (F64, F32):
        info = torch.finfo(w.dtype)
        allowed = allowed + 0.5 * info.eps * exact.abs() * (1 + 1e-6) + 0.5 * info.smallest_normal * info.eps
    over = ((w_new.double() - exact).abs() - allowed).max()
    assert over <= 0, f"{what}: over its budget by {over:.3e}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_against_the_equation(isa, rule, dtype):
    for size in SIZES:
        w, g, _ = random_case(size, dtype, seed=size)
        state, before = new_state(rule, w), w.clone()
        fenced = [Fenced(x, offset=size % 4) for x in (w, g)]
        table = step(rule, *(f.tensor for f in fenced), state, norm="keep", stats="tensor")
        what = f"{rule} {dtype} {size}"
        assert_kept(fenced[0].tensor, before, direction(rule, g, state), "keep", 0.3, what)
        assert all(f.is_intact() for f in fenced), "memory outside the tensors was written"
        assert same_bits(fenced[1].tensor, g), "the gradient was written"
        sums = reference.step_sums(before, g.double() / RULES[rule].get("grad_scale", 1.0), fenced[0].tensor, "tensor")
        torch.testing.assert_close(table, sums, rtol=1e-11, atol=1e-11 * before.double().square().sum().item())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_against_the_equation(isa, rule, dtype):
    for shape in SHAPES:
        w, g, _ = (x.view(shape) for x in random_case(math.prod(shape), dtype, seed=3))
        for stats in ("row", "tensor", None):
            state, got = new_state(rule, w), w.clone()
            table = step(rule, got, g, state, norm="keep_rows", stats=stats)
            what = f"{rule} {dtype} {shape} {stats}"
            if shape[0] < 100:
                assert_kept(got, w, direction(rule, g, state), "keep_rows", 0.3, what)
            else:
                torch.testing.assert_close(
                    reference.norms(got, "keep_rows"), reference.norms(w, "keep_rows"), rtol=1e-2, atol=0
                )
            if stats:
                sums = reference.step_sums(w, g.double() / RULES[rule].get("grad_scale", 1.0), got, stats)
                torch.testing.assert_close(table, sums, rtol=1e-11, atol=1e-11 * w.double().square().sum().item())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", ["keep", "keep_rows"])
def test_the_twin_says_the_same_for_several_steps(rule, norm):
    make = torch.Generator().manual_seed(0)
    ours = [torch.randn(s, generator=make, dtype=F64) for s in ((6, 50), (4, 3, 2))]
    twins = [w.clone() for w in ours]
    radii = [reference.norms(w, norm) * 1.5 for w in ours]
    name = "adamw_" if rule.startswith("adam") else "sgd_"
    lists = [[[None] * 2 for _ in range(3 if name == "adamw_" else 1)] for _ in range(2)]
    options = {
        "lr": 0.2,
        "weight_decay": 0.3,
        **RULES[rule],
        "norm": norm,
        "radii": radii,
        "lr_multipliers": [1.0, 0.5],
    }
    for _ in range(5):
        grads = [torch.randn(w.shape, generator=make, dtype=F64) for w in ours]
        a = getattr(ops, name)(ours, grads, *lists[0], stats="row", **options)
        b = getattr(reference, name)(twins, grads, *lists[1], stats="row", **options)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for x, y, r in zip(ours, twins, radii, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(reference.norms(x, norm), r, rtol=1e-14, atol=0)


def run_all(rule, norm, stats, dtype=F32, **more):
    make = torch.Generator().manual_seed(2)
    tensors = [torch.randn(s, generator=make, dtype=F64).to(dtype) for s in SHAPES]
    grads = [torch.randn(s, generator=make, dtype=F64).to(dtype) for s in SHAPES]
    buffers = [torch.randn(s, generator=make, dtype=F64).to(dtype) for s in SHAPES]
    options = {"lr": 0.1, **RULES[rule], "norm": norm, "stats": stats, **more}
    if rule.startswith("adam"):
        squares = [b.square() for b in buffers]
        table = ops.adamw_(tensors, grads, buffers, squares, [None] * len(SHAPES), **options)
        return [*tensors, *buffers, *squares], table
    return [*tensors, *buffers], ops.sgd_(tensors, grads, buffers, **options)


def assert_same(a, b):
    assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("norm", ["keep", "keep_rows"])
def test_threads_levels_and_measuring_change_no_bit(rule, norm):
    plain, _ = run_all(rule, norm, None)
    for stats in ("tensor", "row"):
        tables = []
        for name in WITH_FMA:
            ops.select_isa(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                tensors, table = run_all(rule, norm, stats)
                assert_same(tensors, plain)
                tables.append(table)
        assert_same(tables, tables[:1] * len(tables))


@pytest.mark.parametrize("rule", ["nesterov", "adam"])
@pytest.mark.parametrize("norm", ["keep", "keep_rows"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_strides_give_the_same_bits(isa, rule, norm, dtype):
    shape = (6, 5, 7, 31)
    w, g, _ = (x.view(shape) for x in random_case(math.prod(shape), dtype))
    plain, state = w.clone(), new_state(rule, w)
    table = step(rule, plain, g, state, norm=norm, stats="row")
    for name, other in strided_versions(w):
        for other_g in (g, dict(strided_versions(g))[name]):
            a = dict(strided_versions(w))[name] if name in ("slice", "middle") else other.clone()
            again = new_state(rule, w)
            sums = step(rule, a, other_g, again, norm=norm, stats="row")
            dense_in_another_order = name in ("transposed", "channels_last") and norm == "keep"
            if dense_in_another_order:  # its sums are added in the order of memory
                torch.testing.assert_close(a, plain, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
            else:
                assert same_bits(a, plain), name
            assert all(same_bits(x, y) for x, y in zip(again, state, strict=True) if x is not None)
            torch.testing.assert_close(sums, table, rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", ["momentum", "nesterov", "adam"])
@pytest.mark.parametrize("norm", ["keep", "keep_rows"])
def test_masters_rounding_at_random_and_state_of_another_dtype(isa, rule, norm):
    shape = (6, 700)
    w, g, _ = (x.view(shape).to(BF16) for x in random_case(math.prod(shape), F64))
    for more in (
        {"masters": [w.float() * 1.001]},
        {"rounding": Rounding(seed=3, step=5)},
        {"state_dtype": F32},
        {"state_dtype": F32, "rounding": Rounding(seed=3, step=5)},
    ):
        got, twin = w.clone(), w.clone()
        kind, lists = ("adamw_", 3) if rule == "adam" else ("sgd_", 1)
        options = {"lr": 0.3, **RULES[rule], "norm": norm}
        copies = [{**more, **({"masters": [more["masters"][0].clone()]} if "masters" in more else {})} for _ in "ab"]
        for m in copies:  # the copy must round to its weight to count
            if "masters" in m:
                m["masters"] = [torch.where(m["masters"][0].to(BF16) == w, m["masters"][0], w.float())]
        a = [[None] for _ in range(lists)]
        b = [[None] for _ in range(lists)]
        getattr(ops, kind)([got], [g], *a, **options, **copies[0])
        getattr(reference, kind)([twin], [g], *b, **options, **copies[1])
        for x, y in zip(a, b, strict=True):
            assert x[0] is None or x[0].dtype == y[0].dtype
        if "masters" in more:
            torch.testing.assert_close(copies[0]["masters"][0], copies[1]["masters"][0], rtol=1e-5, atol=1e-6)
            assert same_bits(got, copies[0]["masters"][0].to(BF16))
        else:
            near = (got.double() - twin.double()).abs() <= 2**-7 * twin.double().abs() + 1e-30
            assert near.all()
            assert (got != twin).double().mean() < 0.02


def test_a_gradient_that_is_the_weight(isa):
    for rule in ("sgd", "nesterov"):
        w = torch.randn(3000)
        twin, state, other = w.clone(), new_state(rule, w), new_state(rule, w)
        step(rule, w, w, state, norm="keep")
        step(rule, twin, twin.clone(), other, norm="keep")
        assert same_bits(w, twin), rule


@pytest.mark.parametrize("norm", ["keep", "keep_rows"])
def test_zero_updates_leave_the_direction(isa, norm):
    w = torch.randn(5, 40)
    got, radii = w.clone(), [2 * reference.norms(w, norm)]
    ops.sgd_([got], [torch.zeros_like(w)], lr=0.5, norm=norm, radii=radii)
    torch.testing.assert_close(got, 2 * w, rtol=1e-6, atol=1e-6)
    kept = w.clone()
    ops.sgd_([kept], [torch.zeros_like(w)], lr=0.5, norm=norm)
    torch.testing.assert_close(kept, w, rtol=1e-7, atol=0)


def test_what_is_not_finite_makes_its_tensor_or_row_nan(isa):
    for bad in (math.nan, math.inf):
        for norm, expected in (("keep", 3), ("keep_rows", 1)):
            w, g = torch.randn(3, 50), torch.randn(3, 50)
            g[1, 7] = bad
            ops.sgd_([w], [g], lr=0.5, norm=norm)
            assert w.isnan().all(1).sum() == expected
            assert w.isnan().any(1).sum() == expected


def test_a_zero_weight_with_a_radius_goes_to_the_sphere(isa):
    w, g = torch.zeros(40), torch.randn(40)
    ops.sgd_([w], [g], lr=0.25, norm="keep", radii=[torch.tensor(3.0, dtype=F64)])
    torch.testing.assert_close(w, -3 * g / g.norm())


def test_empty_tensors_and_skipped_ones():
    w = [torch.zeros(0), torch.zeros(0, 3), torch.zeros(4, 0), torch.ones(4, 2), torch.ones(2, 2)]
    grads = [*(torch.zeros_like(x) for x in w[:4]), None]
    table = ops.sgd_(w, grads, lr=0.5, norm="keep", stats="row")
    assert table.shape == (1 + 0 + 4 + 4 + 2, 5)
    assert table[:5].eq(0).all()
    assert table[-2:].isnan().all()
    ops.sgd_(w[1:4], grads[1:4], lr=0.5, norm="keep_rows")


@given(
    rows=st.integers(1, 4), columns=st.integers(1, 70), eta=st.floats(0, 0.99), seed=st.integers(0, 2**31),
    by_row=st.booleans(), octaves=st.integers(-60, 60), parallel=st.sampled_from([0.0, 1.0, -1.0]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_norms_are_kept_and_angles_are_those_of_the_equation(rows, columns, eta, seed, by_row, octaves, parallel):
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=make, dtype=F64) * 2.0**octaves
    u = torch.randn(rows, columns, generator=make, dtype=F64) + 100 * parallel * w / w.norm()
    norm = "keep_rows" if by_row else "keep"
    got = w.clone()
    normkern.apply_updates_([got], [u], lr=eta, norm=norm)
    length = reference.norms(w, norm)
    torch.testing.assert_close(reference.norms(got, norm), length, rtol=1e-12 / (1 - eta), atol=0)
    for a, b, d in [(w, got, u)] if not by_row else zip(w, got, u, strict=True):
        if a.numel() < 2:
            continue
        a, b, d = a.flatten() / a.norm(), b.flatten() / b.norm(), d.flatten() / d.norm()
        sin, cos = (d - (a @ d) * a).norm().item(), (a @ d).item()
        angle = math.atan2((b - (a @ b) * a).norm().item(), (a @ b).item())
        assert angle == pytest.approx(math.atan2(eta * sin, 1 - eta * cos), abs=1e-9 / (1 - eta))


def test_a_float32_norm_does_not_drift_when_the_radius_is_kept():
    w = torch.randn(64, 300)
    radius = reference.norms(w, "keep")
    for t in range(1000):
        u = torch.randn(64, 300, generator=torch.Generator().manual_seed(t))
        normkern.apply_updates_([w], [u], lr=0.02, radius=radius)
    assert w.double().norm().item() == pytest.approx(radius.item(), rel=3e-8)


class TestApplyUpdates:
    def test_without_a_norm_it_is_plain_subtraction(self):
        w, u = torch.randn(100), torch.randn(100)
        expected = w.clone()
        ops.sgd_([expected], [u], lr=3.0)
        assert normkern.apply_updates_([w], [u], lr=3.0, norm=None) is None
        assert same_bits(w, expected)

    def test_any_way_to_give_a_radius(self):
        w, u = [torch.randn(3, 4), torch.randn(3, 4)], [torch.randn(3, 4), torch.randn(3, 4)]
        rows = torch.tensor([1.0, 2.0, 3.0])
        for radius, expected in (
            (2.0, [[2.0] * 3] * 2),
            (torch.tensor(2.0), [[2.0] * 3] * 2),
            (rows, [[1.0, 2.0, 3.0]] * 2),
            ([4, rows], [[4.0] * 3, [1.0, 2.0, 3.0]]),
            ([None, rows], [None, [1.0, 2.0, 3.0]]),
        ):
            got = [x.clone() for x in w]
            normkern.apply_updates_(got, u, lr=0.1, norm="keep_rows", radius=radius)
            for x, before, r in zip(got, w, expected, strict=True):
                r = before.norm(dim=1) if r is None else torch.tensor(r)
                torch.testing.assert_close(x.norm(dim=1), r)

    def test_its_twin(self):
        w, u = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
        twin = w.clone()
        a = normkern.apply_updates_([w], [u], lr=0.1, norm="keep_rows", radius=2.0, stats="row")
        b = reference.apply_updates_([twin], [u], lr=0.1, norm="keep_rows", radius=2.0, stats="row")
        torch.testing.assert_close(w, twin)
        torch.testing.assert_close(a, b)


ONE = torch.ones(2, 3)
REFUSED = {
    "unknown": ({"norm": "kept"}, ValueError, "norm expected None, \"keep\" or \"keep_rows\", got 'kept'; did you mean"),
    "lr": ({"lr": 1.0}, ValueError, "lr expected a number of at least 0 and below 1 with norm=.*got 1.0"),
    "negative": ({"lr": -0.1}, ValueError, "lr expected .*got -0.1"),
    "nan": ({"lr": math.nan}, ValueError, "lr expected .*got nan"),
    "zero": ({"w": torch.zeros(2, 3)}, ValueError, r"params\[1\] is zero, which has no norm to keep"),
    "minus zero": ({"w": -torch.zeros(2, 3)}, ValueError, r"params\[1\] is zero"),
    "zero row": ({"w": torch.tensor([[1.0, 0], [0, 0]]), "norm": "keep_rows"}, ValueError,
                 r"params\[1\] has a row of zeros, 1, which has no norm to keep"),
    "vector": ({"w": torch.ones(3), "norm": "keep_rows"}, ValueError,
               r"params\[1\]: norm=\"keep_rows\" expected at least two dimensions, got shape \(3,\)"),
}  # fmt: skip
MORE_OF_OPS = {
    "held": ({"held": [None, ONE.clone()]}, ValueError, "held expected None with norm, got list"),
    "radii": ({"norm": None, "radii": [None, None]}, ValueError, "radii expected None without norm, got list"),
    "radius": ({"radii": [None, torch.ones(2, dtype=F64)]}, ValueError,
               r"the radius of params\[1\] expected 1 dense float64 on the CPU, got \(2,\) torch.float64"),
    "float32 radius": ({"radii": [None, torch.ones(())]}, ValueError, "expected 1 dense float64 .*torch.float32"),
    "multiplier": ({"lr_multipliers": [1.0, 3.0], "lr": 0.5}, ValueError,
                   r"params\[1\], with its multiplier: lr expected .*got 1.5"),
    "length": ({"radii": [None]}, ValueError, "radii has 1 entries but params has 2"),
}  # fmt: skip
MORE_OF_UPDATES = {
    "no norm": ({"norm": None, "radius": 1.0}, ValueError, "radius expected None without norm, got float"),
    "zero radius": ({"radius": 0.0}, ValueError, r"radius\[0\] expected positive numbers"),
    "nan radius": ({"radius": [1.0, math.nan]}, ValueError, r"radius\[1\] expected positive numbers"),
    "shape": ({"radius": [1.0, torch.ones(5)], "norm": "keep_rows"}, ValueError,
              r"radius\[1\] expected one number or one for each row, \(2,\), got a tensor of shape \(5,\)"),
    "no number": ({"radius": ["a", 1.0]}, ValueError, r"radius\[0\] expected one number, got 'a'"),
    "count": ({"radius": [1.0]}, ValueError, "radius has 1 entries but params has 2"),
    "dtype": ({"u": torch.ones(2, 3, dtype=F64)}, TypeError, r"updates\[1\] is torch.float64 .*expected one dtype"),
    "form": ({"u": torch.ones(3, 2)}, ValueError, r"updates\[1\] has shape \(3, 2\) but params\[1\] has shape \(2, 3\)"),
    "kind": ({"w": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"params\[1\] is torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED, *MORE_OF_OPS])
def test_ops_refuse(case):
    change, error, text = {**REFUSED, **MORE_OF_OPS}[case]
    options = {"lr": 0.5, "norm": "keep", **change}
    first, w = ONE.clone(), options.pop("w", ONE.clone())
    grads = [torch.randn(2, 3), torch.randn(w.shape)]
    momentum = [torch.ones(2, 3), torch.ones(w.shape)]
    with pytest.raises(error, match=f"sgd_: .*{text}" if "multiplier" not in case else text):
        ops.sgd_([first, w], grads, momentum, momentum=0.9, **options)
    if case != "held":
        t = [torch.zeros(()), torch.zeros(())]
        with pytest.raises(error, match=f"adamw_: .*{text}"):
            ops.adamw_([first, w], grads, momentum, [x.clone() for x in momentum], t, **options)
        assert t[0] == 0
    assert same_bits(first, ONE)
    assert all(x.eq(1).all() for x in momentum)


@pytest.mark.parametrize("case", [*REFUSED, *MORE_OF_UPDATES])
def test_apply_updates_refuses(case):
    change, error, text = {**REFUSED, **MORE_OF_UPDATES}[case]
    options = {"lr": 0.5, **change}
    first, w = ONE.clone(), options.pop("w", ONE.clone())
    u = options.pop("u", None)
    with pytest.raises(error, match=f"apply_updates_: .*{text}"):
        normkern.apply_updates_([first, w], [torch.randn(2, 3), torch.ones(w.shape) if u is None else u], **options)
    assert same_bits(first, ONE)
