"""Every net through GradientNoise: its statistics are those of the definitions, or it is refused; never a wrong number."""

import functools

import pytest
import torch

from .budgets import BUDGET, TIERS, assert_says, close, gradient_size
from .left_behind import assert_nothing_left, snapshot
from .measuring import REFUSED, measured
from .models import NONE, SEPARABLE, UNCOVERED
from .reference import contributions, expected, gradient

#: Alone a tier may take another way than with others; the precision has nothing to do with that.
ALONE = [("nsr",), ("norms",), ("variance",), ("projections",)]
#: `make test` measures each net with all tiers, and with one of them alone: every file of nets has each tier alone.
CHOICES = [
    pytest.param(name, dtype, stats, marks=[pytest.mark.slow] * (stats in ALONE and stats != ALONE[i % len(ALONE)]))
    for i, name in enumerate(SEPARABLE)
    for dtype, stats in [(torch.float64, TIERS), (torch.float32, TIERS), *((torch.float64, alone) for alone in ALONE)]
]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@functools.cache
def told(name, dtype):
    """The definitions on the numbers that a net of this dtype has."""
    return expected(contributions((SEPARABLE | UNCOVERED)[name].problem().to(dtype)))


def attempt(problem, stats=TIERS, **options):
    """The result, or the sentence of a refusal. Whatever else is raised is a fault."""
    try:
        return measured(problem, stats, **options), ""
    except REFUSED as error:
        if "GradientNoise" not in str(error):
            raise
        return None, str(error)


@functools.cache
def plain_gradient(name, dtype):
    return gradient(SEPARABLE[name].problem(), dtype)


@pytest.mark.parametrize(("name", "dtype", "stats"), CHOICES, ids=str)
def test_statistics(name, dtype, stats):
    case = SEPARABLE[name]
    budget = BUDGET[dtype] * (case.weaker if dtype == torch.float32 else 1)
    problem = case.problem().to(dtype)
    before = snapshot(problem.model)
    result, refused = attempt(problem, stats)
    assert_nothing_left(problem.model, before)
    if refused:
        assert case.answer == "exact or refused", refused
        return
    assert_says(result, told(name, dtype), stats, budget)
    assert not result.coverage.estimated
    assert not result.coverage.excluded
    assert_gradients(problem.model, plain_gradient(name, dtype), told(name, dtype), budget)


def assert_gradients(model, plain, told, budget):
    """`.grad` is what autograd alone would have left."""
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in plain), name
        if p.grad is not None:
            close(f"{name}.grad", p.grad.to_dense(), plain[name], gradient_size(told, name), budget)


@pytest.mark.parametrize("uncovered", ["raise", "estimate", "exclude"])
@pytest.mark.parametrize("name", [name for name in NONE if name != "embedding_scaled_by_frequency"])
def test_samples_without_gradients_of_their_own_are_refused(name, uncovered):
    problem = NONE[name].problem().to(torch.float64)
    before = snapshot(problem.model)
    result, refused = attempt(problem, uncovered=uncovered)
    assert refused, f"{result.nsr} of samples that have no gradient"
    assert_nothing_left(problem.model, before)


@pytest.mark.parametrize("uncovered", ["raise", "estimate"])
def test_gradients_divided_by_counts_of_the_batch_are_refused(uncovered):
    result, refused = attempt(NONE["embedding_scaled_by_frequency"].problem(), uncovered=uncovered)
    assert "'0.weight'" in refused, result


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_has_no_exact_answer_is_refused(name):
    case = UNCOVERED[name]
    problem = case.problem().to(torch.float64)
    before = snapshot(problem.model)
    result, refused = attempt(problem)
    assert_nothing_left(problem.model, before)
    if refused:
        assert any(f"'{parameter}'" in refused for parameter, _ in problem.model.named_parameters())
    else:
        assert case.answer == "exact or refused"
        assert_says(result, told(name, torch.float64), TIERS, BUDGET[torch.float64])


@pytest.mark.parametrize("name", ["mlp", "conv_wide", "gpt_tied_by_module", "token_mean"])
def test_sums_have_the_unit_of_sums(name):
    problem = SEPARABLE[name].problem().to(torch.float64)
    told_of_sums = expected(contributions(problem), "sum")
    assert_says(measured(problem, reduction="sum"), told_of_sums, TIERS, BUDGET[torch.float64])
