"""Parameters whose contributions cannot be told sample by sample: estimated by signs, left out, always said."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkern
from normkern.noise.per_sample import contrast

from .budgets import BUDGET, SCALARS, assert_says, close
from .case import numbers
from .left_behind import assert_nothing_left, snapshot
from .measuring import assert_right, measured, noise_of, problem_of, refuses, told_of
from .models import UNCOVERED
from .reference import contributions, expected, gradient

#: Net -> the layer that no rule covers.
HIDDEN = {
    "own_operation": "layer.",
    "own_operations": "layer.",
    "own_operation_odd": "layer.",
}


def hidden(name, parameter):
    return parameter.startswith(HIDDEN[name])


@pytest.mark.parametrize("name", HIDDEN)
def test_estimates_say_so_and_leave_the_rest_exact(name):
    problem = problem_of(name)
    before = snapshot(problem.model)
    result = measured(problem, ("nsr", "variance"), uncovered="estimate")
    assert_nothing_left(problem.model, before)
    told, coverage = told_of(problem), result.coverage
    names = [n for n, _ in problem.model.named_parameters()]
    assert list(coverage.estimated) == [n for n in names if hidden(name, n)]
    assert list(coverage.exact) == [n for n in names if not hidden(name, n)]
    count = sum(p.numel() for n, p in problem.model.named_parameters() if hidden(name, n))
    assert math.isclose(coverage.parameters["estimated"], count / sum(p.numel() for p in problem.model.parameters()))
    signals = {n: s["grad_sq_norm"] for n, s in told.per_param.items()}
    share = sum(signals[n] for n in coverage.estimated) / sum(signals.values())
    assert math.isclose(coverage.grad_sq["estimated"], share, rel_tol=1e-9)
    assert "estimated" in str(coverage)
    for n in coverage.exact:
        size = float(told.second_moment[n].max())
        close(n, result.variance[n], told.variance[n], size, BUDGET[torch.float64])
    for n in names:  # the means are exact for all
        size = float(told.second_moment[n].max()) ** 0.5
        close(n, result.mean[n], told.mean[n], size, BUDGET[torch.float64])
    for n, g in gradient(problem).items():
        torch.testing.assert_close(problem.model.get_parameter(n).grad, g)


def contrasts(samples):
    """All of them, as weights."""
    plus = (samples + 1) // 2
    for chosen in itertools.combinations(range(samples), plus):
        weights = torch.full((samples,), -1.0 / (samples - plus), dtype=torch.float64)
        weights[list(chosen)] = 1.0 / plus
        yield weights


@pytest.mark.parametrize("name", HIDDEN)
def test_estimates_are_exact_on_average_over_all_contrasts(name, monkeypatch):
    """4, 6 and 5 samples: an odd number has a contrast of its own."""
    problem = problem_of(name)
    told, results = told_of(problem), []
    for weights in contrasts(problem.samples):
        monkeypatch.setattr(contrast.Contrast, "draw", classmethod(lambda cls, batch, w=weights: cls(w.clone())))
        results.append(measured(problem, ("nsr", "variance"), uncovered="estimate"))
        problem.model.zero_grad()
    assert len(results) == math.comb(problem.samples, problem.samples // 2)
    for n, variance in told.variance.items():
        mean = torch.stack([r.variance[n] for r in results]).mean(0)
        close(n, mean, variance, float(told.second_moment[n].max()), BUDGET[torch.float64])
    trace = torch.stack([r.trace_sigma for r in results]).mean()
    assert math.isclose(trace, told.scalars["trace_sigma"], rel_tol=1e-9)


@pytest.mark.parametrize("name", ["own_operation", "own_operation_odd"])
def test_draws_scatter_around_the_truth(name):
    """Even and odd numbers of samples; a draw differs from the next."""
    problem, draws = problem_of(name), []
    for _ in range(60):
        draws.append(float(measured(problem, uncovered="estimate", stats=("nsr",)).trace_sigma))
        problem.model.zero_grad()
    told = torch.tensor(draws, dtype=torch.float64)
    assert len(set(draws)) > 2
    assert abs(told.mean() - told_of(problem).scalars["trace_sigma"]) < 5 * told.std() / len(draws) ** 0.5


def test_drawn_contrasts_are_balanced_and_their_own():
    for samples in range(2, 12):
        before = torch.get_rng_state()
        weights = contrast.Contrast.draw(samples).weights
        assert torch.equal(before, torch.get_rng_state())
        assert weights.sum().abs() < 1e-15
        assert (weights != 0).all()
        assert int((weights > 0).sum()) == (samples + 1) // 2


@pytest.mark.parametrize("stats", [("norms",), ("projections",), ("nsr", "norms")])
def test_single_samples_cannot_be_estimated(stats):
    problem = problem_of("own_operation")
    noise = noise_of(problem, stats, uncovered="estimate")
    with refuses("norms.*estimate"):
        with noise:
            problem.value().backward()
        noise.result()


@pytest.mark.parametrize("name", HIDDEN)
def test_left_out_visibly(name):
    problem = problem_of(name)
    before = snapshot(problem.model)
    result = measured(problem, uncovered="exclude")
    assert_nothing_left(problem.model, before)
    rest = {n: c for n, c in contributions(problem).items() if not hidden(name, n)}
    assert_says(result, expected(rest), ("nsr", "norms", "variance", "projections"), BUDGET[torch.float64])
    excluded = [n for n, _ in problem.model.named_parameters() if hidden(name, n)]
    assert list(result.coverage.excluded) == excluded
    assert result.coverage.parameters["excluded"] > 0
    assert "excluded" in str(result.coverage)
    for field in ("mean", "variance", "sq_norms_per_param", "per_param"):
        assert not set(excluded) & set(getattr(result, field)), field


@pytest.mark.parametrize("uncovered", ["estimate", "exclude"])
def test_what_is_covered_is_never_estimated(uncovered):
    for name in ("gpt_tied_by_module", "resnet", "attention"):
        problem = problem_of(name)
        result = measured(problem, uncovered=uncovered)
        assert_right(problem, result)
        assert not result.coverage.estimated
        assert not result.coverage.excluded
        assert result.coverage.parameters["exact"] == 1


def test_unused_parameters_are_said_to_be():
    problem = problem_of("two_losses")
    result = measured(problem)
    unused = {"idle.weight", "idle.bias", "ignored.weight", "ignored.bias", "cut.weight", "cut.bias"}
    assert set(result.coverage.unused) == unused
    for name in unused:
        assert result.per_param[name].trace_sigma == 0
        assert not result.variance[name].any()


@pytest.mark.parametrize("name", UNCOVERED)
def test_refusals_name_the_parameter_and_its_module(name):
    problem = problem_of(name)
    noise, before = noise_of(problem), snapshot(problem.model)
    try:
        with noise:
            problem.value().backward()
        noise.result()
    except (RuntimeError, NotImplementedError) as error:
        told = str(error)
    else:
        pytest.skip("covered")
    assert told.startswith("GradientNoise")
    parameter = next(n for n, _ in problem.model.named_parameters() if f"'{n}'" in told)
    module = problem.model.get_submodule(parameter.rpartition(".")[0])
    assert f"({type(module).__name__})" in told
    assert_nothing_left(problem.model, before)


@pytest.mark.parametrize("uncovered", ["estimate", "exclude"])
def test_custom_functions(uncovered):
    """A weight that only a function of the user's own sees: estimated or left out if asked, or refused."""
    problem = problem_of("custom_function")
    noise = noise_of(problem, ("nsr", "variance"), uncovered=uncovered)
    try:
        with noise:
            problem.value().backward()
        result = noise.result()
    except RuntimeError as error:
        assert "'w'" in str(error)  # noqa: PT017
        return
    told = told_of(problem)
    assert list(getattr(result.coverage, "estimated" if uncovered == "estimate" else "excluded")) == ["w"]
    close(
        "head",
        result.variance["head.weight"],
        told.variance["head.weight"],
        1 + float(told.second_moment["head.weight"].max()),
        1e-11,
    )


