"""EquilibriumMonitor: its predictions and levels; what it says where there is no equilibrium."""

import math

import pytest
import torch
from support.noise_model import Invariant

import normkern
from normkern import EquilibriumMonitor
from normkern.monitors.momentum_sums import MomentumSums
from normkern.monitors.step_reader import StepReader
from normkern.theory import equilibrium_angle, equilibrium_residual, equilibrium_weight_sq, steps_to_equilibrium

from .equilibrium_runs import net, net_step, noise_gradient, train, weights

FORMS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.5},
    {"momentum": 0.9, "decay": "exponential", "norm_buffers": [], "followers": []},
    {"momentum": 0.9, "nesterov": True, "decay": "exponential", "norm_buffers": [], "followers": []},
]
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(
            options, dtype, id=f"{' '.join(options) or 'plain'}-{dtype}", marks=[pytest.mark.slow] * ((i + j) % 2)
        )
        for i, options in enumerate(FORMS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_predictions_come_true_in_noise(options, dtype):
    """Begun at half and at twice the length; both become what the monitor said, and turn by what it said."""
    options = {"weight_decay": 0.01 if "momentum" in options else 0.05, "lr": 0.1, **options}
    own = {k: options.pop(k) for k in ("norm_buffers", "followers") if k in options}
    lr = options["lr"] * (1 - options.get("dampening", 0))
    at = {"lr": lr, "weight_decay": options["weight_decay"], "momentum": options.get("momentum", 0.0)}
    form = {"nesterov": options.get("nesterov", False)}
    length = math.sqrt(equilibrium_weight_sq(**at, **form, unit_grad_sq=1.0))
    steps = round(8 * steps_to_equilibrium(**at)) + 300
    for begin in (length / 1.5, 1.5 * length):
        params = weights(norm=begin, dtype=dtype)
        opt = normkern.SGD([{"params": params, **own}], stats="tensor", **options)
        monitor = EquilibriumMonitor(opt, ema=0.99)
        train(opt, params, monitor, steps)
        told = monitor.report().parameters["0.0"]
        assert told.reason is None
        assert told.steps == steps
        assert told.predicted_angular_update == pytest.approx(
            equilibrium_angle(**at, **form, correlation=told.correlation), rel=0.005
        )
        assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.02)
        assert told.equilibrium_weight_norm == pytest.approx(length, rel=0.03)
        assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.03)
        assert abs(told.residual) < 0.1
        assert abs(told.correlation) < 0.1
        assert told.effective_lr == pytest.approx(options["lr"] / told.weight_norm**2, rel=1e-2)
        assert told.intrinsic_lr == options["lr"] * options["weight_decay"]
        assert told.time == pytest.approx(steps * told.intrinsic_lr)
        assert told.steps_to_equilibrium == pytest.approx(steps_to_equilibrium(**at))


def test_the_residual_has_a_sign():
    for begin, sign in ((1.0, 1), (30.0, -1)):
        params = weights(norm=begin)
        opt = normkern.SGD(params, lr=0.1, weight_decay=0.01, stats="tensor")
        monitor = EquilibriumMonitor(opt, ema=0.5)
        train(opt, params, monitor, 5)
        told = monitor.report().parameters["0.0"]
        assert told.residual * sign > 0.1
        assert told.residual == pytest.approx(
            equilibrium_residual(weight_sq=told.weight_norm**2, grad_sq=told.grad_norm**2, lr=0.1, weight_decay=0.01, momentum=0), rel=1e-9
        )  # fmt: skip


def test_averages_are_weighted_and_without_bias():
    params = weights(norm=2.0)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.01, momentum=0.5, stats="tensor")
    monitor, seen = EquilibriumMonitor(opt, ema=0.9), []
    generator = torch.Generator().manual_seed(0)
    for t in range(7):
        params[0].grad = noise_gradient(params[0].detach(), generator, q=1.0 + t)
        opt.step()
        monitor.update()
        stats = opt.stats()
        seen.append([stats.weight_sq.item(), stats.grad_sq.item(), stats.angular_update.item() ** 2])
    share = torch.tensor([0.9**k for k in range(7)][::-1], dtype=torch.float64)
    mean = (share @ torch.tensor(seen, dtype=torch.float64) / share.sum()).tolist()
    told = monitor.report().parameters["0.0"]
    numbers = (told.weight_norm**2, told.grad_norm**2, told.angular_update**2)
    assert numbers == pytest.approx(mean, rel=1e-12)
    assert told.effective_lr == pytest.approx(0.1 / mean[0], rel=1e-12)
    last = EquilibriumMonitor(opt, ema=0)  # of a step that was before it
    assert last.update()
    told = last.report().parameters["0.0"]
    assert (told.weight_norm**2, told.grad_norm**2, told.angular_update**2) == pytest.approx(seen[-1][:3], rel=1e-12)
    assert told.steps == 1


