"""Ways to measure a problem, and to say that GradientNoise refuses."""

import pytest
import torch

import normkern

from .budgets import BUDGET, TIERS, assert_says
from .models import ALL
from .reference import contributions, expected

#: What it refuses with. Its sentences begin with its name.
REFUSED = (RuntimeError, TypeError, ValueError)


def problem_of(name, dtype=torch.float64):
    return ALL[name].problem().to(dtype)


def told_of(problem, reduction="mean"):
    return expected(contributions(problem), reduction)


def noise_of(problem, stats=TIERS, check=True, **options):
    return normkern.GradientNoise(problem.model, stats, batch_size=problem.batch_size, check=check, **options)


def measured(problem, stats=TIERS, **options):
    """One forward and backward."""
    noise = noise_of(problem, stats, **options)
    with noise:
        problem.value().backward()
    return noise.result()


def refuses(match):
    return pytest.raises(REFUSED, match=f"(?s)^GradientNoise.*{match}")


def assert_right(problem, result, stats=TIERS, dtype=torch.float64):
    assert_says(result, told_of(problem), stats, BUDGET[dtype])
