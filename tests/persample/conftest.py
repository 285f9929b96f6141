"""What every test of this package has besides."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    """Tensors of a few numbers: a second thread on a busy machine makes them twenty times slower."""
    torch.set_num_threads(1)
