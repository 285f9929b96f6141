"""normkern.SGD against torch.optim.SGD's for-loop: steps, state, checkpoints, scaler, refusals."""

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory import same_bits
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import optim_error_inputs_func_sgd, optim_inputs_func_sgd

import normkern

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (0,), (1,), (33,), (16, 3), (8, 4, 3, 3), (40000,)]
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


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=make, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(*lists, seed, skip=()):
    make = torch.Generator().manual_seed(seed)
    for i, twins in enumerate(zip(*lists, strict=True)):
        g = torch.randn(twins[0].shape, generator=make, dtype=torch.float64)
        for p in twins:
            p.grad = None if i in skip else g.to(p.dtype)


def assert_follow(ours, theirs, dtype=torch.float32, steps=1):
    """Within rounding of each other; `theirs` may be more precise."""
    eps = torch.finfo(dtype).eps
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a.detach().double(),
            b.detach().double(),
            rtol=4 * steps * eps,
            atol=8 * steps * eps,
            msg=lambda m, i=i: f"[{i}] {m}",
        )


# ---- Steps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_torch(variant, dtype):
    """float64 and float32 follow torch; low precision follows torch in float64, step by step from the same state."""
    exact_dtype = torch.float64 if dtype in (torch.bfloat16, torch.float16) else dtype
    ours = parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().to(exact_dtype)) for p in ours]
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


def test_closure_runs_with_gradients_and_its_value_is_returned():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SGD([w], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 3
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.8))
    assert opt.step() is None


def test_hooks_see_the_step():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append(w[0].item()))
    opt.register_step_post_hook(lambda *_: seen.append(w[0].item()))
    opt.step()
    assert seen == [1.0, pytest.approx(0.9)]


def test_global_hooks_and_hooks_that_change_the_arguments():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        opt.register_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: seen.append("closure")), kwargs)),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    opt.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert seen == ["global pre", "closure", "post", "global post"]
    assert w[0].item() == pytest.approx(0.8)


def test_subclass_with_its_own_step_runs_hooks_once():
    class Mine(normkern.SGD):
        def step(self, closure=None):
            return super().step(closure)

    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = Mine([w], lr=0.1)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(1))
    opt.step()
    assert seen == [1]


def test_profiler_sees_the_step():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#SGD.step" in [event.name for event in profile.events()]


def test_version_counters_are_bumped():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones(3)
    opt.step()
    buffer = opt.state[w]["momentum_buffer"]
    versions = w._version, buffer._version
    opt.step()
    assert w._version > versions[0]
    assert buffer._version > versions[1]
    loss = (w * w).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


# ---- What torch's own loop steps -------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def unusual(kind, seed):
    """A parameter that no kernel takes, and a function that gives it a gradient."""
    torch.manual_seed(seed)
    if kind == "complex":
        p = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        return p, lambda: torch.randn(4, 3, dtype=torch.complex64)
    if kind == "sparse gradient":
        return nn.Parameter(torch.randn(6)), lambda: torch.sparse_coo_tensor(
            [[0, 0, 4]], torch.randn(3), (6,), check_invariants=True
        )
    if kind == "subclass":
        return torch.randn(7).as_subclass(Subclass), lambda: torch.randn(7)
    if kind == "negative bit":
        return nn.Parameter(torch.randn(7)), lambda: torch._neg_view(torch.randn(7))
    if kind == "gradient of another dtype":
        p = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        p.grad_dtype = torch.float32
        return p, lambda: torch.randn(7)
    raise AssertionError(kind)


