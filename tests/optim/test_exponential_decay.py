"""SGD(decay="exponential") is torch.optim.SGD with weight decay, on networks that do not see the scale of their weights."""

import math
import warnings

import pytest
import torch
from support.gloo import leave, run, start
from support.invariant_nets import KINDS, Net, backward, batch, gradient_of_direction, groups
from support.memory import same_bits
from torch import nn

import normkern
from normkern import ops, reference

BUFFER = "momentum_buffer"
H = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
REST = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4}
VARIANTS = {
    "plain": {"momentum": 0.0, "weight_decay": 0.12},
    "half": {"momentum": 0.5, "weight_decay": 0.06},
    "dampening": {"dampening": 0.3},
    "nesterov": {"nesterov": True},
    "nesterov half": {"nesterov": True, "momentum": 0.5, "weight_decay": 0.06},
    "maximize": {"maximize": True},
}
STEPS = 500


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ---- Schedules of the run with weight decay: options of group i at step t -------------------------------------------------


def step_decay(t, i):
    return {"lr": (0.3 if i == 2 else 0.1) * 10.0 ** -((t >= 300) + (t >= 420))}


def cosine(t, i):
    return {"lr": (0.3 if i == 2 else 0.1) * (1 + math.cos(math.pi * t / STEPS)) / 2}


def warmup(t, i):
    return {"lr": (0.3 if i == 2 else 0.1) * min(1.0, t / 100)}


class Anything:
    """lr, momentum and weight decay of every group anew at every step; each of them is 0 for a while."""

    def __init__(self, seed):
        self.make = torch.Generator().manual_seed(seed)

    def __call__(self, t, i):
        a, b, c = torch.rand(3, generator=self.make, dtype=torch.float64).tolist()
        momentum = 0.0 if t // 20 % 4 == 2 else 0.3 + 0.62 * a
        weight_decay = 0.0 if t // 30 % 5 == 3 else 0.06 * b
        most = (1 - math.sqrt(momentum)) ** 2
        lr = 0.0 if t // 15 % 7 == 4 else min(0.2 * c, most / max(weight_decay, 1e-9))
        return {"lr": lr, "momentum": momentum, "weight_decay": weight_decay if i < 2 else weight_decay / 50}


class Runs:
    """The same net with torch's weight decay and with ours, each step with the same batch."""

    def __init__(self, kind, options, *, rest=REST, stats=None, norm_buffers=True, **own):
        self.ours, self.theirs = Net(kind), Net(kind)
        first, second = {**H, **options}, {**H, **options}
        second["lr"] = H["lr"] / 2  # a layer of its own pace
        theirs = groups(self.theirs, first, second, rest)
        ours = groups(self.ours, first, second, rest)
        for group, norm in zip(ours[:2], self.ours.norms, strict=True):
            group["norm_buffers"] = [norm] if norm_buffers and hasattr(norm, "running_var") else []
            group["followers"] = []
        ours[2]["decay"] = "coupled"
        self.a = normkern.SGD(ours, decay="exponential", stats=stats, **own)
        self.b = torch.optim.SGD(theirs, foreach=False)
        self.worst = 0.0

    def set(self, options_of, t):
        for i in range(3):
            options = options_of(t, i)
            self.a.param_groups[i].update(options)
            self.b.param_groups[i].update(options)

    def look(self, t):
        """Forward and backward of both; how far their outputs are apart."""
        (x, _), (y, _) = backward(self.ours, t), backward(self.theirs, t)
        self.worst = max(self.worst, float((x - y).abs().max() / y.abs().max()))

    def step(self):
        self.a.step()
        self.b.step()

    def assert_alike(self, outputs=1e-9):
        """Outputs of every step; now the weights and momentum buffers, as the gauge says."""
        assert self.worst < outputs
        for group, other, scale in zip(self.a.param_groups, self.b.param_groups, self.a.true_scale(), strict=True):
            f, z, exponent = group.get("gauge", ops.NEW_GAUGE)
            assert f == scale
            assert type(exponent) is int
            assert 0.5**0.5 <= f < 2**0.5
            for p, q in zip(group["params"], other["params"], strict=True):
                w = f * p.detach()
                torch.testing.assert_close(w, q.detach(), rtol=1e-9, atol=1e-9 * float(q.detach().abs().max()))
                b = self.b.state[q].get(BUFFER)
                assert (b is None) == (self.a.state[p].get(BUFFER) is None)
                if b is not None:
                    ours = self.a.state[p][BUFFER] / f + z * w
                    size = float(b.abs().max() + z * w.abs().max())
                    torch.testing.assert_close(ours, b, rtol=1e-9, atol=1e-9 * size)


