"""SVAG for Adam and AdamW: the step is torch's with combined gradients and the paper's numbers; what is refused."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from support.memory import same_bits
from torch import nn

import normkern
from normkern.theory import svag_adam, svag_adam_fraction, svag_steps

F64 = torch.float64
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.1}
BOTH = {
    normkern.SVAGAdam: (normkern.Adam, torch.optim.Adam),
    normkern.SVAGAdamW: (normkern.AdamW, torch.optim.AdamW),
}
SHAPES = [(3, 5), (7,), (2, 3, 4), ()]


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.linspace(-1, 1, max(1, math.prod(s)), dtype=F64).view(s).to(dtype)) for s in SHAPES]


def pair_of_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype) for p in params] for _ in "ab"]


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def paired_step(opt, params, a, b, **hold):
    give(params, a)
    opt.hold(**hold)
    give(params, b)
    opt.step()


def combined(a, b, l):
    root = math.sqrt(2 * l * l - 1)
    return [(1 + root) / 2 * x.double() + (1 - root) / 2 * y.double() for x, y in zip(a, b, strict=True)]


# ---- The step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("l", [0.9, 1.5, 4.0])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", BOTH, ids=lambda k: k.__name__)
def test_steps_are_those_of_torch_with_the_combined_gradient(kind, maximize, l, dtype):
    params = parameters(dtype)
    twins = [nn.Parameter(p.detach().double()) for p in params]
    ours = kind(params, l=l, maximize=maximize, **OPTIONS)
    numbers = {
        "lr": 0.02 / l,
        "betas": (1 - 0.1 / l**2, 1 - 0.02 / l**2),
        "eps": 1e-3 * l,
        "weight_decay": 0.1 / l if kind is normkern.SVAGAdamW else 0.1,
    }
    theirs = BOTH[kind][1](twins, maximize=maximize, **numbers)
    for t in range(5):
        a, b = pair_of_gradients(params, t)
        paired_step(ours, params, a, b)
        give(twins, combined(a, b, l))
        theirs.step()
    assert {key: ours.param_groups[0][key] for key in OPTIONS} == OPTIONS, "the user's numbers stay"
    tolerance = 1e-12 if dtype == F64 else 1e-5
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", ["pairs", "one backward"])
@pytest.mark.parametrize("kind", BOTH, ids=lambda k: k.__name__)
def test_one_is_adam_to_the_bit(kind, way):
    params = parameters()
    twins = copy.deepcopy(params)
    ours, theirs = kind(params, **OPTIONS), BOTH[kind][0](twins, **OPTIONS)
    for t in range(4):
        a, b = pair_of_gradients(params, t)
        if way == "pairs":
            paired_step(ours, params, a, b)
        else:
            give(params, a)
            ours.step()
        give(twins, a)
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        assert same_bits(p, q)
        assert all(same_bits(ours.state[p][key], theirs.state[q][key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_gradients_are_not_written():
    params = parameters()
    opt = normkern.SVAGAdamW(params, l=2, **OPTIONS)
    a, b = pair_of_gradients(params, 0)
    kept = [[x.clone() for x in of] for of in (a, b)]
    for p, x in zip(params, a, strict=True):
        p.grad = x
    opt.hold()
    for p, x in zip(params, b, strict=True):
        p.grad = x
    opt.step()
    for x, y in zip([*a, *b], [*kept[0], *kept[1]], strict=True):
        assert same_bits(x, y)


def linear_moments(l, lr, beta1, eps, curvature, start, time):
    """E x^2 of Adam with an eps that dwarfs sqrt(v): x and m are linear, and their moments follow exactly."""
    square = float(svag_adam_fraction(l))
    numbers = svag_adam(lr=lr, betas=(beta1, 0.9), eps=eps, l=l)
    beta, c = numbers.betas[0], 1 - numbers.betas[0]
    xx, xm, mm = start**2, 0.0, 0.0
    for t in range(1, round(time * square) + 1):
        rate = numbers.lr / numbers.eps / (1 - beta**t)
        mm = beta**2 * mm + 2 * beta * c * curvature * xm + c**2 * (curvature**2 * xx + square)
        xm = beta * xm + c * curvature * xx
        xx, xm = xx - 2 * rate * xm + rate**2 * mm, xm - rate * mm
    return xx


def test_weak_order():
    """On a quadratic E x^2 is the exact one, and its distance to that of the SDE falls as 1/l^2."""
    # eps is so large that v does not matter: lr/eps = 0.2.
    lr, beta1, eps, curvature, start, time, chains = 2e6, 0.8, 1e7, 1.0, 2.0, 4, 50_000
    generator, errors = torch.Generator().manual_seed(1), []
    sde = linear_moments(32, lr, beta1, eps, curvature, start, time)
    for l in (1.0, math.sqrt(2), 2.0):
        x = nn.Parameter(torch.full((chains,), start))
        opt = normkern.SVAGAdam([x], lr, l, betas=(beta1, 0.9), eps=eps)
        noise = torch.empty(chains)
        for _ in range(svag_steps(steps=time, l=svag_adam_fraction(l))):
            for half in range(2):
                x.grad = curvature * x.detach() - noise.normal_(generator=generator)
                if half == 0:
                    opt.hold()
            opt.step()
        square = x.detach().double().square()
        exact = linear_moments(l, lr, beta1, eps, curvature, start, time)
        assert abs(square.mean() - exact) < 5 * square.std() / math.sqrt(chains)
        errors.append(abs(exact - sde))
    assert errors[0] > 0.1 * sde, "there is something to converge"
    assert [x / y for x, y in itertools.pairwise(errors)] == pytest.approx([1.9, 1.9], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH, ids=lambda k: k.__name__)
def test_weak_order_where_noise_dominates(kind):
    """With v in play, E x after 30 steps of the original run: l = 1 is five times as far from l = 4 as l = 2."""
    generator, means, chains = torch.Generator().manual_seed(1), {}, 200_000
    for l in (1, 2, 4):
        x = nn.Parameter(torch.ones(chains))
        opt = kind([x], 0.1, l, betas=(0.8, 0.9), eps=0.3, weight_decay=0.0)
        for _ in range(30 * l * l):
            for half in range(2):
                x.grad = x.detach() + torch.randn(chains, generator=generator)
                if half == 0:
                    opt.hold()
            opt.step()
        means[l] = x.detach().double().mean().item()
    assert (means[1] - means[4]) / (means[2] - means[4]) == pytest.approx(5, rel=0.25), means


# ---- Noise, statistics, options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", [None, "tensor", "row"])
def test_noise_is_of_the_batch_gradient_whatever_l_is(stats):
    params = parameters()
    a, b = pair_of_gradients(params, 0)
    told = []
    for opt in (normkern.SVAGAdamW(params, l=3, stats=stats), normkern.SVAG(params, l=3, stats=stats)):
        paired_step(opt, params, a, b)
        told.append(opt.noise())
    for field in ("grad_sq_norm_unbiased", "trace_sigma", "slot_trace_sigma", "slot_grad_sq_norm_unbiased"):
        torch.testing.assert_close(getattr(told[0], field), getattr(told[1], field), rtol=1e-12, atol=1e-12)
    assert told[0].slots == told[1].slots
    assert told[0].count == 1


def test_stats_are_of_the_combined_gradient_and_of_the_kernels_rate():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = normkern.SVAGAdamW([w], lr=0.1, l=2, stats="tensor")
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])
    paired_step(opt, [w], [a], [b])
    (g,) = combined([a], [b], 2)
    assert opt.stats().grad_sq.item() == pytest.approx(g.square().sum().item(), rel=1e-6)
    assert opt.stats().effective_lr.item() == pytest.approx(0.05 / 5)


def test_clipping_is_of_the_combination():
    params = parameters()
    opt = normkern.SVAGAdamW(params, l=2, max_norm=0.1, **OPTIONS)
    twins = [nn.Parameter(p.detach().double()) for p in params]
    theirs = torch.optim.AdamW(twins, **svag_adam(**OPTIONS, l=2)._asdict())
    for t in range(3):
        a, b = pair_of_gradients(params, t)
        paired_step(opt, params, a, b)
        give(twins, combined(a, b, 2))
        norm = nn.utils.clip_grad_norm_(twins, 0.1)
        theirs.step()
        assert opt.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=1e-4, atol=1e-5)


def test_closures_and_groups_with_their_own_l():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = normkern.SVAGAdamW([{"params": [w]}, {"params": [v], "l": 4}], lr=0.4, l=2, weight_decay=0.0)

    def closure(factor):
        def compute():
            opt.zero_grad()
            loss = factor * (w + v).sum()
            loss.backward()
            return loss

        return compute

    losses = opt.step(closure(1.0), closure(1.0))
    assert [x.item() for x in losses] == [4.0, 4.0]
    assert w.tolist() == pytest.approx([0.8, 0.8])  # lr/2
    assert v.tolist() == pytest.approx([0.9, 0.9])  # lr/4


@pytest.mark.parametrize("unscale", [False, True])
def test_scaler_unscales_both_sets(unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    w = nn.Parameter(torch.zeros(2))
    opt = normkern.SVAGAdam([w], lr=1.0, l=2, eps=1.0, stats="tensor")
    scaler.scale((w * 1.0).sum()).backward()
    opt.hold(scale=scaler.get_scale() if unscale else None)
    scaler.scale((w * 3.0).sum()).backward()
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    (g,) = combined([torch.tensor(1.0)], [torch.tensor(3.0)], 2)
    assert w.tolist() == pytest.approx([-0.5 * g.item() / (abs(g.item()) + 2)] * 2, rel=1e-5)
    assert opt.noise().trace_sigma.item() == pytest.approx(4.0)
    assert opt.stats().grad_sq.item() == pytest.approx(2 * g.item() ** 2, rel=1e-5)


def test_what_no_kernel_takes_is_combined_by_torch():
    odd, plain = nn.Parameter(torch.ones(4, dtype=torch.complex64)), nn.Parameter(torch.ones(4))
    a, b = torch.tensor([1.0, 0, 2, 0]), torch.tensor([3.0, 0, 2, 1])
    opt = normkern.SVAGAdamW([odd, plain], lr=0.1, l=2)
    paired_step(opt, [odd, plain], [a.to(odd.dtype), a], [b.to(odd.dtype), b])
    assert odd.detach().real.tolist() == pytest.approx(plain.tolist())
    noise = opt.noise()
    assert noise.slot_trace_sigma.tolist() == pytest.approx([2.5, 2.5])


def test_corrected_decay_and_master_weights_go_with_it():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = normkern.SVAGAdamW([p], lr=0.1, l=2, weight_decay=0.5, decay="corrected", master_weights=True)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    zero = torch.zeros(4, dtype=torch.bfloat16)
    paired_step(opt, [p], [zero], [zero])
    assert opt.state[p]["master_weight"].tolist() == pytest.approx([1 - 0.05 / 2 * 0.25 / 2] * 4, abs=1e-6)


def test_checkpoints_and_copies():
    params = parameters()
    opt = normkern.SVAGAdamW(params, l=2, noise_decay=0.5, **OPTIONS)
    a, b = pair_of_gradients(params, 0)
    paired_step(opt, params, a, b)
    fresh = parameters()
    other = normkern.SVAGAdamW(fresh, l=3, **OPTIONS)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["l"] == 2
    assert same_bits(other.state[fresh[0]]["exp_avg_sq"], opt.state[params[0]]["exp_avg_sq"])
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        of_twin = twin.param_groups[0]["params"]
        paired_step(twin, of_twin, a, b)
        assert twin.noise().count == 1
        assert twin._pairs.noise.decay == 0.5
    torch.optim.AdamW(parameters()).load_state_dict(opt.state_dict())


def test_parameter_without_gradients_is_skipped():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = normkern.SVAGAdamW([w, v], lr=0.1, l=2)
    paired_step(opt, [w, v], [torch.ones(2), None], [torch.zeros(2), None])
    assert v.tolist() == [1, 1]
    assert v not in opt.state
    assert opt.noise().slot_trace_sigma.isnan().tolist() == [False, True]


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"l": 0.7}, "SVAGAdamW: l expected a finite number >= sqrt(1/2), got 0.7"),
        ({"l": "2"}, "SVAGAdamW: l expected a finite number >= sqrt(1/2), got '2'"),
        ({"amsgrad": True}, "SVAGAdamW: amsgrad expected False with SVAG, got True"),
        ({"differentiable": True}, "SVAGAdamW: differentiable expected False with SVAG, got True"),
        ({"noise_decay": 1.0}, "SVAGAdamW: noise_decay expected a number of at least 0 and less than 1, got 1.0"),
        ({"decay": "coupled"}, 'AdamW: decay expected "decoupled" or "corrected"'),
    ],
)
def test_constructor_refuses(options, sentence):
    with pytest.raises(ValueError) as caught:
        normkern.SVAGAdamW(parameters(), **options)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"l": 0.5}, "l expected a finite number >= sqrt(1/2), got 0.5"),
        ({"amsgrad": True}, "amsgrad expected False with SVAG, got True"),
        ({"l": 0.8, "betas": (0.0, 0.9)}, "betas[0] expected 1 - (1 - beta)/l^2 in [0, 1), got -0.56"),
        ({"betas": 0.9}, "betas expected a pair of numbers, got 0.9"),
        ({"lr": -1.0}, "lr expected a finite number >= 0, got -1.0"),
    ],
)
def test_step_refuses_what_a_group_has_become(changes, sentence):
    params = parameters()
    opt = normkern.SVAGAdamW(params, l=2)
    opt.param_groups[0].update(changes)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError) as caught:
        paired_step(opt, params, *pair_of_gradients(params, 0))
    assert str(caught.value).startswith(f"SVAGAdamW.step: param_groups[0]: {sentence}")
    assert all(same_bits(p.detach(), q) for p, q in zip(params, before, strict=True))
    assert not opt.state


def test_step_refuses_wrong_pairs():
    w = nn.Parameter(torch.ones(3))
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    cases = [
        (w, torch.ones(3).to_sparse(), torch.ones(3), RuntimeError, "does not support sparse gradients, got held[0]"),
        (
            half,
            half.detach(),
            half.detach().clone(),
            ValueError,
            "held[0] expected float32, bfloat16 or float64 at l = 2",
        ),
    ]
    for p, a, b, kind, sentence in cases:
        opt = normkern.SVAGAdam([p], l=2)
        with pytest.raises(kind) as caught:
            paired_step(opt, [p], [a], [b])
        assert str(caught.value).startswith("SVAGAdam.step: param_groups[0]: ")
        assert sentence in str(caught.value)
        assert p.tolist() == [1, 1, 1]
        assert not opt.state
    opt = normkern.SVAGAdam([w], l=2)
    memory = torch.ones(3)
    w.grad = memory
    opt.hold()
    w.grad = memory
    with pytest.raises(RuntimeError, match=r"share memory, .*; expected hold\(copy=True\)"):
        opt.step()
    opt.release()
    w.grad = torch.ones(3)
    opt.hold()
    opt._pairs.held.grads[id(w)] = torch.ones(2)
    w.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"held\[0\] has shape \(2,\) but params\[0\] has shape \(3,\)"):
        opt.step()


def test_order_of_calls_is_kept():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SVAGAdamW([w], l=2)
    w.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"SVAGAdamW.step: param_groups\[0\]: l is 2 but nothing is held"):
        opt.step()
    opt.hold()
    with pytest.raises(RuntimeError, match=r"params\[0\] has a held gradient but no new one; expected both or neither"):
        opt.step()
    opt.hold()
    with pytest.raises(RuntimeError, match=r"SVAGAdamW.step: hold\(\) was called twice"):
        opt.step()
    with pytest.raises(RuntimeError, match=r"SVAGAdamW.noise: expected a step from two gradients before it"):
        opt.noise()
