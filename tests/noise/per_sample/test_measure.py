"""GradientNoise.measure: the numbers of a context, and training as it was."""

import collections
import copy
import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import normkern
from normkern import GradientNoise

from .budgets import SCALARS
from .left_behind import assert_nothing_left, snapshot

TIERS = ("nsr", "norms", "variance", "projections")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3), nn.BatchNorm1d(3).eval()
    ).double()


def pairs(count=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def in_eval_mode_of_batch_norm(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.eval()
    return model


def test_numbers_are_those_of_a_context_with_batch_norm_in_eval_mode():
    model, batch = net(), pairs()
    torch.manual_seed(3)
    measured = GradientNoise.measure(model, loss, batch, stats=TIERS)
    torch.manual_seed(3)  # the same dropout
    noise = GradientNoise(in_eval_mode_of_batch_norm(copy.deepcopy(model)), TIERS)
    with noise:
        loss(noise.model, batch).backward()
    expected = noise.result()
    for field in (*SCALARS, "sq_norms", "projections"):
        assert torch.equal(getattr(measured, field), getattr(expected, field)), field
    for name, x in expected.mean.items():
        assert torch.equal(measured.mean[name], x)
        assert torch.equal(measured.variance[name], expected.variance[name])
    assert measured.batch_size == 12
    assert measured.batchnorm == expected.batchnorm == "eval"
    assert str(measured.coverage) == str(expected.coverage)


def state(model):
    python, (kind, keys, *rest) = random.getstate(), np.random.get_state()  # noqa: NPY002
    return [
        [p.grad for p in model.parameters()],
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
        [m.training for m in model.modules()],
        [b.clone() for b in model.buffers()],
        [id(b) for b in model.buffers()],
        torch.get_rng_state(),
        python, kind, keys.tolist(), rest,
        [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()],
    ]  # fmt: skip


def assert_same_state(a, b):
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        elif isinstance(x, list) and x and isinstance(x[0], torch.Tensor):
            assert all(torch.equal(s, t) for s, t in zip(x, y, strict=True))
        else:
            assert x == y


def careless(model, batch):
    """Change everything that a loss can change."""
    model.train()
    model[1].running_mean.add_(1)
    model[1].num_batches_tracked = torch.tensor(7)
    random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    value = loss(model.eval(), batch)
    model[3].train()
    return value


def failing(model, batch):
    careless(model, batch)
    raise KeyError("of the user")


def batch_norm_by_hand(model, batch):
    careless(model, batch)
    return nn.functional.batch_norm(model(batch[0]), None, None, training=True).sum()


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("measured", [careless, failing, batch_norm_by_hand, lambda m, b: loss(m, b).detach()])
def test_everything_is_as_it_was_also_after_an_error(measured, has_gradients):
    model, batch = net(), pairs()
    called = []
    if has_gradients:
        loss(model, batch).backward()
        model[0].weight.grad = None
    model[0].weight.register_hook(lambda g: called.append("hook"))
    model[4].weight.register_post_accumulate_grad_hook(lambda p: called.append("step"))
    before, parts = state(model), snapshot(model)
    grads = [p.grad for p in model.parameters()]
    if measured is careless:
        GradientNoise.measure(model, measured, batch)
    else:
        with pytest.raises((KeyError, RuntimeError, ValueError)):
            GradientNoise.measure(model, measured, batch)
    assert_same_state(before, state(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert snapshot(model) == parts
    assert not called  # a step of the optimizer in a hook would change the weights
    model.zero_grad()
    loss(model, batch).backward()
    assert sorted(called) == ["hook", "step"]
    with GradientNoise(in_eval_mode_of_batch_norm(model)) as noise:  # no context is open
        loss(model, batch).backward()
    noise.result()


def test_nothing_is_left_in_the_model():
    model = net()
    before = snapshot(model)
    GradientNoise.measure(model, loss, pairs())
    assert_nothing_left(model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callbacks_without_gradients_can_measure(mode):
    model = net()
    torch.manual_seed(0)
    expected = GradientNoise.measure(model, loss, pairs()).scalars()
    with mode():
        torch.manual_seed(0)
        assert GradientNoise.measure(model, loss, pairs()).scalars() == expected
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)


Pair = collections.namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("made", "read"),
    [
        (lambda x, y: [x, y], lambda b: b),
        (Pair, lambda b: (b.x, b.y)),
        (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
        (lambda x, y: collections.UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
        (lambda x, y: types.SimpleNamespace(x=x, y=y), lambda b: (b.x, b.y)),
        (lambda x, y: ({"scale": torch.tensor(2.0)}, {"inner": [x, y]}), lambda b: b[1]["inner"]),
    ],
    ids=["list", "namedtuple", "dict", "UserDict", "object", "nested"],
)
def test_batches_of_every_kind(made, read):
    model = net().eval()
    expected = GradientNoise.measure(model, loss, pairs()).scalars()

    def of_kind(model, batch):
        return loss(model, read(batch))

    assert GradientNoise.measure(model, of_kind, made(*pairs())).scalars() == expected
    if made(*pairs()).__class__ is not types.SimpleNamespace:
        with torch.inference_mode():
            assert GradientNoise.measure(model, of_kind, made(*pairs())).scalars() == expected


class Wrapping(nn.Module):
    """A module as Lightning's: the loss calls the net inside of it, not the module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def step(self, batch):
        return loss(self.inner, batch)


def test_loss_may_call_a_part_of_the_model():
    inner = net().eval()
    expected = GradientNoise.measure(inner, loss, pairs()).scalars()
    found = GradientNoise.measure(Wrapping(inner), lambda module, batch: module.step(batch), pairs()).scalars()
    assert found == {named(key): v for key, v in expected.items()}


def named(key):
    head, _, name = key.rpartition("/")
    return f"{head}/inner.{name}" if "." in name else key


def test_compiled_model_and_copy_of_weights_have_the_names_of_the_model():
    model = net().eval()
    expected = GradientNoise.measure(model, loss, pairs()).scalars()
    assert GradientNoise.measure(torch.compile(model, backend="eager"), loss, pairs()).scalars() == expected
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert GradientNoise.measure(averaged, loss, pairs()).scalars() == expected
    assert GradientNoise.measure(nn.DataParallel(model), loss, pairs()).scalars() == expected


@pytest.mark.parametrize("uncovered", ["raise", "estimate"])
def test_training_and_measurement_in_one_autocast_have_their_gradients(uncovered):
    model, (x, y) = net().float().eval(), pairs()
    batch = (x.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(batch[0])  # autocast keeps casts without a graph
        result = GradientNoise.measure(model, loss, batch, uncovered=uncovered)
        loss(model, batch).backward()
    assert len(result.coverage.exact) == 8
    assert all(p.grad is not None for p in model.parameters())


def test_no_batch_norm_no_word_of_it():
    model = nn.Linear(4, 3).double()
    result = GradientNoise.measure(model, loss, pairs())
    assert result.batchnorm is None
    assert "noise/batchnorm_eval" not in result.scalars()


NAN = torch.full((5, 4), float("nan"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": 3}, TypeError, "model expected a torch.nn.Module, got int; expected measure"),
        ({"model": nn.ReLU()}, ValueError, "model has no parameter that requires a gradient; expected a model"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, ValueError, "model has no parameter that requires"),
        ({"loss": 3.0}, TypeError, r"loss expected a function loss\(model, batch\) .*got float"),
        ({"batch": "words"}, ValueError, r"batch \(str\) has no tensor .*expected tensors.*or batch_size="),
        ({"batch": [torch.tensor(1.0)]}, ValueError, r"batch \(list\) has no tensor with samples"),
        (
            {"loss": lambda m, b: m(b[0])},
            TypeError,
            r"loss\(model, batch\) returned a tensor of shape \(12, 3\); expected",
        ),
        ({"loss": lambda m, b: None}, TypeError, "returned NoneType, no tensor; expected a tensor with one element"),
        ({"loss": lambda m, b: loss(m, b).item()}, TypeError, "returned float, no tensor"),
        ({"loss": lambda m, b: {"loss": loss(m, b)}}, TypeError, "returned dict, no tensor.*transformers"),
        ({"loss": lambda m, b: loss(m, b).detach()}, ValueError, "the loss does not depend on .*without detach"),
        ({"loss": torch.no_grad()(loss)}, ValueError, "the loss does not depend on parameters.*no_grad"),
        ({"batch": (NAN, torch.zeros(5, dtype=torch.long))}, FloatingPointError, "the loss is nan, .*look for NaN"),
        ({"loss": lambda m, b: loss(m, b) / 0}, FloatingPointError, "the loss is inf, "),
    ],
)
def test_every_wrong_argument_is_a_sentence(change, error, match):
    arguments = {"model": net(), "loss": loss, "batch": pairs(), **change}
    with pytest.raises(error, match=f"^GradientNoise.measure: .*{match}"):
        GradientNoise.measure(**arguments)


def test_options_are_those_of_the_context():
    with pytest.raises(ValueError, match="^GradientNoise: stats expected some of"):
        GradientNoise.measure(net(), loss, pairs(), stats="mean")
    with pytest.raises(ValueError, match="^GradientNoise: batch_size is 6, but the first tensor"):
        GradientNoise.measure(net(), loss, pairs(), batch_size=6)
    sums = GradientNoise.measure(
        net().eval(), lambda m, b: cross_entropy(m(b[0]), b[1], reduction="sum"), pairs(), reduction="sum"
    )
    means = GradientNoise.measure(net().eval(), loss, pairs())
    torch.testing.assert_close(sums.trace_sigma, means.trace_sigma)


def test_measuring_inside_a_context_is_refused_and_the_context_goes_on():
    model = net().eval()
    with GradientNoise(model) as noise:
        with pytest.raises(RuntimeError, match="^GradientNoise: this context is inside another one, of model Sequent"):
            GradientNoise.measure(model, loss, pairs())
        loss(model, pairs()).backward()
    assert noise.result().batch_size == 12


def test_parameters_that_something_else_replaced_are_refused():
    model = net().eval()
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def swapped(model, batch):
        return cross_entropy(torch.func.functional_call(model, others, (batch[0],)), batch[1])

    with pytest.raises(RuntimeError, match=r"^GradientNoise: Linear.weight has another parameter .*functional_call"):
        GradientNoise.measure(model, swapped, pairs())
    own = dict(model.named_parameters())
    same = GradientNoise.measure(
        model, lambda m, b: cross_entropy(torch.func.functional_call(m, own, (b[0],)), b[1]), pairs()
    )
    assert same.scalars() == GradientNoise.measure(model, loss, pairs()).scalars()


def test_gradient_penalty_is_a_sentence():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def penalty(model, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (g.norm(dim=1) - 1).square().mean()

    with pytest.raises(RuntimeError, match=r"^GradientNoise: the loss contains gradients of the model \(create_graph"):
        GradientNoise.measure(model, penalty, pairs()[0])


def test_it_is_what_the_package_exports():
    assert normkern.GradientNoise.measure is GradientNoise.measure
