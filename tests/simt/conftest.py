"""What the tests of this folder may ask for."""

import os
from pathlib import Path

import pytest
import torch

from . import build
from .backend import Backend
from .needs import need


@pytest.fixture(scope="session")
def checked():
    """The CUDA kernels in the emulator, with every access examined."""
    need(build.missing())
    return Backend(checked=True)


def pytest_collection_modifyitems(items):
    """Of what runs in the emulator `make test` has float32; `make cuda SWEEP=1` has the rest, which takes minutes more.

    `make test` has what nvcc makes of every kernel where it is given the binary that `make cuda` builds, as in CI.
    """
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if item.get_closest_marker("nvcc"):
            if not os.environ.get("NORMKERN_CUDA_BINARY"):
                item.add_marker(pytest.mark.slow)
            continue
        dtype = getattr(item, "callspec", None) and item.callspec.params.get("dtype")
        if dtype not in (None, torch.float32):
            item.add_marker(pytest.mark.slow)
