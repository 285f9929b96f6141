"""StepStats.scalars: flat numbers for loggers, and the names in them."""

import json
import math

import pytest
import torch
from torch import nn

import normkern
from normkern.names import strip_prefixes


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def stepped(stats="tensor", frozen=(), **options):
    model = net()
    for i in frozen:
        model[i].requires_grad_(False)
    opt = normkern.SGD(model.named_parameters(), lr=0.1, stats=stats, **options)
    model(torch.linspace(-1, 1, 20).view(5, 4).double()).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    return model, opt, before


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_numbers_of_each_parameter_and_of_all(stats):
    model, opt, before = stepped(stats, momentum=0.9)
    scalars = opt.stats().scalars(prefix="train/")
    names = [n for n, _ in model.named_parameters()]
    quantities = ("weight_norm", "grad_norm", "update_norm", "angular_update", "effective_lr")
    assert set(scalars) == {f"train/{q}/{n}" for q in quantities for n in (*names, "all")}
    for name, w, p in zip(names, before, model.parameters(), strict=True):
        assert scalars[f"train/weight_norm/{name}"] == pytest.approx(w.norm().item(), rel=1e-12)
        assert scalars[f"train/update_norm/{name}"] == pytest.approx((p - w).norm().item(), rel=1e-9)
        assert scalars[f"train/effective_lr/{name}"] == pytest.approx(0.1 / w.square().sum().item(), rel=1e-12)
    one, new = (torch.cat([x.detach().flatten() for x in xs]) for xs in (before, model.parameters()))
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    angle = torch.acos((one @ new) / (one.norm() * new.norm())).item()
    assert scalars["train/weight_norm/all"] == pytest.approx(one.norm().item(), rel=1e-12)
    assert scalars["train/grad_norm/all"] == pytest.approx(grad.norm().item(), rel=1e-12)
    assert scalars["train/update_norm/all"] == pytest.approx((new - one).norm().item(), rel=1e-9)
    assert scalars["train/angular_update/all"] == pytest.approx(angle, rel=1e-5)
    assert scalars["train/effective_lr/all"] == pytest.approx(0.1 / one.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_no_number_that_is_none(stats):
    """Frozen parameters, zeros, parameters of different lr: left out; all else is there, and goes through JSON."""
    _, opt, _ = stepped(stats, frozen=[0])
    scalars = opt.stats().scalars()
    assert all(type(x) is float and math.isfinite(x) for x in scalars.values())
    assert json.loads(json.dumps(scalars, allow_nan=False)) == scalars
    assert {key.split("/", 1)[1] for key in scalars} == {"2.weight", "2.bias", "all"}
    total = math.hypot(scalars["weight_norm/2.weight"], scalars["weight_norm/2.bias"])
    assert scalars["weight_norm/all"] == pytest.approx(total, rel=1e-12)


def test_lr_that_differs_has_no_effective_lr_of_all():
    model = net()
    groups = [
        {"params": list(model[0].named_parameters()), "lr": 0.1},
        {"params": list(model[2].named_parameters(prefix="2")), "lr": 0.2},
    ]
    opt = normkern.SGD(groups, stats="tensor")
    model(torch.ones(2, 4).double()).sum().backward()
    opt.step()
    scalars = opt.stats().scalars("effective_lr")
    assert set(scalars) == {f"effective_lr/{n}" for n in ("weight", "bias", "2.weight", "2.bias")}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("efective_lr", "effective_lr"), ("gradnorm", "grad_norm"), (["grad_norm", "angle_update"], "angular_update")],
)
def test_an_unknown_quantity(wrong, meant):
    _, opt, _ = stepped()
    with pytest.raises(ValueError, match=rf"unknown quantity .*; did you mean '{meant}'\?"):
        opt.stats().scalars(wrong)
    with pytest.raises(ValueError, match=r"unknown quantity 'xyzzy'; expected one of weight_sq"):
        opt.stats().scalars(["xyzzy"])
    with pytest.raises(TypeError, match="prefix expected a string, got 3"):
        opt.stats().scalars(prefix=3)


def test_no_quantities_are_no_numbers():
    _, opt, _ = stepped()
    assert opt.stats().scalars([]) == {}


