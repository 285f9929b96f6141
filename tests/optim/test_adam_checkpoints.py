"""normkern.AdamW and Adam are saved, loaded, copied and pickled as torch's are; a bad checkpoint changes nothing."""

import copy
import io

import pytest
import torch
from support.copies import COPIES, copied
from support.memory import same_bits
from support.twins import assert_follow, give_gradients, parameters
from torch import nn

import normkern

from .test_adam_steps import KINDS, both


def trained(optimizer, steps=3, **options):
    params = parameters()
    opt = optimizer(params, lr=0.02, **options)
    for t in range(steps):
        give_gradients(params, seed=t, skip=(3,) if t == 0 else ())
        opt.step()
    return params, opt


@both
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0), (0, 0)])
def test_checkpoints_both_ways(kind, source, target, amsgrad):
    params, opt = trained(KINDS[kind][source], amsgrad=amsgrad, betas=(0.8, 0.9))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = KINDS[kind][target](twins, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    for t in range(3):
        give_gradients(params, twins, seed=10 + t)
        opt.step()
        other.step()
    assert_follow(params, twins, steps=3)
    assert other.param_groups[0]["betas"] == (0.8, 0.9)


@both
def test_checkpoint_has_torchs_entries(kind):
    a, b = (trained(optimizer)[1].state_dict() for optimizer in KINDS[kind])
    assert a["state"].keys() == b["state"].keys()
    for x, y in zip(a["state"].values(), b["state"].values(), strict=True):
        assert x.keys() == y.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(x[key].dtype == y[key].dtype and x[key].shape == y[key].shape for key in x)
    own = {"stats", "norm", "lr_multipliers", "state_dtype", "stochastic_rounding", "rounding_seed", "master_weights"}
    own |= {"decay"} if kind == "AdamW" else set()
    assert set(a["param_groups"][0]) - set(b["param_groups"][0]) == own


def test_old_checkpoints_with_plain_numbers_for_steps():
    params, opt = trained(torch.optim.AdamW)
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = int(entry["step"])
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del saved["param_groups"][0][key]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = normkern.AdamW(twins, lr=0.5)
    other.load_state_dict(saved)
    give_gradients(params, twins, seed=9)
    opt.step()
    other.step()
    assert_follow(params, twins, steps=1)


def test_a_checkpoint_of_adam_goes_on_as_adamw_as_in_torch():
    _, opt = trained(torch.optim.Adam, weight_decay=0.1)
    other = normkern.AdamW(parameters())
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["decoupled_weight_decay"] is True


@both
@pytest.mark.parametrize("way", COPIES)
def test_copies_go_on_alike(kind, way):
    params, opt = trained(KINDS[kind][0], fused=True, stats="tensor")
    twins, other = copied(way, (params, opt))
    assert other._step_supports_amp_scaling
    give_gradients(params, twins, seed=9)
    opt.step()
    other.step()
    assert all(same_bits(a, b) for a, b in zip(params, twins, strict=True))
    assert torch.equal(opt.stats().update_sq, other.stats().update_sq)


def test_a_loaded_state_is_the_optimizers_own():
    params, opt = trained(normkern.AdamW)
    other = normkern.AdamW([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(opt.state_dict())
    saved = copy.deepcopy(opt.state_dict())
    give_gradients(other.param_groups[0]["params"], seed=1)
    other.step()
    for key, entry in opt.state_dict()["state"].items():
        assert all(torch.equal(x, saved["state"][key][name]) for name, x in entry.items())


@pytest.mark.parametrize("options", [
    {"state_dtype": torch.float32}, {"state_dtype": torch.bfloat16, "stochastic_rounding": True}, {"master_weights": True},
])  # fmt: skip
def test_a_resumed_run_in_low_precision_is_the_uninterrupted_one(options):
    params = parameters(dtype=torch.bfloat16)
    opt = normkern.AdamW(params, lr=0.02, **options)
    for t in range(3):
        give_gradients(params, seed=t)
        opt.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = normkern.AdamW(twins, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for t in range(3):
        give_gradients(params, twins, seed=t)
        opt.step()
        other.step()
    assert all(same_bits(a, b) for a, b in zip(params, twins, strict=True))
    assert all(
        same_bits(x, other.state[q][k]) for p, q in zip(params, twins, strict=True) for k, x in opt.state[p].items()
    )


def bad_checkpoints():
    def change(f):
        saved = copy.deepcopy(trained(normkern.AdamW)[1].state_dict())
        f(saved)
        return saved

    def entry(key, value):
        return lambda s: s["state"][4].__setitem__(key, value)

    def option(key, value):
        return lambda s: s["param_groups"][0].__setitem__(key, value)

    where = r"AdamW.load_state_dict: the state of param_groups\[0\]\['params'\]\[4\]"
    yield "shape", change(entry("exp_avg", torch.ones(2))), rf"{where}: exp_avg expected shape \(16, 3\), got \(2,\)"
    yield "kind", change(entry("exp_avg_sq", [1.0])), rf"{where}: exp_avg_sq expected a tensor, got list"
    yield "no step", change(lambda s: s["state"][4].pop("step")), rf"{where} expected exp_avg, .*got one without step"
    yield "none of all", change(lambda s: s["state"].update({4: {"sum": torch.ones(3)}})), rf"{where} .*got one without"
    yield "no average", change(lambda s: s["state"][4].pop("exp_avg_sq")), rf"{where} .*got one without exp_avg_sq"
    yield "steps", change(entry("step", torch.tensor(-3.0))), rf"{where}: step expected a whole number .*got -3.0"
    yield "half", change(entry("step", torch.tensor(2.5))), rf"{where}: step expected a whole number .*got 2.5"
    yield "nan", change(entry("step", torch.tensor(torch.nan))), rf"{where}: step expected a whole number .*got nan"
    yield "lr", change(option("lr", "fast")), r"AdamW.load_state_dict: param_groups\[0\]: lr expected a number"
    yield "betas", change(option("betas", 0.9)), r"param_groups\[0\]: betas expected a pair of numbers, got 0.9"
    yield "beta", change(option("betas", ("a", 0.9))), r"param_groups\[0\]: betas\[0\] expected a number, got 'a'"
    sgd = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9).state_dict()
    yield "SGD's", sgd, r"expected the options of AdamW, got momentum, which SGD and its variants have"


BAD = list(bad_checkpoints())


@pytest.mark.parametrize(("saved", "text"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_a_bad_checkpoint_changes_nothing(saved, text):
    _, opt = trained(normkern.AdamW)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=text):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert all(torch.equal(x, after["state"][key][name]) for name, x in entry.items())


def test_distributed_checkpoints_state_dict():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    opt, other = normkern.AdamW(model.parameters(), lr=0.1), normkern.AdamW(twin.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, copy.deepcopy(get_optimizer_state_dict(model, opt)))
    for net, o in ((model, opt), (twin, other)):
        o.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        o.step()
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
