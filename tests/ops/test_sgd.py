"""Every rule x ISA x dtype x size x misalignment against the float64 reference, with a budget of errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import Fenced, bits, here, same_bits

from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 15, 16, 17, 31, 33, 511, 513, ops.CHUNK - 1, ops.CHUNK, ops.CHUNK + 1, 3 * ops.CHUNK + 5)
RULES = {
    "plain": {},
    "plain_maximize": {"maximize": True},
    "plain_decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "momentum_all": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True, "grad_scale": 8.0},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "nesterov_scaled": {"momentum": 0.5, "nesterov": True, "grad_scale": 3.0},
}
# Roundings of arithmetic precision on the way to a stored value, each at most half a unit of the largest intermediate
# result. Without FMA hardware (v2) every multiply-add rounds twice.
BUDGET_ULP = {"v2": 7.0}
BUDGET_ULP_FMA = 4.0


def magnitude(w, g, v, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, grad_scale=1.0, **_):
    """The largest size that the intermediate results of each coordinate can have: (of v', of w')."""
    d = g.abs() / grad_scale + weight_decay * w.abs()
    new = d if v is None else momentum * v.abs() + abs(1 - dampening) * d
    u = d + momentum * new if nesterov else new
    return new, w.abs() + lr * (u if momentum else d)


def assert_within(got, exact, size, backend, what):
    """|got - exact| <= budget of arithmetic roundings + half a unit of the storage type at the result."""
    real_eps = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    error = (got.double() - exact).abs()
    budget = BUDGET_ULP.get(backend, BUDGET_ULP_FMA) + (
        BUDGET_ULP["v2"] if got.dtype == torch.float64 else 0
    )  # the oracle's own
    allowed = 0.5 * budget * real_eps * size
    if got.dtype not in (torch.float64, torch.float32):
        info = torch.finfo(got.dtype)
        allowed = allowed + 0.5 * info.eps * exact.abs() * (1 + 1e-6) + 0.5 * info.smallest_normal * info.eps
    worst = (error - allowed).max() if error.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"{what}: error {error.max():.3e}, over its budget by {worst:.3e}"


def random_case(size, dtype, seed=0):
    make = torch.Generator().manual_seed(seed)
    w, g, v = (torch.randn(size, generator=make, dtype=torch.float64, device="cpu") for _ in range(3))
    # Sizes over many octaves, so that neighbours cannot hide in each other's rounding.
    octaves = [torch.randint(-6, 3, (size,), generator=make, device="cpu").double() for _ in range(3)]
    return [here((x * torch.exp2(o)).to(dtype)) for x, o in zip((w, g, v), octaves, strict=True)]


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("rule", "first"), [(r, f) for r in RULES for f in (False, True) if "momentum" in RULES[r] or not f]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgd_against_reference(backend, rule, dtype, first):
    options = {"lr": 0.1, **RULES[rule]}
    for size in SIZES:
        for offset in (0, 1, 3):
            w, g, v = random_case(size, dtype, seed=size)
            fenced = [Fenced(x, offset) for x in (w, g, torch.full_like(v, torch.nan) if first else v)]
            fw, fg, fv = (f.tensor for f in fenced)
            stats = ops.Pass()
            stats.begin()
            numbers = {name: value for name, value in options.items() if name != "grad_scale"}
            hyper = ops.Hyper(**numbers, inverse_scale=1 / options.get("grad_scale", 1.0))
            assert not stats.add("sgd_", [fw], [fg], [[fv]], [0] if first else [], hyper, 1)
            stats.check(None)
            table = ops.new_table(1, like=stats.like)
            stats.run(table, ops.new_scratch(stats))

            exact_w, exact_g, exact_v = (x.double() for x in (w, g, v))
            sizes = magnitude(exact_w, exact_g, None if first else exact_v, **options)
            before = exact_w.clone()
            buffers = [None if first else exact_v.clone()]
            reference.sgd_([exact_w], [exact_g], buffers, **options)
            what = f"{rule} {dtype} size {size} offset {offset}"
            assert_within(fw, exact_w, sizes[1], backend, what + " w")
            if options.get("momentum"):
                assert_within(fv, buffers[0], sizes[0], backend, what + " v")
            assert same_bits(fg, g), "the gradient was written"
            assert all(f.is_intact() for f in fenced), "memory outside the tensors was written"
            # The sums speak of what was stored; in double, so little is lost.
            sums = reference.step_sums(before, g.double() / options.get("grad_scale", 1.0), fw, "tensor")
            scale = (
                reference.step_sums(before.abs(), g.double().abs(), before.abs() + sizes[1], "tensor").abs() + 1e-300
            )
            assert ((table - sums).abs() / scale).max() < 1e-13, what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_tensor_sums_of_each_row(backend, dtype):
    shapes = [
        (7, 3),
        (64, 3, 3, 3),
        (3, ops.CHUNK + 17),
        (2, ops.CHUNK),
        (ops.CHUNK + 1, 2),
        (1, 5),
        (5,),
        (),
        (0, 4),
        (4, 0),
    ]
    params = [random_case(math.prod(s), dtype, seed=1)[0].view(s) for s in shapes]
    grads = [random_case(math.prod(s), dtype, seed=2)[1].view(s) for s in shapes]
    expected = [p.clone() for p in params]
    table = ops.sgd_(params, grads, [None] * len(shapes), lr=0.1, momentum=0.9, stats="row")
    ops.sgd_(expected, grads, [None] * len(shapes), lr=0.1, momentum=0.9)
    assert all(same_bits(a, b) for a, b in zip(params, expected, strict=True)), "measuring changed the step"
    before = [random_case(math.prod(s), dtype, seed=1)[0].view(s) for s in shapes]
    sums = torch.cat([reference.step_sums(w, g, p, "row") for w, g, p in zip(before, grads, params, strict=True)])
    assert table.shape == (7 + 64 + 3 + 2 + ops.CHUNK + 1 + 1 + 1 + 1 + 0 + 4, 5)
    torch.testing.assert_close(table, sums, rtol=1e-12, atol=1e-12)


def strided_versions(x):
    """The same values, differently laid out in memory."""
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "slice", torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    yield "middle", torch.nn.functional.pad(x, (2, 3), value=torch.nan)[..., 2:-3]
    if x.ndim == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(backend, dtype, stats):
    shape = (6, 5, 7, 31)
    w, g, v = (x.view(shape) for x in random_case(math.prod(shape), dtype))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "stats": stats}
    plain_w, plain_v = w.clone(), v.clone()
    plain = ops.sgd_([plain_w], [g], [plain_v], **options)
    for name_w, other_w in strided_versions(w):
        for name_g, other_g in [*strided_versions(g), ("contiguous", g)]:
            for other_v in (v.clone(), next(x for n, x in strided_versions(v) if n == name_w)):
                a, b = other_w.clone(memory_format=torch.preserve_format), other_v.clone()
                if name_w in ("slice", "middle"):
                    a = dict(strided_versions(w))[name_w]
                table = ops.sgd_([a], [other_g], [b], **options)
                assert same_bits(a, plain_w), (name_w, name_g)
                assert same_bits(b, plain_v), (name_w, name_g)
                torch.testing.assert_close(table, plain, rtol=1e-12, atol=0)


def test_expanded_gradient_gives_the_right_numbers(backend):
    w, row = torch.randn(40, 33), torch.randn(33)
    for grad in (row.expand(40, 33), torch.tensor(2.0).expand(40, 33), torch.randn(40, 1).expand(40, 33)):
        got, expected = w.clone(), w.clone()
        ops.sgd_([got], [grad], lr=0.1)
        ops.sgd_([expected], [grad.contiguous()], lr=0.1)
        assert same_bits(got, expected)


def test_every_float16_and_bfloat16_survives(backend):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        w = every.view(dtype).clone()
        ops.sgd_([w], [torch.zeros_like(w)], lr=0.5)
        number = ~every.view(dtype).isnan()
        assert torch.equal(bits(w)[number], every[number])
        assert w[~number].isnan().all()


def test_narrowing_rounds_to_nearest_even(backend):
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        w = torch.tensor([1, 1, 1, 1, info.max, info.smallest_normal, 0.0], dtype=dtype)
        half = info.eps / 2
        g = torch.tensor([half, 1.5 * half, 3 * half, half / 2, info.max, 0, 2.0**-14], dtype=dtype)
        got, exact = w.clone(), (w.float() + g.float()).to(dtype)
        ops.sgd_([got], [g], lr=1.0, maximize=True)
        assert same_bits(got, exact)


def test_infinite_weight_without_decay_stays_infinite(backend):
    w = torch.tensor([torch.inf, -torch.inf, 1.0])
    ops.sgd_([w], [torch.ones(3)], lr=0.5)
    assert w.tolist() == [torch.inf, -torch.inf, 0.5]


def test_nan_and_inf_gradients_go_through_and_show(backend):
    w = torch.ones(40)
    g = torch.zeros(40)
    g[3], g[38] = torch.nan, torch.inf
    table = ops.sgd_([w], [g], lr=1.0, stats="tensor")
    assert w[3].isnan()
    assert w[38] == -torch.inf
    assert (w[torch.arange(40) % 35 != 3] == 1).all()
    assert table[0, 1].isnan()
    assert table[0, 0] == 40


def test_sums_neither_overflow_nor_underflow_in_float32(backend):
    for size in (1e30, 1e-30):
        w, g = torch.full((100,), size), torch.full((100,), size)
        table = ops.sgd_([w], [g], lr=0.5, stats="tensor")
        exact = float(torch.tensor(size)) ** 2 * 100
        assert table[0, 0].item() == pytest.approx(exact, rel=1e-12)
        assert table[0, 3].item() == pytest.approx(exact / 4, rel=1e-12)


def test_many_tensors_of_every_size_in_one_call(backend):
    sizes = torch.randint(0, 3000, (300,)).tolist()
    params, grads = ([torch.randn(n) for n in sizes] for _ in range(2))
    grads[7] = grads[200] = None
    exact = [p.double() for p in params]
    buffers, exact_buffers = [None] * 300, [None] * 300
    for _ in range(3):
        table = ops.sgd_(params, grads, buffers, lr=0.1, momentum=0.9, stats="tensor")
        reference.sgd_(
            exact, [g if g is None else g.double() for g in grads], exact_buffers, lr=0.1, momentum=0.9, stats="tensor"
        )
    for a, b in zip(params, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    assert buffers[7] is None
    assert table[[7, 200]].isnan().all()
    assert table[[i for i in range(300) if i not in (7, 200)]].isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 6), max_size=5),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    stats=st.sampled_from(["tensor", "row"]),
)
def test_any_permutation_of_dimensions(shape, order, dtype, stats):
    def permuted(x):
        dims = list(range(x.ndim))
        order.shuffle(dims)
        back = [dims.index(d) for d in range(x.ndim)]
        return x.permute(dims).contiguous().permute(back)

    w, g = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    expected, other = w.clone(), permuted(w)
    table = ops.sgd_([expected], [g], lr=0.1, stats=stats)
    got = ops.sgd_([other], [permuted(g)], lr=0.1, stats=stats)
    assert same_bits(other.contiguous(), expected.contiguous())
    torch.testing.assert_close(got, table, rtol=1e-12, atol=1e-300)


# ---- Refusals: a sentence that names list, index, expected and got; nothing is written ---------------------------------


def refusals():
    f = torch.ones
    base = torch.arange(20.0)
    yield "length", [f(3)], [f(3), f(3)], None, ValueError, r"sgd_: grads has 2 entries but params has 1"
    yield (
        "shape",
        [f(3), f(4)],
        [f(3), f(4, 1)],
        None,
        ValueError,
        r"grads\[1\] has shape \(4, 1\) but params\[1\] has shape \(4,\)",
    )
    yield (
        "dtype",
        [f(3)],
        [f(3).double()],
        None,
        TypeError,
        r"grads\[0\] is torch.float64 on cpu but params\[0\] is torch.float32",
    )
    yield (
        "integer",
        [f(3).long()],
        [f(3).long()],
        None,
        TypeError,
        r"params\[0\] is torch.int64 on cpu; expected .*float16",
    )
    yield "complex", [f(3).cfloat()], [f(3).cfloat()], None, TypeError, r"params\[0\] is torch.complex64"
    yield "device", [f(3), f(2)], [f(3), f(2, device="meta")], None, TypeError, r"grads\[1\] is torch.float32 on meta"
    yield "sparse", [f(3)], [f(3).to_sparse()], None, TypeError, r"grads\[0\] is torch.float32 on cpu, torch.sparse_coo"
    yield "negative bit", [f(3)], [torch._neg_view(f(3))], None, TypeError, r"grads\[0\] .* negative bit"
    yield "no tensor", [f(3)], [[1.0, 2.0, 3.0]], None, TypeError, r"grads\[0\] is list"
    yield "subclass", [f(3), MyTensor(f(3))], [f(3), f(3)], None, TypeError, r"params\[1\] is MyTensor of torch.float32"
    yield "expanded", [f(3), f(1).expand(3)], [f(3), f(3)], None, ValueError, r"params\[1\] of shape \(3,\) is expanded"
    yield "itself", [base.as_strided((3, 3), (2, 1))], [f(3, 3)], None, ValueError, r"params\[0\] .* overlaps itself"
    yield (
        "partial",
        [base[:10], base[5:15]],
        [f(10), f(10)],
        None,
        ValueError,
        r"params\[1\] partially overlaps params\[0\]",
    )
    yield (
        "shifted gradient",
        [base[:10]],
        [base[1:11]],
        None,
        ValueError,
        r"(grads|params)\[0\] partially overlaps (grads|params)\[0\]",
    )
    yield "buffer length", [f(3)], [f(3)], [f(3), f(3)], ValueError, r"momentum_buffers has 2 entries but params has 1"
    yield (
        "buffer shape",
        [f(3)],
        [f(3)],
        [f(4)],
        ValueError,
        r"momentum_buffers\[0\] has shape \(4,\) but params\[0\] has shape \(3,\)",
    )
    yield (
        "buffer dtype",
        [f(3)],
        [f(3)],
        [f(3).half()],
        TypeError,
        r"momentum_buffers\[0\] is torch.float16 on cpu but params\[0\]",
    )
    yield (
        "gradient is buffer",
        [f(3)],
        [base[:3]],
        [base[:3]],
        ValueError,
        r"momentum_buffers\[0\] is the same memory as grads\[0\]|grads\[0\] is the same memory as momentum_buffers\[0\]",
    )
    yield "buffer is param", [base[:10]], [f(10)], [base[5:15]], ValueError, r"partially overlaps"


class MyTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("params", "grads", "buffers", "error", "text"), [c[1:] for c in refusals()], ids=[c[0] for c in refusals()]
)
def test_refusal(params, grads, buffers, error, text):
    written = [
        t for t in (*params, *(buffers or [])) if isinstance(t, torch.Tensor) and not t.is_sparse and not t.is_meta
    ]
    before = [t.clone() for t in written]
    momentum = {"momentum": 0.9} if buffers else {}
    with pytest.raises(error, match=text):
        ops.sgd_(params, grads, buffers, lr=0.1, **momentum)
    assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))


def test_refuses_momentum_without_buffers():
    with pytest.raises(ValueError, match=r"sgd_: momentum is not 0, expected momentum_buffers, got None"):
        ops.sgd_([torch.ones(2)], [torch.ones(2)], lr=0.1, momentum=0.9)


def test_refuses_unknown_stats():
    with pytest.raises(ValueError, match=r'sgd_: stats expected None, "tensor" or "row", got \'column\''):
        ops.sgd_([torch.ones(2)], [torch.ones(2)], lr=0.1, stats="column")


def test_refuses_unknown_isa():
    with pytest.raises(ValueError, match=r"select_isa: expected one of .* got 'v9'"):
        ops.select_isa("v9")


def test_a_hyper_takes_only_the_numbers_that_it_knows():
    with pytest.raises(TypeError, match=r"Hyper: expected lr, momentum, .* rounding or state_dtype, got rate"):
        ops.Hyper(rate=0.1)
    with pytest.raises(TypeError, match=r"Hyper: lr expected a number, got 'much'"):
        ops.Hyper(lr="much")
    with pytest.raises(TypeError, match=r"Hyper: gauge expected a GaugeStep or None, got 3"):
        ops.Hyper(gauge=3)
    with pytest.raises(TypeError, match=r"Hyper: rounding expected \(seed, step\) or None, got 7"):
        ops.Hyper(rounding=7)
    with pytest.raises(TypeError, match=r"Hyper: state_dtype expected a position in the list of dtypes or None, got 4"):
        ops.Hyper(state_dtype=4)


def test_a_pass_knows_its_ops_and_their_state():
    step, ones = ops.Pass(), [torch.ones(2)]
    step.begin()
    with pytest.raises(ValueError, match="Pass: expected the name of an op over lists of tensors, got lion_"):
        step.add("lion_", ones, ones, None, None, ops.Hyper())
    with pytest.raises(ValueError, match="sgd_: expected 1 lists of state buffers, got 2"):
        step.add("sgd_", ones, ones, [ones, ones], None, ops.Hyper(momentum=0.9))
    with pytest.raises(ValueError, match="gather: expected at most 4 keys, got 5"):
        ops.gather(ones, {}, ("a", "b", "c", "d", "e"))


def test_refuses_a_table_of_the_wrong_size():
    step = ops.Pass()
    step.begin()
    step.add("sgd_", [torch.ones(2)], [torch.ones(2)], None, None, ops.Hyper(lr=0.1), 1)
    step.check(None)
    with pytest.raises(ValueError, match=r"Pass.run: expected a dense float64 table of 1 x 5, got"):
        step.run(torch.empty(5))


# ---- Memory that tensors share on purpose --------------------------------------------------------------------------------


def test_interleaved_slices_do_not_disturb_each_other():
    base = torch.randn(50, 2)
    exact = base.double()
    grads = [torch.randn(50), torch.randn(50)]
    ops.sgd_([base[:, 0], base[:, 1]], grads, lr=0.1)
    reference.sgd_([exact[:, 0], exact[:, 1]], [g.double() for g in grads], lr=0.1)
    torch.testing.assert_close(base.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stats", [None, "tensor"])
def test_gradient_that_is_the_weight_itself(stats):
    w = torch.randn(1000)
    v = torch.randn(1000)
    w2, v2, g = w.clone(), v.clone(), w.clone()
    a = ops.sgd_([w], [w], [v], lr=0.1, momentum=0.9, stats=stats)
    b = ops.sgd_([w2], [g], [v2], lr=0.1, momentum=0.9, stats=stats)
    assert same_bits(w, w2)
    assert same_bits(v, v2)
    assert stats is None or torch.equal(a, b)


def test_gradient_that_is_another_weight_is_read_in_list_order():
    for order in (0, 1):
        tensors = [torch.randn(2000) for _ in range(2)]
        twins = [t.double() for t in tensors]
        g = torch.randn(2000)
        grads = [g, tensors[0]] if order == 0 else [tensors[1], g]
        twin_grads = [g.double(), twins[0]] if order == 0 else [twins[1], g.double()]
        ops.sgd_(tensors, grads, lr=0.1)
        reference.sgd_(twins, twin_grads, lr=0.1)
        for a, b in zip(tensors, twins, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
