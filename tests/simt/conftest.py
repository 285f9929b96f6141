"""What the tests of this folder may ask for."""

import pytest

from . import build
from .backend import Backend
from .needs import need


@pytest.fixture(scope="session")
def checked():
    """The CUDA kernels in the emulator, with every access examined."""
    need(build.missing())
    return Backend(checked=True)
