"""Wrappers that frameworks put around an optimizer: no state of it may be split between both."""

import copy
import io

import pytest
import torch
from torch import nn

import normkern
from normkern.optim.unwrap import expect_sgd, unwrap_optimizer


class Forwarding:
    """As LightningOptimizer and Fabric's: of a subclass made at run time; reads are forwarded, writes are kept."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Forwarding" + type(optimizer).__name__, (Forwarding, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Copied:
    """As LightningOptimizer before 2.0: with a copy of the attributes."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
        self.__class__ = type("Copied" + type(optimizer).__name__, (Copied, type(optimizer)), {})
        self._optimizer = optimizer


class Proxy:
    """No optimizer at all, but for its attributes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


WRAPPERS = [Forwarding, Copied, Proxy]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def give(model, t, scale=1.0):
    make = torch.Generator().manual_seed(t)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=make, dtype=p.dtype)


OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inside", WRAPPERS)
def test_every_method_through_either_object(outer, inside):
    """Each call through one of the two, in turn, is the run of the bare optimizer."""
    ours, bare = net(), net()
    opt = normkern.SVAG(ours.named_parameters(), l=4, stats="tensor", **OPTIONS)
    twin = normkern.SVAG(bare.named_parameters(), l=4, stats="tensor", **OPTIONS)
    ways = [inside(opt), outer(opt), opt]

    def through(k):
        return ways[k % len(ways)]

    for t in range(6):
        for model, a, b, c in ((ours, through(t), through(t + 1), through(t + 2)), (bare, twin, twin, twin)):
            give(model, 1000 + t)
            a.hold()
            c.release()
            give(model, 2 * t)
            b.hold()
            give(model, 2 * t + 1)
            c.step(max_norm=1.0)
        if t == 3:
            opt_state, twin_state = (copy.deepcopy(x.state_dict()) for x in (through(0), twin))
            through(1).load_state_dict(opt_state)
            twin.load_state_dict(twin_state)
        if t == 2:
            extra, its_twin = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(2).double())
            through(t).add_param_group({"params": [("extra", extra)], "lr": 0.2})
            twin.add_param_group({"params": [("extra", its_twin)], "lr": 0.2})
    for p, q in zip(ours.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q)
    for way in ways:
        assert torch.equal(way.stats().update_sq[:4], twin.stats().update_sq[:4])
        assert way.stats() is opt.stats()
        assert torch.equal(way.noise().trace_sigma, twin.noise().trace_sigma)
        assert way.noise().count == twin.noise().count == 3
        assert way.true_scale() == twin.true_scale()
        assert len(way.param_groups) == 2
        assert torch.equal(way.last_grad_norm, twin.last_grad_norm)
    assert {id(x.param_groups) for x in ways} == {id(opt.param_groups)}
    assert {id(x.state) for x in ways} == {id(opt.state)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_svag_with_l_1_through_a_wrapper(wrapper):
    """Where nothing was held nothing would be noticed: the second batch's gradients would be stepped."""
    ours, bare = net(), net()
    opts = [wrapper(normkern.SVAG(ours.parameters(), lr=0.1)), normkern.SVAG(bare.parameters(), lr=0.1)]
    for model, opt in zip((ours, bare), opts, strict=True):
        give(model, 0)
        opt.hold()
        give(model, 1)
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("wrapper", [Forwarding, Copied])
@pytest.mark.parametrize("cls", [normkern.SGD, normkern.SVAG])
def test_a_scaler_that_steps_the_wrapper(wrapper, cls):
    """It leaves its scale on the object that it has."""
    model, twin = net(), net()
    opt, bare = wrapper(cls(model.parameters(), lr=0.1, fused=True)), cls(twin.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros((), requires_grad=True))
    give(model, 0, scale=8.0)
    give(twin, 0)
    scaler.step(opt)
    scaler.update()
    bare.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert not hasattr(opt, "found_inf")
    assert not hasattr(opt, "grad_scale")


