"""The models of the zoo that are installed."""

import importlib.util
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_generate_tests(metafunc):
    """Give `entry` every model; those that are not quick are slow."""
    if "entry" in metafunc.fixturenames:
        from .measure import entries

        every = [
            pytest.param(e, id=f"{e.library}-{e.name}", marks=() if e.quick else pytest.mark.slow) for e in entries()
        ]
        metafunc.parametrize("entry", every)


@pytest.fixture
def known_refusals():
    """Models that are refused, and a part of the sentence."""
    from .refused import REFUSED

    return REFUSED


def pytest_report_header():
    """Say which libraries are missing."""
    names = ("transformers", "timm", "torch_geometric", "peft", "diffusers", "x_transformers")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"zoo: without {', '.join(missing)}" if missing else []