@pytest.mark.parametrize("stats", [None, "tensor", "row"])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize(
    "kind", ["complex", "sparse gradient", "subclass", "negative bit", "gradient of another dtype"]
)
def test_torch_steps_what_the_kernel_cannot(kind, momentum, stats, caplog):
    results = []
    for optimizer in (normkern.SGD, torch.optim.SGD):
        p, gradient = unusual(kind, seed=3)
        plain = nn.Parameter(torch.ones(5))
        own = {"stats": stats} if optimizer is normkern.SGD else {"foreach": False}
        opt = optimizer([plain, p], lr=0.1, momentum=momentum, **own)
        with caplog.at_level("DEBUG", logger="normkern"):
            for _ in range(3):
                before = p.detach().clone()
                p.grad, plain.grad = gradient(), torch.ones(5)
                opt.step()
        results.append((p.detach(), plain.detach()))
        if stats and optimizer is normkern.SGD:
            moved = (p.detach() - before).abs().double().square().sum()
            first = opt.stats().slots["0.1"].start
            torch.testing.assert_close(opt.stats().update_sq[first:].sum(), moved, rtol=1e-2, atol=1e-12)
    assert_follow(*[[torch.view_as_real(r[0]) if r[0].is_complex() else r[0], r[1]] for r in results], steps=3)
    assert "params[1]" in caplog.text
    assert "torch's own loop" in caplog.text