# ---- Float64: the run with weight decay, for 500 steps --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        pytest.param(
            kind, schedule, marks=[pytest.mark.slow] * (schedule is cosine and kind not in ("batch", "weight norm"))
        )
        for kind in KINDS
        for schedule in (step_decay, cosine)
    ],
)
def test_every_norm_follows_step_decay_and_cosine(kind, schedule):
    """T5.1: outputs at every step, then weights and momentum buffers."""
    runs = Runs(kind, {})
    for t in range(STEPS):
        runs.set(schedule, t)
        runs.look(t)
        runs.step()
    runs.assert_alike()
    assert runs.a.param_groups[0]["gauge"][2] >= 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_follows(variant):
    """T5.5 too: nesterov by its own formula. Momentum alone is a run of the test before."""
    runs = Runs("batch", VARIANTS[variant], rest={**REST, **VARIANTS[variant], "weight_decay": 1e-4})
    for t in range(STEPS):
        runs.set(step_decay, t)
        runs.look(t)
        runs.step()
    runs.assert_alike()
    assert runs.a.param_groups[0]["gauge"][2] >= 3


@pytest.mark.parametrize("options", [{}, {"dampening": 0.3}, {"nesterov": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_everything_may_change_at_every_step(seed, options):
    """Momentum goes to 0 and comes back to buffers that rested; decay and learning rate are 0 for a while."""
    runs, anything = Runs("layer", options), Anything(seed)
    rested = 0
    for t in range(STEPS):
        runs.set(anything, t)
        rested += runs.a.param_groups[0]["momentum"] == 0
        runs.look(t)
        runs.step()
        if t % 50 == 49:
            runs.assert_alike()
    assert rested > 50
    assert runs.a.param_groups[0]["gauge"][2] >= 2


def test_warmup_from_zero():
    runs = Runs("weight norm", {})
    for t in range(200):
        runs.set(warmup, t)
        runs.look(t)
        runs.step()
    runs.assert_alike()


@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0, "weight_decay": 0.1}, {"nesterov": True}], ids=str)
def test_statistics_are_of_the_run_with_weight_decay(options, stats):
    runs = Runs("batch of images", options, stats=stats)
    shifts = 0
    for t in range(200):
        runs.look(t)
        before = [[p.detach().clone() for p in group["params"]] for group in runs.b.param_groups]
        exponent = runs.a.param_groups[0].get("gauge", ops.NEW_GAUGE)[2]
        runs.step()
        shifts += runs.a.param_groups[0]["gauge"][2] != exponent
        sums = [
            reference.step_sums(w, p.grad, p.detach(), stats)
            for group, old in zip(runs.b.param_groups, before, strict=True)
            for w, p in zip(old, group["params"], strict=True)
        ]
        expected, got = torch.cat(sums), torch.stack([getattr(runs.a.stats(), name) for name in ops.SUMS], dim=1)
        w_sq, g_sq, u_sq = expected[:, 0], expected[:, 1], expected[:, 3]
        g_sq = g_sq.clamp(min=1e-16 * float(g_sq.max()))  # that of the bias before a norm is rounding errors only
        size = torch.stack([w_sq, g_sq, (w_sq * g_sq).sqrt(), u_sq, (w_sq * u_sq).sqrt()], dim=1)
        assert ((got - expected).abs() <= 1e-7 * size).all(), (t, ((got - expected).abs() / size).max(0))
    assert shifts > 0
    lr = torch.tensor([g["lr"] for g in runs.a.param_groups for _ in g["params"]], dtype=torch.float64)
    if stats == "tensor":
        torch.testing.assert_close(runs.a.stats().effective_lr, lr / expected[:, 0], rtol=1e-7, atol=0)


