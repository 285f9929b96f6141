"""What a test needs of the machine. CI has it all: there a test is not skipped, it fails."""

import os

import pytest


def need(missing: str | None) -> None:
    """Skips the test for the reason given, if there is one.

    In CI (``CI=true``) it fails instead.
    """
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"CI needs everything: {missing}")
    if missing:
        pytest.skip(missing)