def test_differentiable():
    w, lr = (
        torch.randn(5, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    )
    inner = w.clone()
    inner.grad = torch.ones(5, dtype=torch.float64)
    opt = normkern.SGD([inner], lr=lr, momentum=0.9, differentiable=True, stats="tensor")
    opt.step()
    inner.sum().backward()
    torch.testing.assert_close(w.grad, torch.ones(5, dtype=torch.float64))
    assert lr.grad.item() == -5
    assert opt.stats().update_sq.item() == pytest.approx(0.05)


def test_meta_and_fake_parameters():
    w = nn.Parameter(torch.empty(3, device="meta"))
    w.grad = torch.empty(3, device="meta")
    normkern.SGD([w], lr=0.1, momentum=0.9, stats="tensor").step()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        w = nn.Parameter(torch.empty(3))
        w.grad = torch.empty(3)
        normkern.SGD([w], lr=0.1, momentum=0.9).step()
    w = nn.Parameter(torch.empty(3, device="meta"))
    w.grad = torch.empty(3, device="meta")
    fused = normkern.SGD([w], fused=True)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors of supported devices"):
        fused.step()


def test_fused_has_torchs_errors():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        normkern.SGD([w], fused=True).step()
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        normkern.SGD([w], fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        normkern.SGD([w], fused=True, differentiable=True)


def test_dispatch_modes_see_the_step():
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(w, g):
        q = w.clone()
        q.grad = g
        normkern.SGD([q], lr=0.1, stats="row").step()
        return q

    traced = make_fx(step)(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(traced(torch.full((3,), 5.0), torch.full((3,), 2.0)), torch.full((3,), 4.8))
    mapped = torch.func.vmap(step)(torch.ones(2, 3), torch.tensor([[1.0] * 3, [2.0] * 3]))
    torch.testing.assert_close(mapped, torch.tensor([[0.9] * 3, [0.8] * 3]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    ours, theirs = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    a = normkern.SGD(ours, lr=0.1, momentum=0.9, stats="tensor")
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    compiled = torch.compile(a.step, backend=backend)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        compiled()
        b.step()
    assert_follow(ours, theirs, steps=3)
    assert a.stats().weight_norm.isfinite().all()


def test_lazy_modules_before_their_first_forward():
    module = nn.LazyLinear(3)
    opt = normkern.SGD(module.parameters(), lr=0.1, stats="row")
    opt.step()
    module(torch.randn(4, 2)).sum().backward()
    opt.step()
    assert opt.stats().slots == {"0.0": slice(0, 3), "0.1": slice(3, 4)}


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


# ---- torch's tables of inputs ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("wrong", optim_error_inputs_func_sgd("cpu", torch.float32), ids=lambda e: e.error_regex)
def test_torchs_own_errors(wrong):
    given_by_torch = wrong.optimizer_error_input
    with pytest.raises(wrong.error_type, match=wrong.error_regex):
        normkern.SGD(given_by_torch.params, **given_by_torch.kwargs)


# ---- Checkpoints ------------------------------------------------------------------------------------------------------------


def trained(optimizer, steps=3, **options):
    params = parameters()
    opt = optimizer(params, lr=0.1, momentum=0.9, **options)
    for t in range(steps):
        give_gradients(params, seed=t)
        opt.step()
    return params, opt


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(
    ("source", "target"),
    [(normkern.SGD, torch.optim.SGD), (torch.optim.SGD, normkern.SGD), (normkern.SGD, normkern.SGD)],
)
def test_checkpoints_both_ways(source, target, weights_only):
    params, opt = trained(source)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = target(twins, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=weights_only))
    for t in range(3):
        give_gradients(params, twins, seed=10 + t)
        opt.step()
        other.step()
    assert_follow(params, twins, steps=3)


def test_checkpoint_has_torchs_entries():
    _, ours = trained(normkern.SGD)
    _, theirs = trained(torch.optim.SGD)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["state"].keys() == b["state"].keys()
    assert all(x.keys() == y.keys() for x, y in zip(a["state"].values(), b["state"].values(), strict=True))
    assert set(b["param_groups"][0]) <= set(a["param_groups"][0])
    assert set(a["param_groups"][0]) - set(b["param_groups"][0]) == {"stats", "decay"}
    w = nn.Parameter(torch.ones(1))
    w.grad = torch.ones(1)
    plain = normkern.SGD([w])
    plain.step()
    assert plain.state_dict()["state"] == {}


def test_old_checkpoints():
    params, opt = trained(normkern.SGD, stats="row", maximize=True)
    saved = opt.state_dict()
    saved["state"][3] = {"momentum_buffer": None}
    for key in ("maximize", "foreach", "differentiable", "fused", "stats", "decay"):
        del saved["param_groups"][0][key]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = normkern.SGD(twins, lr=0.5, maximize=True, stats="tensor")
    other.load_state_dict(saved)
    assert other.param_groups[0]["stats"] == "tensor", (
        "an option that the checkpoint lacks keeps the constructor's value"
    )
    assert other.param_groups[0]["maximize"] is True
    give_gradients(twins, seed=0)
    other.step()
    torch.testing.assert_close(other.state[twins[3]]["momentum_buffer"], -twins[3].grad)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(way):
    params, opt = trained(normkern.SGD, fused=True, stats="tensor")
    if way == "deepcopy":
        twins, other = copy.deepcopy((params, opt))
    elif way == "pickle":
        twins, other = pickle.loads(pickle.dumps((params, opt)))
    else:
        file = io.BytesIO()
        torch.save((params, opt), file)
        file.seek(0)
        twins, other = torch.load(file, weights_only=False)
    assert other._step_supports_amp_scaling
    give_gradients(params, twins, seed=9)
    opt.step()
    other.step()
    assert all(same_bits(a, b) for a, b in zip(params, twins, strict=True))
    assert torch.equal(opt.stats().update_sq, other.stats().update_sq)
    public = {k for k in vars(opt) if not k.startswith("_")}
    assert public == {k for k in vars(other) if not k.startswith("_")}


def corrupted():
    def change(f):
        _, opt = trained(normkern.SGD)
        saved = copy.deepcopy(opt.state_dict())
        f(saved)
        return saved

    def drop(key):
        return change(lambda s: s.pop(key))

    def put(i, value):
        return change(lambda s: s["state"][i].update(momentum_buffer=value))

    def group(**values):
        return change(lambda s: s["param_groups"][0].update(values))

    yield "no dict", [1, 2], r"expected a dict, got list"
    yield "no state", drop("state"), r"got one without 'state'"
    yield "no groups", drop("param_groups"), r"got one without 'param_groups'"
    yield "no params", change(lambda s: s["param_groups"][0].pop("params")), r"got one without 'params'"
    yield (
        "too many groups",
        change(lambda s: s["param_groups"].append(s["param_groups"][0])),
        r"different number of parameter groups",
    )
    yield "fewer params", change(lambda s: s["param_groups"][0]["params"].pop()), r"doesn't match the size"
    yield "shape", put(3, torch.ones(7)), r"params'\]\[3\]: momentum_buffer expected shape \(33,\), got \(7,\)"
    yield "no tensor", put(3, "x"), r"params'\]\[3\]: momentum_buffer expected a tensor, got str"
    yield "entry", change(lambda s: s["state"].update({3: [1]})), r"params'\]\[3\] expected a dict, got list"
    yield "lr", group(lr="fast"), r"param_groups\[0\]: lr expected a number, got 'fast'"
    yield (
        "lr shape",
        group(lr=torch.ones(3)),
        r"param_groups\[0\]: lr expected one number, got a tensor of shape \(3,\)",
    )
    yield "momentum", group(momentum=None), r"param_groups\[0\]: momentum expected a number, got None"
    yield "stats", group(stats="all"), r'param_groups\[0\]: stats expected None, "tensor" or "row", got \'all\''
    yield "decay", group(decay="linear"), r'param_groups\[0\]: decay expected "coupled", got \'linear\''


@pytest.mark.parametrize(("saved", "text"), [c[1:] for c in corrupted()], ids=[c[0] for c in corrupted()])
def test_corrupted_checkpoint_changes_nothing(saved, text):
    params, opt = trained(normkern.SGD)
    twins, other = trained(normkern.SGD)
    with pytest.raises(ValueError, match=text):
        opt.load_state_dict(saved)
    give_gradients(params, twins, seed=5)
    opt.step()
    other.step()
    assert all(same_bits(a, b) for a, b in zip(params, twins, strict=True))


# ---- GradScaler ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [True, None])
def test_grad_scaler(fused, unscale_first):
    ours, theirs = parameters(), parameters()
    a = normkern.SGD(ours, lr=0.1, momentum=0.9, fused=fused, stats="tensor")
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for t in range(6):
        give_gradients(ours, theirs, seed=t)
        scale = scaler.get_scale()
        scaler.scale(torch.ones(()))
        bad = t in (0, 3)  # the very first step, and a later one
        for i, p in enumerate(ours):
            p.grad.mul_(scale)
            if bad and i == 6:
                p.grad[0] = torch.inf
        before = [p.detach().clone() for p in ours], copy.deepcopy(a.state_dict())
        scaled = [p.grad.clone() for p in ours]
        if unscale_first:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if bad:
            assert all(same_bits(p, q) for p, q in zip(ours, before[0], strict=True))
            assert before[1]["state"].keys() == a.state_dict()["state"].keys(), "a skipped step made a buffer"
        else:
            b.step()
            torch.testing.assert_close(a.stats().grad_sq, torch.stack([p.grad.double().square().sum() for p in theirs]))
        if fused and not unscale_first:
            assert all(torch.equal(p.grad, g) for p, g in zip(ours, scaled, strict=True)), "the gradients were written"
        assert_follow(ours, theirs, steps=t + 1)
    assert not hasattr(a, "found_inf")


def test_skipped_first_step_leaves_no_statistics():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], fused=True, stats="tensor")
    opt.found_inf = torch.ones(1)
    opt.step()
    with pytest.raises(RuntimeError, match="expected a step before it"):
        opt.stats()


# ---- Bad input: nothing is written -------------------------------------------------------------------------------------------


def bad_steps():
    def resized(p):
        p[1].data = torch.ones(2, 2)

    def integer(p):
        p[1].requires_grad_(False)
        p[1].data, p[1].grad = torch.ones(p[1].shape, dtype=torch.int64), None
        p[1].grad = torch.ones(p[1].shape, dtype=torch.int64)

    def expanded(p):
        p[1].data = torch.ones(1).expand(p[1].shape)

    def overlapping(p):
        base = torch.ones(1000)
        p[0].data, p[1].data = base[:48].view(16, 3), base[20:68].view(16, 3)

    yield (
        "shape",
        resized,
        ValueError,
        r"SGD.step: param_groups\[1\]: grads\[0\] has shape \(16, 3\) but params\[0\] has shape \(2, 2\)",
    )
    yield (
        "integer",
        integer,
        RuntimeError,
        r"SGD.step: param_groups\[1\]: params\[0\] is .*int64 on cpu; expected a floating point or complex",
    )
    yield "expanded", expanded, ValueError, r"SGD.step: param_groups\[1\]: params\[0\] of shape \(16, 3\) is expanded"
    yield (
        "overlap",
        overlapping,
        ValueError,
        r"params\[0\] of param_groups\[1\] partially overlaps params\[0\] of param_groups\[0\]",
    )


@pytest.mark.parametrize(("spoil", "error", "text"), [c[1:] for c in bad_steps()], ids=[c[0] for c in bad_steps()])
def test_error_in_the_last_group_leaves_the_first_unwritten(spoil, error, text):
    params = parameters([(16, 3), (16, 3)])
    opt = normkern.SGD([{"params": [params[0]]}, {"params": [params[1]]}], lr=0.1, momentum=0.9)
    give_gradients(params, seed=0)
    opt.step()
    spoil(params)
    before = [p.detach().clone() for p in params], opt.state[params[0]]["momentum_buffer"].clone()
    with pytest.raises(error, match=text):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], before[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": torch.ones(2)}, r"SGD.step: param_groups\[0\]: lr expected one number, got a tensor of shape \(2,\)"),
        ({"lr": "fast"}, r"param_groups\[0\]: lr expected a number, got 'fast'"),
        ({"weight_decay": None}, r"param_groups\[0\]: weight_decay expected a number, got None"),
        ({"stats": "column"}, r"param_groups\[0\]: stats expected None, \"tensor\" or \"row\", got 'column'"),
        ({"decay": "linear"}, r"param_groups\[0\]: decay expected \"coupled\", got 'linear'"),
    ],
)
def test_bad_group_options(options, text):
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    opt.param_groups[0].update(options)
    with pytest.raises(ValueError, match=text):
        opt.step()
    assert w.detach().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"stats": "all"}, "SGD: stats expected"), ({"decay": "linear"}, "SGD: decay expected \"coupled\", got 'linear'")],
)
def test_bad_constructor_options(options, text):
    with pytest.raises(ValueError, match=text):
        normkern.SGD([nn.Parameter(torch.ones(2))], **options)