def test_predictions_follow_a_schedule():
    """What is compared are averages over the same steps: a falling lr makes no difference."""
    params = weights(norm=2.5)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.02, momentum=0.9, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.995)
    lrs = [0.1 * 0.9995**t for t in range(1000)]
    train(opt, params, monitor, 1000, schedule=lrs.__getitem__)
    told = monitor.report().parameters["0.0"]
    now = equilibrium_angle(lr=lrs[-1], weight_decay=0.02, momentum=0.9)
    assert told.predicted_angular_update > 1.03 * now
    assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.03)
    assert told.intrinsic_lr == lrs[-1] * 0.02
    assert told.time == pytest.approx(sum(lrs) * 0.02)


def test_exponential_decay_is_told_as_the_run_with_decay():
    reports = []
    for decay in ("coupled", "exponential"):
        model = net()
        groups = [
            {"params": [model[0].weight, model[3].weight], "weight_decay": 0.02, "norm_buffers": [], "followers": []},
            {"params": model[6].parameters(), "decay": "coupled"},
        ]
        opt = normkern.SGD(groups, lr=0.2, momentum=0.5, stats="row", decay=decay)
        monitor = EquilibriumMonitor(opt)
        for t in range(400):
            net_step(model, opt, t)
            monitor.update()
        reports.append(monitor.to_dict())
    scale = opt.true_scale()
    assert opt.param_groups[0]["gauge"][2] != 0  # rescaled, more than once
    assert scale[0] != 1
    for a, b in zip(reports[0]["parameters"].values(), reports[1]["parameters"].values(), strict=True):
        for quantity, x in a.items():
            assert b[quantity] == (x if x is None or isinstance(x, str) else pytest.approx(x, rel=1e-6, abs=1e-9)), (
                quantity
            )


@pytest.mark.parametrize("late", [0, 5])
@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "nesterov": True}, {}],
    ids=["heavy ball", "nesterov", "nesterov .5", "plain"],
)  # fmt: skip
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_buffers_are_followed_by_the_sums(options, late, stats):
    """<b,g> of every row, parameter and group, against the real buffers; also by one who comes late."""
    model = net()
    params = [model[0].weight, model[3].weight]
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.02, stats=stats, **options)
    steps = StepReader(opt, "test")
    follower = None
    for t in range(60):
        opt.param_groups[0]["lr"] = 0.1 + 0.05 * math.sin(t)
        before = [opt.state.get(p, {}).get("momentum_buffer") for p in params]
        before = [torch.zeros_like(p) if b is None else b.clone() for p, b in zip(params, before, strict=True)]
        net_step(model, opt, t)
        step = steps.read()
        if t < late:
            continue
        follower = follower or MomentumSums(step.row_index.rows, torch.device("cpu"))
        dots = follower.dots(step)
        products = [b * p.grad for b, p in zip(before, params, strict=True)]
        rows = [x.sum(1) for x in products] if stats == "row" else []
        expected = torch.cat([*rows, torch.stack([x.sum() for x in products]), sum(x.sum() for x in products)[None]])
        size = step.sums.grad_sq / (1 - options.get("momentum", 0)) ** 2
        if t == late:
            assert late or torch.equal(dots, torch.zeros_like(dots))
        elif t >= late + (60 if options.get("nesterov") and late else 1) - 30:
            assert ((dots - expected).abs() <= 1e-7 * size).all(), t


