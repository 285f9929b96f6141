"""What every test may ask for."""

import pytest
import torch

from normkern import ops


@pytest.fixture(params=ops.supported_isas())
def isa(request):
    """Each instruction-set level that this machine can run."""
    before = ops.isa()
    ops.select_isa(request.param)
    yield request.param
    ops.select_isa(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
