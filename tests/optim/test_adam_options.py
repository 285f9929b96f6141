"""What normkern.AdamW has that torch's lacks: sums, clipping, multipliers, storage; and wrappers, threads."""

import copy
import logging
import threading

import pytest
import torch
from support.memory import same_bits
from support.twins import assert_follow, give_gradients, parameters
from torch import nn

import normkern

from .test_adam_steps import KINDS, both
from .test_wrappers import WRAPPERS, give, net

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@both
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_sums_are_those_of_the_step(kind, stats):
    params = parameters()
    opt = KINDS[kind][0](params, lr=0.1, weight_decay=0.3, stats=stats)
    for t in range(2):
        before = [p.detach().double() for p in params]
        give_gradients(params, seed=t)
        opt.step()
    for i, (p, w) in enumerate(zip(params, before, strict=True)):
        of = opt.stats().slots[f"0.{i}"]
        shape = (p.shape[0], -1) if stats == "row" and p.ndim >= 2 else (1, -1) if p.numel() else (1, 0)
        w, g, u = (x.reshape(shape) for x in (w, p.grad.double(), p.detach().double() - w))
        torch.testing.assert_close(opt.stats().update_sq[of], u.square().sum(1))
        torch.testing.assert_close(opt.stats().weight_grad_dot[of], (w * g).sum(1))
        torch.testing.assert_close(opt.stats().weight_update_dot[of], (w * u).sum(1))


def test_effective_lr_is_per_weight_norm():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.ones(2)
    opt = normkern.AdamW([("w", w)], lr=0.5, weight_decay=0.0, stats="tensor")
    opt.step()
    assert opt.stats().effective_lr.item() == pytest.approx(0.1)
    scalars = opt.stats().scalars(["effective_lr", "grad_norm"])
    assert scalars["effective_lr/all"] == scalars["effective_lr/w"] == pytest.approx(0.1)


def test_stats_without_any_is_refused():
    with pytest.raises(RuntimeError, match="AdamW.stats: nothing was measured"):
        normkern.AdamW(parameters()).stats()
    with pytest.raises(RuntimeError, match="AdamW.stats: expected a step before it"):
        normkern.AdamW(parameters(), stats="row").stats()


def test_names_of_a_model():
    model = net()
    opt = normkern.AdamW(model.parameters(), stats="tensor")
    with pytest.raises(TypeError, match="AdamW.name_parameters: model expected a torch.nn.Module"):
        opt.name_parameters(3)
    opt.name_parameters(model)
    give(model, 0)
    opt.step()
    assert opt.stats().names == ["0.weight", "0.bias", "2.weight", "2.bias"]


@both
@pytest.mark.parametrize("way", ["argument", "constructor", "infinity norm"])
def test_clipping_is_torchs(kind, way):
    shapes = [(), (33,), (16, 3), (40000,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    more = {"max_norm": 0.1} if way != "argument" else {}
    p = torch.inf if way == "infinity norm" else 2.0
    a = KINDS[kind][0](ours, lr=0.02, **more, norm_type=p)
    b = KINDS[kind][1](theirs, lr=0.02, foreach=False)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        before = [q.grad.clone() for q in ours]
        got = a.step(max_norm=0.1) if way == "argument" else a.step() or a.last_grad_norm
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.1, norm_type=p)
        b.step()
        torch.testing.assert_close(got, expected.double(), rtol=1e-6, atol=0)
        assert all(torch.equal(q.grad, g) for q, g in zip(ours, before, strict=True))
    assert_follow(ours, theirs, steps=3)


def test_a_gradient_that_is_not_finite_is_named():
    model = net()
    opt = normkern.AdamW(model.named_parameters(), max_norm=1.0, error_if_nonfinite=True)
    give(model, 0)
    model[2].weight.grad[0, 0] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"AdamW.step: the norm of all gradients is nan.* '2.weight'.*nothing was stepped"
    ):
        opt.step()
    assert not opt.state