def test_a_network_that_pulls_back_is_told_and_allowed_for():
    model = Invariant(rows=8, dim=32, norm=1.0)
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        opt = normkern.SGD([("w", model.first)], lr=0.3, weight_decay=0.05 / 3, stats="tensor", **options)
        monitor = EquilibriumMonitor(opt, ema=0.999)
        for t in range(3000):
            opt.zero_grad()
            model(t).backward()
            opt.step()
            monitor.update()
        told = monitor.report().parameters["w"]
        assert abs(told.correlation) > 0.03
        assert told.weight_norm == pytest.approx(told.equilibrium_weight_norm, rel=0.03)
        assert told.angular_update == pytest.approx(told.predicted_angular_update, rel=0.03)


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_parameters_and_groups_are_vectors_of_their_own(stats):
    model = net()
    named = dict(model.named_parameters())
    groups = [
        {"params": [("0.weight", named["0.weight"]), ("3.weight", named["3.weight"])], "weight_decay": 0.02},
        {"params": [("6.weight", named["6.weight"]), ("6.bias", named["6.bias"])], "lr": 0.05},
    ]
    opt = normkern.SGD(groups, lr=0.1, momentum=0.9, stats=stats)
    monitor = EquilibriumMonitor(opt, ema=0)
    for t in range(3):
        before = {n: p.detach().clone() for n, p in named.items()}
        net_step(model, opt, t)
        monitor.update()
    report = monitor.report()
    assert list(report.groups) == [0, 1]
    assert list(report.parameters) == list(report.slots) == list(named)
    vectors = {n: (before[n].flatten(), p.detach().flatten(), p.grad.flatten()) for n, p in named.items()}
    joint = [
        tuple(torch.cat(x) for x in zip(*(vectors[n] for n in names), strict=True))
        for names in (list(named)[:2], list(named)[2:])
    ]
    entries = [(report.parameters[n], v) for n, v in vectors.items()] + list(
        zip(report.groups.values(), joint, strict=True)
    )
    if stats == "row":
        assert [len(slots) for slots in report.slots.values()] == [8, 6, 3, 1]
        entries += [
            (slot, (before[n][i], p.detach()[i], p.grad[i]))
            for n, p in named.items() if p.ndim > 1 for i, slot in enumerate(report.slots[n])
        ]  # fmt: skip
    else:
        assert all(slots == [report.parameters[n]] for n, slots in report.slots.items())
    for told, (w, new, g) in entries:
        cosine = (w @ new / w.norm() / new.norm()).clamp(max=1)
        assert told.weight_norm == pytest.approx(w.norm().item(), rel=1e-12)
        assert told.grad_norm == pytest.approx(g.norm().item(), rel=1e-12)
        assert told.angular_update == pytest.approx(cosine.arccos().item(), rel=1e-6)
        assert told.cosine == pytest.approx(((w @ g).abs() / w.norm() / g.norm()).item(), rel=1e-6, abs=1e-12)
    assert report.groups[1].effective_lr == pytest.approx(0.05 / report.groups[1].weight_norm ** 2)
    assert {report.parameters[n].group for n in list(named)[2:]} == {1}


def test_groups_have_their_own_options():
    params = weights(count=3, norm=2.0)
    groups = [
        {"params": [params[0]], "lr": 0.1, "weight_decay": 0.02},
        {"params": [params[1]], "lr": 0.2, "weight_decay": 0.05, "momentum": 0.9, "nesterov": True},
        {"params": [params[2]], "stats": None},
    ]
    opt = normkern.SGD(groups, lr=0.3, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.9)
    train(opt, params, monitor, 200)
    report = monitor.report()
    assert list(report.parameters) == ["0.0", "1.0"]
    assert report.groups[0].predicted_angular_update == pytest.approx(math.sqrt(0.004), rel=1e-9)
    r = report.groups[1].correlation
    angle = equilibrium_angle(lr=0.2, weight_decay=0.05, momentum=0.9, nesterov=True, correlation=r)
    assert report.groups[1].predicted_angular_update == pytest.approx(angle, rel=1e-3)
    assert [g.intrinsic_lr for g in report.groups.values()] == pytest.approx([0.002, 0.01])


