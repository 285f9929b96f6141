"""What the tests of this folder may ask for."""

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
    """Of what runs in the emulator `make test` has float32, and nvcc's code of every kernel; the rest takes minutes more
    and runs with `make cuda SWEEP=1`."""
    for item in items:
        if Path(__file__).parent not in item.path.parents or item.path.name == "test_ptx.py":
            continue
        dtype = getattr(item, "callspec", None) and item.callspec.params.get("dtype")
        if dtype not in (None, torch.float32):
            item.add_marker(pytest.mark.slow)
