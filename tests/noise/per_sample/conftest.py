"""What every test of this package has besides."""

import pytest
import torch

from .measuring import problem_of


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    """Tensors of a few numbers: a second thread on a busy machine makes them twenty times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def mlp():
    return problem_of("mlp")


@pytest.fixture
def gpt():
    return problem_of("gpt_tied_by_module")
