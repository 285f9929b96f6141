"""The models of the zoo that are installed."""

import importlib.util
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


LIBRARIES = ("transformers", "timm", "torch_geometric", "peft", "diffusers", "x_transformers")


def pytest_generate_tests(metafunc):
    """Give `entry` every model; those that are not quick are slow, and those of missing libraries are skipped."""
    if "entry" in metafunc.fixturenames:
        from .measure import entries

        every = [
            pytest.param(e, id=f"{e.library}-{e.name}", marks=() if e.quick else pytest.mark.slow) for e in entries()
        ]
        missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
        every += [pytest.param(None, id=name, marks=pytest.mark.skip(reason=_without(name))) for name in missing]
        metafunc.parametrize("entry", every)


def _without(library):
    group = "zoo" if library in ("diffusers", "x_transformers") else "frameworks"
    return f"{library} is not installed, of whose models the zoo has some: make .venv/{group}-ready"


@pytest.fixture
def known_refusals():
    """Models that are refused, and a part of the sentence."""
    from .refused import REFUSED

    return REFUSED