def test_loading_keeps_the_objects_that_wrappers_have_taken():
    """timm's Lookahead and others keep `param_groups` and `state`."""
    model = net()
    opt = normkern.SGD(model.parameters(), **OPTIONS)
    groups, state = opt.param_groups, opt.state
    give(model, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    opt.load_state_dict(saved)
    assert opt.param_groups is groups
    assert opt.state is state
    assert groups[0]["lr"] == 0.5
    assert len(state) == 4


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: torch.load(_saved(x), weights_only=False)])
def test_a_copy_has_state_of_its_own(how):
    model = net()
    opt = normkern.SVAG(model.parameters(), lr=0.1, noise_decay=0.5, max_norm=2.0, norm_type=3.0)
    give(model, 0)
    opt.hold()
    other = how(opt)
    other.release()
    assert opt._pairs.held is not None
    assert opt._run is not other._run
    assert opt._run.lock is not other._run.lock
    assert (other.max_norm, other._run.clip_options.norm_type) == (2.0, 3.0)
    assert other._pairs.noise.decay == 0.5


def _saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


def test_nothing_that_changes_is_an_attribute():
    """Whatever a method assigns to the optimizer is lost in a wrapper."""
    model = net()
    for cls in (normkern.SGD, normkern.SVAG):
        opt = cls(model.named_parameters(), momentum=0.9, lr=0.1, stats="tensor", max_norm=1.0)
        before = {k: v if isinstance(v, (str, bool)) else id(v) for k, v in vars(opt).items()}
        for t in range(3):
            if cls is normkern.SVAG:
                give(model, t)
                opt.hold()
            give(model, t + 10)
            opt.step()
        opt.stats()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.max_norm = 2.0
        opt.name_parameters(model)
        opt.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
        assert {k: v if isinstance(v, (str, bool)) else id(v) for k, v in vars(opt).items()} == before


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("attribute", ["optimizer", "_optimizer", "optim", "_base_optimizer", "original_optimizer"])
def test_monitors_look_inside(attribute, depth):
    class Wrapper:
        pass

    model = net()
    opt = normkern.SGD(model.named_parameters(), lr=0.1, weight_decay=0.1, stats="tensor")
    wrapped = opt
    for _ in range(depth):
        inner, wrapped = wrapped, Wrapper()
        setattr(wrapped, attribute, inner)
        wrapped.param_groups = opt.param_groups
    assert unwrap_optimizer(wrapped) is opt
    monitors = [normkern.EquilibriumMonitor(wrapped), normkern.AutoRateMonitor(wrapped)]
    give(model, 0)
    opt.step()
    assert all(monitor.update() for monitor in monitors)
    watch = normkern.InvarianceMonitor(wrapped, names=["0.weight"], threshold=10.0)
    watch.update()
    assert watch.report()["0.weight"]["updates"] == 1


def test_a_wrapper_of_another_optimizer_is_named():
    wrapped = Proxy(torch.optim.SGD(net().parameters(), lr=0.1))
    text = r"EquilibriumMonitor: optimizer expected a normkern.SGD, AdamW or SVAG, .* got torch.optim.SGD as Proxy.optimizer"
    with pytest.raises(TypeError, match=text):
        normkern.EquilibriumMonitor(wrapped)
    with pytest.raises(TypeError, match=r"A: optimizer expected a normkern.SGD or SVAG, .* got int"):
        expect_sgd(3, "A")
    with pytest.raises(ValueError, match=r"got Proxy around SGD"):
        normkern.InvarianceMonitor(Proxy(torch.optim.SGD(net().parameters(), lr=0.1)))


def test_a_wrapper_that_is_not_known_is_named_with_its_attribute():
    class Wrapper:
        def __init__(self, optimizer):
            self.inner = optimizer

    optimizer = normkern.SGD(nn.Linear(2, 2).parameters(), lr=0.1, stats="tensor")
    with pytest.raises(TypeError, match=r"^EquilibriumMonitor: .* got Wrapper; pass its \.inner$"):
        normkern.EquilibriumMonitor(Wrapper(optimizer))


def test_wrappers_in_a_cycle_are_left():
    class Wrapper:
        param_groups = ()

    a, b = Wrapper(), Wrapper()
    a.optimizer, b.optimizer = b, a
    assert unwrap_optimizer(a) in (a, b)
