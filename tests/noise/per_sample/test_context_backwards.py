"""GradientNoise as a context: several backwards in one context."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import normkern

from .budgets import TIERS, assert_says, close
from .case import numbers, squares
from .contexts import F64
from .left_behind import assert_nothing_left, snapshot
from .measuring import REFUSED, assert_right, measured, noise_of, problem_of, told_of
from .reference import expected, gradient

WITHOUT_PROJECTIONS = ("nsr", "norms", "variance")


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("mlp_wide", (2, 4, 9)),
        ("mlp", (3,)),
        *((name, (2,)) for name in ("gpt_tied_by_module", "resnet", "token_mean", "keywords")),
    ],
)
def test_micro_batches_of_one_context_are_one_batch(name, cuts):
    problem = problem_of(name)
    parts = [problem.sample(a, b) for a, b in itertools.pairwise((0, *cuts, problem.samples))]
    noise = noise_of(problem, WITHOUT_PROJECTIONS)
    with noise:
        for part in parts:
            share = part.samples / problem.samples
            if problem.weights is not None:
                share = float((part.target != -100).sum() / (problem.target != -100).sum())
            (part.value() * share).backward()
    assert_right(problem, noise.result(), WITHOUT_PROJECTIONS)
    for name, g in gradient(problem).items():
        torch.testing.assert_close(problem.model.get_parameter(name).grad, g)


def test_projections_of_micro_batches_are_right_or_refused(mlp):
    noise = noise_of(mlp)
    try:
        with noise:
            for part in (mlp.sample(0, 2), mlp.sample(2, 5)):
                (part.value() * part.samples / 5).backward()
        result = noise.result()
    except RuntimeError as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
        assert "projections" in str(error)  # noqa: PT017
    else:
        assert_right(mlp, result)


def test_a_parameter_that_only_one_micro_batch_uses():
    problem = numbers(Either(), 6, 5).to(F64)
    noise = noise_of(problem, WITHOUT_PROJECTIONS)
    with noise:
        for part, left in ((problem.sample(0, 2), True), (problem.sample(2, 6), False)):
            problem.model.left = left
            (part.value() * part.samples / 6).backward()
    problem.model.left = None
    assert_right(problem, noise.result(), WITHOUT_PROJECTIONS)


class Either(nn.Module):
    """One layer or another, for all samples of a call; `left` None: the first two samples that it ever sees go left."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.left, self.seen = nn.Linear(5, 3), nn.Linear(5, 3), None, 0

    def forward(self, x):
        left = self.seen < 2 if self.left is None else self.left
        self.seen += len(x) if self.left is None else 0
        return self.a(x) if left else self.b(x)


def test_gradient_that_was_there_before(mlp):
    for p in mlp.model.parameters():
        p.grad = torch.ones_like(p)
    result = measured(mlp)
    assert_right(mlp, result)
    for p, g in zip(mlp.model.parameters(), gradient(mlp).values(), strict=True):
        torch.testing.assert_close(p.grad, g + 1)


@pytest.mark.parametrize("zeroed", ["zeros", "None"])
def test_training_is_what_it_is_without(zeroed):
    runs = []
    for watched in (False, True):
        problem = problem_of("resnet", torch.float32)
        opt = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
        noise, losses = noise_of(problem), []
        for _ in range(4):
            opt.zero_grad(set_to_none=zeroed == "None")
            if watched:
                with noise:
                    loss = problem.value()
                    loss.backward()
            else:
                loss = problem.value()
                loss.backward()
            losses.append(loss.item())
            opt.step()
        runs.append(losses)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=0)
    assert runs[0][-1] < runs[0][0]


def second_backward(problem):
    loss = problem.value()
    loss.backward(retain_graph=True)
    loss.backward()


def losses_apart(problem):
    out = problem.model(*problem.inputs)
    problem.loss(out, problem.target).backward(retain_graph=True)
    (0.5 * out.square().sum()).backward()


def gradients_only(problem):
    torch.autograd.grad(problem.value(), list(problem.model.parameters()))


def gradients_then_backward(problem):
    loss = problem.value()
    torch.autograd.grad(loss, list(problem.model.parameters()), retain_graph=True)
    loss.backward()


def one_backward_of_two_forwards(problem):
    (problem.value() + problem.value()).backward()


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (second_backward, 2.0),
        (losses_apart, None),
        (gradients_only, None),
        (gradients_then_backward, 1.0),
        (one_backward_of_two_forwards, 2.0),
    ],
)
def test_unusual_backwards_are_right_or_refused(step, factor, mlp):
    noise, before = noise_of(mlp, WITHOUT_PROJECTIONS), snapshot(mlp.model)
    try:
        with noise:
            step(mlp)
        result = noise.result()
    except RuntimeError as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        assert factor is not None
        if result.batch_size == mlp.samples:
            scaled = type(mlp)(mlp.model, mlp.inputs, mlp.target, lambda out, y: factor * mlp.loss(out, y))
            assert_right(scaled, result, WITHOUT_PROJECTIONS)
        else:  # each forward has samples of its own: twice the same batch
            assert result.batch_size == 2 * mlp.samples
            told = told_of(mlp)
            grad_sq = told.scalars["grad_sq_norm"] * factor**2
            assert math.isclose(result.grad_sq_norm, grad_sq, rel_tol=1e-9)
    assert_nothing_left(mlp.model, before)


def test_evaluation_inside_the_context(mlp):
    noise = noise_of(mlp)
    with noise:
        loss = mlp.value()
        with torch.no_grad():
            mlp.value()
        loss.backward()
    assert_right(mlp, noise.result())