@both
@pytest.mark.parametrize("amsgrad", [False, True])
def test_learning_rate_multipliers(kind, amsgrad):
    shapes = [(5,), (3, 4)]
    ours, theirs = parameters(shapes), parameters(shapes)
    group = [{"params": ours, "lr_multipliers": [0.5, 2.0]}]
    a = KINDS[kind][0](group, lr=0.02, weight_decay=0.1, amsgrad=amsgrad, stats="tensor")
    b = KINDS[kind][1](
        [{"params": [theirs[0]], "lr": 0.01}, {"params": [theirs[1]], "lr": 0.04}],
        weight_decay=0.1, amsgrad=amsgrad, foreach=False,
    )  # fmt: skip
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        a.step()
        b.step()
    assert_follow(ours, theirs, steps=3)
    ratio = a.stats().effective_lr * a.stats().weight_norm
    torch.testing.assert_close(ratio, torch.tensor([0.01, 0.04], dtype=torch.float64))


def test_bad_multipliers():
    with pytest.raises(ValueError, match=r"AdamW: param_groups\[0\]: lr_multipliers expected 1 numbers"):
        normkern.AdamW([{"params": parameters([(2,)]), "lr_multipliers": [1.0, 2.0]}])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_master_weights_are_the_run_in_float32(dtype):
    ours = parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    a = normkern.AdamW(ours, lr=0.02, master_weights=True, state_dtype=F32)
    b = normkern.AdamW(theirs, lr=0.02)
    for t in range(4):
        give_gradients(ours, seed=t)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same_bits(a.state[p]["master_weight"], q.detach())
        assert same_bits(p.detach(), q.detach().to(dtype))