def test_names_of_a_model_for_groups_without():
    model = net()
    opt = normkern.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2]},
            {"params": [p for p in model.parameters() if p.ndim == 1]},
        ],
        lr=0.1,
        stats="tensor",
    )
    model(torch.ones(2, 4).double()).sum().backward()
    opt.step()
    assert opt.stats().names == ["0.0", "0.1", "1.0", "1.1"]
    opt.name_parameters(torch.compile(model, backend="eager"))
    opt.step()
    assert opt.stats().names == ["0.weight", "2.weight", "0.bias", "2.bias"]
    monitor = normkern.EquilibriumMonitor(opt)
    assert monitor.update()
    assert list(monitor.report().parameters) == opt.stats().names
    # A group that is added, as Lightning's BaseFinetuning does, gets a name too.
    extra = nn.Linear(2, 2).double()
    model.append(extra)
    opt.add_param_group({"params": extra.parameters()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.stats().names == ["0.weight", "2.weight", "0.bias", "2.bias", "3.weight", "3.bias"]


def test_a_group_without_names_beside_others():
    """As Lightning's BaseFinetuning adds it to an optimizer made of named_parameters()."""
    model, extra = net(), nn.Linear(2, 2).double()
    opt = normkern.SGD(model.named_parameters(), lr=0.1, stats="tensor")
    opt.add_param_group({"params": extra.weight})
    opt.add_param_group({"params": iter([extra.bias])})
    for p in (*model.parameters(), *extra.parameters()):
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.stats().names == ["0.weight", "0.bias", "2.weight", "2.bias", "1.0", "2.0"]


def test_names_follow_parameters():
    """Removed from a group, swapped, moved to another group."""
    model = net()
    opt = normkern.SGD(model.named_parameters(), lr=0.1, stats="tensor")

    def names():
        model(torch.ones(2, 4).double()).sum().backward()
        opt.step()
        return opt.stats().names

    group = opt.param_groups[0]
    group["params"] = group["params"][2:]
    assert names() == ["2.weight", "2.bias"]
    group["params"] = [model[0].bias, *reversed(group["params"])]
    assert names() == ["0.bias", "2.bias", "2.weight"]
    opt.add_param_group({"params": [("moved", model[0].weight)]})
    assert names() == ["0.bias", "2.bias", "2.weight", "moved"]
    opt.name_parameters(model)
    assert names() == ["0.bias", "2.bias", "2.weight", "0.weight"]
    model(torch.ones(2, 4).double()).sum().backward()
    opt.step()
    opt.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 2 params, but had 3 at the last step"):
        opt.stats()


def test_a_number_of_names_that_does_not_fit():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = normkern.SGD([("a", a)], lr=0.1, stats="tensor")
    opt.param_groups[0]["params"] = [a, b]
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    opt.step()
    with pytest.raises(ValueError, match=r"has 2 params but 1 param_names; opt.name_parameters\(model\)"):
        opt.stats()


def test_a_model_without_a_parameter():
    model = net()
    opt = normkern.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"lacks param_groups\[0\]\['params'\]\[2\] of shape \(2, 3\)"):
        opt.name_parameters(model[0])
    with pytest.raises(TypeError, match="model expected a torch.nn.Module, got list"):
        opt.name_parameters(list(model.named_parameters()))
    assert "param_names" not in opt.param_groups[0]


def test_prefixes_of_wrappers_are_left_out():
    """The optimizer, its noise and the noise of samples have the same names."""
    model = net()
    compiled = torch.compile(nn.ModuleDict({"module": model}), backend="eager")
    for cls in (normkern.SGD, normkern.SVAG):
        opt = cls(compiled.named_parameters(), lr=0.1, stats="tensor")
        model(torch.ones(2, 4).double()).sum().backward()
        if cls is normkern.SVAG:
            opt.hold()
            model(torch.ones(2, 4).double()).sum().backward()
        opt.step()
        expected = [strip_prefixes(n) for n, _ in model.named_parameters()]
        assert opt.stats().names == expected
        if cls is normkern.SVAG:
            assert opt.noise().names == expected


def test_two_models_with_the_same_names():
    models = net(), net()
    params = [p for model in models for p in model.named_parameters()]
    opt = normkern.SGD([{"params": params[:4]}, {"params": params[4:]}], lr=0.1, stats="tensor")
    for model in models:
        model(torch.ones(2, 4).double()).sum().backward()
    opt.step()
    stats = opt.stats()
    assert len(stats.slots) == 8
    assert stats.names[4:] == ["0.weight#2", "0.bias#2", "2.weight#2", "2.bias#2"]


def test_names_are_those_of_the_constructor_after_loading():
    model = net()
    plain, named = normkern.SGD(model.parameters(), lr=0.1), normkern.SGD(model.named_parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    named.step()
    plain.load_state_dict(named.state_dict())
    plain.param_groups[0]["stats"] = "tensor"
    plain.step()
    assert plain.stats().names == [n for n, _ in model.named_parameters()]


def test_invariances_have_the_names_of_the_model():
    """Behind wrappers too, so that groups, statistics and monitors agree."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = inner

        def forward(self, x):
            return self.module(x)

    def loss(model, batch):
        return model(batch).square().mean()

    wrapped, batches = Wrapper(), [torch.randn(16, 4) for _ in range(2)]
    found = normkern.invariance.find(wrapped, loss, batches, granularity="tensor")
    assert set(found.granularity) == {n for n, _ in inner.named_parameters()}
    assert found.granularity == normkern.invariance.find(inner, loss, batches, granularity="tensor").granularity
    groups = normkern.invariance.param_groups(wrapped, found)
    opt = normkern.SGD(groups, lr=0.1, stats="tensor")
    loss(wrapped, batches[0]).backward()
    opt.step()
    assert set(opt.stats().names) == set(found.granularity)
    monitor = normkern.InvarianceMonitor(opt)
    monitor.update()
    assert list(monitor.report()) == ["0.weight"]