def test_momentum_buffer_of_another_shape_in_the_state():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1, momentum=0.9)
    opt.state[w]["momentum_buffer"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] has shape \(4,\) but params\[0\] has shape \(3,\)"):
        opt.step()
    assert w.detach().tolist() == [1, 1, 1]


def test_two_threads_step_two_optimizers():
    results = []

    def train():
        params, opt = parameters([(200_000,), (300, 300)]), None
        opt = normkern.SGD(params, lr=0.01, momentum=0.9, stats="tensor")
        for t in range(20):
            give_gradients(params, seed=t)
            opt.step()
        results.append([*params, opt.stats().update_sq])

    threads = [threading.Thread(target=train) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    train()
    assert len(results) == 3
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(8,), (300_000,)], ids=str)
def test_one_optimizer_in_four_threads_takes_every_step(shape):
    params = [nn.Parameter(torch.zeros(shape)) for _ in range(6)]
    opt = normkern.SGD(params, lr=1.0, stats="tensor")
    for p in params:
        p.grad = torch.full(shape, -1.0)
    steps = 400 if shape == (8,) else 20

    def train():
        for _ in range(steps):
            opt.step()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((p == 4 * steps).all() for p in params)


# ---- A life of an optimizer --------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Any sequence of steps, late gradients, edits of groups, saving and loading, against torch's for-loop in float64."""

    @initialize(
        momentum=st.sampled_from([0.0, 0.5, 0.9]),
        nesterov=st.booleans(),
        stats=st.sampled_from([None, "tensor", "row"]),
    )
    def begin(self, momentum, nesterov, stats):
        self.time = 0
        self.shapes = [(5,), (3, 4), (), (2, 2, 2)]
        self.ours, self.theirs = (parameters(self.shapes, torch.float64) for _ in range(2))
        options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
        self.a = normkern.SGD(self.ours, stats=stats, **options)
        self.b = torch.optim.SGD(self.theirs, foreach=False, **options)

    @rule(skip=st.sets(st.integers(0, 7)), layout=st.sampled_from(["plain", "strided", "expanded"]))
    def step(self, skip, layout):
        self.time += 1
        give_gradients(self.ours, self.theirs, seed=self.time, skip=skip)
        for p, q in zip(self.ours, self.theirs, strict=True):
            if p.grad is not None and layout == "strided":
                p.grad = torch.stack([p.grad, p.grad], -1)[..., 0]
            if p.grad is not None and layout == "expanded":
                p.grad = torch.tensor(0.5, dtype=torch.float64).expand(p.shape)
                q.grad = p.grad.contiguous()
        self.a.step()
        self.b.step()

    @rule(
        key=st.sampled_from(["lr", "weight_decay", "dampening", "momentum", "maximize"]),
        value=st.sampled_from([0.0, 0.01, 0.3]),
        group=st.integers(0, 3),
    )
    def edit(self, key, value, group):
        for opt in (self.a, self.b):
            g = opt.param_groups[group % len(opt.param_groups)]
            if g["nesterov"] and key in ("dampening", "momentum"):
                return
            g[key] = bool(value) if key == "maximize" else value

    @precondition(lambda self: len(self.ours) < 8)
    @rule(shape=st.sampled_from([(4,), (2, 3)]), lr=st.sampled_from([0.05, 0.2]))
    def add_group(self, shape, lr):
        for params, opt in ((self.ours, self.a), (self.theirs, self.b)):
            params += parameters([shape], torch.float64, seed=len(params))
            opt.add_param_group({"params": params[-1:], "lr": lr})

    @rule(swap=st.booleans())
    def save_and_load(self, swap):
        a, b = copy.deepcopy(self.a.state_dict()), copy.deepcopy(self.b.state_dict())
        self.a.load_state_dict(b if swap else a)
        self.b.load_state_dict(a if swap else b)

    @rule()
    def copy_all(self):
        self.ours, self.a = copy.deepcopy((self.ours, self.a))

    @invariant()
    def follow(self):
        if not hasattr(self, "a"):
            return
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
            v, u = self.a.state.get(p, {}).get("momentum_buffer"), self.b.state.get(q, {}).get("momentum_buffer")
            assert (v is None) == (u is None)
            if v is not None:
                torch.testing.assert_close(v, u, rtol=1e-9, atol=1e-9)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@settings(deadline=None, max_examples=50)
@given(
    lr=st.floats(1e-4, 1.0), momentum=st.floats(0, 0.99), dampening=st.floats(0, 1), weight_decay=st.floats(0, 0.5),
    maximize=st.booleans(), n=st.integers(0, 70), dtype=st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_any_hyperparameters(lr, momentum, dampening, weight_decay, maximize, n, dtype):
    ours, theirs = parameters([(n,)], dtype), parameters([(n,)], torch.float64)
    theirs[0].data.copy_(ours[0].data)
    options = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    a, b = normkern.SGD(ours, **options), torch.optim.SGD(theirs, foreach=False, **options)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        theirs[0].grad.copy_(ours[0].grad)
        a.step()
        b.step()
    assert_follow(ours, theirs, dtype, steps=8)
