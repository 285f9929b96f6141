"""SVAG: the step from two gradients is the paper's, the order of calls is kept, and the noise is what the pairs say."""

import copy
import itertools
import logging
import math
import pickle

import pytest
import torch
from support.memory import same_bits
from torch import nn

import normkern
from normkern import reference

H = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
VARIANTS = {
    "plain": {"lr": 0.1},
    "momentum": H,
    "nesterov": {**H, "nesterov": True},
    "dampening": {**H, "dampening": 0.3},
    "maximize": {**H, "maximize": True},
}


def shapes():
    return [(3, 5), (7,), (2, 3, 4), ()]


def pair_of_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params] for _ in "ab"]


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def paired_step(opt, params, a, b):
    give(params, a)
    opt.hold()
    assert all(p.grad is None for p in params)
    give(params, b)
    opt.step()


# ---- The step ----------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scaling", ["fixed", "continuous"])
@pytest.mark.parametrize("l", [1, 1.5, 4.0, 33])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_torch_with_the_combined_gradient(variant, l, scaling, dtype):
    """torch.optim.SGD on c1 g1 + c2 g2 with lr/l, or with lr/l^2 and the scaled momentum."""
    options = VARIANTS[variant]
    params = [nn.Parameter(torch.linspace(-1, 1, max(1, math.prod(s)), dtype=dtype).view(s)) for s in shapes()]
    twins = [nn.Parameter(p.detach().double().clone()) for p in params]
    if scaling == "continuous":
        momentum = 1 - (1 - options.get("momentum", 0)) / l
        theirs = torch.optim.SGD(twins, **{**options, "lr": options["lr"] / l**2, "momentum": momentum}, foreach=False)
        if options.get("nesterov"):
            assert momentum > 0
    else:
        theirs = torch.optim.SGD(twins, **{**options, "lr": options["lr"] / l}, foreach=False)
    ours = normkern.SVAG(params, l=l, momentum_scaling=scaling, **options)
    c1, c2 = (1 + math.sqrt(2 * l - 1)) / 2, (1 - math.sqrt(2 * l - 1)) / 2
    for t in range(5):
        a, b = pair_of_gradients(params, t)
        paired_step(ours, params, a, b)
        give(twins, [c1 * x.double() + c2 * y.double() for x, y in zip(a, b, strict=True)])
        theirs.step()
    assert ours.param_groups[0]["lr"] == options["lr"]
    for p, q in zip(params, twins, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6 * (1 + math.sqrt(l))
        torch.testing.assert_close(p.double(), q.double(), rtol=tolerance, atol=tolerance)


def test_half_is_one_step_with_both_batches_and_twice_the_rate():
    """l = 1/2: the mean of both gradients, 2 lr."""
    params, twins = ([nn.Parameter(torch.ones(5, dtype=torch.float64))] for _ in "ab")
    a, b = pair_of_gradients(params, 0)
    paired_step(normkern.SVAG(params, 0.1, 0.5), params, a, b)
    give(twins, [(a[0] + b[0]) / 2])
    torch.optim.SGD(twins, lr=0.2).step()
    torch.testing.assert_close(params[0], twins[0], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("way", ["no hold", "held only", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_is_sgd_to_the_bit(variant, way):
    """T7.6: l = 1 needs one gradient; of two the first is used."""
    params, twins = ([nn.Parameter(torch.linspace(-1, 1, 1003))] for _ in "ab")
    ours, theirs = normkern.SVAG(params, **VARIANTS[variant]), normkern.SGD(twins, stats="tensor", **VARIANTS[variant])
    for t in range(3):
        a, b = pair_of_gradients(params, t)
        give(params, a)
        if way != "no hold":
            ours.hold()
        if way == "both":
            give(params, b)
        ours.step()
        give(twins, a)
        theirs.step()
        assert same_bits(params[0], twins[0])
    ours.param_groups[0]["stats"] = "tensor"
    torch.testing.assert_close(ours.stats().update_sq, theirs.stats().update_sq, rtol=0, atol=0)


def test_halves_are_two_loaders():
    """T7.6: one loader of 2B, split, gives the steps of two loaders of B over the same samples, to the bit."""
    data = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    batches = data.split(8)
    firsts, seconds = [b[:4] for b in batches], [b[4:] for b in batches]
    results = []
    for pairs in (map(normkern.halves, batches), zip(firsts, seconds, strict=True)):
        w = nn.Parameter(torch.linspace(-1, 1, 5))
        opt = normkern.SVAG([w], lr=0.1, l=3, momentum=0.9)
        for pair in pairs:
            opt.zero_grad()
            (pair[0] @ w).square().mean().backward()
            opt.hold()
            (pair[1] @ w).square().mean().backward()
            opt.step()
        results.append(w.detach())
    assert same_bits(*results)
    assert not torch.equal(results[0], torch.linspace(-1, 1, 5))


def test_one_steps_what_the_first_batch_reached():
    """l = 1: a parameter with only a second gradient has none of the first batch, and rests."""
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = normkern.SVAG([x, y], lr=1.0)
    x.grad = torch.ones(2)
    opt.hold()
    x.grad = y.grad = torch.full((2,), 5.0)
    opt.step()
    assert x.tolist() == [0, 0]
    assert y.tolist() == [1, 1]


def test_covariance_of_the_combination():
    """T7.5: over all pairs of batches of a linear regression the combination has the mean gradient and l Sigma."""
    torch.manual_seed(0)
    x, y, w = torch.randn(6, 3).double(), torch.randn(6).double(), torch.randn(3).double()
    per_sample = (x @ w - y)[:, None] * x
    mean, l = per_sample.mean(0), 3.5
    sigma = (per_sample - mean).T @ (per_sample - mean) / 6
    combined = []
    for i, j in itertools.product(range(6), repeat=2):
        a, b = [per_sample[i].clone()], [per_sample[j].clone()]
        normkern.svag_combine_(a, b, l)
        combined.append(a[0])
    u = torch.stack(combined)
    torch.testing.assert_close(u.mean(0), mean)
    torch.testing.assert_close((u - mean).T @ (u - mean) / 36, l * sigma)


def test_weak_order():
    """T7.1: on a quadratic with 4 million independent chains E x^2 is the exact one, and its distance to that of the
    stochastic differential equation falls as 1/l."""
    lr, curvature, time, start, chains = 0.8, 1.0, 4.0, 2.0, 4_000_000
    generator = torch.Generator().manual_seed(1)
    sde = start**2 * math.exp(-2 * curvature * time) + lr * curvature / 2 * (1 - math.exp(-2 * curvature * time))
    errors = []
    for l in (1, 2, 4, 8):
        x = nn.Parameter(torch.full((chains,), start))
        opt = normkern.SVAG([x], lr, l)
        steps, noise = round(l * time / lr), torch.empty(chains)
        for _ in range(steps):
            for half in range(2):
                x.grad = curvature * (x.detach() - noise.normal_(generator=generator))
                if half == 0:
                    opt.hold()
            opt.step()
        square = x.detach().double().square()
        a = 1 - curvature * lr / l
        exact = a ** (2 * steps) * start**2 + (lr * curvature) ** 2 / l * (1 - a ** (2 * steps)) / (1 - a * a)
        assert abs(square.mean() - exact) < 5 * square.std() / math.sqrt(chains)
        errors.append(abs(float(square.mean()) - sde))
    assert errors[0] == pytest.approx(0.266, abs=0.01)
    ratios = [x / y for x, y in itertools.pairwise(errors)]
    assert all(1.8 < r < 2.9 for r in ratios), errors


def test_equilibrium_of_normalised_weights():
    """T7.4: scale-invariant weights with weight decay settle where (2/lr - wd/l) wd |w|^2 = N + G/l."""
    torch.manual_seed(2)
    dim, chains, lr, decay = 16, 1000, 0.5, 0.1
    for l in (1, 2, 8):
        w = nn.Parameter(torch.nn.functional.normalize(torch.randn(chains, dim, dtype=torch.float64), dim=1))
        opt = normkern.SVAG([w], lr, l, weight_decay=decay)
        target, sums = torch.zeros(dim, dtype=torch.float64), []
        target[0] = 1.0
        steps = round(3 * l / (lr * decay))
        for t in range(2 * steps):
            v, norm = w.detach() / w.detach().norm(dim=1, keepdim=True), w.detach().norm(dim=1, keepdim=True)
            signal = -0.5 * (target - (v @ target)[:, None] * v) / norm
            for half in range(2):
                z = torch.randn(chains, dim, dtype=torch.float64)
                w.grad = signal + (z - (z * v).sum(1, keepdim=True) * v) / norm / 4
                if half == 0:
                    opt.hold()
            if t >= steps:
                n = ((dim - 1) / 16 / norm.square()).mean()
                sums.append((norm.square().mean(), signal.square().sum(1).mean(), n))
            opt.step()
        r, g, n = (float(torch.stack(x).mean()) for x in zip(*sums, strict=True))
        left, right = (2 / lr - decay / l) * decay * r, n + g / l
        assert left == pytest.approx(right, rel=0.01), (l, left, right)


# ---- What lies around it ---------------------------------------------------------------------------------------------


def test_hold_takes_by_reference_and_zero_grad_leaves_it():
    """Accumulation before and after; the held tensors are the very gradients."""
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SVAG([w], lr=1.0, l=5)
    for x in (1.0, 2.0):
        (w * x).sum().backward()
    held = w.grad
    opt.hold()
    assert opt._pairs.held.grads[id(w)] is held
    opt.zero_grad()
    for x in (0.5, 0.5):
        (w * x).sum().backward()
    opt.step()
    torch.testing.assert_close(w.detach(), 1 - (2.0 + 1.5 * 2.0) / 5 * torch.ones(3))
    assert torch.equal(held, torch.full((3,), 3.0))


def test_hold_copies_if_asked():
    w = nn.Parameter(torch.zeros(2))
    opt = normkern.SVAG([w], lr=1.0, l=5)
    memory = torch.ones(2)
    w.grad = memory
    opt.hold(copy=True)
    memory.fill_(3.0)
    w.grad = memory
    opt.step()  # 2 + 1.5 (1 - 3) = -1
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.2))


def test_closures_do_it_all():
    """Both losses come back; one closure goes with what is held, or with l = 1."""
    w = nn.Parameter(torch.tensor([1.0]))
    opt = normkern.SVAG([w], lr=0.4, l=5)

    def closure(x):
        def run():
            opt.zero_grad()
            loss = (w * x).sum()
            loss.backward()
            return loss.detach()

        return run

    losses = opt.step(closure(1.0), closure(3.0))
    assert [float(x) for x in losses] == [1.0, 3.0]
    torch.testing.assert_close(w.detach(), torch.tensor([1.08]))
    closure(1.0)()
    opt.hold()
    assert float(opt.step(closure(3.0))) == pytest.approx(3.24)
    torch.testing.assert_close(w.detach(), torch.tensor([1.16]))
    opt.param_groups[0]["l"] = 1
    opt.step(closure(1.0))
    torch.testing.assert_close(w.detach(), torch.tensor([0.76]))


def test_groups_have_their_own_l_which_may_change():
    x, y = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = normkern.SVAG([{"params": [x]}, {"params": [y], "l": 1}], lr=1.0, l=5)
    paired_step(opt, [x, y], [torch.tensor([1.0])] * 2, [torch.tensor([3.0])] * 2)
    assert [x.item(), y.item()] == pytest.approx([0.2, -1.0])
    opt.param_groups[0]["l"] = 0.5
    paired_step(opt, [x, y], [torch.tensor([1.0])] * 2, [torch.tensor([3.0])] * 2)
    assert [x.item(), y.item()] == pytest.approx([0.2 - 4.0, -2.0])


def test_scheduler_sees_the_users_rate():
    w = nn.Parameter(torch.zeros(1))
    opt = normkern.SVAG([w], lr=1.0, l=2)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    paired_step(opt, [w], [torch.ones(1)], [torch.ones(1)])
    schedule.step()
    paired_step(opt, [w], [torch.ones(1)], [torch.ones(1)])
    assert w.item() == pytest.approx(-0.5 - 0.25)


def test_stats_speak_of_the_combined_gradient():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = normkern.SVAG([("w", w)], lr=0.5, l=5, stats="tensor")
    paired_step(opt, [w], [torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 0.0])])
    stats = opt.stats()
    assert stats.names == ["w"]
    assert stats.grad_sq.tolist() == pytest.approx([1.0])  # 2 + 1.5 * -2
    assert stats.weight_grad_dot.tolist() == pytest.approx([-3.0])
    assert stats.effective_lr.tolist() == pytest.approx([0.1 / 25])


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_what_no_kernel_takes_is_combined_by_torch(kind):
    """The rest of the list runs on the kernel; noise speaks of both."""
    dtype = torch.complex64 if kind == "complex" else torch.float32
    odd, plain = nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(4))
    a, b = torch.tensor([1.0, 0, 2, 0]), torch.tensor([3.0, 0, 2, 0])
    make = {"sparse": lambda x: x.to_sparse(), "complex": lambda x: x.to(dtype)}.get(kind, lambda x: x)
    opt = normkern.SVAG([odd, plain], lr=1.0, l=5)
    odd.grad, plain.grad = make(a), a.clone()
    opt.hold()
    odd.grad, plain.grad = make(b), b.clone()
    opt.step()
    assert odd.detach().to_dense().real.tolist() == pytest.approx(plain.tolist())
    noise = opt.noise()
    assert noise.slot_trace_sigma.tolist() == pytest.approx([2.0, 2.0])
    assert noise.slot_grad_sq_norm_unbiased.tolist() == pytest.approx([7.0, 7.0])