def test_small_steps_are_lost_in_bfloat16_but_not_with_stochastic_rounding():
    lost, kept = (parameters([(20000,)], dtype=BF16) for _ in range(2))
    start = lost[0].detach().float()
    plain = normkern.AdamW(lost, lr=1e-4, weight_decay=0.0, state_dtype=F32)
    rounded = normkern.AdamW(kept, lr=1e-4, weight_decay=0.0, state_dtype=F32, stochastic_rounding=True)
    for _ in range(50):
        lost[0].grad, kept[0].grad = torch.ones(20000, dtype=BF16), torch.ones(20000, dtype=BF16)
        plain.step()
        rounded.step()
    assert (kept[0].detach().float() - start).mean() == pytest.approx(-50e-4, rel=0.05)
    assert (lost[0].detach().float() - start).mean() > -25e-4
    assert rounded.param_groups[0]["rounding_step"] == 50


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
def test_the_dtype_of_the_state(state_dtype):
    params = parameters(dtype=BF16 if state_dtype == F32 else F32)
    opt = normkern.AdamW(params, state_dtype=state_dtype)
    give_gradients(params, seed=0)
    opt.step()
    for p in params:
        assert {opt.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {state_dtype}
        assert opt.state[p]["step"].dtype == F32


def test_a_new_state_dtype_converts_at_the_next_step():
    params = parameters(dtype=BF16)
    opt = normkern.AdamW(params)
    for t in range(2):
        give_gradients(params, seed=t)
        opt.step()
        opt.param_groups[0]["state_dtype"] = F32
    assert all(opt.state[p][key].dtype == F32 for p in params for key in ("exp_avg", "exp_avg_sq"))
    assert all(opt.state[p]["step"] == 2 for p in params)


def test_storage_options_that_do_not_fit():
    for options, text in (
        ({"state_dtype": F16}, "AdamW: state_dtype expected None, torch.float32 or torch.bfloat16"),
        (
            {"stochastic_rounding": True, "master_weights": True},
            "AdamW: expected stochastic_rounding or master_weights",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            normkern.AdamW(parameters(), **options)
    params = parameters([(2,)], dtype=torch.float64)
    opt = normkern.AdamW(params, state_dtype=BF16)
    give_gradients(params, seed=0)
    with pytest.raises(ValueError, match=r"AdamW.step: param_groups\[0\]: state_dtype expected float32"):
        opt.step()


@pytest.mark.parametrize(("betas", "text"), [
    ((0.9, 1.0), r"betas\[1\] expected a number of at least 0 and below 1, got 1.0"), ((-0.1, 0.5), r"betas\[0\] expected"),
    ((0.9,), r"betas expected a pair of numbers"), (("x", 0.5), r"betas\[0\] expected a number, got 'x'"),
])  # fmt: skip
def test_betas_that_a_step_cannot_take(betas, text):
    params = parameters([(2,), (3,)])
    opt = normkern.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    opt.param_groups[1]["betas"] = betas
    give_gradients(params, seed=0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"AdamW.step: param_groups\[1\]: " + text):
        opt.step()
    assert torch.equal(params[0], before)
    assert not opt.state


def test_arguments_of_another_kind():
    for options, text in (
        ({"betas": 0.9}, "AdamW: betas expected a pair of numbers, got 0.9"),
        ({"lr": "fast"}, "AdamW: lr expected a number"),
        ({"eps": "small"}, "AdamW: eps expected a number"),
        ({"stats": "column"}, "AdamW: stats expected None"),
        ({"max_norm": -1.0}, "AdamW: max_norm expected a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            normkern.AdamW(parameters(), **options)
    with pytest.raises(TypeError, match="AdamW: params expected parameters or param groups, got the model"):
        normkern.AdamW(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"AdamW: param_groups\[0\]: unknown key 'state_dtyp'; did you mean 'state_dtype'"
    ):
        normkern.AdamW([{"params": parameters(), "state_dtyp": None}])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_method_through_a_wrapper_or_the_optimizer(wrapper):
    ours, bare = net(), net()
    opt = normkern.AdamW(ours.named_parameters(), lr=0.1, stats="tensor")
    twin = normkern.AdamW(bare.named_parameters(), lr=0.1, stats="tensor")
    ways = [wrapper(opt), opt]
    for t in range(6):
        for model, a, b in ((ours, ways[t % 2], ways[(t + 1) % 2]), (bare, twin, twin)):
            give(model, t)
            a.step()
            b.load_state_dict(copy.deepcopy(a.state_dict()))
        assert torch.equal(ways[t % 2].stats().update_sq, twin.stats().update_sq)
        assert ways[(t + 1) % 2].stats().names == twin.stats().names
    assert all(same_bits(p, q) for p, q in zip(ours.parameters(), bare.parameters(), strict=True))


def test_one_optimizer_in_four_threads_takes_every_step():
    params = [nn.Parameter(torch.zeros(8)) for _ in range(6)]
    opt = normkern.AdamW(params, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, stats="tensor")
    for p in params:
        p.grad = torch.ones(8)
    threads = [threading.Thread(target=lambda: [opt.step() for _ in range(50)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((p == -200).all() for p in params)
    assert all(opt.state[p]["step"] == 200 for p in params)


def test_no_step_of_plain_tensors_falls_back(caplog):
    caplog.set_level(logging.DEBUG, logger="normkern")
    params = parameters()
    for options in ({}, {"capturable": True}, {"fused": True}, {"state_dtype": F32}):
        opt = normkern.AdamW(params, **options)
        give_gradients(params, seed=0)
        opt.step()
    assert "torch's own loop" not in caplog.text


def test_shared_memory_of_state_is_refused():
    params = parameters([(3,)])
    opt = normkern.AdamW(params)
    give_gradients(params, seed=0)
    opt.step()
    opt.state[params[0]]["exp_avg_sq"] = opt.state[params[0]]["exp_avg"]
    with pytest.raises(
        ValueError, match=r"AdamW.step: param_groups\[0\]: exp_avg_sqs\[0\] .*is the same memory as exp_avgs"
    ):
        opt.step()


@both
def test_random_problems_end_where_torchs_runs_do(kind):
    """A least-squares problem in float64, hundreds of steps."""
    make = torch.Generator().manual_seed(5)
    x, y = (torch.randn(64, 10, generator=make, dtype=torch.float64) for _ in range(2))
    ends = []
    for optimizer in KINDS[kind]:
        w = nn.Parameter(torch.zeros(10, 10, dtype=torch.float64))
        opt = optimizer([w], lr=0.01, betas=(0.9, 0.99), weight_decay=0.05)
        for _ in range(300):
            opt.zero_grad()
            (x @ w - y).square().mean().backward()
            opt.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)