def test_stored_weights_stay_within_a_factor_of_root_two():
    """The range that the user sees, and 200 doublings that nobody does."""
    w, q = (nn.Parameter(torch.linspace(1, 2, 20, dtype=torch.float64)) for _ in range(2))
    group = {"params": [w], "norm_buffers": [], "followers": [], "scale_invariant": True}
    ours = normkern.SGD([group], lr=1.0, weight_decay=0.3, decay="exponential")
    theirs = torch.optim.SGD([q], lr=1.0, weight_decay=0.3, foreach=False)
    for _ in range(400):
        w.grad, q.grad = torch.zeros_like(w), torch.zeros_like(q)
        ours.step()
        theirs.step()
        ratio = float(torch.linalg.vector_norm(q.detach()) / torch.linalg.vector_norm(w.detach()))
        assert 0.5**0.5 * (1 - 1e-9) < ratio < 2**0.5 * (1 + 1e-9)
    assert ours.param_groups[0]["gauge"][2] > 200
    torch.testing.assert_close(ours.true_scale()[0] * w.detach(), q.detach(), rtol=1e-9, atol=0)


# ---- Powers of two, bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_inverse_to_the_scale_of_the_weights(kind):
    """T2.2: at c w the outputs are those at w, and the gradient is 1/c of it; <w,g> is 0."""
    net = Net(kind)
    out, _ = backward(net, 0)
    for layer in net.invariant:
        before = [p.grad.clone() for p in layer]
        dot, size = (
            sum(f(p, p.grad) for p in layer) for f in (lambda w, g: (w * g).sum(), lambda w, g: w.norm() * g.norm())
        )
        assert abs(dot) < 1e-12 * size
        with torch.no_grad():
            for p in layer:
                p.mul_(3.7)
        again, _ = backward(net, 0)
        assert (again - out).norm() < 1e-13 * out.norm()
        size = sum(g.square().sum() for g in before).sqrt()
        off = sum((3.7 * p.grad - g).square().sum() for p, g in zip(layer, before, strict=True)).sqrt()
        assert off < 1e-13 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_see_no_power_of_two(kind, dtype):
    """T2.4: the loss is the same to the bit, and gradients are 2^-k of theirs."""
    net = Net(kind, dtype=dtype)
    for norm in net.norms:
        if getattr(norm, "eps", 0) > 0:
            norm.eps = 1e-60  # small beside what is 2^-40 times as small, too
    out, loss = backward(net, 0)
    weights = [p.detach().clone() for layer in net.invariant for p in layer]
    grads = [p.grad.clone() for layer in net.invariant for p in layer]
    rest = [p.grad.clone() for p in net.rest]
    for k in range(-20, 21):
        with torch.no_grad():
            for p, w in zip([p for layer in net.invariant for p in layer], weights, strict=True):
                p.copy_(torch.ldexp(w, torch.tensor(k)))
        scaled_out, scaled_loss = backward(net, 0)
        assert same_bits(scaled_out, out)
        assert same_bits(scaled_loss, loss)
        for p, g in zip([p for layer in net.invariant for p in layer], grads, strict=True):
            assert same_bits(torch.ldexp(p.grad, torch.tensor(k)), g)
        assert all(same_bits(p.grad, g) for p, g in zip(net.rest, rest, strict=True))


def growing_rate(group):
    """The learning rate of the run that nobody rescales, at the step that follows."""
    f, z, exponent = group.get("gauge", ops.NEW_GAUGE)
    lam, mu, left = group["weight_decay"], group["momentum"], 1.0 if "gauge" not in group else 1 - group["dampening"]
    q = 1 - group["lr"] * (mu * z + left * lam)
    return math.ldexp(group["lr"] / (f * f * q), 2 * exponent)


