"""Refusals that are not about the batch: `uncovered` gives the numbers of the rest, and the sentence says where and how."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern

from .measuring import refuses

SAMPLES = 6


@torch.library.custom_op("normkern_tests::quietly_halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    """An operation without a rule."""
    return x / 2


halved.register_autograd(lambda ctx, grad: grad / 2, setup_context=lambda ctx, inputs, output: None)


class Doubled(torch.autograd.Function):
    """An operation with a backward of its own, which no mode sees."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return 2 * grad @ w.t(), 2 * x.t() @ grad


class Net(nn.Module):
    """Two branches; one has an operation without a rule between two layers. `loss`: whether the loss is inside."""

    def __init__(self, kind, inside=False):
        super().__init__()
        self.kind, self.inside = kind, inside
        self.before, self.behind, self.beside = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(5, 3)
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, y=None):
        h = torch.tanh(self.before(x))
        if self.kind == "unknown":
            h = torch.ops.normkern_tests.quietly_halved(h)
        elif self.kind == "function":
            h = Doubled.apply(h, self.w)
        elif self.kind == "opaque":
            h = h @ F.dropout(self.w, 1e-12)
        z = self.behind(h) + self.beside(x)
        return z if y is None else F.cross_entropy(z, y)


def problem(kind):
    torch.manual_seed(0)
    return Net(kind).double(), torch.randn(SAMPLES, 5, dtype=torch.float64), torch.randint(3, (SAMPLES,))


def traces(model, x, y):
    """Name -> trace of the covariance of per-sample gradients, by a loop over samples."""
    names, params = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[b : b + 1]), y[b : b + 1]), params, allow_unused=True)
        for b in range(SAMPLES)
    ]
    return {
        n: float(torch.stack([r[i] for r in rows]).var(0).sum()) for i, n in enumerate(names) if rows[0][i] is not None
    }


def measured(model, x, y, inside, uncovered, stats=("nsr",)):
    model.zero_grad()
    noise = normkern.GradientNoise(model, stats, uncovered=uncovered, check=True)
    with noise:
        (model(x, y) if inside else F.cross_entropy(model(x), y)).backward()
    return noise.result()


@pytest.mark.parametrize("inside", [False, True])
def test_operation_without_a_rule_leaves_out_what_it_may_couple(inside):
    """The layer behind it, and the one before it: exact is what the operation does not touch."""
    model, x, y = problem("unknown")
    with refuses("linear uses 'behind.weight' .*quietly_halved is not known.*register.*exclude"):
        measured(model, x, y, inside, "raise")
    result = measured(model, x, y, inside, "exclude")
    assert set(result.coverage.excluded) == {"before.weight", "before.bias", "behind.weight", "behind.bias"}
    wanted = traces(model, x, y)
    for n in ("beside.weight", "beside.bias"):
        assert math.isclose(float(result.per_param[n].trace_sigma), wanted[n], rel_tol=1e-10)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["function", "opaque"])
def test_hidden_parameter_is_left_out_or_estimated(kind, inside):
    """Also with the loss inside the model, and for a function with a backward of its own."""
    model, x, y = problem(kind)
    wanted = traces(model, x, y)
    result = measured(model, x, y, inside, "exclude")
    assert result.coverage.excluded == ("w",)
    for n, p in result.per_param.items():
        assert math.isclose(float(p.trace_sigma), wanted[n], rel_tol=1e-9)
    draws = []
    for _ in range(60):
        result = measured(model, x, y, inside, "estimate")
        assert result.coverage.estimated == ("w",)
        draws.append(float(result.per_param["w"].trace_sigma))
        assert math.isclose(float(result.per_param["before.weight"].trace_sigma), wanted["before.weight"], rel_tol=1e-9)
    drawn = torch.tensor(draws, dtype=torch.float64)
    assert abs(drawn.mean() - wanted["w"]) < 5 * drawn.std() / len(draws) ** 0.5


def test_losses_of_several_terms_in_the_model_are_estimated():
    """Each term is signed; together they are the same estimate as with the loss outside."""

    class Terms(Net):
        def forward(self, x, y=None):
            z = Net.forward(self, x)
            if y is None:
                return z
            return F.cross_entropy(z, y) + 0.1 * z.square().mean(0).sum() + z.sum() / 50

    model, x, y = problem("opaque")
    inside = Terms("opaque").double()
    inside.load_state_dict(model.state_dict())
    got, wanted = [], []
    for _ in range(80):
        got.append(float(measured(inside, x, y, True, "estimate").per_param["w"].trace_sigma))
        noise = normkern.GradientNoise(model, uncovered="estimate")
        model.zero_grad()
        with noise:
            z = model(x)
            (F.cross_entropy(z, y) + 0.1 * z.square().mean(0).sum() + z.sum() / 50).backward()
        wanted.append(float(noise.result().per_param["w"].trace_sigma))
    a, b = torch.tensor(got), torch.tensor(wanted)
    assert sorted({round(v, 9) for v in got})[0] == pytest.approx(min(wanted), rel=1e-6)
    assert abs(a.mean() - b.mean()) < 5 * (a.std() + b.std()) / len(got) ** 0.5


def test_sentences_name_operation_parameter_and_line():
    """The line of the user's code: where the operation ran that mixed the samples, and where the layer met them."""
    for kind, what in (("unknown", "halved"), ("opaque", "matmul")):
        model, x, y = problem(kind)
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            measured(model, x, y, False, "raise")
        said = str(caught.value)
        assert said.startswith("GradientNoise: ")
        assert what in said
        assert re.search(re.escape(__file__) + r":\d+, in forward", said), said
        assert "normkern.noise.register" in said
        assert 'uncovered="exclude"' in said


def test_function_of_its_own_is_not_taken_for_a_forward_outside():
    """All parameters go through it, and the model was called."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return Doubled.apply(x, self.w)

    with refuses("'w' of the model .*has a gradient but no use was seen"), normkern.GradientNoise(model := Alone()):
        model(torch.randn(4, 5)).square().mean().backward()
