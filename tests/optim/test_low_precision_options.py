"""state_dtype, stochastic_rounding and master_weights of the optimizers: what they keep, and for how long."""

import copy
import io
import pickle

import pytest
import torch
from support.memory import same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkern

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(33,), (16, 3), (8, 4, 3, 3), ()]
OPTIONS = {
    "at random": {"stochastic_rounding": True},
    "float32 momentum": {"state_dtype": F32},
    "at random, float32 momentum": {"stochastic_rounding": True, "state_dtype": F32, "rounding_seed": 7},
    "master": {"master_weights": True},
    "master, float32 momentum": {"master_weights": True, "state_dtype": F32},
}
KINDS = {
    "sgd": (normkern.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "plain": (normkern.SGD, {"weight_decay": 0.01}),
    "nesterov": (normkern.SGD, {"momentum": 0.9, "nesterov": True, "stats": "row"}),
    "exponential": (normkern.SGD, {"momentum": 0.9, "weight_decay": 0.05, "decay": "exponential"}),
    "svag": (normkern.SVAG, {"l": 4.0, "momentum": 0.9, "weight_decay": 0.01}),
}


def parameters(dtype=BF16, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in SHAPES]


def groups(params, **more):
    """Two, so that the second one's parameters are not the first of the optimizer."""
    more = {"scale_invariant": True, "norm_buffers": [], "followers": [], **more}
    return [{"params": params[:2], **more}, {"params": params[2:], **more}]


def make(kind, params, **options):
    cls, given = KINDS[kind]
    return cls(groups(params), lr=0.05, **{**given, **options})


def gradients(params, seed, scale=1.0):
    make = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=make)).to(p.dtype)


def step(opt, params, t):
    if isinstance(opt, normkern.SVAG):
        gradients(params, 1000 + t)
        opt.hold()
    gradients(params, t)
    opt.step()