@pytest.mark.pairwise
@pytest.mark.parametrize(("dtype", "stats"), [(torch.float64, "row"), (torch.float32, None)], ids=str)
@pytest.mark.parametrize("kind", ["batch", "layer", "weight norm"])
def test_rescaling_is_invisible_to_the_bit(isa, kind, dtype, stats):
    """T5.6: beside the same steps without rescaling, whose rate grows by 4^exponent; nine doublings and more."""
    ours, theirs = Net(kind, dtype=dtype), Net(kind, dtype=dtype)
    options = {"momentum": 0.9, "weight_decay": 0.02, "lr": 0.1, "dampening": 0.3}
    rest = {"lr": 0.1, "decay": "coupled"}
    a = normkern.SGD(
        groups(ours, {**options, "norm_buffers": [], "followers": []}, options, rest)[:2],
        decay="exponential",
        stats=stats,
    )
    a.param_groups[1].update(norm_buffers=[], followers=[])
    b = normkern.SGD(groups(theirs, {**options, "weight_decay": 0.0})[:2])
    exponents = set()
    for t in range(400):
        assert same_bits(*(backward(net, t)[1] for net in (ours, theirs)))
        for group, other in zip(a.param_groups, b.param_groups, strict=True):
            other["lr"] = growing_rate(group)
        a.step()
        b.step()
        for group, other in zip(a.param_groups, b.param_groups, strict=True):
            exponent = group["gauge"][2]
            exponents.add(exponent)
            for p, q in zip(group["params"], other["params"], strict=True):
                assert same_bits(torch.ldexp(p.detach(), torch.tensor(exponent)), q.detach())
                v, u = a.state[p][BUFFER], b.state[q][BUFFER]
                assert same_bits(torch.ldexp(v, torch.tensor(-exponent)), u)
    assert max(exponents) >= 9


# ---- Where the plain exponential learning rate would overflow --------------------------------------------------------------


def trained_in_float32(decay, steps, weight_decay, last):
    """Mean loss and norms of the layers over the last steps, and log10 of the factor that the rate has grown by."""
    net = Net("batch", dtype=torch.float32)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": weight_decay, "norm_buffers": [], "followers": []}
    lists = groups(net, options, options, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "decay": "coupled"})
    opt = normkern.SGD(lists, decay=decay)
    losses, norms = [], []
    for t in range(steps):
        losses.append(backward(net, t)[1])
        opt.step()
        if t >= steps - last:
            norms.append([s * float(p.detach().norm()) for s, g in zip(opt.true_scale(), opt.param_groups, strict=True)
                          for p in g["params"][:1]][:2])  # fmt: skip
    f, _, exponent = opt.param_groups[0].get("gauge", ops.NEW_GAUGE)
    grown = 2 * (exponent - math.log2(f)) * math.log10(2)
    return float(torch.stack(losses[-last:]).double().mean()), torch.tensor(norms).mean(0), grown


@pytest.mark.parametrize(
    ("steps", "weight_decay", "last"),
    [(2200, 0.02, 800), pytest.param(20_000, 3e-3, 1000, marks=pytest.mark.slow)],
)
def test_beyond_the_range_of_float32(steps, weight_decay, last):
    """T5.7: the loss and the norms at the end are those of coupled decay, while the rate alone passes 1e38."""
    loss, norms, grown = trained_in_float32("exponential", steps, weight_decay, last)
    other_loss, other_norms, _ = trained_in_float32("coupled", steps, weight_decay, last)
    assert grown > 38
    assert loss == pytest.approx(other_loss, rel=0.05)
    torch.testing.assert_close(norms, other_norms, rtol=0.05, atol=0)


# ---- Running statistics of batch norms --------------------------------------------------------------------------------------


def after_a_rescale(norm_buffers):
    """Two runs at their first step after the weights were halved, in evaluation mode: both outputs."""
    runs = Runs("batch", {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.01}, norm_buffers=norm_buffers)
    for group, other in zip(runs.a.param_groups[:2], runs.b.param_groups[:2], strict=True):
        other["lr"] = group["lr"] = 0.1
    for norm in (*runs.ours.norms, *runs.theirs.norms):
        norm.momentum = 0.5  # else statistics of weights that decay are those of ten steps ago
    for t in range(1000):
        runs.look(t)
        runs.step()
        if runs.a.param_groups[0]["gauge"][2] == 1:
            break
    assert runs.a.param_groups[0]["gauge"][2] == 1
    runs.ours.eval()
    runs.theirs.eval()
    x, _ = batch(runs.ours, 0)
    with torch.no_grad():
        return runs.ours(x), runs.theirs(x)


