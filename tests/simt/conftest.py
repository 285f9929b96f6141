"""What the tests of this folder may ask for."""

from pathlib import Path

import pytest

from . import build
from .backend import Backend
from .needs import need


@pytest.fixture(scope="session")
def checked():
    """The CUDA kernels in the emulator, with every access examined."""
    need(build.missing())
    return Backend(checked=True)


def pytest_collection_modifyitems(items):
    """`make cuda-sweep` runs them, not `make test`: with what they build they take as long as all the others."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
