"""Handlers and layout rules of operations that torch does not have: a new op is measured exactly, by one registration."""

import pkgutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkern.noise.per_sample import layers, propagation
from normkern.noise.per_sample.contributions import Contribution
from normkern.noise.per_sample.layers.base import LayerKind, apply
from normkern.noise.per_sample.layers.registry import HANDLERS, handles
from normkern.noise.per_sample.propagation import RULES, propagates
from normkern.noise.per_sample.sample_layout import SampleLayout, by_sample

from .case import numbers
from .measuring import assert_right, measured, refuses

SCALED, HALVED = "normkern_tests::scaled_linear", "normkern_tests::halved"


@torch.library.custom_op(SCALED, mutates_args=())
def scaled_linear(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
    return x @ w.t() * scale


@torch.library.custom_op(HALVED, mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    """The means of neighbouring features."""
    return x.unflatten(-1, (-1, 2)).mean(-1)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.scale = inputs[2]


def _backward(ctx, g):
    x, w = ctx.saved_tensors
    return g @ w * ctx.scale, g.flatten(0, -2).t() @ x.flatten(0, -2) * ctx.scale, None


scaled_linear.register_autograd(_backward, setup_context=_setup)
halved.register_autograd(lambda ctx, g: g.repeat_interleave(2, -1) / 2)


#: Ways to call it.
OPS = {
    "packet": torch.ops.normkern_tests.scaled_linear,
    "overload": torch.ops.normkern_tests.scaled_linear.default,
    "python": scaled_linear,
}


class Scaled(nn.Module):
    """Two Linears, between them an op of the user's own."""

    def __init__(self, op="packet"):
        super().__init__()
        self.into, self.head, self.op = nn.Linear(6, 5), nn.Linear(4, 3), op
        self.w = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return self.head(torch.tanh(OPS[self.op](torch.tanh(self.into(x)), self.w, 1.5)))


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.ops.normkern_tests.halved(self.into(x))))


@pytest.fixture(autouse=True)
def _forgets(monkeypatch):
    """What a test registers goes with it."""
    for table in (HANDLERS, RULES):
        for name in (SCALED, HALVED):
            assert name not in table
    yield
    for table in (HANDLERS, RULES):
        for name in (SCALED, HALVED):
            table.pop(name, None)


class ScaledContribution(Contribution):
    """c_b = scale g_b^T x_b, of which only a single sample is known: everything else follows from it."""

    def __init__(self, x, g, scale, shape):
        self.x, self.g, self.scale, self.batch, self.shape = x, g, scale, len(x), shape

    def sample(self, b):
        return self.g[b].t() @ self.x[b] * self.scale


