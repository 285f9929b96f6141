"""param_groups: who is in which group, that optimizers take them, and what is refused."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import normkern
from normkern.invariance import find, param_groups

from .normalised_nets import IMAGES, ROWS, case, convnet, pairs


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    torch.set_num_threads(1)


def members(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def of(name, **options):
    net, batches, *_ = case(name)
    return net, param_groups(net, find(net, F.cross_entropy, batches), **options)


def test_batch_norm():
    net, groups = of("batch norm")
    assert members(groups) == {
        "scale_invariant": ["0.weight", "3.weight"],
        "norm_and_bias": ["1.weight", "1.bias", "4.weight", "4.bias", "8.bias"],
        "rest": ["8.weight"],
    }
    assert [group["scale_invariant"] for group in groups] == [True, False, False]
    assert groups[0]["joint"] == []
    assert all(p is dict(net.named_parameters())[name] for group in groups for name, p in group["params"])


def test_joint_sets_stay_together():
    _, groups = of("layer norm and RMSNorm")
    assert members(groups)["scale_invariant"] == ["0.weight", "3.weight", "3.bias"]
    assert groups[0]["joint"] == [["3.weight", "3.bias"]]
    _, groups = of("pre-activation ResNet")
    assert [name for name, _ in groups[0]["params"]] == [
        "stem.weight", "blocks.0.conv1.weight", "blocks.0.conv2.weight", "blocks.1.conv1.weight",
        "blocks.1.conv2.weight", "blocks.1.shortcut.weight", "blocks.2.conv1.weight", "blocks.2.conv2.weight",
    ]  # fmt: skip
    assert members(groups)["rest"] == ["head.weight"]


def test_norms_that_are_invariant_among_themselves():
    _, groups = of("batch norm", include_norms=True)
    assert members(groups)["scale_invariant"] == ["0.weight", "1.weight", "1.bias", "3.weight"]
    assert groups[0]["joint"] == [["1.weight", "1.bias"]]
    _, groups = of("embedding norm")
    assert members(groups)["scale_invariant"] == ["embedding.weight", "hidden.weight"]
    _, groups = of("embedding norm", include_norms=True)
    assert members(groups)["scale_invariant"] == ["embedding.weight", "norm.weight", "hidden.weight"]


def test_frozen_unused_and_without_a_gradient():
    _, groups = of("half-way frozen")
    assert members(groups)["scale_invariant"] == ["3.weight"]
    assert "0.weight" not in itertools.chain(*members(groups).values())
    _, groups = of("embedding norm")
    assert members(groups)["rest"] == ["head.weight", "spare.weight"]
    assert "spare.bias" in members(groups)["norm_and_bias"]
    assert "hidden.bias" in members(groups)["norm_and_bias"]


def test_nothing_is_invariant():
    _, groups = of("relu")
    assert members(groups) == {
        "scale_invariant": [],
        "norm_and_bias": ["0.bias", "2.bias", "4.bias"],
        "rest": ["0.weight", "2.weight", "4.weight"],
    }


def test_lengths_of_weight_norm_are_no_weights():
    net = nn.Sequential(weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    batches = [(torch.randn(9, 5), torch.randn(9)) for _ in range(2)]
    groups = param_groups(net, loss=F.mse_loss, batches=batches)
    assert members(groups) == {
        "scale_invariant": ["0.parametrizations.weight.original1"],
        "norm_and_bias": ["0.bias", "0.parametrizations.weight.original0", "2.bias"],
        "rest": ["2.weight"],
    }


def test_every_trainable_parameter_is_in_one_group():
    for name in ("QK norm, biases", "two branches", "language model, tied", "half-way frozen", "complex"):
        net, groups = of(name)
        trainable = [n for n, p in net.named_parameters() if p.requires_grad]
        assert sorted(itertools.chain(*members(groups).values())) == sorted(trainable)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.AdamW, lambda g, **o: normkern.SGD(g, stats="tensor", **o)],
    ids=["torch.SGD", "AdamW", "normkern.SGD"],
)
@pytest.mark.parametrize("name", ["batch norm", "relu"])
def test_optimizers_take_them(optimizer, name):
    options = {"scale_invariant": {"lr": 0.3, "weight_decay": 0.01}, "rest": {"lr": 0.05}}
    net, groups = of(name, **options)
    opt = optimizer(groups, lr=0.1)
    assert [g["lr"] for g in opt.param_groups] == [0.3, 0.1, 0.05]
    x, y = case(name)[1][0]
    F.cross_entropy(net(x), y).backward()
    opt.step()
    other = optimizer(of(name)[1], lr=0.1)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [g["scale_invariant"] for g in other.param_groups] == [True, False, False]
    assert other.param_groups[0]["lr"] == 0.3


def test_from_loss_and_batches():
    net, batches, *_ = case("batch norm")
    found = find(net, F.cross_entropy, batches)
    assert members(param_groups(net, loss=F.cross_entropy, batches=batches)) == members(param_groups(net, found))


def test_refusals():
    net, batches, *_ = case("batch norm")
    found = find(net, F.cross_entropy, batches)
    with pytest.raises(
        ValueError, match="param_groups: expected found, .* or loss and batches to find it with: modules do not say"
    ):
        param_groups(net)
    with pytest.raises(ValueError, match="param_groups: expected found, .* or loss and batches"):
        param_groups(net, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="param_groups: expected either found, or loss and batches, got both"):
        param_groups(net, found, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="param_groups: found expected what invariance.find returns, got dict"):
        param_groups(net, {})
    with pytest.raises(
        ValueError,
        match="param_groups: found expected the parameters of this model, but only the model has '9.(weight|bias)'",
    ):
        param_groups(nn.Sequential(*convnet(nn.BatchNorm2d(8)), nn.Linear(4, 4)), found)
    with pytest.raises(ValueError, match="but only found has '8.(weight|bias)'"):
        param_groups(net[:8], found)
    for key in ("params", "name", "scale_invariant", "joint"):
        with pytest.raises(ValueError, match=f"param_groups: rest expected options without '{key}', got 1"):
            param_groups(net, found, rest={key: 1})


def test_wrongly_shared_batches_are_no_concern_of_groups():
    """Two models of one kind share what was found."""
    net = convnet(nn.GroupNorm(2, 8))
    found = find(net, F.cross_entropy, pairs(*IMAGES))
    other = convnet(nn.GroupNorm(2, 8))
    assert members(param_groups(other, found)) == members(param_groups(net, found))
    assert len(pairs(*ROWS)) == 3


def test_groups_of_a_wrapped_model_have_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]

    for wrapped in (model, nn.DataParallel(model)):
        groups = param_groups(wrapped, loss=F.cross_entropy, batches=batches)
        assert [n for n, _ in groups[0]["params"]] == ["0.weight"]
        assert sorted(n for group in groups for n, _ in group["params"]) == sorted(dict(model.named_parameters()))