def test_pairs_stay_on_the_kernel(caplog):
    """No parameter is left to torch's loop: not at the first step, not when its first pair comes late."""
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=2, momentum=0.9)
    with caplog.at_level(logging.DEBUG, logger="normkern"):
        paired_step(opt, params, [torch.ones(2), None], [torch.ones(2), None])
        for _ in range(2):
            paired_step(opt, params, [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)])
    assert not caplog.records


def test_scaled_pairs_that_torch_combines():
    """Sparse gradients are unscaled too, each by its own scale."""
    w = nn.Parameter(torch.zeros(3))
    opt = normkern.SVAG([w], lr=1.0, l=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    w.grad = torch.full((3,), 8.0).to_sparse()
    opt.hold(scale=8.0)
    w.grad = torch.full((3,), 12.0).to_sparse()
    scaler.step(opt)
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.2))
    assert opt.noise().trace_sigma.item() == pytest.approx(6.0)


def test_checkpoints_and_copies():
    """l and the scaling are in the checkpoint; one of plain SGD keeps the constructor's; copies go their own way."""
    params = [nn.Parameter(torch.ones(3))]
    opt = normkern.SVAG(params, l=4, momentum_scaling="continuous", **H)
    paired_step(opt, params, [torch.ones(3)], [torch.zeros(3)])
    other = normkern.SVAG([nn.Parameter(torch.ones(3))], lr=1.0)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["l"] == 4
    assert other.param_groups[0]["momentum_scaling"] == "continuous"
    plain = normkern.SGD([nn.Parameter(torch.ones(3))], **H)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["l"] == 4
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (w,) = twin.param_groups[0]["params"]
        paired_step(twin, [w], [torch.ones(3)], [torch.zeros(3)])
        assert twin.noise().count == 1
    torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1.0).load_state_dict(opt.state_dict())


