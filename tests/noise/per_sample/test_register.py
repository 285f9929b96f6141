"""Rules of the user's own: for operations, autograd functions and modules, checked as every layer is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern
from normkern.noise import register

from .case import numbers
from .measuring import assert_right, measured, refuses


class Cubed(torch.autograd.Function):
    """(x w^T)^3, with a backward of its own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w.t()) ** 3

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = 3 * (x @ w.t()) ** 2 * grad
        return grad @ w, grad.t() @ x


@register(Cubed)
def _cubed(tensors, op):
    x, w = op.args
    return tensors.run(lambda: F.linear(x, w) ** 3)


class Fused(nn.Module):
    """A layer that calls a function without a rule; `factor` 0 is one that the rule does not know."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(4, 4) / 2), factor

    def forward(self, x, *, shift=0.0):
        if self.factor:
            return Hidden.apply(x, self.weight, self.factor) + shift
        return F.linear(x, self.weight) + shift


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return factor * x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return ctx.factor * grad @ w, ctx.factor * grad.t() @ x, None


@register(Fused)
def _fused(tensors, op):
    module, x = op.args
    if not module.factor:
        return NotImplemented
    return tensors.run(lambda: F.linear(x, module.weight) * module.factor + op.kwargs.get("shift", 0.0))


class Wrong(Fused):
    def forward(self, x):
        return Hidden.apply(x, self.weight, 3.0)


@register(Wrong)
def _wrong(tensors, op):
    """Half of it runs where the tracer does not see it."""
    module, x = op.args
    return tensors.run(lambda: F.linear(x, module.weight) * 2) + Hidden.apply(x, module.weight, 1.0)


class Between(nn.Module):
    def __init__(self, how, factor=2.0):
        super().__init__()
        self.how, self.a, self.b, self.head = how, nn.Linear(5, 4), nn.Parameter(torch.randn(4, 4) / 2), nn.Linear(4, 3)
        self.layer = None if how == "function" else Fused(factor)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        if self.how == "function":
            return self.head(Cubed.apply(Cubed.apply(x, self.b), self.b))
        return self.head(self.layer(self.layer(x, shift=0.5)) * self.b.diagonal())


@pytest.mark.parametrize(("how", "factor"), [("function", 0), ("module", 2.0), ("module", 0.0)])
def test_registered_rules_measure_exactly(how, factor):
    """Used twice each; a module whose arguments the rule does not know runs as it is."""
    torch.manual_seed(0)
    problem = numbers(Between(how, factor), 6, 5).to(torch.float64)
    plain = problem.model(*problem.inputs)
    assert_right(problem, measured(problem))
    torch.testing.assert_close(problem.model(*problem.inputs), plain, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["function", "module"])
def test_frozen_and_without_gradients(how):
    """Without parameters to measure the operation is the user's own."""
    torch.manual_seed(0)
    model = Between(how).double()
    for p in (model.b, *(() if model.layer is None else model.layer.parameters())):
        p.requires_grad_(False)
    problem = numbers(model, 6, 5).to(torch.float64)
    noise = normkern.GradientNoise(problem.model, uncovered="exclude")
    with noise:
        with torch.no_grad():
            problem.model(*problem.inputs)
        problem.value().backward()
    assert "head.weight" in noise.result().coverage.exact


def test_wrong_rule_is_found_by_the_sum_check():
    problem = numbers(nn.Sequential(nn.Linear(5, 4), Wrong()), 6, 5).to(torch.float64)
    with refuses("'1.weight' .*do not add up to its gradient"):
        measured(problem)


def test_rule_for_what_has_one_or_is_no_operation():
    with refuses("already handled"):
        register(Fused)(lambda tensors, op: NotImplemented)
    with refuses(r"register\(\) expected names of operations, functions, or classes"):
        register(3)
    with refuses(r"register\(\) expected at least one operation"):
        register()
    with refuses("cannot be called as handler"):
        register("normkern_tests::nothing")(lambda: None)
