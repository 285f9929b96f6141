"""`adamw_` against its float64 twin, the twin against torch; every rule x ISA x dtype x size x misalignment."""

import itertools
import math

import pytest
import torch
from support.memory import Fenced, here, same_bits

from normkern import ops, reference
from normkern.ops import Rounding

from .test_sgd import BUDGET_ULP, DTYPES, SIZES, random_case, strided_versions

WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RULES = {
    "adamw": {"weight_decay": 0.1},
    "adamw_no_decay": {"weight_decay": 0.0},
    "adamw_all": {"weight_decay": 0.3, "beta1": 0.5, "beta2": 0.95, "eps": 1e-3, "maximize": True, "grad_scale": 8.0},
    "adam": {"weight_decay": 0.1, "decoupled": False},
    "adam_no_averages": {"weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0, "decoupled": False, "grad_scale": 3.0},
}


def state_of(size, dtype, seed):
    """Averages as steps leave them: m of any sign, v of the size of its square."""
    _, m, v = random_case(size, torch.float64, seed=seed + 1000)
    return m.to(dtype), (v.square() + 1e-3).to(dtype)


# Roundings of the arithmetic type on the way to each stored number, in halves of its unit: the products and sums of m
# and v; the root, the denominator, the quotient, the update and the difference, beside what m and v bring along.
BUDGET = {"m": 6.0, "v": 8.0, "w": 24.0}


def sizes_of(w, g, m, v, *, beta1=0.9, beta2=0.999, weight_decay=0.01, decoupled=True, grad_scale=1.0, **_):
    """The largest size that the intermediate results of each coordinate can have: of m' and of v'."""
    d = g.abs() / grad_scale + (0 if decoupled else weight_decay * w.abs())
    return beta1 * m.abs() + (1 - beta1) * d, beta2 * v + (1 - beta2) * d * d


def assert_within(got, exact, allowed, what):
    if got.dtype not in (torch.float64, F32):
        info = torch.finfo(got.dtype)
        allowed = allowed + 0.5 * info.eps * exact.abs() * (1 + 1e-6) + 0.5 * info.smallest_normal * info.eps
    over = ((got.double() - exact).abs() - allowed).max() if got.numel() else torch.tensor(-1.0)
    assert over <= 0, f"{what}: over its budget by {over:.3e}"


@pytest.mark.pairwise
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_against_reference(backend, rule, dtype):
    options = {"lr": 0.1, **RULES[rule]}
    beta1, beta2 = options.get("beta1", 0.9), options.get("beta2", 0.999)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else F32).eps
    more = 2 if dtype == torch.float64 or backend in BUDGET_ULP else 1  # the oracle's own roundings; two for each fma
    for size in SIZES:
        for offset, steps in ((0, 7), (1, 0), (3, 1000)):
            w, g, _ = random_case(size, dtype, seed=size)
            m, v = state_of(size, dtype, size) if steps else (torch.zeros_like(w), torch.zeros_like(w))
            fenced = [Fenced(x, offset) for x in (w, g, m, v)]
            fw, fg, fm, fv = (f.tensor for f in fenced)
            count = torch.tensor(float(steps), dtype=F32)
            table = ops.adamw_([fw], [fg], [fm], [fv], [count], stats="tensor", **options)
            assert count == steps + 1

            exact = [x.double() for x in (w, g, m, v)]
            before, t = exact[0].clone(), torch.tensor(float(steps))
            of_m, of_v = sizes_of(*exact, **options)
            reference.adamw_([exact[0]], [exact[1]], [exact[2]], [exact[3]], [t], **options)
            what = f"{rule} {dtype} size {size} offset {offset}"
            half = 0.5 * eps * more
            assert_within(fm, exact[2], half * BUDGET["m"] * of_m, f"{what} m")
            assert_within(fv, exact[3], half * BUDGET["v"] * of_v, f"{what} v")
            # The update: errors of m' count as m' has them, though its parts may cancel.
            root = (exact[3] / (1 - beta2 ** (steps + 1))).sqrt() + options.get("eps", 1e-8)
            update = options["lr"] * of_m / (1 - beta1 ** (steps + 1)) / root
            decayed = options["lr"] * options["weight_decay"] if options.get("decoupled", True) else 0.0
            allowed = half * (3 * before.abs() + BUDGET["w"] * (update + decayed * before.abs()))
            # 1 - beta^t in float64: each of at most t products rounds, and the difference is small.
            allowed = allowed + update * 2.0**-52 * (steps + 1) / min(
                1 - beta1 ** (steps + 1), 1 - beta2 ** (steps + 1)
            )
            assert_within(fw, exact[0], allowed, f"{what} w")
            assert same_bits(fg, g), "the gradient was written"
            assert all(f.is_intact() for f in fenced), "memory outside the tensors was written"
            sums = reference.step_sums(before, g.double() / options.get("grad_scale", 1.0), fw, "tensor")
            scale = (
                reference.step_sums(before.abs(), g.double().abs(), before.abs() + update + 1, "tensor").abs() + 1e-300
            )
            assert ((table - sums).abs() / scale).max() < 1e-13, what


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_reference_is_torchs(decoupled, weight_decay, maximize):
    """On random problems, in float64, for many steps; a parameter whose gradients come late among them."""
    make = torch.Generator().manual_seed(3)
    options = {"lr": 0.03, "eps": 1e-6, "weight_decay": weight_decay, "maximize": maximize}
    w = [torch.nn.Parameter(torch.randn(n, generator=make, dtype=torch.float64)) for n in (3, 7)]
    ours = [p.detach().clone() for p in w]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    opt, m, v, t = kind(w, betas=(0.8, 0.95), **options), [None] * 2, [None] * 2, [None] * 2
    for step in range(50):
        grads = [torch.randn(p.shape, generator=make, dtype=torch.float64) * 10.0 ** (step % 5 - 2) for p in w]
        if step < 20:
            grads[1] = None
        for p, g in zip(w, grads, strict=True):
            p.grad = g
        opt.step()
        reference.adamw_(ours, grads, m, v, t, beta1=0.8, beta2=0.95, decoupled=decoupled, **options)
    assert [x.item() for x in t] == [50, 30]
    for p, x, a, b in zip(w, ours, m, v, strict=True):
        torch.testing.assert_close(x, p.detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(a, opt.state[p]["exp_avg"], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(b, opt.state[p]["exp_avg_sq"], rtol=1e-13, atol=1e-14)


def test_small_weight_decay_keeps_its_digits(backend):
    """eta lambda = 1e-6, of which 1 - eta lambda has two digits in float32: what rounding loses is no bias."""
    before = here(torch.rand(1 << 18)) + 1
    w = before.clone()
    ops.adamw_([w], [torch.zeros_like(w)], [None], [None], [None], lr=1e-4, weight_decay=1e-2)
    decay = ((before.double() - w.double()) / before.double()).mean()
    assert decay.item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_infinite_weights_stay_as_in_torch(backend, decay):
    w = torch.tensor([torch.inf, -torch.inf, 1.0])
    ops.adamw_([w], [torch.ones(3)], [None], [None], [None], lr=0.5, weight_decay=decay)
    assert w[:2].tolist() == [torch.inf, -torch.inf]
    assert w[2].isfinite()


def test_nan_goes_through_and_shows(backend):
    w, g = torch.ones(40), torch.ones(40)
    g[3] = torch.nan
    table = ops.adamw_([w], [g], [None], [None], [None], lr=1.0, stats="tensor")
    assert w.isnan().nonzero().flatten().tolist() == [3]
    assert table[0, 1].isnan()


def test_a_first_step_has_the_size_of_the_learning_rate(backend):
    w, g = torch.zeros(100), here(torch.randn(100))
    ops.adamw_([w], [g], [None], [None], [None], lr=0.25, eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(w, -0.25 * g.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_sums_of_each_row(backend, dtype):
    shapes = [(7, 3), (3, ops.CHUNK + 17), (ops.CHUNK + 1, 2), (1, 5), (5,), (), (0, 4), (4, 0)]
    params = [random_case(math.prod(s), dtype, seed=1)[0].view(s) for s in shapes]
    grads = [random_case(math.prod(s), dtype, seed=2)[1].view(s) for s in shapes]
    before = [p.clone() for p in params]
    table = ops.adamw_(params, grads, *([None] * len(shapes) for _ in range(3)), lr=0.1, stats="row")
    sums = torch.cat([reference.step_sums(w, g, p, "row") for w, g, p in zip(before, grads, params, strict=True)])
    torch.testing.assert_close(table, sums, rtol=1e-12, atol=1e-12)


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(backend, dtype, stats):
    shape = (6, 5, 7, 31)
    w, g, _ = (x.view(shape) for x in random_case(math.prod(shape), dtype))
    m, v = (x.view(shape) for x in state_of(math.prod(shape), dtype, 0))
    plain = [w.clone(), m.clone(), v.clone()]
    sums = ops.adamw_([plain[0]], [g], [plain[1]], [plain[2]], [torch.tensor(3.0)], lr=0.1, stats=stats)
    versions = zip(*(strided_versions(x) for x in (w, g, m, v)), strict=True)
    for (name, a), (_, b), (_, c), (_, d) in versions:
        table = ops.adamw_([a], [b], [c], [d], [torch.tensor(3.0)], lr=0.1, stats=stats)
        assert all(same_bits(x, y) for x, y in zip((a, c, d), plain, strict=True)), name
        torch.testing.assert_close(table, sums, rtol=1e-12, atol=0)
    for _, b in strided_versions(g):  # streams that differ in their strides
        got = [w.clone(), m.clone(), v.transpose(0, 3).contiguous().transpose(0, 3)]
        ops.adamw_([got[0]], [b], [got[1]], [got[2]], [torch.tensor(3.0)], lr=0.1)
        assert all(same_bits(x, y) for x, y in zip(got, plain, strict=True))


def steps(dtype, stats="tensor", decoupled=True):
    """Three steps of lists large enough for the thread pool: every tensor, and the sums."""
    make = torch.Generator().manual_seed(1)
    shapes = [*((n,) for n in (1, 7, 8, 9, 100, 4097, ops.CHUNK, 5 * ops.CHUNK + 3)), (300, 77), (3, 2 * ops.CHUNK + 1)]
    params = [here(torch.randn(s, generator=make, device="cpu").to(dtype)) for s in shapes]
    state = [[None] * len(shapes) for _ in range(3)]
    options = {"lr": 0.1, "weight_decay": 0.1, "decoupled": decoupled, "grad_scale": 3.0, "stats": stats}
    for _ in range(3):
        grads = [here(torch.randn(s, generator=make, device="cpu").to(dtype)) for s in shapes]
        table = ops.adamw_(params, grads, *state, **options)
    return [*params, *state[0], *state[1], *([] if table is None else [table])]


def mixed_steps(stats="tensor", sizes=(1, 7, 100, 4097, 5 * ops.CHUNK + 3)):
    """The same of lists whose streams are stored differently."""
    results = []
    for dtype, state_dtype, more in (
        (BF16, BF16, {"rounding": Rounding(9, 4)}),
        (BF16, F32, {"rounding": Rounding(9, 4)}),
        (BF16, F32, {"masters": [None] * (len(sizes) + 1)}),
        (F16, BF16, {"masters": [None] * (len(sizes) + 1)}),
        (F16, F32, {}),
        (F32, BF16, {}),
    ):
        w, g = ([random_case(n, dtype, seed=n + k)[k] for n in sizes] for k in (0, 1))
        w, g = ([*x, x[-1][: 100 * 77].view(100, 77).clone()] for x in (w, g))
        state = [[None] * len(w) for _ in range(3)]
        for _ in range(2):
            table = ops.adamw_(w, g, *state, lr=0.1, grad_scale=3.0, stats=stats, state_dtype=state_dtype, **more)
        assert all(x.dtype == state_dtype for x in (*state[0], *state[1]))
        results += [*w, *state[0], *state[1], *more.get("masters", []), *([] if table is None else [table])]
    return results


def same(a, b):
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(len(WITH_FMA) < 2, reason="two levels with FMA hardware are needed to compare")
@pytest.mark.parametrize("run", [*(lambda dtype=dtype: steps(dtype, "row") for dtype in DTYPES), mixed_steps])
def test_isa_levels_agree(run):
    chosen, results = ops.isa(), []
    try:
        for name in WITH_FMA:
            ops.select_isa(name)
            results.append(run())
    finally:
        ops.select_isa(chosen)
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("run", [*(lambda dtype=dtype: steps(dtype) for dtype in DTYPES), mixed_steps])
def test_thread_counts_agree(isa, run):
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run())
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measuring_changes_nothing(backend, dtype):
    plain = steps(dtype, None)
    for stats in ("tensor", "row"):
        assert same(plain, steps(dtype, stats)[: len(plain)])


def test_counts_of_either_dtype_give_the_same_bits(backend):
    results = []
    for dtype in (F32, torch.float64):
        w, g, _ = random_case(100, F32)
        count = torch.tensor(12.0, dtype=dtype)
        ops.adamw_([w], [g], [None], [None], [count], lr=0.1)
        assert count == 13
        results.append(w)
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_master_copies_follow_float32(backend, dtype):
    """The copy is what float32 weights would be, and the weight is the rounded copy."""
    w, g, _ = random_case(513, dtype, seed=1)
    full, masters = w.float(), [None]
    state, twin = [[None] for _ in range(3)], [[None] for _ in range(3)]
    for _ in range(3):
        ops.adamw_([w], [g], *state, lr=0.1, masters=masters, state_dtype=F32)
        ops.adamw_([full], [g.float()], *twin, lr=0.1)
    assert same_bits(masters[0], full)
    assert same_bits(w, full.to(dtype))


def test_rounding_at_random_lies_between_the_neighbours(backend):
    w, g, _ = random_case(2000, BF16, seed=2)
    full, rounded = w.float(), w.clone()
    ops.adamw_([full], [g.float()], [None], [None], [None], lr=0.1)
    ops.adamw_([rounded], [g], [None], [None], [None], lr=0.1, rounding=Rounding(5, 1), state_dtype=F32)
    error = (rounded.float() - full).abs()
    assert (error <= 2.0**-7 * full.abs() + 1e-30).all()
    assert 0.2 < (rounded.float() != full.to(BF16).float()).double().mean() < 0.8


@pytest.mark.parametrize("decoupled", [True, False])
def test_learning_rate_multipliers_and_clipping(backend, decoupled):
    cases = [random_case(n, F32, seed=n) for n in (5, 300)]
    w, g = [c[0] for c in cases], [c[1] for c in cases]
    exact, grads = [x.double() for x in w], [x.double() for x in g]
    coef, ours, theirs = (
        torch.tensor(0.25, dtype=torch.float64),
        [[None] * 2 for _ in range(3)],
        [[None] * 2 for _ in range(3)],
    )
    more = {
        "lr": 0.1,
        "weight_decay": 0.2,
        "decoupled": decoupled,
        "clip_coef": here(coef),
        "lr_multipliers": [0.5, 2.0],
    }
    ops.adamw_(w, g, *ours, **more)
    reference.adamw_(exact, grads, *theirs, **more)
    for a, b in zip((*w, *ours[0], *ours[1]), (*exact, *theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-7)


def test_many_tensors_some_of_which_are_skipped(backend):
    params, grads = ([torch.randn(n) for n in range(0, 900, 3)] for _ in range(2))
    grads[7] = grads[200] = None
    state = [[None] * 300 for _ in range(3)]
    table = ops.adamw_(params, grads, *state, lr=0.1, stats="tensor")
    assert state[0][7] is None
    assert state[2][200] is None
    assert table[[7, 200]].isnan().all()
    assert table[[i for i in range(300) if i not in (7, 200)]].isfinite().all()


def refusals():
    f, one = torch.ones, torch.tensor
    yield "length", {"exp_avgs": [f(3), f(3)]}, ValueError, "adamw_: exp_avgs has 2 entries but params has 1"
    yield "counts", {"steps": []}, ValueError, "adamw_: steps has 0 entries but params has 1"
    yield "shape", {"exp_avg_sqs": [f(4)]}, ValueError, r"exp_avg_sqs\[0\] has shape \(4,\) but params\[0\] has"
    yield "dtype", {"exp_avgs": [f(3).half()]}, TypeError, r"exp_avgs\[0\] is torch.float16 on cpu but params\[0\]"
    yield "gradient", {"grads": [f(3).double()]}, TypeError, r"grads\[0\] is torch.float64 on cpu but params\[0\]"
    yield "one memory", {"exp_avgs": [(x := f(3))], "exp_avg_sqs": [x]}, ValueError, "is the same memory as exp_avgs"
    for wrong in (f(2), one(1), one(1.0).half(), 3.0):
        yield (
            "count",
            {"steps": [wrong]},
            TypeError,
            r"adamw_: steps\[0\] expected one float32 or float64 number on the",
        )
    yield (
        "tuple",
        {"exp_avgs": (f(3),)},
        TypeError,
        "adamw_: exp_avgs expected a list, into which new entries are put, got",
    )
    yield "none", {"steps": None}, TypeError, "adamw_: steps expected a list, into which new entries are put, got None"
    yield "scale", {"grad_scale": 0}, ValueError, "adamw_: grad_scale expected a number that is not 0, got 0"
    yield "stats", {"stats": "column"}, ValueError, "adamw_: stats expected None"
    yield "lr", {"lr": f(2)}, ValueError, "adamw_: lr expected one number"
    yield "masters", {"masters": [f(3)]}, TypeError, r"adamw_: masters\[0\] expected None beside params\[0\]"


@pytest.mark.parametrize(("given", "error", "text"), [c[1:] for c in refusals()], ids=[c[0] for c in refusals()])
def test_refusal(given, error, text):
    w, m, v, t = (torch.ones(3) for _ in range(4))
    lists = {"params": [w], "grads": [torch.ones(3)], "exp_avgs": [m], "exp_avg_sqs": [v], "steps": [t.sum() - 3]}
    arguments = {**lists, "lr": 0.1, **given}
    with pytest.raises(error, match=text):
        ops.adamw_(**arguments)
    written = itertools.chain(arguments["params"], arguments["exp_avgs"], arguments["exp_avg_sqs"])
    assert all((x == 1).all() for x in written)
    steps = arguments["steps"] or []
    assert all(not isinstance(x, torch.Tensor) or x.numel() != 1 or x in (0, 1) for x in steps)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_strided", [False, True])
def test_sums_without_eps_at_every_size(is_strided, state_dtype):
    """The last coordinates run in a block of eight, and what pads it must add nothing: not 0/0 either."""
    for size in range(1, 20):
        w, g = torch.linspace(1, 2, 2 * size), torch.linspace(-1, 3, 2 * size) + 0.01
        w, g = (w[::2], g[::2]) if is_strided else (w[:size].clone(), g[:size].clone())
        m, v = torch.zeros_like(w, dtype=state_dtype), torch.zeros_like(w, dtype=state_dtype)
        old = w.double()
        sums = ops.adamw_(
            [w], [g], [m], [v], [torch.zeros(())], lr=0.1, eps=0.0, stats="tensor", state_dtype=state_dtype
        )
        update = w.double() - old
        expected = torch.stack([old @ old, g.double() @ g.double(), old @ g.double(), update @ update, old @ update])
        torch.testing.assert_close(sums[0], expected, rtol=1e-12, atol=0)
