"""What `assert_says` lets pass, and what it does not: results made by hand, right and wrong."""

from types import SimpleNamespace

import pytest
import torch

from .budgets import BUDGET, TIERS, assert_says
from .models import SEPARABLE
from .reference import contributions, expected

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

WRONG = {
    "": lambda c: c,
    "samples exchanged": lambda c: {n: x.flip(0) for n, x in c.items()},
    "one sample's sign": lambda c: {n: torch.cat([-x[:1], x[1:]]) for n, x in c.items()},
    "one parameter left out": lambda c: {n: x * (i > 0) for i, (n, x) in enumerate(c.items())},
    "one parameter a thousandth too large": lambda c: {
        n: x * (1.001 if i == 0 else 1) for i, (n, x) in enumerate(c.items())
    },
    "one column wrong": lambda c: {n: _one_column(x) for n, x in c.items()},
}


def _one_column(x):
    x = x.clone()
    x.view(len(x), -1)[:, -1] *= 1.01
    return x


def result_of(told):
    """As GradientNoise would say it."""
    per_param = {name: SimpleNamespace(**values) for name, values in told.per_param.items()}
    fields = {
        f: getattr(told, f) for f in ("batch_size", "mean", "variance", "sq_norms", "sq_norms_per_param", "projections")
    }
    return SimpleNamespace(**fields, **told.scalars, per_param=per_param)


@pytest.mark.parametrize("name", ["mlp", "gpt_square", "resnet"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_found_wrong(name, wrong):
    right = contributions(SEPARABLE[name].problem())
    result = result_of(expected(WRONG[wrong](right)))
    if wrong:
        with pytest.raises(AssertionError, match="off"):
            assert_says(result, expected(right), TIERS, BUDGET[torch.float32])
    else:
        assert_says(result, expected(right), TIERS, BUDGET[torch.float64])


@pytest.mark.parametrize(
    "field", ["variance", "mean", "sq_norms", "projections", "trace_sigma", "nsr", "nsr_batch", "gns"]
)
def test_every_field_is_looked_at(field):
    told = expected(contributions(SEPARABLE["mlp"].problem()))
    result = result_of(told)
    value = getattr(result, field)
    setattr(result, field, {n: x * 1.01 for n, x in value.items()} if isinstance(value, dict) else value * 1.01)
    with pytest.raises(AssertionError):
        assert_says(result, told, TIERS, BUDGET[torch.float32])


#: Of every file of nets a fourth, and the rest.
@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_float32_rounding_of_other_loops_is_within_the_budget(first):
    for name, case in list(SEPARABLE.items())[first::4]:
        problem = case.problem().to(torch.float32)
        named = {n: p for n, p in problem.model.named_parameters() if p.requires_grad}
        rows = [torch.autograd.grad(term, list(named.values()), materialize_grads=True) for term in problem.terms()]
        rounded = {n: torch.stack([row[i].to_dense() for row in rows]).double() for i, n in enumerate(named)}
        try:
            assert_says(
                result_of(expected(rounded)),
                expected(contributions(problem)),
                TIERS,
                case.weaker * BUDGET[torch.float32],
            )
        except AssertionError as error:
            raise AssertionError(name) from error
