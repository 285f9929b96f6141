"""group["lr_multipliers"]: a learning rate for each parameter, as one group for each would have it."""

import io

import pytest
import torch
from support.memory import same_bits
from support.twins import DTYPES, give_gradients, parameters
from torch import nn

import normkern

MULTIPLIERS = [1.0, 0.5, 0.0, 2.0, 0.3, 1.5, 0.1]


def single_groups(params, multipliers=MULTIPLIERS):
    return [{"params": [p], "lr": 0.1 * m} for p, m in zip(params, multipliers, strict=True)]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [list, tuple, torch.tensor])
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_a_group_for_each_to_the_bit(dtype, given, max_norm):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    multipliers = torch.tensor(MULTIPLIERS, dtype=torch.float64) if given is torch.tensor else given(MULTIPLIERS)
    options = {"momentum": 0.9, "weight_decay": 0.1, "stats": "tensor"}
    a = normkern.SGD([{"params": ours, "lr_multipliers": multipliers}], lr=0.1, **options)
    b = normkern.SGD(single_groups(theirs), **options)
    for t, skip in enumerate([(0, 3), (), (5,)]):
        give_gradients(ours, theirs, seed=t, skip=skip)
        a.step(max_norm=max_norm)
        b.step(max_norm=max_norm)
        assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
        assert same_bits(a.stats().effective_lr, b.stats().effective_lr)
        assert same_bits(a.stats().update_sq, b.stats().update_sq)


def test_may_change_between_steps_and_stay_with_what_was_measured():
    ours, theirs = parameters(), parameters()
    a = normkern.SGD(ours, lr=0.1, stats="tensor")
    b = normkern.SGD(single_groups(theirs, [1.0] * 7), stats="tensor")
    assert a.param_groups[0]["lr_multipliers"] is None
    for t, multipliers in enumerate([[1.0] * 7, MULTIPLIERS, torch.ones(7)]):
        give_gradients(ours, theirs, seed=t)
        a.param_groups[0]["lr_multipliers"] = multipliers
        for group, m in zip(b.param_groups, multipliers, strict=True):
            group["lr"] = 0.1 * float(m)
        a.step()
        b.step()
        if isinstance(multipliers, torch.Tensor):
            multipliers.zero_()
        torch.testing.assert_close(a.stats().effective_lr, b.stats().effective_lr)
        assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


def test_svag():
    ours, theirs = parameters(), parameters()
    a = normkern.SVAG([{"params": ours, "lr_multipliers": MULTIPLIERS}], lr=0.1, l=2, momentum=0.9)
    b = normkern.SVAG(single_groups(theirs), l=2, momentum=0.9)
    for t in range(2):
        give_gradients(ours, theirs, seed=t)
        a.hold()
        b.hold()
        give_gradients(ours, theirs, seed=t + 7)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_checkpoints():
    ours, theirs = parameters(), parameters()
    a = normkern.SGD([{"params": ours, "lr_multipliers": torch.tensor(MULTIPLIERS)}], lr=0.1)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b = normkern.SGD(theirs, lr=0.1)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(b.param_groups[0]["lr_multipliers"], torch.tensor(MULTIPLIERS))
    give_gradients(ours, theirs, seed=0)
    a.step()
    b.step()
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
    saved = torch.optim.SGD(theirs, lr=0.1).state_dict()  # knows of none
    fresh = normkern.SGD(theirs, lr=0.1)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr_multipliers"] is None
    torch.optim.SGD(theirs, lr=0.1).load_state_dict(a.state_dict())
    saved = a.state_dict()
    saved["param_groups"][0]["lr_multipliers"] = [1.0]
    with pytest.raises(ValueError, match=r"SGD.load_state_dict: param_groups\[0\]: lr_multipliers expected 7 numbers"):
        a.load_state_dict(saved)


def two(**more):
    params = parameters([(3,), (4,)])
    give_gradients(params, seed=0)
    return params, normkern.SGD(params, lr=0.1, stats="tensor", **more)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([1.0], "lr_multipliers expected 2 numbers, one for each parameter of the group, got 1"),
        (torch.ones(2, 1), r"got a tensor of shape \(2, 1\)"),
        ([1.0, -2.0], r"lr_multipliers\[1\] expected a finite number of at least 0, got -2.0"),
        ([float("nan"), 1.0], r"lr_multipliers\[0\] expected a finite number of at least 0, got nan"),
        (3.0, "expected None, a sequence of numbers or a tensor, got float"),
    ],
)
def test_refusals(given, text):
    params, opt = two()
    opt.add_param_group({"params": parameters([(5,)], seed=1)})
    before = [p.detach().clone() for p in params]
    opt.param_groups[0]["lr_multipliers"] = given
    with pytest.raises(ValueError, match=r"SGD.step: param_groups\[0\]: .*" + text):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    with pytest.raises(ValueError, match=r"SGD: param_groups\[2\]: .*" + text):
        opt.add_param_group({"params": parameters([(1,), (1,)], seed=2), "lr_multipliers": given})
    assert len(opt.param_groups) == 2


def test_who_knows_one_learning_rate_for_a_group_says_so():
    _, opt = two(decay="exponential", weight_decay=0.1)
    opt.param_groups[0].update(lr_multipliers=[1.0, 2.0], scale_invariant=True)
    with pytest.raises(ValueError, match=r'lr_multipliers expected None with decay="exponential"'):
        opt.step()
    _, opt = two()
    monitor = normkern.EquilibriumMonitor(opt)
    opt.param_groups[0]["lr_multipliers"] = [1.0, 2.0]
    opt.step()
    with pytest.raises(ValueError, match=r"EquilibriumMonitor: param_groups\[0\]: lr_multipliers expected None"):
        monitor.update()
    with pytest.raises(ValueError, match=r"AutoRateMonitor: param_groups\[0\]: lr_multipliers expected None"):
        normkern.AutoRateMonitor(opt)
    with pytest.raises(ValueError, match=r"lr_multipliers expected None, as one learning rate takes the place of"):
        normkern.EquivalentExponentialLR(opt, 0.1)


def test_a_module_of_its_own_is_not_needed():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    opt = normkern.SGD([{"params": [w], "lr_multipliers": [0.5]}], lr=torch.tensor(0.2))
    opt.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.9))
