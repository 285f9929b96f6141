"""InvarianceMonitor: averages against sums done here, warnings where a scale is seen, silence where none is."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern
from normkern import InvarianceMonitor
from normkern.invariance import find, param_groups

from .normalised_nets import case, convnet, pairs


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    torch.set_num_threads(1)


def train(net, batches, opt, monitor, steps):
    for i in range(steps):
        x, y = batches[i % len(batches)]
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
        monitor.update()


def cosine(ws, gs):
    dot = sum((w.double() * g.double()).sum() for w, g in zip(ws, gs, strict=True))
    return float(dot / (sum(w.double().square().sum() for w in ws) * sum(g.double().square().sum() for g in gs)).sqrt())


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_averages(stats):
    """Random gradients; a single parameter and a set; NaN and a missing gradient keep the average."""
    params = {n: nn.Parameter(torch.randn(4, 3)) for n in "abcd"}
    groups = [
        {"params": [(n, params[n]) for n in "abc"], "scale_invariant": True, "joint": [["b", "c"]]},
        {"params": [("d", params["d"])]},
    ]
    opt = normkern.SGD(groups, lr=0.01, stats=stats)
    monitor = InvarianceMonitor(opt, ema=0.7, threshold=2.0)
    seen = {"a": [], "b + c": []}
    for step in range(6):
        before = {n: p.detach().clone() for n, p in params.items()}
        for p in params.values():
            p.grad = torch.randn(4, 3)
        if step == 2:
            params["a"].grad[1, 1] = math.nan
        if step == 4:
            params["b"].grad = None
        for key in seen:
            names = key.split(" + ")
            gs = [params[n].grad for n in names]
            if all(g is not None and not g.isnan().any() for g in gs):
                seen[key].append(cosine([before[n] for n in names], gs))
        opt.step()
        if step == 2:
            with torch.no_grad():
                params["a"].nan_to_num_(0.5)
        monitor.update()
    report = monitor.report()
    assert list(report) == ["a", "b + c"]
    for key, values in seen.items():
        weights = [0.7 ** (len(values) - 1 - i) for i in range(len(values))]
        mean = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
        assert report[key] == {"cosine": pytest.approx(mean, rel=1e-9), "updates": 5, "drifted": False}


@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize(
    "name", ["batch norm", "group norm, biases", "pre-activation ResNet", "layer norm and RMSNorm", "weight norm"]
)
def test_what_was_found_stays_so(name, stats):
    net, batches, *_ = case(name)
    groups = param_groups(net, find(net, F.cross_entropy, batches), scale_invariant={"weight_decay": 1e-3})
    opt = normkern.SGD(groups, lr=0.05, momentum=0.9, stats=stats)
    monitor = InvarianceMonitor(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, batches, opt, monitor, 20)
    report = monitor.report()
    assert all(
        abs(entry["cosine"]) < 1e-3 and entry["updates"] == 20 and not entry["drifted"] for entry in report.values()
    )
    assert {n for key in report for n in key.split(" + ")} == set(opt.param_groups[0]["param_names"])


@pytest.mark.parametrize("optimizer", ["SGD", "SVAG"])
def test_what_is_declared_wrongly_is_told_once(optimizer):
    net, batches, *_ = case("batch norm")
    construct = normkern.SGD if optimizer == "SGD" else normkern.SVAG
    groups = [
        {"params": [("conv", net[0].weight), ("head", net[8].weight)], "scale_invariant": True},
        {"params": [("other", net[8].bias)]},
    ]
    opt = construct(groups, lr=0.05, stats="tensor")
    monitor = InvarianceMonitor(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            if optimizer == "SVAG":
                opt.zero_grad()
                F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
                opt.hold()
            train(net, batches, opt, monitor, 1)
    told, *more = [str(w.message) for w in caught]
    assert more == []
    assert told.startswith("normkern: head is declared scale-invariant, but <w,g> / (|w| |g|) averages")
    assert "expected is at most 0.001: the loss sees its scale" in told
    report = monitor.report()
    assert (report["head"]["drifted"], report["conv"]["drifted"]) == (True, False)
    assert list(report) == ["conv", "head"]


def test_eval_mode_drifts():
    """Stored statistics instead of the batch's: the warning comes when the mode changes."""
    net, batches = convnet(nn.BatchNorm2d(8)), pairs(6, 3, 8, 8)
    opt = normkern.SGD([("w", net[0].weight)], lr=0.01, stats="tensor")
    monitor = InvarianceMonitor(opt, names=["w"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, batches, opt, monitor, 10)
    net.eval()
    with pytest.warns(UserWarning, match="normkern: w is declared"):
        train(net, batches, opt, monitor, 10)


def test_a_set_given_by_names():
    net, batches, *_ = case("two branches")
    opt = normkern.SGD(net.named_parameters(), lr=0.01, stats="tensor")
    monitor = InvarianceMonitor(opt, names=[("w1", "w2")])
    train(net, batches, opt, monitor, 5)
    assert abs(monitor.report()["w1 + w2"]["cosine"]) < 1e-4
    with pytest.warns(UserWarning, match="w1 is declared"):
        train(net, batches, opt, InvarianceMonitor(opt, names=["w1"]), 5)


def test_parameters_without_names():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = normkern.SGD([{"params": [w], "scale_invariant": True}], lr=0.1, stats="tensor")
    monitor = InvarianceMonitor(opt)
    assert monitor.report() == {"0.0": {"cosine": pytest.approx(math.nan, nan_ok=True), "updates": 0, "drifted": False}}
    with pytest.raises(RuntimeError, match="expected a step before it"):
        monitor.update()
    w.grad = torch.tensor([4.0, -3.0])
    opt.step()
    monitor.update()
    assert monitor.report()["0.0"]["cosine"] == 0


def test_a_group_that_comes_later():
    a, b = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    opt = normkern.SGD([{"params": [("a", a)], "scale_invariant": True}], lr=0.0, stats="tensor")
    monitor = InvarianceMonitor(opt, threshold=2.0)
    a.grad = b.grad = torch.tensor([3.0, 4.0])
    opt.step()
    monitor.update()
    opt.add_param_group({"params": [("b", b)], "scale_invariant": True})
    monitor.update()
    assert monitor.report()["a"]["updates"] == 2
    opt.step()
    monitor.update()
    report = monitor.report()
    assert (report["a"]["updates"], report["b"]["updates"]) == (3, 1)
    assert report["a"]["cosine"] == pytest.approx(1)


def test_zero_gradients_are_skipped():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SGD([{"params": [("w", w)], "scale_invariant": True}], lr=0.1, stats="tensor")
    monitor = InvarianceMonitor(opt)
    w.grad = torch.zeros(3)
    opt.step()
    monitor.update()
    assert monitor.report()["w"]["updates"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_has_room(dtype):
    """Four units in the last place over the root of the entries are no drift."""
    w = nn.Parameter(torch.tensor([1.0, 0.0], dtype=dtype))
    room = 4 * torch.finfo(dtype).eps / math.sqrt(2)
    opt = normkern.SGD([{"params": [("w", w)], "scale_invariant": True}], lr=0.0, stats="tensor")
    monitor = InvarianceMonitor(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w.grad = torch.tensor([0.8 * room, 1.0], dtype=dtype)
        opt.step()
        monitor.update()
    w.grad = torch.tensor([10 * room, 1.0], dtype=dtype)
    opt.step()
    with pytest.warns(UserWarning, match="w is declared"):
        monitor.update()


def measured():
    w = nn.Parameter(torch.ones(2))
    return normkern.SGD([{"params": [("w", w)], "scale_invariant": True}], lr=0.1, stats="tensor")


@pytest.mark.parametrize(
    ("optimizer", "options", "sentence"),
    [
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))]), {}, "InvarianceMonitor: optimizer expected one with statistics, such as normkern.SGD(..., stats=\"tensor\"), got SGD"),
        (lambda: normkern.SGD([{"params": [("w", nn.Parameter(torch.ones(2)))], "scale_invariant": True}]), {}, "InvarianceMonitor: 'w' expected to be in a param group with statistics; construct the optimizer with stats=\"tensor\" or \"row\""),
        (lambda: normkern.SGD([nn.Parameter(torch.ones(2))], stats="tensor"), {}, "InvarianceMonitor: expected a param group with scale_invariant=True, as invariance.param_groups makes them, or names; got neither"),
        (measured, {"names": ["v"]}, "InvarianceMonitor: names expected those of the optimizer's parameters, got 'v'"),
        (measured, {"names": []}, "InvarianceMonitor: expected a param group with scale_invariant=True"),
        (measured, {"ema": 1.0}, "InvarianceMonitor: ema expected a number in [0, 1), got 1.0"),
        (measured, {"ema": math.nan}, "InvarianceMonitor: ema expected a number in [0, 1), got nan"),
        (measured, {"threshold": 0.0}, "InvarianceMonitor: threshold expected a finite number > 0, got 0.0"),
        (measured, {"every": 0}, "InvarianceMonitor: every expected an integer >= 1, got 0"),
    ],
)  # fmt: skip
def test_refusals(optimizer, options, sentence):
    with pytest.raises(ValueError) as caught:
        InvarianceMonitor(optimizer(), **options)
    assert str(caught.value).startswith(sentence)
