"""normkern.AdamW and Adam step as torch's loops do: the numbers, for every option, layout and order of events."""

import copy

import pytest
import torch
from support.memory import same_bits
from support.twins import DTYPES, assert_follow, give_gradients, parameters
from torch import nn
from torch.testing._internal import common_optimizers as torchs

import normkern

from .test_steps import layouts

pytestmark = pytest.mark.usefixtures("device")

KINDS = {"AdamW": (normkern.AdamW, torch.optim.AdamW), "Adam": (normkern.Adam, torch.optim.Adam)}
INPUTS = [
    ("AdamW", i) for i in torchs.optim_inputs_func_adamw("cpu")
] + [("Adam", i) for i in torchs.optim_inputs_func_adam("cpu")]  # fmt: skip
ERRORS = [
    ("AdamW", e) for e in torchs.optim_error_inputs_func_adamw("cpu", torch.float32)
] + [("Adam", e) for e in torchs.optim_error_inputs_func_adam("cpu", torch.float32)]  # fmt: skip
VARIANTS = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.7), "eps": 1e-3},
    "no averages": {"betas": (0.0, 0.0), "eps": 1e-2},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.02, dtype=torch.float64)},
    "tensor betas": {"betas": tuple(torch.tensor([0.8, 0.9], dtype=torch.float64))},
    "fused": {"weight_decay": 0.1, "fused": True},
    "foreach": {"foreach": True},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "amsgrad maximize": {"amsgrad": True, "maximize": True},
}
both = pytest.mark.parametrize("kind", KINDS)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_torch(kind, variant, dtype):
    """float64 and float32 follow torch; low precision follows torch in float64, with averages in float32."""
    is_low = dtype in (torch.bfloat16, torch.float16)
    if is_low and "amsgrad" in variant:
        pytest.skip("torch's own loop, whose averages are in low precision")
    exact_dtype = torch.float64 if is_low else dtype
    ours = parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().to(exact_dtype, copy=True)) for p in ours]
    options = {"lr": 0.02, **VARIANTS[variant]}
    a = KINDS[kind][0](ours, **copy.deepcopy(options), state_dtype=torch.float32 if is_low else None)
    b = KINDS[kind][1](theirs, **{**copy.deepcopy(options), "fused": None, "foreach": False})
    for t in range(4):
        give_gradients(ours, theirs, seed=t)
        if exact_dtype != dtype:
            for p, q in zip(ours, theirs, strict=True):
                q.grad.copy_(p.grad)
        a.step()
        b.step()
        assert_follow(ours, theirs, dtype, steps=t + 1)
    for p, q in zip(ours, theirs, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert a.state[p]["step"] == 4


def test_bfloat16_averages_follow_loosely():
    ours, theirs = parameters(dtype=torch.bfloat16), parameters(dtype=torch.float64)
    a, b = normkern.AdamW(ours, lr=0.02), torch.optim.AdamW(theirs, lr=0.02, foreach=False)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert_follow(ours, theirs, torch.bfloat16, steps=3)
    assert a.state[ours[-1]]["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "given_by_torch"), INPUTS, ids=lambda x: getattr(x, "desc", x))
def test_torchs_own_inputs(kind, given_by_torch):
    ours, theirs = parameters(), parameters()
    a = KINDS[kind][0](ours, **copy.deepcopy(given_by_torch.kwargs))
    b = KINDS[kind][1](theirs, **copy.deepcopy(given_by_torch.kwargs))
    for t in range(5):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert_follow(ours, theirs, steps=5)
    assert repr(a).startswith(f"{kind} (\nParameter Group 0\n    amsgrad: ")


@pytest.mark.parametrize(("kind", "wrong"), ERRORS, ids=lambda x: getattr(x, "error_regex", x))
def test_torchs_own_errors(kind, wrong):
    given = wrong.optimizer_error_input
    params = parameters([(3,)]) if given.params is None else given.params
    with pytest.raises(wrong.error_type, match=wrong.error_regex):
        KINDS[kind][0](params, **given.kwargs)


@both
def test_defaults_are_torchs(kind):
    ours, theirs = (optimizer(parameters()) for optimizer in KINDS[kind])
    assert theirs.defaults.items() <= ours.defaults.items()
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, torch.optim.Adam)


def test_adam_with_decoupled_decay_is_adamw():
    ours, theirs = parameters(), parameters()
    a = normkern.Adam(ours, lr=0.02, weight_decay=0.3, decoupled_weight_decay=True)
    b = normkern.AdamW(theirs, lr=0.02, weight_decay=0.3)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


@both
def test_late_and_missing_gradients(kind, caplog):
    """Every parameter has its own count of steps, and its own bias correction."""
    caplog.set_level("DEBUG", logger="normkern")
    ours, theirs = parameters(), parameters()
    a = KINDS[kind][0](ours, lr=0.1, stats="tensor")
    b = KINDS[kind][1](theirs, lr=0.1, foreach=False)
    for t, skip in enumerate([(0, 3, 6), (3,), (), (1, 6), ()]):
        give_gradients(ours, theirs, seed=t, skip=skip)
        a.step()
        b.step()
        assert_follow(ours, theirs, steps=t + 1)
        assert a.stats().weight_sq.isnan().nonzero().flatten().tolist() == list(skip)
        assert [p in a.state for p in ours] == [p in b.state for p in theirs]
    steps = [[opt.state[p]["step"].item() for p in params] for opt, params in ((a, ours), (b, theirs))]
    assert steps[0] == steps[1]
    assert len(set(steps[0])) > 1
    assert "torch's own loop" not in caplog.text


@pytest.mark.parametrize("of_weight", ["contiguous", "transposed", "channels_last", "slice"])
@pytest.mark.parametrize("of_grad", ["contiguous", "slice", "expanded"])
def test_layouts(of_weight, of_grad):
    base = torch.randn(6, 5, 4, 3)
    ours = nn.Parameter(dict(layouts(base))[of_weight].clone(memory_format=torch.preserve_format))
    if of_weight == "slice":
        ours = nn.Parameter(dict(layouts(base))["slice"])
    theirs = nn.Parameter(base.clone())
    a = normkern.AdamW([ours], lr=0.1, stats="row")
    b = torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for _ in range(3):
        if of_grad == "expanded":
            g = torch.randn(6, 1, 4, 1).expand(6, 5, 4, 3)
        else:
            g = dict(layouts(torch.randn(6, 5, 4, 3)))[of_grad]
        ours.grad, theirs.grad = g, g.contiguous()
        a.step()
        b.step()
    for key in ("exp_avg", "exp_avg_sq"):
        assert_follow([ours, a.state[ours][key]], [theirs, b.state[theirs][key]], steps=3)
    torch.testing.assert_close(
        a.stats().next_weight_sq, theirs.detach().double().square().sum((1, 2, 3)), rtol=1e-5, atol=0
    )


@both
def test_hyperparameters_are_read_at_every_step(kind):
    ours, theirs = parameters(), parameters()
    a, b = KINDS[kind][0](ours, lr=0.1), KINDS[kind][1](theirs, lr=0.1, foreach=False)
    changes = [{"lr": 0.2}, {"betas": (0.5, 0.9)}, {"eps": 1e-2}, {"maximize": True}, {"weight_decay": 0.3},
               {"amsgrad": True}, {"amsgrad": False}, {"lr": torch.tensor(0.01)}, {"betas": (0, 0.5)}]  # fmt: skip
    for t, change in enumerate(changes):
        for opt, params in ((a, ours), (b, theirs)):
            opt.param_groups[0].update(change)
            for p in params if change == {"amsgrad": True} else ():  # which torch makes at the first step only
                opt.state[p]["max_exp_avg_sq"] = opt.state[p]["exp_avg_sq"].clone()
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
        assert_follow(ours, theirs, steps=t + 1)


@both
def test_param_groups_with_their_own_options(kind):
    ours, theirs = parameters(), parameters()

    def groups(p):
        return [
            {"params": p[:2], "lr": 0.01},
            {"params": p[2:4], "betas": (0.5, 0.6), "weight_decay": 0.5},
            {"params": []},
            {"params": p[4:], "eps": 1e-2},
        ]

    a = KINDS[kind][0](groups(ours), lr=0.1)
    b = KINDS[kind][1](groups(theirs), lr=0.1, foreach=False)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert_follow(ours, theirs, steps=3)


@pytest.mark.parametrize("schedule", ["cosine", "one cycle", "plateau"])
def test_schedulers(schedule):
    """One cycle moves beta1 as well."""
    ours, theirs = parameters(), parameters()
    pairs = [(normkern.AdamW(ours, lr=0.02), ours), (torch.optim.AdamW(theirs, lr=0.02, foreach=False), theirs)]
    make = {
        "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6),
        "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=7),
        "plateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    }[schedule]
    schedulers = [make(opt) for opt, _ in pairs]
    for t in range(6):
        give_gradients(ours, theirs, seed=t)
        for (opt, _), scheduler in zip(pairs, schedulers, strict=True):
            opt.step()
            scheduler.step(*([1.0] if schedule == "plateau" else []))
    assert pairs[0][0].param_groups[0]["lr"] == pairs[1][0].param_groups[0]["lr"] != 0.02
    assert_follow(ours, theirs, steps=6)


def test_closures_hooks_and_what_step_returns():
    w, seen = nn.Parameter(torch.ones(3)), []
    opt = normkern.AdamW([w], lr=0.1)
    opt.register_step_pre_hook(lambda *_: seen.append(w[0].item()))
    opt.register_step_post_hook(lambda *_: seen.append(w[0].item()))

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 3
    assert seen == [1.0, pytest.approx(0.899)]
    assert opt.step() is None


def test_version_counters_are_raised():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.AdamW([w])
    opt.step()
    tensors = [w, *opt.state[w].values()]
    before = [x._version for x in tensors]
    opt.step()
    assert all(x._version > v for x, v in zip(tensors, before, strict=True))


@both
@pytest.mark.parametrize("case", ["complex", "subclass", "negative bit", "amsgrad"])
def test_torch_steps_what_the_kernel_cannot(kind, case, caplog):
    from .test_fallback import unusual

    results, moved = [], None
    for optimizer in KINDS[kind]:
        p, gradient = (nn.Parameter(torch.randn(7)), None) if case == "amsgrad" else unusual(case, seed=3)
        torch.manual_seed(1)
        gradient = gradient or (lambda: torch.randn(7))
        if case == "amsgrad":
            p.data = torch.arange(7.0)
        plain = nn.Parameter(torch.ones(5))
        own = {"stats": "tensor"} if optimizer is KINDS[kind][0] else {"foreach": False}
        opt = optimizer([plain, p], lr=0.02, amsgrad=case == "amsgrad", **own)
        with caplog.at_level("DEBUG", logger="normkern"):
            for _ in range(3):
                before = p.detach().clone()
                p.grad, plain.grad = gradient(), torch.ones(5)
                opt.step()
        results.append((p.detach(), plain.detach()))
        if own.get("stats"):
            moved = (p.detach() - before).abs().double().square().sum()
            torch.testing.assert_close(opt.stats().update_sq[1], moved, rtol=1e-2, atol=1e-12)
        assert opt.state[p]["step"] == 3
    assert_follow(*[[torch.view_as_real(r[0]) if r[0].is_complex() else r[0], r[1]] for r in results], steps=3)
    assert case == "amsgrad" or "params[1]" in caplog.text


@both
def test_sparse_gradients_are_refused_as_in_torch(kind):
    w, other = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(2))
    w.grad, other.grad = torch.sparse_coo_tensor([[0, 4]], torch.ones(2), (6,), check_invariants=True), torch.ones(2)
    opt = KINDS[kind][0]([other, w])
    with pytest.raises(RuntimeError, match=f"{kind}.step: .*does not support sparse gradients.*SparseAdam.*params.1."):
        opt.step()
    assert (other == 1).all()
    assert not opt.state


def test_a_gradient_of_another_dtype_is_refused_before_anything_is_written():
    w, other = nn.Parameter(torch.ones(6, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    w.grad_dtype = torch.float32
    w.grad, other.grad = torch.ones(6), torch.ones(2)
    opt = normkern.AdamW([other, w], lr=0.5, weight_decay=0.0)
    with pytest.raises(RuntimeError, match=r"AdamW.step: .*grads\[1\] is torch.float32 .* expected one dtype"):
        opt.step()
    assert (other == 1).all()
    assert not opt.state
    opt.param_groups[0]["master_weights"] = True
    opt.step()
    torch.testing.assert_close(opt.state[w]["master_weight"], torch.full((6,), 0.5))


def test_differentiable():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    grads = []
    for optimizer in KINDS["AdamW"]:
        inner = w.clone()
        inner.grad = torch.ones(5, dtype=torch.float64)
        optimizer([inner], lr=0.1, weight_decay=0.5, differentiable=True).step()
        grads.append(torch.autograd.grad(inner.square().sum(), w)[0])
    assert torch.equal(*grads)


def test_meta_and_fake_parameters():
    from torch._subclasses.fake_tensor import FakeTensorMode

    w = nn.Parameter(torch.empty(3, device="meta"))
    w.grad = torch.empty(3, device="meta")
    normkern.AdamW([w], stats="tensor").step()
    with FakeTensorMode():
        w = nn.Parameter(torch.empty(3))
        w.grad = torch.empty(3)
        normkern.AdamW([w]).step()


def test_float64_counts_under_a_float64_default():
    torch.set_default_dtype(torch.float64)
    try:
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        ours, theirs = normkern.AdamW([w]), torch.optim.AdamW([w])
        ours.step()
        theirs.step()
        assert ours.state[w]["step"].dtype == theirs.state[w]["step"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