def test_parts_that_are_invariant_together_only():
    """Two tensors whose sum is normalised: neither is invariant alone, the group is."""
    a, b = weights(size=30, count=2, norm=1.0)
    opt = normkern.SGD([("a", a), ("b", b)], lr=0.05, weight_decay=0.1, momentum=0.9, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.998)
    for t in range(1500):
        make = torch.Generator().manual_seed(t)
        opt.zero_grad()
        v = torch.cat([a, b])
        xi = torch.randn(v.shape, generator=make, dtype=torch.float64)
        (v @ xi / v.norm()).backward()
        opt.step()
        monitor.update()
    report = monitor.report()
    for name in ("a", "b"):
        assert report.parameters[name].residual is None
        assert report.parameters[name].reason.startswith("not scale-invariant by itself: |<w,g>| is 0.")
    group = report.groups[0]
    assert group.reason is None
    assert group.angular_update == pytest.approx(group.predicted_angular_update, rel=0.03)
    assert group.weight_norm == pytest.approx(group.equilibrium_weight_norm, rel=0.03)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_decay": 0.0}, "weight_decay is 0: no equilibrium, the norm grows for ever"),
        ({"lr": 0.0}, "lr is 0: nothing moves"),
        ({"lr": 0.0, "weight_decay": 0.0, "momentum": 0.9}, "lr is 0: nothing moves"),
        ({"lr": 1.0, "weight_decay": 2.5}, "equilibrium: lr * weight_decay expected < 2 (1 + momentum) = 2.0, beyond which no length is stable, got 1.0 * 2.5 = 2.5"),
    ],
)  # fmt: skip
def test_where_there_is_no_equilibrium(options, reason):
    params = weights()
    opt = normkern.SGD(params, **{"lr": 0.1, "weight_decay": 0.1, "stats": "tensor", **options})
    monitor = EquilibriumMonitor(opt)
    train(opt, params, monitor, 3)
    told = monitor.report().groups[0]
    assert told.reason == reason
    assert (told.predicted_angular_update, told.residual, told.equilibrium_weight_norm) == (None, None, None)
    assert told.steps_to_equilibrium == math.inf
    assert told.steps == 3
    assert told.weight_norm > 0
    assert reason in str(monitor)


def test_decay_that_begins_later():
    params = weights(norm=3.0)
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    monitor = EquilibriumMonitor(opt, ema=0.999)
    train(opt, params, monitor, 50)
    assert monitor.report().groups[0].residual is None
    opt.param_groups[0]["weight_decay"] = 0.05
    train(opt, params, monitor, 1, seed=3)
    told = monitor.report().groups[0]
    assert told.reason is None
    assert told.predicted_angular_update == pytest.approx(0.1, rel=1e-9)
    assert told.time == pytest.approx(0.005)


def test_parameters_that_are_not_stepped_and_numbers_that_are_none():
    params = weights(count=4, norm=2.0)
    opt = normkern.SGD([(n, p) for n, p in zip("abcd", params, strict=True)], lr=0.1, weight_decay=0.02, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = None if i == 1 or (i == 2 and t == 5) else noise_gradient(p.detach(), generator)
        if t == 3:
            params[3].grad[0] = math.nan
        opt.step()
        monitor.update()
    report = monitor.report()
    assert [p.steps for p in report.parameters.values()] == [6, 0, 5, 3]
    assert [p.time for p in report.parameters.values()] == pytest.approx([0.012, 0, 0.01, 0.006])
    assert report.parameters["a"].reason is None
    assert report.parameters["b"].reason == "not measured: never stepped with finite numbers"
    assert math.isnan(report.parameters["b"].weight_norm)
    for name in "cd":
        assert report.parameters[name].reason == "not measured in the last step: not stepped, or no finite numbers"
        assert report.parameters[name].residual is not None
    assert report.groups[0].steps == 5  # without the step of the NaN itself
    assert math.isfinite(report.groups[0].weight_norm)


def test_weights_without_gradient_only_decay():
    params = weights(norm=2.0)
    opt = normkern.SGD(params, lr=0.1, weight_decay=0.1, momentum=0.9, stats="tensor")
    monitor = EquilibriumMonitor(opt)
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        opt.step()
        monitor.update()
    told = monitor.report().groups[0]
    assert (told.residual, told.equilibrium_weight_norm, told.cosine) == (-1.0, 0.0, 0.0)
    assert told.predicted_angular_update == pytest.approx(math.sqrt(0.02 / 1.9))
    assert told.angular_update < 1e-7
