"""Tensors that something else holds or has freed: copies when loading, no memory that is gone, no references that stay."""

import copy

import pytest
import torch
from torch import nn

import normkern


def freed(*shape, bytes_left=0):
    x = torch.ones(*shape)
    x.untyped_storage().resize_(bytes_left)
    return x


def one(**options):
    p = nn.Parameter(torch.ones(4000))
    p.grad = torch.ones(4000)
    return p, normkern.SGD([p], lr=0.1, momentum=0.9, **options)


@pytest.mark.parametrize("left", [0, 100])
@pytest.mark.parametrize("differentiable", [False, True])
def test_freed_memory_of_a_gradient_or_a_parameter(differentiable, left):
    if left and not differentiable:
        pytest.skip("torch says nothing about the length of memory that there is")
    p, opt = one(differentiable=differentiable)
    p.grad.untyped_storage().resize_(left)
    text = r"param_groups\[0\]: grads\[0\] has shape \(4000,\), but its memory "
    with torch.no_grad(), pytest.raises(RuntimeError, match=text):
        opt.step()
    p.grad = torch.ones(4000)
    p.untyped_storage().resize_(left)
    with torch.no_grad(), pytest.raises(RuntimeError, match=text.replace("grads", "params")):
        opt.step()


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("key", ["momentum_buffer", "master_weight"])
def test_freed_memory_of_the_state(key, fused):
    p = nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    opt = normkern.SGD([p], lr=0.1, momentum=0.9, master_weights=True, state_dtype=torch.float32, fused=fused)
    opt.step()
    opt.state[p][key].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{key}\[0\] has shape \(40,\), but its memory was freed"):
        opt.step()


def test_freed_memory_of_held_gradients():
    p = nn.Parameter(torch.ones(40))
    opt = normkern.SVAG([p], lr=0.1, l=4)
    p.grad = torch.ones(40)
    held = p.grad
    opt.hold()
    p.grad = torch.ones(40)
    held.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"held\[0\] has shape \(40,\), but its memory was freed"):
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_freed_memory_elsewhere(dtype):
    gone, there = freed(2, 4000).to(dtype) if dtype == torch.float32 else None, torch.ones(2, 4000, dtype=dtype)
    if gone is None:
        gone = torch.ones(2, 4000, dtype=dtype)
        gone.untyped_storage().resize_(0)
    calls = {
        "x": lambda: normkern.moments(gone),
        r"x\[1\]": lambda: normkern.moments([there, gone]),
        r"grads_a\[0\]": lambda: normkern.svag_combine_([gone], [there], 4.0),
        r"grads_b\[0\]": lambda: normkern.svag_combine_([there], [gone], 4.0),
        r"grads_a\[1\]": lambda: normkern.noise_from_pair([there, gone], [there, there]),
        r"params\[0\]": lambda: normkern.ops.sgd_([gone], [there], lr=0.1),
        r"grads\[0\]": lambda: normkern.ops.grad_sq_norms([gone]),
    }
    for name, call in calls.items():
        with pytest.raises((RuntimeError, TypeError), match=rf"{name} has shape \(2, 4000\), but its memory was freed"):
            call()


def test_freed_memory_in_running_moments():
    model = nn.Linear(3, 2)
    moments = normkern.RunningMoments(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.weight.grad.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, TypeError), match="weight.* memory was freed"):
        moments.update()


def test_loading_copies():
    """Of optimizers in one process neither steps into the other's buffers and master copies."""

    def make():
        p = nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        p.grad = torch.full_like(p, 5.0)
        return p, normkern.SGD([p], lr=0.1, momentum=0.9, master_weights=True, state_dtype=torch.float32)

    (a, first), (b, second) = make(), make()
    first.step()
    saved = first.state_dict()
    second.load_state_dict(saved)
    before = copy.deepcopy(first.state[a])
    assert all(torch.equal(second.state[b][k], x) for k, x in before.items())
    second.step()
    assert all(torch.equal(x, first.state[a][k]) for k, x in before.items())
    assert all(torch.equal(x, saved["state"][0][k]) for k, x in before.items())
    second.load_state_dict(second.state_dict())  # its own
    assert second.state[b]["master_weight"].dtype == torch.float32


def test_stats_are_the_constructors():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    plain, measured = normkern.SGD([w], lr=0.1), normkern.SGD([w], lr=0.1, stats="row")
    plain.step()
    measured.step()
    monitor = normkern.EquilibriumMonitor(measured)
    measured.load_state_dict(plain.state_dict())
    measured.step()
    assert measured.stats().names == ["0.0"]
    assert monitor.update()
    through = torch.optim.SGD([w], lr=0.1)
    through.load_state_dict(measured.state_dict())
    plain.load_state_dict(through.state_dict())
    assert plain.param_groups[0]["stats"] is None
    assert copy.deepcopy(measured).param_groups[0]["stats"] == "row"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("scale_invarient", "scale_invariant"),
        ("Scale-Invariant", "scale_invariant"),
        ("norm_buffer", "norm_buffers"),
        ("follower", "followers"),
        ("lr_multiplier", "lr_multipliers"),
        ("stat", "stats"),
        ("stochastic_roundings", "stochastic_rounding"),
        ("master_weight", "master_weights"),
    ],
)
def test_a_misspelled_key_of_a_group(key, meant):
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: unknown key '{key}'; did you mean '{meant}'\?"):
        normkern.SGD([{"params": [w], key: True}], lr=0.1)
    opt = normkern.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match=rf"param_groups\[1\]: unknown key '{key}'"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], key: True})
    assert len(opt.param_groups) == 1


def test_keys_of_others_pass():
    keys = (
        "name",
        "initial_lr",
        "max_lr",
        "base_momentum",
        "max_momentum",
        "swa_lr",
        "lr_scale",
        "weight_decay_mult",
        "layer_decay",
        "lr_decay",
        "lookahead_k",
        "joint",
        "momentum_scale",
    )
    group = {"params": [nn.Parameter(torch.ones(3))], **dict.fromkeys(keys, 1.0)}
    assert set(keys) <= normkern.SGD([group], lr=0.1).param_groups[0].keys()