def test_estimates_over_micro_batches():
    """Each part has a contrast of its own; the spread between the parts is added."""
    problem, draws = problem_of("own_operations"), []
    told = told_of(problem)
    for _ in range(40):
        noise = normkern.GradientNoise(problem.model, uncovered="estimate")
        with noise:
            for a, b in ((0, 2), (2, 6)):
                (problem.sample(a, b).value() * (b - a) / 6).backward()
        result = noise.result()
        assert result.batch_size == 6
        draws.append(float(result.trace_sigma))
        problem.model.zero_grad()
    drawn = torch.tensor(draws, dtype=torch.float64)
    assert abs(drawn.mean() - told.scalars["trace_sigma"]) < 5 * drawn.std() / len(draws) ** 0.5 + 1e-9
    for field in SCALARS:
        assert math.isfinite(getattr(result, field))


class Half(nn.Module):
    """A weight of which no rule covers one use; the bias beside it is exact."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + F.linear(x, F.dropout(self.a.weight, 1e-12))))


def test_a_bias_beside_an_estimated_weight_is_exact():
    """The signed backward must leave nothing behind for the one that counts."""
    problem = numbers(Half(), 6, 5).to(torch.float64)
    noise = normkern.GradientNoise(problem.model, uncovered="estimate")
    with noise:
        problem.value().backward()
    result, told = noise.result(), expected(contributions(problem))
    assert result.coverage.estimated == ("a.weight",)
    for name in ("a.bias", "b.weight", "b.bias"):
        assert math.isclose(result.per_param[name].trace_sigma, told.per_param[name]["trace_sigma"], rel_tol=1e-9)
