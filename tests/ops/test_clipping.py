"""Clipping by the global norm and learning rates of single parameters, as ops: against the eager reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import here, same_bits

from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Lanes, packs, blocks of 512 and of 8192, chunks of 32768, and what is left over.
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (63,), (64,), (65,), (513,), (8193,), (32768,), (32769,), (70001,), (9, 40)]
L = 3.0


def lists(dtype, shapes=SHAPES, count=1, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [
        [here(torch.randn(s, generator=make, dtype=torch.float64, device="cpu").to(dtype)) for s in shapes]
        for _ in range(count)
    ]


def laid_out(x, how):
    """The same numbers elsewhere in memory."""
    if how == "slice":
        return torch.stack([x, x], -1)[..., 0]
    if how == "off":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if how == "transposed" and x.ndim == 2:
        return x.t().contiguous().t()
    if how == "expanded":
        return x.flatten()[:1].expand(x.shape) if x.numel() else x
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_of_norms(backend, dtype):
    grads, held = lists(dtype, count=2)
    grads[3] = None
    exact = reference.grad_sq_norms([None if g is None else g.double() for g in grads], grad_scale=4.0)
    torch.testing.assert_close(ops.grad_sq_norms(grads, grad_scale=4.0), exact, rtol=1e-13, atol=0)
    held[3] = held[5] = None  # no gradients; a first one alone
    pair = {"l": L, "grad_scale": 4.0, "held_scale": 2.0}
    exact = reference.grad_sq_norms(grads, held=held, **pair)
    eps = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(ops.grad_sq_norms(grads, held=held, **pair), exact, rtol=eps, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["slice", "off", "transposed", "expanded"])
def test_squares_of_norms_of_any_layout(backend, dtype, how):
    shapes = [(1,), (37, 30), (700,), (8, 1025), (3, 0)]
    grads, held = ([laid_out(x, how) for x in xs] for xs in lists(dtype, shapes, count=2))
    for first, l in ((None, 1.0), (held, L)):
        exact = reference.grad_sq_norms(grads, held=first, l=l)
        torch.testing.assert_close(ops.grad_sq_norms(grads, held=first, l=l), exact, rtol=1e-5, atol=0)
    # Of a pair whose halves lie differently.
    grads = [g.contiguous() for g in grads]
    exact = reference.grad_sq_norms(grads, held=held, l=L)
    torch.testing.assert_close(ops.grad_sq_norms(grads, held=held, l=L), exact, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1200), max_size=5),
    scale=st.sampled_from([1.0, 0.25, 65536.0]),
    seed=st.integers(0, 99),
)
def test_a_norm_of_parts_is_the_norm_of_all(sizes, scale, seed):
    grads = lists(torch.float32, [(n,) for n in sizes], seed=seed)[0]
    norm, _ = ops.clip_coef(ops.grad_sq_norms(grads, grad_scale=scale), 1.0)
    whole = torch.cat(grads).double() if grads else torch.zeros(0, dtype=torch.float64)
    torch.testing.assert_close(norm, (whole / scale).norm(), rtol=1e-13, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("max_norm", [0, 1e-3, 2.5, 10.0, 1e30, math.inf])
@pytest.mark.parametrize(
    "squares", [[], [0.0], [9.0, 16.0], [4e300, 1.0], [math.inf, 1.0], [math.nan, 1.0], [1.0] * 600]
)
def test_coefficient_is_torchs(backend, max_norm, squares):
    sq_norms = torch.tensor(squares, dtype=torch.float64)
    norm, coef = ops.clip_coef(sq_norms, max_norm)
    expected = reference.clip_coef(sq_norms, max_norm)
    torch.testing.assert_close((norm, coef), expected, rtol=1e-15, atol=0, equal_nan=True)
    assert norm.shape == coef.shape == ()


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "maximize": True}], ids=str
)
def test_step_with_both(backend, dtype, options):
    """The same as the reference, and sums of the gradient before clipping."""
    w, g, v = lists(dtype, count=3)
    g[4] = None
    exact = [[None if x is None else x.to(torch.float64, copy=True) for x in xs] for xs in (w, g, v)]
    coef = torch.tensor(0.3, dtype=torch.float64)
    multipliers = [0.0, 1.0, 2.0, 0.5, 3.0, *[1 + 0.1 * i for i in range(len(w) - 5)]]
    rest = {"lr": 0.1, "weight_decay": 0.1, "grad_scale": 2.0, "stats": "tensor", **options}
    sums = ops.sgd_(w, g, v, clip_coef=coef, lr_multipliers=multipliers, **rest)
    expected = reference.sgd_(*exact, clip_coef=coef, lr_multipliers=multipliers, **rest)
    eps = torch.finfo(dtype).eps
    for ours, theirs in ((w, exact[0]), (v, exact[2])):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=8 * eps)
    torch.testing.assert_close(sums[:, :3], expected[:, :3], rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multipliers_are_learning_rates(backend, dtype):
    """Bit for bit; as numbers and as a tensor."""
    multipliers = [0.0, 0.3, 1.7]
    for choice in (multipliers, torch.tensor(multipliers, dtype=torch.float64), tuple(multipliers)):
        one, two = (lists(dtype, [(5,), (300,), (9, 40)], count=3) for _ in range(2))
        ops.sgd_(*one, lr=0.1, momentum=0.9, weight_decay=0.1, lr_multipliers=choice)
        for w, g, v, m in zip(*two, multipliers, strict=True):
            ops.sgd_([w], [g], [v], lr=0.1 * m, momentum=0.9, weight_decay=0.1)
        assert all(same_bits(a, b) for a, b in zip(one[0] + one[2], two[0] + two[2], strict=True))


def refusals():
    x = torch.ones(2)
    yield (
        "norm",
        lambda: ops.clip_coef(torch.ones(2, dtype=torch.float64), -1),
        ValueError,
        "clip_coef: max_norm expected a number of at least 0, got -1",
    )
    yield "nan", lambda: ops.clip_coef(torch.ones(2, dtype=torch.float64), math.nan), ValueError, "got nan"
    yield (
        "text",
        lambda: ops.clip_coef(torch.ones(2, dtype=torch.float64), "1"),
        TypeError,
        "max_norm expected a number of at least 0, got '1'",
    )
    yield (
        "huge",
        lambda: ops.clip_coef(torch.ones(2, dtype=torch.float64), 10**400),
        TypeError,
        "max_norm expected a number of at least 0, got 1000",
    )
    yield "no squares", lambda: ops.clip_coef(None, 1.0), TypeError, "clip_coef: sq_norms is NoneType; expected"
    yield (
        "squares",
        lambda: ops.clip_coef(x, 1.0),
        ValueError,
        "clip_coef: sq_norms expected dense float64, got torch.float32 on cpu",
    )
    yield (
        "strided",
        lambda: ops.clip_coef(torch.ones(4, dtype=torch.float64)[::2], 1.0),
        ValueError,
        "sq_norms expected dense float64",
    )
    yield (
        "coef",
        lambda: ops.sgd_([x], [x.clone()], lr=1.0, clip_coef=x),
        ValueError,
        r"sgd_: clip_coef expected one number of float64, got \(2,\) torch.float32 on cpu",
    )
    yield (
        "kind",
        lambda: ops.grad_sq_norms([x.long()]),
        TypeError,
        r"grad_sq_norms: grads\[0\] is torch.int64 on cpu; expected a torch.Tensor of",
    )
    yield (
        "pair",
        lambda: ops.grad_sq_norms([x], held=[torch.ones(3)], l=2),
        ValueError,
        r"grad_sq_norms: held\[0\] has shape \(3,\) but grads\[0\] has",
    )
    yield (
        "pairs",
        lambda: ops.grad_sq_norms([x], held=[], l=2),
        ValueError,
        "grad_sq_norms: held has 0 entries but grads has 1",
    )
    yield "l", lambda: ops.grad_sq_norms([x], l=0), ValueError, "l expected a number of at least 1/2, got 0"
    for wrong, text in (
        ([1.0, 2.0], "lr_multipliers expected 1 numbers, one for each parameter of the group, got 2"),
        (torch.ones(1, 1), r"got a tensor of shape \(1, 1\)"),
        (torch.tensor(1.0), r"got a tensor of shape \(\)"),
        ([-1.0], r"lr_multipliers\[0\] expected a finite number of at least 0, got -1.0"),
        ([math.nan], "at least 0, got nan"),
        (torch.tensor([math.inf]), "at least 0, got inf"),
        (["x"], r"lr_multipliers\[0\] expected a number, got 'x'"),
        ("x", "expected None, a sequence of numbers or a tensor, got str"),
        (iter([1.0]), "expected None, a sequence of numbers or a tensor, got list_iterator"),
        (torch.ones(1).long(), "expected a plain tensor of float64, float32, bfloat16 or float16, got torch.int64 on cpu"),
    ):  # fmt: skip
        yield (
            f"multipliers: {text}",
            lambda wrong=wrong: ops.sgd_([x], [x.clone()], lr=1.0, lr_multipliers=wrong),
            ValueError,
            text,
        )


@pytest.mark.parametrize(("call", "error", "text"), [c[1:] for c in refusals()], ids=[c[0] for c in refusals()])
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nothing_is_written_by_what_is_refused():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="lr_multipliers"):
        ops.sgd_([x], [torch.ones(2)], lr=1.0, lr_multipliers=[-1])
    assert x.tolist() == [1, 1]