def saved(opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(params, opt, twins, other):
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
    for p, q in zip(params, twins, strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        assert all(same_bits(x, other.state[q][key]) for key, x in opt.state[p].items())


@pytest.mark.pairwise
@pytest.mark.parametrize("way", ["load_state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, options, way):
    params = parameters()
    opt = make(kind, params, **options)
    for t in range(3):
        step(opt, params, t)
    if way == "load_state_dict":
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        other = make(kind, twins)  # the options are the checkpoint's
        other.load_state_dict(saved(opt))
    elif way == "deepcopy":
        twins, other = copy.deepcopy((params, opt))
    else:
        twins, other = pickle.loads(pickle.dumps((params, opt)))
    torch.manual_seed(123)  # not one of the numbers is torch's
    for t in range(3, 6):
        step(opt, params, t)
        step(other, twins, t)
    assert_same(params, opt, twins, other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_is_of_the_types_that_were_asked_for(options):
    params = [*parameters(), *parameters(F32), *parameters(F16 if "stochastic_rounding" not in options else BF16)]
    opt = normkern.SGD(params, lr=0.1, momentum=0.9, **options)
    step(opt, params, 0)
    for p in params:
        assert opt.state[p]["momentum_buffer"].dtype == options.get("state_dtype", p.dtype)
        has_master = options.get("master_weights", False) and p.dtype != F32
        assert opt.state[p].keys() == {"momentum_buffer", *(["master_weight"] if has_master else [])}
        if has_master:
            assert same_bits(opt.state[p]["master_weight"].to(p.dtype), p.detach())
    assert opt.param_groups[0].get("rounding_step") == (1 if "stochastic_rounding" in options else None)


def test_checkpoints_of_torch_and_for_torch():
    params = parameters()
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    step(theirs, params, 0)
    ours = normkern.SGD(params, lr=0.1, state_dtype=F32)
    ours.load_state_dict(theirs.state_dict())
    for p in params:
        assert same_bits(ours.state[p]["momentum_buffer"], theirs.state[p]["momentum_buffer"].float())
    step(ours, params, 1)
    back = torch.optim.SGD(params, lr=0.1)
    back.load_state_dict(saved(ours))
    for p in params:
        assert same_bits(back.state[p]["momentum_buffer"], ours.state[p]["momentum_buffer"].to(BF16))
    step(back, params, 2)


def test_a_checkpoint_of_float32_parameters_and_one_for_them():
    low, full = parameters(), parameters(F32)
    of_low = normkern.SGD(low, lr=0.1, momentum=0.9, state_dtype=F32, master_weights=True)
    of_full = normkern.SGD(full, lr=0.1, momentum=0.9, state_dtype=BF16)
    step(of_low, low, 0)
    step(of_full, full, 0)
    a, b = saved(of_low), saved(of_full)
    of_full.load_state_dict(a)
    of_low.load_state_dict(b)
    for p, q in zip(low, full, strict=True):
        assert same_bits(of_low.state[p]["momentum_buffer"], b["state"][_at(low, p)]["momentum_buffer"])
        assert same_bits(of_full.state[q]["momentum_buffer"], a["state"][_at(full, q)]["momentum_buffer"])
    step(of_low, low, 1)
    step(of_full, full, 1)
    again = normkern.SGD(full, lr=0.1)
    again.load_state_dict(b)
    assert all(again.state[q]["momentum_buffer"].dtype == BF16 for q in full)


def _at(params, p):
    return next(i for i, q in enumerate(params) if q is p)


def test_hooks_see_and_change_what_is_loaded():
    params = parameters()
    opt = normkern.SGD(params, lr=0.1, momentum=0.9, state_dtype=F32)
    step(opt, params, 0)
    before = saved(opt)

    def twice(_, state):
        state = {**state, "state": {k: {n: 2 * x for n, x in v.items()} for k, v in state["state"].items()}}
        return state

    hook = opt.register_load_state_dict_pre_hook(twice)
    opt.load_state_dict(before)
    hook.remove()
    for i, p in enumerate(params):
        assert same_bits(opt.state[p]["momentum_buffer"], 2 * before["state"][i]["momentum_buffer"])


def test_state_dtype_may_change_between_steps():
    params, twins = parameters(), parameters()
    opt = normkern.SGD(params, lr=0.1, momentum=0.9)
    step(opt, params, 0)
    other = normkern.SGD(twins, lr=0.1, momentum=0.9)
    step(other, twins, 0)
    opt.param_groups[0]["state_dtype"] = F32
    for p in twins:
        other.state[p]["momentum_buffer"] = other.state[p][
            "momentum_buffer"
        ].float()  # kept as it is without the option
    step(opt, params, 1)
    step(other, twins, 1)
    assert_same(params, opt, twins, other)
    assert opt.state[params[0]]["momentum_buffer"].dtype == F32
    opt.param_groups[0]["state_dtype"] = BF16
    step(opt, params, 2)
    assert opt.state[params[0]]["momentum_buffer"].dtype == BF16
    opt.param_groups[0]["state_dtype"] = None
    step(opt, params, 3)
    assert opt.state[params[0]]["momentum_buffer"].dtype == BF16


def test_options_are_group_keys():
    a, b = parameters(), parameters()
    opt = normkern.SGD([{"params": a, "master_weights": True}, {"params": b}], lr=1e-4, stochastic_rounding=False)
    opt.add_param_group({"params": parameters(), "stochastic_rounding": True, "rounding_seed": 3})
    opt.param_groups[1]["stochastic_rounding"] = True
    params = [p for group in opt.param_groups for p in group["params"]]
    for t in range(2):
        step(opt, params, t)
    assert "master_weight" in opt.state[a[0]]
    assert [group.get("rounding_step") for group in opt.param_groups] == [None, 2, 2]


def test_parameters_that_join_later_or_have_no_gradient_round_as_if_always_there():
    """A parameter's numbers are those of its place and of the group's steps."""
    params, twins = parameters(), parameters()
    opt, other = (normkern.SGD(p, lr=1e-3, momentum=0.9, stochastic_rounding=True) for p in (params, twins))
    for t in range(3):
        step(opt, params, t)
        gradients(twins, t)
        if t < 2:
            twins[1].grad = None
        other.step()
    for i in (0, 2, 3):
        assert same_bits(params[i], twins[i])


def test_replicas_round_alike_and_seeds_differ():
    runs = []
    for seed, global_seed in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(global_seed)
        params = parameters()
        step(normkern.SGD(params, lr=1e-3, stochastic_rounding=True, rounding_seed=seed), params, 0)
        runs.append(params)
    assert all(same_bits(p, q) for p, q in zip(runs[0], runs[1], strict=True))
    assert not all(same_bits(p, q) for p, q in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "svag"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_that_the_scaler_skips_leaves_no_trace(options, kind, first):
    params, twins = parameters(), parameters()
    opt, other = make(kind, params, fused=True, **options), make(kind, twins, fused=True, **options)
    if not first:
        for o, p in ((opt, params), (other, twins)):
            step(o, p, 0)
    if "state_dtype" in options:  # there would be something to convert
        opt.param_groups[0]["state_dtype"] = BF16
    before = saved(opt)
    opt.found_inf, opt.grad_scale = torch.ones(1), torch.ones(1)
    step(opt, params, 1)
    del opt.found_inf, opt.grad_scale
    after = saved(opt)
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
    if "state_dtype" in options:
        opt.param_groups[0]["state_dtype"] = F32
    for o, p in ((opt, params), (other, twins)):
        step(o, p, 2)
    assert_same(params, opt, twins, other)


# ---- What the options are for -----------------------------------------------------------------------------------------


def drift(steps=256, **options):
    """The mean weight after many steps, each a sixteenth of what bfloat16 tells apart at 1."""
    w = nn.Parameter(torch.ones(4096, dtype=BF16))
    opt = normkern.SGD([w], lr=2**-12, **options)
    for _ in range(steps):
        w.grad = torch.ones_like(w)
        opt.step()
    return w.detach().double().mean().item()


def test_steps_too_small_for_bfloat16_are_not_lost():
    assert drift() == 1.0
    assert drift(master_weights=True) == 1 - 256 * 2**-12
    # Each step rounds away at most half of 2^-8 squared, of variance.
    assert abs(drift(stochastic_rounding=True) - (1 - 256 * 2**-12)) < 5 * 2**-9 * (256 / 4096) ** 0.5


def test_master_weights_follow_the_float32_run():
    """The same gradients, of which bfloat16 has all digits: the copies are that run, to the bit."""
    low, full = parameters(), [nn.Parameter(p.detach().float()) for p in parameters()]
    a = normkern.SGD(low, lr=0.01, momentum=0.9, weight_decay=0.01, master_weights=True, state_dtype=F32, stats="row")
    b = normkern.SGD(full, lr=0.01, momentum=0.9, weight_decay=0.01, stats="row")
    for t in range(10):
        gradients(low, t)
        for p, q in zip(low, full, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(low, full, strict=True):
        assert same_bits(a.state[p]["master_weight"], q.detach())
        assert same_bits(p, q.to(BF16))
    torch.testing.assert_close(a.stats().update_sq, b.stats().update_sq, rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["load_state_dict", "data", "in place"])
def test_a_model_that_is_loaded_is_not_undone_by_old_copies(how):
    model, other = (nn.Linear(7, 5).to(BF16) for _ in range(2))
    opt = normkern.SGD(model.parameters(), lr=1e-4, master_weights=True)
    step(opt, list(model.parameters()), 0)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                (p.data if how == "data" else p).copy_(q)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(p, q)
        assert same_bits(opt.state[p]["master_weight"].to(BF16), q)


def test_weights_that_are_put_aside_and_back_keep_their_digits():
    """As averages of weights are looked at between steps."""
    params, twins = parameters(), parameters()
    opt, other = (normkern.SGD(p, lr=1e-4, momentum=0.9, master_weights=True) for p in (params, twins))
    for t in range(4):
        step(opt, params, t)
        step(other, twins, t)
        aside = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.zero_()
            for p, q in zip(params, aside, strict=True):
                p.copy_(q)
    assert_same(params, opt, twins, other)


# ---- torch's own path ---------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_where_no_kernel_may_run_the_options_hold(options):
    """Powers of two, so that eager operations round where the kernel does."""
    params, twins = parameters(), parameters()
    opt, other = (
        normkern.SGD([{"params": p[:2]}, {"params": p[2:]}], lr=2**-6, momentum=0.5, weight_decay=2**-4, **options)
        for p in (params, twins)
    )
    for t in range(3):
        step(opt, params, t)
        with Watch():
            step(other, twins, t)
    assert_same(params, opt, twins, other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sparse_gradients(options):
    w, twin = (nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(BF16)) for _ in range(2))
    opt, other = (normkern.SGD([p], lr=2**-6, momentum=0.5, **options) for p in (w, twin))
    for t in range(3):
        gradients([twin], t)
        w.grad = twin.grad.to_sparse()
        opt.step()
        other.step()
    assert_same([w], opt, [twin], other)


# ---- Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"state_dtype": F16}, r"SGD: state_dtype expected None, torch.float32 or torch.bfloat16, got torch.float16"),
        ({"state_dtype": "bfloat16"}, r"got 'bfloat16'"),
        ({"stochastic_rounding": 1}, r"SGD: stochastic_rounding expected True or False, got 1"),
        ({"master_weights": None}, r"SGD: master_weights expected True or False, got None"),
        ({"rounding_seed": -1}, r"SGD: rounding_seed expected a whole number from 0 to 2\^64 - 1, got -1"),
        ({"rounding_seed": 1.0}, r"rounding_seed expected a whole number .*, got 1.0"),
        ({"stochastic_rounding": True, "master_weights": True}, r"expected stochastic_rounding or master_weights, got"),
    ],
)
@pytest.mark.parametrize("cls", [normkern.SGD, normkern.SVAG])
def test_unknown_options(cls, options, text):
    with pytest.raises(ValueError, match=text):
        cls(parameters(), 0.1, **options)
    params = parameters()
    opt = cls(params, 0.1)
    opt.param_groups[0].update({"stochastic_rounding": True, **options})
    if options.get("stochastic_rounding", True) is True or "state_dtype" in options:
        gradients(params, 0)
        with pytest.raises(ValueError, match=text.replace("SGD: ", r"SGD.step: param_groups\[0\]: ")):
            opt.step()
    state = cls(params, 0.1).state_dict()
    state["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=text.replace("SGD: ", r"SGD.load_state_dict: param_groups\[0\]: ")):
        opt.load_state_dict(state)


def test_a_counter_that_is_none():
    opt = normkern.SGD(parameters(), lr=0.1, stochastic_rounding=True)
    state = opt.state_dict()
    state["param_groups"][0]["rounding_step"] = -3
    with pytest.raises(ValueError, match=r"param_groups\[0\]: rounding_step expected a whole number from 0 .*, got -3"):
        opt.load_state_dict(state)


@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        (F16, {"stochastic_rounding": True}, r"param_groups\[1\]: stochastic_rounding expected bfloat16 parameters, .*"
                                             r"params\[0\] is torch.float16 on cpu"),
        (torch.float64, {"state_dtype": F32}, r"state_dtype expected float32, bfloat16 or float16 parameters, but"),
        (torch.complex64, {"state_dtype": F32}, r"params\[0\] is torch.complex64 on cpu"),
        (BF16, {"master_weights": True, "differentiable": True}, r"differentiable expected False with state_dtype, "),
    ],
)  # fmt: skip
def test_parameters_that_an_option_is_not_for(dtype, options, text):
    params = [*parameters(), nn.Parameter(torch.ones(3, dtype=dtype))]
    opt = normkern.SGD([{"params": params[:-1]}, {"params": params[-1:], **options}], lr=0.1)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=text):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert opt.state == {}


def test_float64_and_complex_parameters_beside_low_ones_are_stored_as_always():
    params = [nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.float64, torch.complex64, BF16)]
    opt = normkern.SGD(params, lr=0.1, momentum=0.9, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.allclose(params[0], torch.tensor(0.9, dtype=torch.float64))
    assert torch.allclose(params[1], torch.tensor(0.9 + 0j))


@pytest.mark.parametrize("value", ["x", torch.ones(2)])
def test_corrupted_copies_are_refused(value):
    params = parameters()
    opt = normkern.SGD(params, lr=0.1, master_weights=True)
    step(opt, params, 0)
    state = saved(opt)
    state["state"][0]["master_weight"] = value
    with pytest.raises(ValueError, match=r"params'\]\[0\]: master_weight expected (a tensor|shape \(33,\)), got"):
        opt.load_state_dict(state)