def test_running_statistics_follow_where_named():
    got, expected = after_a_rescale(norm_buffers=True)
    size = float(expected.abs().max())
    assert float((got - expected).abs().max()) < 5e-3 * size
    got, expected = after_a_rescale(norm_buffers=False)
    assert float((got - expected).abs().max()) > 0.1 * size


def shrinking(**group):
    w = nn.Parameter(torch.linspace(1, 2, 20))
    opt = normkern.SGD([{"params": [w], **group}], lr=1.0, weight_decay=0.2, decay="exponential")
    n = torch.randn(20)

    def step():
        w.grad = gradient_of_direction(w, n)
        opt.step()

    return opt, step


def test_unnamed_norms_are_warned_of_once():
    opt, step = shrinking()
    step()
    assert opt.param_groups[0]["gauge"][2] == 0
    with pytest.warns(UserWarning, match=r"rescaled weights by a power of two.* norm_buffers=\[model.bn1") as seen:
        step()
    assert len(seen) == 1
    assert seen[0].filename == __file__, "the warning points at the call of step()"
    for _ in range(10):
        step()
    assert opt.param_groups[0]["gauge"][2] > 2


@pytest.mark.parametrize("named", [[], [nn.BatchNorm1d(3)]], ids=["none", "one"])
def test_named_norms_are_not_warned_of(named):
    opt, step = shrinking(norm_buffers=named, followers=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            step()
    assert opt.param_groups[0]["gauge"][2] > 1


def test_a_warning_that_is_an_error_breaks_no_step():
    """Every group of the step keeps its gauge, and its weights."""
    weights = [nn.Parameter(torch.linspace(1, 2, 20, dtype=torch.float64)) for _ in range(4)]
    n = torch.randn(20, dtype=torch.float64)
    ours = normkern.SGD(
        [{"params": [w]} for w in weights[:2]], lr=1.0, momentum=0.01, weight_decay=0.3, decay="exponential"
    )
    theirs = torch.optim.SGD(weights[2:], lr=1.0, momentum=0.01, weight_decay=0.3, foreach=False)
    raised = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            for w in weights:
                w.grad = gradient_of_direction(w, n)
            try:
                ours.step()
            except UserWarning:
                raised += 1
            theirs.step()
    assert raised == 1
    for w, q, scale in zip(weights[:2], weights[2:], ours.true_scale(), strict=True):
        torch.testing.assert_close(scale * w.detach(), q.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", ["norms", "pairs", "one norm", "without statistics"])
def test_what_norm_buffers_may_be(given):
    norm, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    named = {
        "norms": [norm],
        "pairs": [(norm.running_mean, norm.running_var)],
        "one norm": norm,
        "without statistics": [plain, norm],
    }[given]
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(8.0)
    opt, step = shrinking(norm_buffers=named, followers=[])
    for _ in range(3):
        step()
    exponent = opt.param_groups[0]["gauge"][2]
    assert exponent == 1
    # Stored weights were halved, and what the norm sees with them.
    assert norm.running_mean.tolist() == [1.0] * 3
    assert norm.running_var.tolist() == [2.0] * 3


# ---- SVAG --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "options"),
    [("fixed", {}), ("continuous", {"lr": 0.4, "weight_decay": 0.006}), ("fixed", {"nesterov": True})],
    ids=str,
)
def test_svag_follows_coupled_decay(scaling, options):
    """And its noise is that at the true scale."""
    nets = [Net("layer"), Net("layer")]
    first = {**H, "weight_decay": 0.04, "norm_buffers": [], "followers": [], **options}
    optimizers = [
        normkern.SVAG(
            groups(net, first, first, {**REST, "decay": "coupled"}),
            0.1,
            4,
            momentum_scaling=scaling,
            decay=d,
            stats="tensor",
        )
        for net, d in zip(nets, ("exponential", "coupled"), strict=True)
    ]
    for t in range(200):
        outputs = []
        for net, opt in zip(nets, optimizers, strict=True):
            outputs.append(backward(net, 2 * t)[0])
            opt.hold()
            backward(net, 2 * t + 1)
            opt.step()
        assert float((outputs[0] - outputs[1]).abs().max()) < 1e-9 * float(outputs[1].abs().max())
        if t % 20 == 19:
            ours, theirs = (opt.noise() for opt in optimizers)
            for name in ("grad_sq_norm_unbiased", "trace_sigma", "slot_grad_sq_norm_unbiased", "slot_trace_sigma"):
                x, y = getattr(ours, name), getattr(theirs, name)
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-20)
            ours, theirs = (opt.stats() for opt in optimizers)
            for name in ("weight_sq", "grad_sq", "update_sq", "effective_lr"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-7, atol=1e-20)
    assert optimizers[0].param_groups[0]["gauge"][2] >= 1
    for group, other, scale in zip(*(o.param_groups for o in optimizers), optimizers[0].true_scale(), strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(scale * p.detach(), q.detach(), rtol=1e-9, atol=1e-9)


# ---- What torch's own loop steps ---------------------------------------------------------------------------------------------


def unusual(kind):
    """A parameter that no kernel takes, and its twin for torch; gradients of a direction for both."""
    make = torch.Generator().manual_seed(3)
    dtype = torch.complex128 if kind == "complex" else torch.float64
    p, q = (nn.Parameter(torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(5))) for _ in range(2))
    if kind == "gradient of another dtype":
        p = nn.Parameter(p.detach().float())
        q = nn.Parameter(p.detach().double())
        p.grad_dtype = torch.float64

    def give():
        n = 0.01 * torch.randn(4, 6, dtype=dtype, generator=make)
        p.grad, q.grad = gradient_of_direction(p, n), gradient_of_direction(q, n)
        if kind == "sparse gradient":
            p.grad = p.grad.to_sparse()
        if kind == "negative bit":
            p.grad = torch._neg_view(-p.grad)

    return p, q, give


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", [None, "row"])
@pytest.mark.parametrize(
    "options", [{"momentum": 0.0}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}], ids=str
)
@pytest.mark.parametrize("kind", ["complex", "sparse gradient", "negative bit", "gradient of another dtype"])
def test_what_the_kernel_cannot_take_follows_too(kind, options, stats, caplog):
    """Beside an ordinary parameter of the same group."""
    p, q, give = unusual(kind)
    x, y = (nn.Parameter(torch.linspace(1, 2, 7, dtype=torch.float64)) for _ in range(2))
    n = 0.01 * torch.randn(7, dtype=torch.float64)
    ours = normkern.SGD(
        [{"params": [x, p], "norm_buffers": [], "followers": []}],
        0.5,
        weight_decay=0.1,
        decay="exponential",
        stats=stats,
        **options,
    )
    theirs = torch.optim.SGD([y, q], 0.5, weight_decay=0.1, foreach=False, **options)
    tolerance = 1e-5 if kind == "gradient of another dtype" else 1e-11
    for t in range(60):
        before = q.detach().clone()
        if t == 20:
            for opt in (ours, theirs):
                opt.param_groups[0]["momentum"] = 0.5 - options["momentum"]
                opt.param_groups[0]["nesterov"] = False
        give()
        x.grad, y.grad = gradient_of_direction(x, n), gradient_of_direction(y, n)
        with caplog.at_level("DEBUG", logger="normkern"):
            ours.step()
        theirs.step()
        scale = ours.true_scale()[0]
        torch.testing.assert_close(scale * p.detach().to(q.dtype), q.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(scale * x.detach(), y.detach(), rtol=1e-11, atol=1e-11)
        if stats:
            sums = reference.step_sums(before, q.grad, q.detach(), "row")
            table = torch.stack([getattr(ours.stats(), name) for name in ops.SUMS], dim=1)
            torch.testing.assert_close(table[1:], sums, rtol=10 * tolerance, atol=10 * tolerance)
    assert ours.param_groups[0]["gauge"][2] >= 3
    assert "params[1]" in caplog.text
    assert "torch's own loop" in caplog.text


def test_fake_and_meta_parameters():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            w = nn.Parameter(torch.empty(3))
            opt = normkern.SGD(
                [{"params": [w], "norm_buffers": [], "followers": []}], 1.0, 0.1, weight_decay=0.4, decay="exponential"
            )
            for _ in range(4):
                w.grad = torch.empty(3)
                opt.step()
        assert opt.param_groups[0]["gauge"][2] >= 1
        assert not opt.param_groups[0].get("scale_invariant"), "nothing is learned from tensors without values"


def test_dispatch_modes_and_transforms_see_the_step():
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(w, n):
        q, p = w.clone(), w.clone()
        q.grad = p.grad = (n - w * (w @ n) / (w @ w)) / (w @ w).sqrt()
        group = {"params": [q], "scale_invariant": True, "norm_buffers": [], "followers": []}
        opt = normkern.SGD([group], 0.5, weight_decay=1.2, decay="exponential", stats="row")
        opt.step()
        torch.optim.SGD([p], 0.5, weight_decay=1.2, foreach=False).step()
        return opt.true_scale()[0] * q - p

    w, n = torch.linspace(1, 2, 6, dtype=torch.float64).view(2, 3), torch.randn(2, 3, dtype=torch.float64)
    traced = make_fx(step)(w[0], n[0])
    torch.testing.assert_close(traced(w[1], n[1]), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(torch.func.vmap(step)(w, n), torch.zeros(2, 3, dtype=torch.float64))


def test_invariance_cannot_be_judged_of_traced_tensors():
    """They have no values to judge by."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(w, g):
        q = w.clone()
        q.grad = g
        normkern.SGD(
            [{"params": [q], "norm_buffers": [], "followers": []}], 0.1, weight_decay=0.5, decay="exponential"
        ).step()
        return q

    w, g = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    traced = make_fx(step)(w, g)
    torch.testing.assert_close(traced(w, g), torch.tensor([1.0, -0.1 / 0.95]))


def sharded(rank, world, rendezvous):
    start(rank, world, rendezvous)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    wholes = [torch.linspace(1, 2, 35, dtype=torch.float64).view(7, 5), torch.linspace(1, 3, 5, dtype=torch.float64)]
    placements = [[Shard(0)], [Replicate()]]
    ours = [nn.Parameter(distribute_tensor(w, mesh, p)) for w, p in zip(wholes, placements, strict=True)]
    theirs = [nn.Parameter(w.clone()) for w in wholes]
    group = {"params": ours, "norm_buffers": [], "followers": []}
    a = normkern.SGD([group], lr=0.5, momentum=0.5, weight_decay=0.1, decay="exponential")
    b = torch.optim.SGD(theirs, lr=0.5, momentum=0.5, weight_decay=0.1, foreach=False)
    make = torch.Generator().manual_seed(0)
    for _ in range(30):
        scale = a.true_scale()[0]
        for p, q, place in zip(ours, theirs, placements, strict=True):
            q.grad = gradient_of_direction(q, torch.randn(q.shape, generator=make, dtype=torch.float64))
            p.grad = distribute_tensor(q.grad * scale, mesh, place)
        a.step()
        b.step()
    assert a.param_groups[0]["gauge"][2] >= 2
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.true_scale()[0] * p.full_tensor(), q.detach(), rtol=1e-11, atol=1e-11)
    # A shard alone is not at right angles to its gradient: it is the whole that is judged, and refused here.
    ours[1].grad = ours[1].detach().clone()
    a.param_groups[0]["scale_invariant"] = None
    with pytest.raises(ValueError, match=r"params\[1\] is not scale-invariant.*got 1\."):
        a.step()
    leave()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_shards_follow(tmp_path):
    run(sharded, str(tmp_path / "rendezvous"))