# ---- GradScaler --------------------------------------------------------------------------------------------------------


def scaled_step(opt, w, scaler, a, b, unscale=False):
    opt.zero_grad()
    scaler.scale((w * a).sum()).backward()
    opt.hold(scale=scaler.get_scale() if unscale else None)
    scaler.scale((w * b).sum()).backward()
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
def test_scaler_unscales_both_sets(unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    w = nn.Parameter(torch.zeros(2))
    opt = normkern.SVAG([w], lr=1.0, l=5)
    scaled_step(opt, w, scaler, torch.tensor(1.0), torch.tensor(3.0), unscale)
    assert w.tolist() == pytest.approx([0.2, 0.2])
    assert opt.noise().trace_sigma.item() == pytest.approx(4.0)


@pytest.mark.parametrize("which", ["held", "new", "both"])
def test_scaler_skips_and_backs_off(which):
    """An overflow in either set: no step, a smaller scale, nothing held."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    w = nn.Parameter(torch.zeros(2))
    opt = normkern.SVAG([w], lr=1.0, l=5, momentum=0.9)
    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    scaled_step(opt, w, scaler, good if which == "new" else bad, good if which == "held" else bad)
    assert w.tolist() == [0, 0]
    assert scaler.get_scale() == 512.0
    assert not opt.state
    scaled_step(opt, w, scaler, good, good)
    assert w.tolist() == pytest.approx([-0.2, -0.2])


def test_unscale_without_a_scale_is_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    w = nn.Parameter(torch.zeros(2))
    opt = normkern.SVAG([w], lr=1.0, l=5)
    scaler.scale((w * 1).sum()).backward()
    opt.hold()
    scaler.scale((w * 1).sum()).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"not the held gradients; expected hold\(scale=scaler.get_scale\(\)\)"):
        scaler.step(opt)
    assert w.tolist() == [0, 0]


# ---- Noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_what_the_pairs_say():
    """Per slot and in all: averages of <g1,g2> and |g1-g2|^2/2 with weights decay^(T-t), normalised."""
    params = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    opt = normkern.SVAG(params, lr=0.0, l=3, stats="row", noise_decay=0.5)
    signal, noise, weights = [], [], [0.25, 0.5, 1.0]
    for t in range(3):
        a, b = pair_of_gradients(params, t)
        paired_step(opt, params, a, b)
        sums = reference.pair_sums(a, b, "row")
        signal.append(sums[:, 0])
        noise.append(sums[:, 1] / 2)
    w = torch.tensor(weights, dtype=torch.float64)[:, None] / sum(weights)
    signal, noise = (torch.stack(signal) * w).sum(0), (torch.stack(noise) * w).sum(0)
    told = opt.noise()
    torch.testing.assert_close(told.slot_grad_sq_norm_unbiased, signal)
    torch.testing.assert_close(told.slot_trace_sigma, noise)
    torch.testing.assert_close(told.slot_nsr_batch, noise / signal)
    torch.testing.assert_close(told.grad_sq_norm_unbiased, signal.sum())
    torch.testing.assert_close(told.trace_sigma, noise.sum())
    torch.testing.assert_close(told.nsr_batch, noise.sum() / signal.sum())
    assert told.slots == {"0.0": slice(0, 2), "0.1": slice(2, 3)}
    assert told.count == 3


def test_noise_of_steps_with_missing_pairs():
    """A parameter without gradients has no noise, and the total does not see it."""
    x, y = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = normkern.SVAG([x, y], lr=0.1, l=3)
    paired_step(opt, [x, y], [torch.tensor([1.0]), None], [torch.tensor([3.0]), None])
    told = opt.noise()
    assert told.trace_sigma.item() == 2.0
    assert told.slot_trace_sigma[0].item() == 2.0
    assert math.isnan(told.slot_trace_sigma[1])


def test_noise_of_a_gradient_that_is_no_number():
    """NaN in both gradients is not taken for a missing pair."""
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=3)
    broken = [torch.tensor([math.nan, 1.0]), torch.ones(3)]
    paired_step(opt, params, broken, broken)
    assert math.isnan(opt.noise().trace_sigma)


def test_noise_begins_anew_with_other_parameters():
    x, y = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = normkern.SVAG([x], lr=0.1, l=3)
    paired_step(opt, [x], [torch.ones(1)], [torch.ones(1)])
    opt.add_param_group({"params": [y], "l": 2})
    paired_step(opt, [x, y], [torch.ones(1)] * 2, [torch.ones(1)] * 2)
    assert opt.noise().count == 1
    assert opt.noise().names == ["0.0", "1.0"]


# ---- Refusals: a sentence, and nothing changed -----------------------------------------------------------------------


def untouched(opt, params):
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(opt.state_dict())

    def check():
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert str(opt.state_dict()) == str(state)

    return check


def two():
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


def test_refuses_a_step_without_hold():
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=2)
    check = untouched(opt, params)
    give(params, [torch.ones(2), torch.ones(3)])
    with pytest.raises(
        RuntimeError, match=r"SVAG.step: param_groups\[0\]: l is 2 but nothing is held; expected hold\(\)"
    ):
        opt.step()
    with pytest.raises(RuntimeError, match="nothing is held"):
        opt.step(lambda: pytest.fail("the closure ran"))
    check()


def pair(opt, model, micro):
    for half in range(2):
        for _ in range(micro):
            model(torch.randn(4, 3)).square().mean().backward()
        if half == 0:
            opt.hold()
    opt.step()


@pytest.mark.parametrize("micro", [1, 3])
def test_refuses_to_hold_what_was_added_to_the_second_gradient_of_the_last_step(micro):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = normkern.SVAG(model.parameters(), lr=0.1, l=2)
    pair(opt, model, micro)
    check = untouched(opt, list(model.parameters()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"SVAG.hold: .* expected zero_grad\(\) after each step"):
            pair(opt, model, micro)
        check()
        opt.zero_grad()
        pair(opt, model, micro)
        check = untouched(opt, list(model.parameters()))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("by", ["optimizer", "model", "in place", "hand"])
def test_every_way_to_clear_the_second_gradient_is_one(by, micro):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = normkern.SVAG(model.parameters(), lr=0.1, l=2)
    for _ in range(5):
        pair(opt, model, micro)
        if by == "hand":
            for p in model.parameters():
                p.grad = None
        elif by == "in place":
            opt.zero_grad(set_to_none=False)
        else:
            (opt if by == "optimizer" else model).zero_grad()


def test_refuses_to_hold_twice():
    """The second call takes nothing; the step says what is wrong, as often as it is asked; release() is the way out."""
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=2)
    check = untouched(opt, params)
    give(params, [torch.ones(2), torch.ones(3)])
    opt.hold()
    give(params, [torch.ones(2), torch.ones(3)])
    opt.hold()
    assert params[0].grad is not None
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"hold\(\) was called twice; expected backward, hold, backward, step"):
            opt.step()
    check()
    opt.release()
    opt.hold()
    give(params, [torch.ones(2), torch.ones(3)])
    opt.step()


@pytest.mark.parametrize(
    ("missing", "words"), [("held", "a new gradient but no held one"), ("new", "a held gradient but no new one")]
)
def test_refuses_half_a_pair(missing, words):
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=2, momentum=0.9)
    check = untouched(opt, params)
    full, half = [torch.ones(2), torch.ones(3)], [torch.ones(2), None]
    give(params, half if missing == "held" else full)
    opt.hold()
    give(params, full if missing == "held" else half)
    with pytest.raises(RuntimeError, match=rf"params\[1\] has {words}"):
        opt.step()
    check()


@pytest.mark.parametrize("make", [torch.clone, torch.Tensor.to_sparse])
def test_refuses_a_held_gradient_of_another_shape(make):
    w = nn.Parameter(torch.ones(2))
    opt = normkern.SVAG([w], lr=0.1, l=2)
    w.grad = make(torch.ones(2))
    opt.hold()
    w.data = torch.ones(3)
    w.grad = make(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: held\[0\] has shape \(2,\) but params\[0\] has shape \(3,\)"
    ):
        opt.step()
    assert w.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["same", "part", "sparse"])
def test_refuses_gradients_that_share_memory(kind):
    """As with DDP's gradient_as_bucket_view=True; the cure is in the sentence."""
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=2)
    check = untouched(opt, params)
    bucket = torch.ones(8)
    if kind == "sparse":
        bucket = torch.ones(3).to_sparse()
        views = [torch.ones(2), bucket]
    else:
        views = [bucket[:2], bucket[2:5]]
    for p, g in zip(params, views, strict=True):
        p.grad = g
    opt.hold()
    params[0].grad = torch.ones(2)
    params[1].grad = bucket[4:7] if kind == "part" else views[1]
    with pytest.raises(RuntimeError, match=r"share memory.*gradient_as_bucket_view=True.*hold\(copy=True\)"):
        opt.step()
    check()


