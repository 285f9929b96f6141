"""normkern.SGD is saved, loaded, copied and pickled as torch.optim.SGD is; a corrupted checkpoint changes nothing."""

import copy
import io
import pickle

import pytest
import torch
from support.copies import COPIES, copied
from support.memory import same_bits
from support.twins import assert_follow, give_gradients, parameters
from torch import nn

import normkern


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
    assert set(a["param_groups"][0]) - set(b["param_groups"][0]) == {
        "stats", "decay", "norm", "lr_multipliers", "state_dtype", "stochastic_rounding", "rounding_seed", "master_weights",
    }  # fmt: skip
    w = nn.Parameter(torch.ones(1))
    w.grad = torch.ones(1)
    plain = normkern.SGD([w])
    plain.step()
    assert plain.state_dict()["state"] == {}


def test_old_checkpoints():
    params, opt = trained(normkern.SGD, stats="row", maximize=True)
    saved = opt.state_dict()
    saved["state"][3] = {"momentum_buffer": None}
    for key in ("maximize", "foreach", "differentiable", "fused", "stats", "decay", "norm"):
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


@pytest.mark.parametrize("way", COPIES)
def test_copies_go_on_alike(way):
    params, opt = trained(normkern.SGD, fused=True, stats="tensor")
    twins, other = copied(way, (params, opt))
    assert other._step_supports_amp_scaling
    give_gradients(params, twins, seed=9)
    opt.step()
    other.step()
    assert all(same_bits(a, b) for a, b in zip(params, twins, strict=True))
    assert torch.equal(opt.stats().update_sq, other.stats().update_sq)
    public = {k for k in vars(opt) if not k.startswith("_")}
    assert public == {k for k in vars(other) if not k.startswith("_")}


def test_pickle_of_the_time_when_optim_was_one_module_loads():
    params, opt = trained(normkern.SGD, stats="tensor")
    old = pickle.dumps((params, opt), protocol=2).replace(b"cnormkern.optim.sgd\nSGD\n", b"cnormkern.optim\nSGD\n")
    assert b"cnormkern.optim\nSGD\n" in old
    twins, other = pickle.loads(old)
    assert type(other) is normkern.SGD
    give_gradients(params, twins, seed=9)
    opt.step()
    other.step()
    assert all(same_bits(a, b) for a, b in zip(params, twins, strict=True))
    assert torch.equal(opt.stats().update_sq, other.stats().update_sq)


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
    yield "state no dict", change(lambda s: s.update(state=1.0)), r"state expected a dict, got float"
    yield "groups no list", change(lambda s: s.update(param_groups=7)), r"param_groups expected a list, got int"
    yield (
        "group no dict",
        change(lambda s: s.update(param_groups=[0.5])),
        r"param_groups\[0\] expected a dict, got float",
    )
    yield (
        "params no list",
        change(lambda s: s["param_groups"][0].update(params=3)),
        r"param_groups\[0\]\['params'\] expected a list, got int",
    )
    yield (
        "param no name",
        change(lambda s: s["param_groups"][0]["params"].__setitem__(1, [])),
        r"param_groups\[0\]\['params'\]\[1\] expected a number or a name, got list",
    )
    yield "no params", change(lambda s: s["param_groups"][0].pop("params")), r"got one without 'params'"
    yield (
        "names no list",
        change(lambda s: s["param_groups"][0].update(param_names=0.5)),
        r"param_groups\[0\]\['param_names'\] expected a list of names, got float",
    )
    yield (
        "name no text",
        change(lambda s: s["param_groups"][0].update(param_names=["a", 2])),
        r"param_groups\[0\]\['param_names'\]\[1\] expected a name, got int",
    )
    yield (
        "norm a tensor",
        change(lambda s: s["param_groups"][0].update(norm=torch.tensor(1.0))),
        r"param_groups\[0\]: norm expected None",
    )
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
    yield "lr too large", group(lr=10**400), r"param_groups\[0\]: lr expected a number, got 1000"
    yield (
        "gauge of tensors",
        group(gauge=(torch.ones(3), 0.0, 0)),
        r"param_groups\[0\]: gauge expected \(scale, z, exponent\) as a step leaves them",
    )
    yield (
        "lr shape",
        group(lr=torch.ones(3)),
        r"param_groups\[0\]: lr expected one number, got a tensor of shape \(3,\)",
    )
    yield "momentum", group(momentum=None), r"param_groups\[0\]: momentum expected a number, got None"
    yield "stats", group(stats="all"), r'param_groups\[0\]: stats expected None, "tensor" or "row", got \'all\''
    yield (
        "decay",
        group(decay="linear"),
        r'param_groups\[0\]: decay expected "coupled", "exponential" or "corrected", got \'linear\'',
    )


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
