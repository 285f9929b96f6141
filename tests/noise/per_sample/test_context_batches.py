"""GradientNoise as a context: batches of many kinds, and any order of events."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern

from .budgets import SCALARS, TIERS, close
from .case import numbers, squares
from .contexts import F64, same, same_variance
from .left_behind import assert_nothing_left, snapshot
from .measuring import assert_right, noise_of, problem_of, refuses, told_of
from .reference import gradient


def test_one_sample_has_no_variance(mlp):
    before = snapshot(mlp.model)
    with refuses("at least 2 samples.*1"), normkern.GradientNoise(mlp.model):
        mlp.sample(0, 1).value().backward()
    assert_nothing_left(mlp.model, before)


def test_no_samples(mlp):
    with refuses("at least 2 samples.*0"), normkern.GradientNoise(mlp.model):
        mlp.model(torch.zeros(0, 6, dtype=F64)).sum().backward()


def test_batch_size_that_the_input_contradicts(mlp):
    with refuses("batch_size.*4.*5"), normkern.GradientNoise(mlp.model, batch_size=4):
        mlp.value().backward()


def test_batch_size_that_the_input_confirms(mlp):
    noise = normkern.GradientNoise(mlp.model, TIERS, batch_size=5)
    with noise:
        mlp.value().backward()
    assert_right(mlp, noise.result())


class TakesDictionaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, batch, scale=1.0):
        return {"logits": self.body(batch["x"][0]) * scale}


def test_inputs_in_dictionaries_and_lists():
    problem = numbers(TakesDictionaries().to(F64), 4, 5, loss=lambda out, y: squares(out["logits"], y)).to(F64)
    noise = noise_of(problem)
    with noise:
        problem.loss(problem.model({"name": "x", "x": [problem.inputs[0]]}, scale=2.0), problem.target).backward()
    plain = numbers(nn.Linear(5, 3), 4, 5, loss=lambda out, y: squares(2 * out, y)).to(F64)
    plain.model.load_state_dict(problem.model.body.state_dict())
    told = told_of(type(plain)(plain.model, problem.inputs, problem.target, plain.loss))
    close("sq_norms", noise.result().sq_norms, told.sq_norms, float(told.sq_norms.max()), 1e-11)


def test_result_before_anything(mlp):
    noise = noise_of(mlp)
    with refuses("expected a forward and a backward inside"):
        noise.result()
    with noise:
        mlp.value()
    with refuses("no backward"):
        noise.result()


def test_backward_after_the_context(mlp):
    noise, before = noise_of(mlp), snapshot(mlp.model)
    with noise:
        loss = mlp.value()
    assert_nothing_left(mlp.model, before)
    with refuses(""):
        loss.backward()
        noise.result()
    mlp.model.zero_grad()
    mlp.value().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(mlp.model.parameters(), gradient(mlp).values(), strict=True))


def test_forward_before_the_context(mlp):
    loss, noise = mlp.value(), noise_of(mlp)
    with refuses("whose forward ran outside .* move the call of the model"), noise:
        loss.backward()
    with refuses(""):
        noise.result()


@pytest.mark.parametrize("who", ["itself", "the same model's", "another model's"])
def test_contexts_do_not_nest(mlp, who):
    model = nn.Linear(2, 2) if who == "another model's" else mlp.model
    noise, before = noise_of(mlp), snapshot(mlp.model)
    inner = noise if who == "itself" else normkern.GradientNoise(model)
    with noise:
        with refuses("already open.*expected close" if who == "itself" else "inside another one.*close"), inner:
            pass
        mlp.value().backward()
    assert_right(mlp, noise.result())  # the outer one goes on
    assert_nothing_left(mlp.model, before)


@pytest.mark.parametrize("when", ["before", "between", "in forward", "in backward", "after"])
def test_exception_leaves_the_model_as_it_was(gpt, when):
    def fail(*_):
        raise KeyError(when)

    noise, before = noise_of(gpt), snapshot(gpt.model)

    def step():
        if when == "before":
            fail()
        handle = gpt.model.norm.register_forward_hook(fail) if when == "in forward" else None
        try:
            loss = gpt.value()
        finally:
            if handle:
                handle.remove()
        if when == "in backward":
            loss.register_hook(fail)
        if when == "between":
            fail()
        loss.backward()
        fail()

    with pytest.raises(KeyError, match=when), noise:
        step()
    assert_nothing_left(gpt.model, before)
    if when != "after":
        with refuses(""):
            noise.result()
    gpt.model.zero_grad()
    with noise:
        gpt.value().backward()
    assert_right(gpt, noise.result())


def test_result_can_be_repeated(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    same(noise.result(), noise.result())
    assert_right(mlp, noise.result())


def test_a_result_between_two_backwards_stays_and_the_next_is_right():
    problem = problem_of("mlp")
    noise = noise_of(problem, ("nsr", "norms", "variance"))
    with noise:
        problem.sample(0, 3).value().backward()
        between = noise.result()
        variance = {name: x.clone() for name, x in between.variance.items()}
        problem.sample(3, 5).value().backward()
    after = noise.result()
    for name, x in between.variance.items():
        assert torch.equal(x, variance[name])
        assert not torch.equal(x, after.variance[name])
    same_variance(after, noise.result())


def test_a_variance_that_was_changed_is_not_given_twice(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    result = noise.result()
    next(iter(result.variance.values())).sqrt_()
    with refuses("the variance of .* that an earlier result gave has been changed in place.*expected a copy"):
        noise.result()


def test_numbers_as_large_as_the_model_go_with_the_result(mlp):
    noise = noise_of(mlp)
    gone = []
    gc.disable()
    try:
        for _ in range(3):
            mlp.model.zero_grad()
            with noise:
                mlp.value().backward()
            result = noise.result()
            gone += [weakref.ref(x) for x in result.variance.values()]
        assert all(x() is None for x in gone[: -len(result.variance)])
    finally:
        gc.enable()


def test_result_inside_the_context(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
        inside = noise.result()
    same(inside, noise.result())
    assert_right(mlp, inside)


def test_new_entry_is_a_new_measurement(mlp):
    noise = noise_of(mlp)
    for samples in (slice(0, 5), slice(0, 3), slice(2, 4)):
        part = mlp.sample(samples.start, samples.stop)
        mlp.model.zero_grad()
        with noise:
            part.value().backward()
        assert_right(part, noise.result())
    with noise:
        pass
    with refuses("no backward"):
        noise.result()


def test_result_stays_what_it_was(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    result, told = noise.result(), told_of(mlp)
    means = {name: x.clone() for name, x in result.mean.items()}
    for p in mlp.model.parameters():
        p.grad.mul_(3.0)
        with torch.no_grad():
            p.add_(1.0)
    with noise:
        mlp.value().backward()
    close("sq_norms", result.sq_norms, told.sq_norms, float(told.sq_norms.max()), 1e-11)
    for name, x in result.mean.items():
        assert torch.equal(x, means[name])
        close(name, result.variance[name], told.variance[name], float(told.second_moment[name].max()), 1e-11)


@pytest.mark.parametrize("to_none", [True, False])
def test_result_after_the_step(mlp, to_none):
    noise, told = noise_of(mlp), told_of(mlp)
    opt = torch.optim.SGD(mlp.model.parameters(), lr=0.1)
    with noise:
        mlp.value().backward()
    opt.step()
    opt.zero_grad(set_to_none=to_none)
    result = noise.result()
    for field in SCALARS:
        assert math.isclose(getattr(result, field), told.scalars[field], rel_tol=1e-9)
    close("projections", result.projections, told.projections, float(told.sq_norms.max()), 1e-11)
    try:
        means = result.mean
    except RuntimeError as error:  # it may have been in .grad; zeros it must not be
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        for name, x in means.items():
            close(name, x, told.mean[name], float(x.abs().max()), 1e-11)


class TwoOrders(nn.Module):
    """A batch, and a second input whose samples lie in its second dimension."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x, y):
        return F.mse_loss(self.body(x).expand(6, 6, 3), self.body(y))


def test_second_input_in_another_order_is_refused():
    """It is taken for a batch in front, which the loss shows to be wrong."""
    model = TwoOrders()
    sentence = r"mse_loss joins a tensor of shape \(6, 6, 3\) with samples that lie along another dimension"
    with refuses(sentence), normkern.GradientNoise(model):
        model(torch.randn(6, 5), torch.randn(6, 6, 5)).backward()