def test_refuses_to_hold_nothing():
    opt = normkern.SVAG(two(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"SVAG.hold: expected a backward before it, but no parameter has a gradient"
    ):
        opt.hold()


@pytest.mark.parametrize("l", [0.4, 0, -1, math.nan, math.inf, "2", None, True])
def test_refuses_l(l):
    with pytest.raises(ValueError, match=r"SVAG: l expected a number of at least 1/2, got "):
        normkern.SVAG(two(), lr=0.1, l=l)
    opt = normkern.SVAG(two(), lr=0.1)
    with pytest.raises(ValueError, match=r"SVAG: param_groups\[1\]: l expected"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "l": l})
    opt.param_groups[0]["l"] = l
    params = opt.param_groups[0]["params"]
    give(params, [torch.ones(2), torch.ones(3)])
    opt.hold()
    with pytest.raises((ValueError, RuntimeError), match=r"param_groups\[0\]: l "):
        opt.step()
    assert params[0].tolist() == [1, 1]


def test_refuses_other_options():
    with pytest.raises(ValueError, match='momentum_scaling expected "fixed" or "continuous", got \'slow\''):
        normkern.SVAG(two(), lr=0.1, momentum_scaling="slow")
    with pytest.raises(ValueError, match="noise_decay expected a number of at least 0 and less than 1, got 1"):
        normkern.SVAG(two(), lr=0.1, noise_decay=1)
    with pytest.raises(ValueError, match=r"SVAG.hold: scale expected a positive number, got 0"):
        normkern.SVAG(two(), lr=0.1).hold(scale=0)
    params = two()
    opt = normkern.SVAG(params, lr=0.1, l=0.5, momentum=0.4, momentum_scaling="continuous")
    give(params, [torch.ones(2), torch.ones(3)])
    opt.hold()
    give(params, [torch.ones(2), torch.ones(3)])
    with pytest.raises(
        ValueError, match=r"expected 1 - \(1 - momentum\)/l of at least 0, got -0.2 from momentum 0.4 and l 0.5"
    ):
        opt.step()
    with pytest.raises(ValueError, match="closure_b expected a closure before it"):
        opt.step(None, lambda: 0.0)
    with pytest.raises(RuntimeError, match="expected nothing held before two closures"):
        opt.step(lambda: 0.0, lambda: 0.0)
    with pytest.raises(RuntimeError, match=r"SVAG.noise: expected a step from two gradients before it"):
        opt.noise()


def test_refuses_a_bad_checkpoint():
    opt = normkern.SVAG(two(), lr=0.1)
    state = opt.state_dict()
    state["param_groups"][0]["l"] = 0.1
    with pytest.raises(ValueError, match=r"load_state_dict: param_groups\[0\]: l expected"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["l"] == 1
