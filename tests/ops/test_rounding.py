"""`sgd_` whose streams are stored differently: weights rounded at random, master copies, buffers of another type."""

import itertools
import math

import pytest
import torch
from support.memory import Fenced, here, same_bits

from normkern import ops, reference
from normkern.ops import Rounding

from .test_sgd import BUDGET_ULP, RULES, assert_within, magnitude, random_case, strided_versions

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (1, 7, 8, 9, 63, 65, 255, 256, 257, 511, 512, 513, 1100, ops.CHUNK + 5)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
#: Where every product is exact, so that eager operations round where the kernel does.
EXACT = {
    "plain": {"lr": 2**-9, "weight_decay": 2**-6},
    "momentum": {"lr": 2**-9, "momentum": 0.5, "weight_decay": 2**-6},
    "nesterov": {"lr": 2**-9, "momentum": 0.5, "nesterov": True},
}
MAXIMUM = torch.finfo(BF16).max


def test_philox_has_the_published_answers():
    def words(counter, key):
        return [int(x) for x in reference.philox([torch.tensor([c]) for c in counter], key)]

    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words((0,) * 4, (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words((ones,) * 4, (ones, ones)) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


def lists(dtype, buffer_dtype, sizes=SIZES):
    cases = [random_case(n, dtype, seed=n) for n in sizes]
    w, g, v = (list(x) for x in zip(*cases, strict=True))
    return w, g, [x.to(buffer_dtype) for x in v]


@pytest.mark.parametrize("buffer_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("rule", EXACT)
def test_the_bits_of_the_eager_twin(backend, rule, buffer_dtype):
    ours, twins = lists(BF16, buffer_dtype), lists(BF16, buffer_dtype)
    for step in (0, 2**32 - 1, 5):
        rounding = Rounding(seed=0xFEDCBA9876543210, step=step, first=3)
        ops.sgd_(*ours, rounding=rounding, **EXACT[rule])
        reference.sgd_(*twins, rounding=rounding, **EXACT[rule])
    for a, b in zip((*ours[0], *ours[2]), (*twins[0], *twins[2]), strict=True):
        assert same_bits(a, b)


@pytest.mark.pairwise
@pytest.mark.parametrize("buffer_dtype", [None, F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("rule", EXACT)
def test_master_copies_have_the_bits_of_the_eager_twin(backend, rule, dtype, buffer_dtype):
    ours, twins = ([*lists(dtype, buffer_dtype or dtype), [None] * len(SIZES)] for _ in range(2))
    for _ in range(3):
        for op, x in ((ops.sgd_, ours), (reference.sgd_, twins)):
            op(x[0], x[1], x[2], masters=x[3], **EXACT[rule])
    # In float16 an eager product of small numbers may be subnormal, and rounded once more.
    for a, b in zip((*ours[0], *ours[3]), (*twins[0], *twins[3]), strict=True):
        assert same_bits(a, b)
    assert all(m.dtype == F32 for m in ours[3])


def mixed_steps(stats="tensor", sizes=(1, 7, 100, 4097, 5 * ops.CHUNK + 3)):
    """Tensors and sums after steps of every kind, large enough for the pool."""
    results = []
    for dtype, buffer_dtype, more in (
        (BF16, BF16, {"rounding": Rounding(9, 4)}),
        (BF16, F32, {"rounding": Rounding(9, 4)}),
        (BF16, F32, {"masters": [None] * (len(sizes) + 1)}),
        (F16, BF16, {"masters": [None] * (len(sizes) + 1)}),
        (F16, F32, {}),
        (F32, BF16, {}),
    ):
        w, g, v = ([*x, x[-1][: 100 * 77].view(100, 77).clone()] for x in lists(dtype, buffer_dtype, sizes))
        table = ops.sgd_(w, g, v, lr=0.1, momentum=0.9, weight_decay=0.01, grad_scale=3.0, stats=stats, **more)
        results += [*w, *v, *more.get("masters", []), *([] if table is None else [table])]
    return results


@pytest.mark.skipif(len(WITH_FMA) < 2, reason="two levels with FMA hardware are needed to compare")
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_isa_levels_agree(stats):
    chosen, results = ops.isa(), []
    try:
        for name in WITH_FMA:
            ops.select_isa(name)
            results.append(mixed_steps(stats))
    finally:
        ops.select_isa(chosen)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_thread_counts_agree(isa):
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(mixed_steps("row"))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_measuring_changes_nothing(backend):
    sizes = (9, 513, 8195)
    plain, measured = mixed_steps(None, sizes), mixed_steps("row", sizes)
    assert all(same_bits(a, b) for a, b in zip(plain, (x for x in measured if x.dtype != torch.float64), strict=True))


@pytest.mark.parametrize("masters", [False, True])
def test_any_strides_give_the_same_bits(backend, masters):
    """Coordinates are counted in row-major order, wherever they lie."""
    shape = (6, 5, 7, 31)
    w, g, v = (x.view(shape) for x in random_case(math.prod(shape), BF16))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "stats": "row"}
    if not masters:
        options["rounding"] = Rounding(1, 2, 3)
    plain = [w.clone(), v.float(), [None] if masters else None]
    sums = ops.sgd_([plain[0]], [g], [plain[1]], masters=plain[2], **options)
    for (name, other_w), (_, other_g), (_, other_v) in zip(
        strided_versions(w), reversed(list(strided_versions(g))), strided_versions(v.float()), strict=True
    ):
        other_m = [None] if masters else None
        table = ops.sgd_([other_w], [other_g], [other_v], masters=other_m, **options)
        assert same_bits(other_w, plain[0]), name
        assert same_bits(other_v, plain[1]), name
        assert not masters or same_bits(other_m[0], plain[2][0]), name
        torch.testing.assert_close(table, sums, rtol=1e-12, atol=1e-12)


def test_alignment_changes_nothing_and_nothing_else_is_written(backend):
    w, g, v = random_case(1003, BF16)
    results = []
    for offset in (0, 1, 3, 5):
        fenced = [Fenced(x, offset) for x in (w, g, v.float())]
        ops.sgd_(*([f.tensor] for f in fenced), lr=0.1, momentum=0.9, rounding=Rounding(1, 2))
        assert all(f.is_intact() for f in fenced)
        copies = [Fenced(x, offset) for x in (w, g, v, w.float())]
        m = [copies[3].tensor]
        ops.sgd_(*([f.tensor] for f in copies[:3]), lr=0.1, momentum=0.9, masters=m)
        assert all(f.is_intact() for f in copies)
        results.append([f.tensor for f in (*fenced, *copies)])
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def rounded(x, seed=0, step=0, first=0):
    """x, float32, as the step stores it: w' = 0 - (-x)."""
    w, m = torch.zeros_like(x, dtype=BF16), x.clone()
    ops.sgd_([w], [torch.zeros_like(w)], [m.neg()], lr=1.0, momentum=1.0, rounding=Rounding(seed, step, first))
    return w


@pytest.mark.pairwise
@pytest.mark.parametrize("position", [0.5, 1 / 65536, 0.1, 0.999])
@pytest.mark.parametrize("low", [1.0, -3.140625, 2.0**-130])
def test_the_mean_of_what_is_stored_is_what_was_to_be_stored(backend, low, position):
    """Up as often as the position between the neighbours says: a z-test."""
    count = 1 << 18
    away = torch.tensor(low).view(torch.int32) + round(position * 65536)
    x = here(away.view(F32).expand(count).clone())
    y = rounded(x, seed=11)
    up = int((y.float() != low).sum())
    share = round(position * 65536) / 65536
    assert set(y.float().unique().tolist()) <= {low, (away & ~0xFFFF).add(65536).view(F32).item()}
    assert abs(up - count * share) < 4.5 * math.sqrt(count * share * (1 - share))


def test_steps_parameters_seeds_and_coordinates_have_numbers_of_their_own(isa):
    count = 1 << 16
    half = torch.tensor(1.0).view(torch.int32).add(32768).view(F32).expand(count).clone()
    draws = [rounded(half, *key) for key in ((0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1))]
    signs = torch.stack([2.0 * (y.float() != 1) - 1 for y in draws]).double()
    signs = torch.cat([signs, *(signs[:1].roll(k, dims=1) for k in (1, 2, 4, 8, 64, 512))])
    correlation = (signs @ signs.T / count - torch.eye(len(signs))).abs()
    assert correlation.max() < 4.5 / math.sqrt(count)


def test_nothing_overflows_and_what_is_no_number_stays(backend):
    beyond = torch.tensor([0x7F7F0001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF], dtype=torch.int32).view(F32)
    values = [torch.inf, -torch.inf, 0.0, 1.0, MAXIMUM, -MAXIMUM, *beyond.tolist(), *(-beyond).tolist()]
    x = here(torch.tensor(values).repeat(50))
    for step in range(3):
        assert same_bits(rounded(x, step=step), x.to(BF16))  # as to nearest
        assert rounded(x * torch.nan, step=step).isnan().all()
    below = here(torch.full((1000,), 0x7F7E8000, dtype=torch.int32).view(F32))
    assert set(rounded(below).float().tolist()) == {
        MAXIMUM,
        torch.tensor(0x7F7E0000, dtype=torch.int32).view(F32).item(),
    }


def test_other_types_are_stored_as_always(backend):
    for dtype in (torch.float64, F32, F16):
        w, g, v = random_case(300, dtype)
        a, b = [[w.clone()], [v.clone()]], [[w.clone()], [v.clone()]]
        ops.sgd_(a[0], [g], a[1], lr=0.1, momentum=0.9, rounding=Rounding(1, 2))
        ops.sgd_(b[0], [g], b[1], lr=0.1, momentum=0.9)
        assert same_bits(a[0][0], b[0][0])
        assert same_bits(a[1][0], b[1][0])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_weight_that_somebody_has_written_counts(backend, dtype):
    """Coordinate by coordinate; where the weight is what the copy rounds to, the copy keeps its digits."""
    master = here(torch.randn(1000))
    w = master.to(dtype)
    w[::3] = 2.0
    w[5], master[6] = torch.nan, torch.nan
    expected = torch.where(w == master.to(dtype), master, w.float())
    masters = [master.clone()]
    table = ops.sgd_([w], [torch.zeros_like(w)], masters=masters, lr=0.1, stats="tensor")
    assert same_bits(masters[0].nan_to_num(0.0), expected.nan_to_num(0.0))
    assert masters[0].isnan().nonzero().flatten().tolist() == [5]
    assert table[0, 3].isnan()
    assert same_bits(w.nan_to_num(0.0), expected.to(dtype).nan_to_num(0.0))


# ---- Every rule within its budget of float64 -------------------------------------------------------------------------

STORED = {
    "at random": (BF16, BF16, {"rounding": Rounding(3, 1)}),
    "at random, float32 buffers": (BF16, F32, {"rounding": Rounding(3, 1)}),
    "float32 buffers, bfloat16": (BF16, F32, {}),
    "float32 buffers, float16": (F16, F32, {}),
    "bfloat16 buffers, float32": (F32, BF16, {}),
    "bfloat16 buffers, float16": (F16, BF16, {}),
    "master copies, bfloat16": (BF16, F32, {"masters": [None]}),
    "master copies, float16": (F16, BF16, {"masters": [None]}),
}
GAUGED = {
    "gauged": {"weight_decay": 0.5, "gauge": (1.2, 0.0, 3)},
    "gauged momentum": {"momentum": 0.9, "weight_decay": 0.02, "gauge": (0.708, 0.1, 7)},
    "gauged nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02, "gauge": (0.9, 0.1, 1)},
}
PAIRS = {"pair": {"l": 3.0}, "pair momentum": {"l": 3.0, "momentum": 0.9, "weight_decay": 0.01, "held_scale": 2.0}}


@pytest.mark.pairwise
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("first", [False, True])
def test_every_rule_against_float64(backend, stored, first):
    dtype, buffer_dtype, given = STORED[stored]
    for (name, rule), size in itertools.product({**RULES, **GAUGED, **PAIRS}.items(), (17, 1030)):
        if (first or buffer_dtype != dtype) and "momentum" not in rule and "masters" not in given:
            continue
        rule, w, g, v = dict(rule), *random_case(size, dtype, seed=size)
        v, h = v.to(buffer_dtype), random_case(size, dtype, seed=size + 1)[1]
        momentum, kinds = rule.get("momentum", 0.0), ops.Buffers
        if "gauge" in rule:
            kind = kinds.NONE if not momentum else kinds.FIRST if first else kinds.KEPT
            before = rule["gauge"] if not first else (rule["gauge"][0], 0.0, 0)
            rule["gauge"] = ops.gauge_step(
                before, 0.1, momentum, 0.0, rule["weight_decay"], rule.get("nesterov", False), kind
            )
        if "l" in rule:
            rule["held"] = [h]
        more = {key: list(value) if key == "masters" else value for key, value in given.items()}
        exact_w, exact = w.double(), [None if first else v.double()]
        sizes = [3 * x for x in magnitude(w.double(), 2 * (g.double().abs() + h.double().abs()), exact[0], lr=0.1, **{
            k: x for k, x in rule.items() if k in ("momentum", "weight_decay", "nesterov", "grad_scale", "dampening")
        })]  # fmt: skip
        sums = reference.sgd_([exact_w], [g.double()], exact, lr=0.1, stats="tensor", **_doubled(rule))
        got, buffers = w.clone(), [None if first else v.clone()]
        table = ops.sgd_(
            [got], [g], buffers, lr=0.1, stats="tensor", state_dtype=buffer_dtype, **more, **rule
        )  # fmt: skip
        what = f"{name}, {size}"
        result = more["masters"][0] if "masters" in more else got
        if "rounding" in more:
            ulp = torch.finfo(BF16).eps * exact_w.abs() * (1 + 1e-5) + 2.0**-133
            slack = 0.5 * BUDGET_ULP["v2"] * torch.finfo(F32).eps * sizes[1]
            assert ((got.double() - exact_w).abs() <= ulp + slack).all(), what
        else:
            assert_within(result, exact_w, sizes[1], "v2", what)
        if "masters" in more:
            assert same_bits(got, result.to(dtype)), what
        if momentum:
            assert buffers[0].dtype == buffer_dtype, what
            assert_within(buffers[0], exact[0], sizes[0], "v2", what + " v")
        # The sums are of the weights as they are stored, the copies where there are some.
        gauge = rule.get("gauge")
        scale, after = (1.0, 1.0) if gauge is None else (gauge.before[0], gauge.next[0])
        before = scale * w.double()
        of_weights = reference.step_sums(before, torch.zeros_like(before), after * result.double(), "tensor")
        torch.testing.assert_close(table[:, [0, 3, 4]], of_weights[:, [0, 3, 4]], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(table[:, 1:3], sums[:, 1:3], rtol=1e-5, atol=1e-5)


def _doubled(rule):
    return {key: [x.double() for x in value] if key == "held" else value for key, value in rule.items()}


def test_refusals():
    w, low = torch.ones(3), torch.ones(3, dtype=BF16)
    for p, master, error, text in (
        (w, w.clone(), TypeError, r"sgd_: masters\[0\] expected None beside params\[0\], torch.float32 on cpu"),
        (low, low.clone(), TypeError, r"sgd_: masters\[0\] expected float32 beside params\[0\], torch.bfloat16"),
        (low, torch.ones(4), ValueError, r"sgd_: masters\[0\] has shape \(4,\) but params\[0\] has shape \(3,\)"),
        (low, torch.ones(1).expand(3), ValueError, r"sgd_: masters\[0\] of shape \(3,\) is expanded"),
    ):
        with pytest.raises(error, match=text):
            ops.sgd_([p], [torch.ones_like(p)], masters=[master], lr=1.0)
    with pytest.raises(ValueError, match=r"sgd_: masters has 2 entries but params has 1"):
        ops.sgd_([low], [low.clone()], masters=[None, None], lr=1.0)
    shared = torch.ones(3)
    with pytest.raises(ValueError, match=r"masters\[0\] is the same memory as momentum_buffers\[0\]|momentum_buffers"):
        ops.sgd_([low], [low.clone()], [shared], masters=[shared], lr=1.0, momentum=0.9)
    with pytest.raises(TypeError, match="momentum_buffers"):  # float64 keeps to itself
        ops.sgd_([w.double()], [w.double()], [w.clone()], lr=1.0, momentum=0.9)
    assert (w == 1).all()
    assert (low == 1).all()