class ScaledLinear(LayerKind):
    def __init__(self, batch, block, scale, shape):
        self.batch, self.block, self.scale, self.shape = batch, block, scale, shape

    def forward(self, x, *params):
        (w,) = params
        return F.linear(x, w) * self.scale, (x, w)

    def input_grad(self, g, *kept):
        return g @ kept[1] * self.scale

    def contributions(self, g, *kept):
        x = by_sample(kept[0], self.block, self.batch, kept[0].shape[-1])
        g = by_sample(g, self.block // kept[0].shape[-1] * g.shape[-1], self.batch, g.shape[-1])
        return lambda i: ScaledContribution(x, g, self.scale, self.shape)


def by_a_layer_kind(tensors, op):
    x, w, scale = op.bind("x w scale")
    layout = tensors.layout(x)
    if layout is None:
        return NotImplemented
    use = tensors.use(op.name, [w])
    out = apply(use, ScaledLinear(use.batch, layout.block, scale, w.shape), x, w)
    tensors.mark(out, SampleLayout(layout.block // x.shape[-1] * out.shape[-1], layout.certain))
    return out


def by_other_operations(tensors, op):
    x, w, scale = op.bind("x w scale")
    return tensors.run(lambda: F.linear(x, w) * scale)


@pytest.mark.parametrize("shape", [(6,), (3, 6)], ids=["rows", "steps"])
@pytest.mark.parametrize("handler", [by_a_layer_kind, by_other_operations])
@pytest.mark.parametrize("called", OPS)
def test_registered_op_is_measured_exactly(called, handler, shape):
    handles(SCALED)(handler)
    problem = numbers(Scaled(called), 5, *shape).to(torch.float64)
    result = measured(problem)
    assert_right(problem, result)
    assert result.coverage.parameters["exact"] == 1


@pytest.mark.parametrize("operation", [SCALED, OPS["packet"], OPS["overload"]], ids=str)
def test_op_is_registered_by_name_or_function(operation):
    handles(operation)(by_a_layer_kind)
    problem = numbers(Scaled(), 5, 6).to(torch.float64)
    assert_right(problem, measured(problem))


def test_op_without_handler_is_refused():
    problem = numbers(Scaled(), 5, 6).to(torch.float64)
    with refuses(f"'w' of the model .Scaled. is used by {SCALED}"):
        measured(problem)


def test_handler_that_does_not_know_the_arguments_leaves_the_parameter_uncovered():
    handles(SCALED)(lambda tensors, op: NotImplemented)
    problem = numbers(Scaled(), 5, 6).to(torch.float64)
    with refuses("'w' of the model"):
        measured(problem)
    propagates(SCALED)(lambda op, results, batch: [SampleLayout(results[0][0].numel())])
    assert measured(problem, ("nsr",), uncovered="exclude").coverage.excluded == ("w",)


def test_wrong_contributions_of_a_handler_are_found(monkeypatch):
    handles(SCALED)(by_a_layer_kind)
    right = ScaledContribution.sample
    monkeypatch.setattr(ScaledContribution, "sample", lambda self, b: right(self, b) * 1.01)
    with refuses("do not add up to the gradient of autograd"):
        measured(numbers(Scaled(), 5, 6).to(torch.float64))


def test_op_without_layout_rule_is_refused():
    with refuses(f"{HALVED} is not known to treat every sample by itself"):
        measured(numbers(Halved(), 5, 6).to(torch.float64))


def test_registered_layout_rule_is_followed():
    @propagates(HALVED)
    def rule(op, results, batch):
        [(_, layout)] = op.samples
        return [SampleLayout(layout.block // 2, layout.certain)]

    problem = numbers(Halved(), 5, 6).to(torch.float64)
    assert_right(problem, measured(problem))


def test_second_handler_of_an_op_is_refused():
    with pytest.raises(
        ValueError, match="^GradientNoise: linear is already handled by normkern.*layers.linear.linear;"
    ):
        handles(SCALED, "linear")(by_a_layer_kind)
    assert SCALED not in HANDLERS


def test_second_layout_rule_of_an_op_is_refused():
    with pytest.raises(ValueError, match="^GradientNoise: softmax already has a layout rule;"):
        propagates("softmax")(lambda op, results, batch: [None])


@pytest.mark.parametrize(
    "handler", [lambda op: op, lambda a, b, c: a, lambda *, tensors, op: op, 3], ids=["one", "three", "keywords", "int"]
)
def test_handler_of_another_signature_is_refused(handler):
    with pytest.raises(TypeError, match=r"^GradientNoise: .* cannot be called as handler\(tensors, op\);"):
        handles(SCALED)(handler)
    assert SCALED not in HANDLERS


@pytest.mark.parametrize("operation", [3, "", None, nn.Linear(2, 2).weight], ids=["int", "empty", "None", "tensor"])
def test_what_is_no_operation_is_refused(operation):
    with pytest.raises(TypeError, match=r"^GradientNoise: register\(\) expected names of operations, functions, .*got"):
        handles(operation)


def test_no_operation_is_refused():
    with pytest.raises(TypeError, match=r"^GradientNoise: register\(\) expected at least one operation"):
        handles()


def test_every_file_of_layers_is_imported():
    names = {f"{layers.__name__}.{m.name}" for m in pkgutil.iter_modules(layers.__path__)}
    assert len(names) >= 9
    assert names <= sys.modules.keys()
    kinds = {r.handler.__module__ for r in HANDLERS.values() if r.handler.__module__.startswith("normkern.")}
    shared = {"base", "registry", "collected", "recurrent_steps"}
    assert kinds == names - {f"{layers.__name__}.{name}" for name in shared}


def test_moves_are_remembered_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(propagation, "_moved", {})
    monkeypatch.setattr(propagation, "_MOST_MOVES", 4)

    class Moving(nn.Module):
        def forward(self, x):
            return sum(x.roll(k, 1) for k in range(6))

    problem = numbers(nn.Sequential(nn.Linear(6, 6), Moving(), nn.Linear(6, 3)), 5, 6).to(torch.float64)
    assert_right(problem, measured(problem))
    assert 0 < len(propagation._moved) <= 4
