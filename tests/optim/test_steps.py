"""normkern.SGD steps as torch.optim.SGD's for-loop does: the numbers, for every option, layout and order of events."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from support.twins import DTYPES, assert_follow, give_gradients, parameters
from torch import nn
from torch.testing._internal.common_optimizers import optim_inputs_func_sgd

import normkern

pytestmark = pytest.mark.usefixtures("device")

VARIANTS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"momentum": 0.9, "weight_decay": 0.01, "maximize": True},
    "plain maximize": {"maximize": True},
    "tensor lr": {"lr": torch.tensor(0.05), "momentum": 0.5},
    "fused": {"momentum": 0.9, "fused": True},
    "foreach": {"momentum": 0.9, "foreach": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_torch(variant, dtype):
    """float64 and float32 follow torch; low precision follows torch in float64, step by step from the same state."""
    exact_dtype = torch.float64 if dtype in (torch.bfloat16, torch.float16) else dtype
    ours = parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().to(exact_dtype, copy=True)) for p in ours]
    options = {"lr": 0.1, **VARIANTS[variant]}
    a = normkern.SGD(ours, **options)
    b = torch.optim.SGD(theirs, **{**options, "fused": None, "foreach": False})
    for t in range(4):
        give_gradients(ours, theirs, seed=t)
        if exact_dtype != dtype:
            for p, q in zip(ours, theirs, strict=True):
                q.grad.copy_(p.grad)
        a.step()
        b.step()
        assert_follow(ours, theirs, dtype, steps=t + 1)


@pytest.mark.parametrize("given_by_torch", optim_inputs_func_sgd("cpu"), ids=lambda i: i.desc)
def test_torchs_own_inputs(given_by_torch):
    ours, theirs = parameters(), parameters()
    a = normkern.SGD(ours, **copy.deepcopy(given_by_torch.kwargs))
    b = torch.optim.SGD(theirs, **copy.deepcopy(given_by_torch.kwargs))
    for t in range(5):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert_follow(ours, theirs, steps=5)
    assert repr(a).startswith("SGD (\nParameter Group 0\n    dampening: ")


@pytest.mark.parametrize("variant", ["momentum", "nesterov", "dampening"])
def test_late_and_missing_gradients(variant, caplog):
    caplog.set_level("DEBUG", logger="normkern")
    ours, theirs = parameters(), parameters()
    a = normkern.SGD(ours, lr=0.1, stats="tensor", **VARIANTS[variant])
    b = torch.optim.SGD(theirs, lr=0.1, foreach=False, **VARIANTS[variant])
    for t, skip in enumerate([(0, 3, 6), (3,), (), (1, 6), ()]):
        give_gradients(ours, theirs, seed=t, skip=skip)
        a.step()
        b.step()
        assert_follow(ours, theirs, steps=t + 1)
        assert a.stats().weight_sq.isnan().nonzero().flatten().tolist() == list(skip)
        assert [p in a.state for p in ours] == [p in b.state for p in theirs]
    assert "torch's own loop" not in caplog.text, "right, but slow without a word"


def layouts(x):
    yield "contiguous", x.contiguous()
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "slice", torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.pairwise
@pytest.mark.parametrize("of_weight", ["contiguous", "transposed", "channels_last", "slice"])
@pytest.mark.parametrize("of_grad", ["contiguous", "transposed", "channels_last", "slice", "expanded"])
@pytest.mark.parametrize("stats", [None, "row"])
def test_layouts(of_weight, of_grad, stats):
    base = torch.randn(6, 5, 4, 3)
    ours = nn.Parameter(dict(layouts(base))[of_weight].clone(memory_format=torch.preserve_format))
    if of_weight == "slice":
        ours = nn.Parameter(dict(layouts(base))["slice"])
        assert not ours.is_contiguous()
    theirs = nn.Parameter(base.clone())
    a = normkern.SGD([ours], lr=0.1, momentum=0.9, weight_decay=0.1, stats=stats)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
    for _ in range(3):
        if of_grad == "expanded":
            g = torch.randn(6, 1, 4, 1).expand(6, 5, 4, 3)
        else:
            g = dict(layouts(torch.randn(6, 5, 4, 3)))[of_grad]
        ours.grad, theirs.grad = g, g.contiguous()
        before = g.clone()
        a.step()
        b.step()
        assert torch.equal(g, before)
    assert_follow([ours, a.state[ours]["momentum_buffer"]], [theirs, b.state[theirs]["momentum_buffer"]], steps=3)
    if stats:
        torch.testing.assert_close(a.stats().next_weight_sq, theirs.detach().double().square().sum((1, 2, 3)))


def test_hyperparameters_are_read_at_every_step():
    ours, theirs = parameters(), parameters()
    a = normkern.SGD(ours, lr=0.1)
    b = torch.optim.SGD(theirs, lr=0.1, foreach=False)
    changes = [{"lr": 0.2}, {"momentum": 0.9}, {"nesterov": True}, {"nesterov": False, "dampening": 0.5}, {"maximize": True},
               {"weight_decay": 0.3}, {"momentum": 0}, {"momentum": 0.5}, {"lr": torch.tensor([0.01])}]  # fmt: skip
    for t, change in enumerate(changes):
        for opt in (a, b):
            opt.param_groups[0].update(change)
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
        assert_follow(ours, theirs, steps=t + 1)


def test_param_groups_with_their_own_options():
    ours, theirs = parameters(), parameters()

    def groups(p):
        return [
            {"params": p[:2], "lr": 0.01},
            {"params": p[2:4], "momentum": 0.0, "weight_decay": 0.5},
            {"params": []},
            {"params": p[4:], "nesterov": True},
        ]

    a = normkern.SGD(groups(ours), lr=0.1, momentum=0.9)
    b = torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9, foreach=False)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert_follow(ours, theirs, steps=3)
    assert ours[2] not in a.state


def test_params_need_not_be_a_list():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    opt.param_groups[0]["params"] = (w,)
    opt.step()
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.9))


def test_numpy_numbers_are_numbers():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    opt.param_groups[0].update(lr=np.array(0.5), momentum=np.float32(0), weight_decay=np.int64(0))
    opt.step()
    assert w.detach().tolist() == [0.5] * 3


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR", "CosineAnnealingLR", "StepLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_schedulers(schedule, lr):
    make = {
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12),
        "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
        "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    }[schedule]
    ours, theirs = parameters(), parameters()
    a = normkern.SGD(ours, lr=copy.deepcopy(lr), momentum=0.9)
    b = torch.optim.SGD(theirs, lr=copy.deepcopy(lr), momentum=0.9, foreach=False)
    schedules = [make(a), make(b)]
    for t in range(10):
        give_gradients(ours, theirs, seed=t)
        for opt, s in zip((a, b), schedules, strict=True):
            opt.step()
            s.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
    assert_follow(ours, theirs, steps=10)
    assert float(a.param_groups[0]["momentum"]) == float(b.param_groups[0]["momentum"])


def test_inference_mode():
    with torch.inference_mode():
        w = torch.ones(5)
        w.grad = torch.ones(5)
        opt = normkern.SGD([w], lr=0.1, momentum=0.9, stats="tensor")
        opt.step()
        opt.step()
    torch.testing.assert_close(w, torch.full((5,), 1 - 0.1 - 0.19))


def test_same_parameter_twice_steps_twice_as_in_torch():
    ours, theirs = parameters([(50,), (3,)]), parameters([(50,), (3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        a = normkern.SGD([ours[0], ours[1], ours[0]], lr=0.1, momentum=0.9, weight_decay=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        b = torch.optim.SGD([theirs[0], theirs[1], theirs[0]], lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
        assert_follow(ours, theirs, steps=t + 1)


def test_two_parameters_in_the_same_memory_step_one_after_the_other():
    memory, twin_memory = torch.randn(50), torch.empty(50)
    twin_memory.copy_(memory)
    ours, theirs = ([nn.Parameter(m), nn.Parameter(m.view(5, 10))] for m in (memory, twin_memory))
    a = normkern.SGD(ours, lr=0.1, momentum=0.9, weight_decay=0.5)
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.5, foreach=False)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
        assert_follow(ours, theirs, steps=t + 1)


def test_buffers_die_with_the_optimizer_and_with_the_state():
    """What the optimizer holds besides its state never outlives it, nor a buffer that has been replaced."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    opt = normkern.SGD(params, lr=0.1, momentum=0.9)
    opt.step()
    refs = [weakref.ref(opt.state[p]["momentum_buffer"]) for p in params]
    opt.state[params[0]]["momentum_buffer"] = torch.zeros(3)
    opt.step()
    assert refs[0]() is None
    assert refs[1]() is not None
    del opt
    assert refs[1]() is None


def test_a_cycle_of_parameter_and_optimizer_is_collected():
    """What the optimizer holds is visible to Python's collector."""

    def tied():
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = p.optimizer = normkern.SGD([p], lr=0.1, momentum=0.9)
        opt.step()
        return weakref.ref(p), weakref.ref(opt)

    refs = tied()
    gc.collect()
    assert [r() for r in refs] == [None, None]


def test_step_without_slots_has_stats():
    """A parameter without rows leaves nothing to measure, which is not an error."""
    p = nn.Parameter(torch.zeros(0, 3))
    p.grad = torch.zeros(0, 3)
    opt = normkern.SGD([p], lr=0.1, stats="row")
    opt.step()
    stats = opt.stats()
    assert stats.slots == {"0.0": slice(0, 0)}
    assert len(stats.weight_norm) == 0