def test_double_backward_is_refused(mlp):
    """A gradient penalty, whose own backward goes through the layers' backwards."""
    x = mlp.inputs[0].clone().requires_grad_()

    def step():
        out = mlp.model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (mlp.loss(out, mlp.target) + slope.square().sum()).backward()

    with pytest.raises(RuntimeError), noise_of(mlp):  # torch's own sentence will do
        step()


def test_gradients_of_inputs_are_autograds(gpt):
    x = torch.randn(4, 6, 8, dtype=F64, requires_grad=True)
    block = gpt.model.blocks[0]
    noise = normkern.GradientNoise(block, TIERS)
    with noise:
        block(x).square().sum().backward()
    ours, x.grad = x.grad, None
    block(x).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-12, atol=1e-12)


def test_a_part_of_a_model(gpt):
    """Only its parameters are measured, though the loss is of the whole."""
    whole, noise = told_of(gpt), normkern.GradientNoise(gpt.model.blocks, TIERS, check=True, batch_size=gpt.samples)
    with noise:
        gpt.value().backward()
    for name, norms in noise.result().sq_norms_per_param.items():
        close(name, norms, whole.sq_norms_per_param[f"blocks.{name}"], float(norms.max()), 1e-11)


def test_another_model_beside_it(mlp, gpt):
    noise = noise_of(mlp)
    with noise:
        (mlp.value() + gpt.value()).backward()
    assert_right(mlp, noise.result())
    assert all(p.grad is not None for p in gpt.model.parameters())


class Encoder(nn.Module):
    """Used by a method of its own, which gives its layers (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def encode(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, x):
        return self.encode(x)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_method_instead_of_a_call_is_right_or_refused(batch_size):
    """The first tensor that any module sees has another leading dimension than the batch."""
    problem = numbers(Encoder(), 4, 3, 5).to(F64)
    noise = normkern.GradientNoise(problem.model, TIERS, batch_size=batch_size)
    try:
        with noise:
            problem.loss(problem.model.encode(*problem.inputs), problem.target).backward()
        result = noise.result()
    except REFUSED as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        assert_right(problem, result)


def test_chunks_of_a_batch_in_one_backward_are_right_or_refused(mlp):
    """Two calls of the model on different samples, one loss."""
    problem = mlp.sample(0, 4)
    noise = noise_of(problem, WITHOUT_PROJECTIONS)
    try:
        with noise:
            (0.5 * problem.sample(0, 2).value() + 0.5 * problem.sample(2, 4).value()).backward()
        result = noise.result()
    except REFUSED as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        assert_right(problem, result, WITHOUT_PROJECTIONS)


def test_hooks_on_activations_are_part_of_the_gradient(mlp):
    def halve(module, args, out):
        out.register_hook(lambda g: g / 2)

    mlp.model[2].register_forward_hook(halve)
    assert_right(mlp, measured(mlp))


def test_dropout():
    """Samples cannot be taken alone here: the terms of one forward are, with the same random numbers."""
    problem = numbers(
        nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3), nn.Dropout(0.2)), 6, 5
    )
    problem = problem.to(F64)
    torch.manual_seed(3)
    result = measured(problem)
    torch.manual_seed(3)
    out = problem.model(*problem.inputs)
    named = dict(problem.model.named_parameters())
    terms = [squares(out[b : b + 1], problem.target[b : b + 1]) / 6 for b in range(6)]
    rows = [torch.autograd.grad(term, list(named.values()), retain_graph=True) for term in terms]
    told = expected({name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)})
    assert_says(result, told, TIERS, 1e-11)


#: Ways to get the gradient of a loss by the model's input alone, as attacks and saliency maps do.
OF_INPUT = {
    "torch.autograd.grad": lambda loss, x: torch.autograd.grad(loss, x)[0],
    "create_graph": lambda loss, x: torch.autograd.grad(loss, x, create_graph=True)[0].detach(),
    "backward(inputs=)": lambda loss, x: (loss.backward(inputs=[x]), x.grad.clone())[1],
}


def of_input(problem, x):
    return problem.loss(problem.model(x, *problem.inputs[1:], **problem.keywords, **problem.common), problem.target)


@pytest.mark.parametrize("uncovered", ["raise", "estimate"])
@pytest.mark.parametrize("way", OF_INPUT)
@pytest.mark.parametrize("name", ["mlp", "resnet", "lstm", "frozen_convolutions"])
def test_backwards_to_the_input_alone_are_not_measured(name, way, uncovered):
    """An adversarial attack inside of the context: the numbers are those of the batch that comes after."""
    problem = problem_of(name)
    noise = noise_of(problem, WITHOUT_PROJECTIONS, uncovered=uncovered)
    with noise:
        x = problem.inputs[0].detach().requires_grad_()
        for _ in range(2):
            assert OF_INPUT[way](of_input(problem, x), x).abs().max() > 0
        problem.value().backward()
    assert_right(problem, noise.result(), WITHOUT_PROJECTIONS)


@pytest.mark.parametrize("uncovered", ["raise", "estimate"])
def test_a_saliency_map_before_the_backward_of_the_same_forward(mlp, uncovered):
    noise = noise_of(mlp, WITHOUT_PROJECTIONS, uncovered=uncovered)
    with noise:
        x = mlp.inputs[0].detach().requires_grad_()
        loss = of_input(mlp, x)
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    assert_right(mlp, noise.result(), WITHOUT_PROJECTIONS)


def test_the_sum_that_an_attack_takes_is_no_loss(mlp):
    noise = noise_of(mlp, WITHOUT_PROJECTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with noise:
            x = mlp.inputs[0].detach().requires_grad_()
            mlp.model(x).sum().backward(inputs=[x])
            mlp.value().backward()
    assert_right(mlp, noise.result(), WITHOUT_PROJECTIONS)
