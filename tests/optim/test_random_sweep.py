"""Random lists of tensors, options and gradients, step after step: the reference's numbers, everywhere the same bits."""

import copy
import random

import pytest
import torch
from support.memory import same_bits
from torch import nn

import normkern
from normkern import ops, reference

pytestmark = pytest.mark.slow

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
STEPS = 4
CODE = {None: 0, "tensor": 1, "row": 2}


def random_shape(rng):
    kind = rng.random()
    if kind < 0.1:
        return (rng.choice([ops.CHUNK - 1, ops.CHUNK, ops.CHUNK + 1, 2 * ops.CHUNK + 5, 3 * ops.CHUNK]),)
    if kind < 0.2:
        return rng.choice(
            [(1, ops.CHUNK + 9), (3, ops.CHUNK // 2 + 7), (2, 2 * ops.CHUNK), (700, 60), (40_000, 1), (20, 4681)]
        )
    return tuple(
        rng.choice([1, 1, 2, 3, 4, 7, 8, 9, 17]) if rng.random() > 0.02 else 0 for _ in range(rng.randrange(5))
    )


def laid_out(x, rng):
    """The same values somewhere else: permuted, sliced, out of alignment, with NaN between and around them."""
    kind = rng.choice(["plain", "plain", "shifted", "permuted", "every second", "middle"])
    if kind == "shifted" or x.ndim == 0:
        room = torch.full((x.numel() + 20,), torch.nan, dtype=x.dtype)
        return room[(at := rng.randrange(20)) : at + x.numel()].view(x.shape).copy_(x)
    if kind == "permuted":
        dims = rng.sample(range(x.ndim), x.ndim)
        return x.permute(dims).contiguous().permute([dims.index(d) for d in range(x.ndim)])
    if kind == "every second":
        d = rng.randrange(x.ndim)
        room = torch.full([2 * n if i == d else n for i, n in enumerate(x.shape)], torch.nan, dtype=x.dtype)
        part = room[tuple(slice(None, None, 2) if i == d else slice(None) for i in range(x.ndim))]
        return part.copy_(x)
    if kind == "middle":
        room = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
        return room[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)
    return x.clone()


def random_values(shape, dtype, make, rng):
    x = torch.randn(shape, generator=make, dtype=torch.float64) * 2.0 ** rng.randrange(-4, 3)
    if rng.random() < 0.2:
        x = x * (torch.rand(shape, generator=make, dtype=torch.float64) < 0.5)  # zeros
    return x.to(dtype)


def random_gradient(p, make, rng):
    """A new tensor, perhaps expanded, or nothing."""
    kind = rng.random()
    if kind < 0.12:
        return None
    if kind < 0.25:
        shape = [n if rng.random() < 0.5 else 1 for n in p.shape]
        return random_values(shape, p.dtype, make, rng).expand(p.shape)
    return laid_out(random_values(p.shape, p.dtype, make, rng), rng)


def random_options(rng):
    options = {"lr": rng.choice([0.0, 1e-3, 0.1, 1.0])}
    if rng.random() < 0.7:
        options["momentum"] = rng.choice([0.5, 0.9, 0.99, 1.0])
        if rng.random() < 0.4:
            options["nesterov"] = True
        elif rng.random() < 0.5:
            options["dampening"] = rng.choice([0.1, 0.5, 1.0])
    if rng.random() < 0.6:
        options["weight_decay"] = rng.choice([1e-4, 0.1])
    if rng.random() < 0.3:
        options["maximize"] = True
    return options


def life(seed):
    """A few random steps of a random optimizer. Yields, at each, all that there is to see."""
    rng, make = random.Random(seed), torch.Generator().manual_seed(seed)
    params, groups = [], []
    for _ in range(rng.randrange(1, 4)):
        shapes = [random_shape(rng) for _ in range(rng.choice([1, 3, 12]))]
        dtype = rng.choice(DTYPES)
        own = [nn.Parameter(laid_out(random_values(s, dtype, make, rng), rng)) for s in shapes]
        groups.append({"params": own, "stats": rng.choice([None, "tensor", "row"]), **random_options(rng)})
        params += own
    opt = normkern.SGD(groups, lr=0.1, fused=True)
    for _ in range(STEPS):
        if rng.random() < 0.3:
            group = rng.choice(opt.param_groups)
            group.update(lr=rng.choice([0.01, 0.5]), weight_decay=rng.choice([0.0, 0.03]))
        for p in params:
            p.grad = random_gradient(p, make, rng)
        scale = rng.choice([None, None, 3.0, 1024.0])
        if scale:
            opt.grad_scale, opt.found_inf = torch.tensor([scale]), torch.zeros(1)
        else:
            opt.grad_scale = opt.found_inf = None
        before = [p.detach().clone().double() for p in params], [buffer_of(opt, p) for p in params]
        opt.step()
        measured = any(ops.slot_count(p, CODE[group["stats"]]) for group in opt.param_groups for p in group["params"])
        yield opt, params, scale or 1.0, before, opt.stats()._table if measured else None


def buffer_of(opt, p):
    v = opt.state.get(p, {}).get("momentum_buffer")
    return None if v is None else v.clone().double()


def seen(seed):
    """The bits of every step, copied."""
    for opt, params, _, _, table in life(seed):
        buffers = [opt.state.get(p, {}).get("momentum_buffer") for p in params]
        yield [copy.deepcopy(x.detach().contiguous()) for x in (*params, *buffers, table) if x is not None]


def assert_near(got, exact, size, dtype, roundings):
    """Within so many roundings of intermediate results as large as `size`, and one of the storage type."""
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    stored = torch.finfo(dtype)
    allowed = roundings * arithmetic.eps * size + stored.eps * exact.abs() + stored.smallest_normal * stored.eps
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("block", range(20))
def test_against_the_reference(isa, block):
    """Each step from where the last one left: weights, buffers and sums are the float64 reference's, rounded."""
    for seed in range(block * 20, block * 20 + 20):
        for opt, _, scale, (old, old_buffers), table in life(seed):
            at, slot = 0, 0
            for group in opt.param_groups:
                own = {k: group[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
                for p in group["params"]:
                    w, v, grad = old[at].clone(), old_buffers[at], p.grad
                    buffers = [None if v is None else v.clone()]
                    g = None if grad is None else grad.double()
                    reference.sgd_([w], [g], buffers, grad_scale=scale, **own)
                    if g is None:
                        assert same_bits(p, old[at].to(p.dtype)), "stepped without a gradient"
                    else:
                        d = g.abs() / scale + own["weight_decay"] * old[at].abs()
                        size_v = d if v is None else own["momentum"] * v.abs() + d
                        size_u = d + own["momentum"] * size_v if own["nesterov"] else size_v if own["momentum"] else d
                        assert_near(p.detach(), w, old[at].abs() + own["lr"] * size_u, p.dtype, 8)
                        if own["momentum"]:
                            assert_near(opt.state[p]["momentum_buffer"], buffers[0], size_v, p.dtype, 8)
                    if group["stats"]:
                        count = ops.slot_count(p, CODE[group["stats"]])
                        rows = table[slot : slot + count]
                        slot += count
                        if g is None:
                            assert rows.isnan().all()
                        else:
                            exact = reference.step_sums(old[at], g / scale, p.detach(), group["stats"])
                            size = reference.step_sums(
                                old[at].abs(),
                                g.abs() / scale,
                                old[at].abs() + p.detach().abs().double(),
                                group["stats"],
                            )
                            assert ((rows - exact).abs() <= 1e-12 * (size + exact.abs())).all()
                    at += 1
            assert table is None or slot == len(table)


@pytest.mark.parametrize("block", range(20))
def test_same_bits_everywhere(block):
    """The same life under every instruction-set level with FMA hardware, with 1, 2 and 5 threads: bit for bit."""
    chosen = ops.isa()
    try:
        for seed in range(block * 20, block * 20 + 20):
            expected = None
            for isa in WITH_FMA or [chosen]:
                ops.select_isa(isa)
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    got = list(seen(seed))
                    expected = expected or got
                    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
                        assert all(same_bits(x, y) for x, y in zip(a, b, strict=True)), (seed, isa, threads, step)
    finally:
        ops.select_isa(chosen)
