"""examples/*.py run, are short, and print what the documentation shows, but for the numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normkern

EXAMPLES = Path(__file__).parent.parent / "examples"
#: What an example waits for before it can run.
NEEDS = {"ddp_noise": "DDPNoise"}


def words(text):
    """Line by line, without numbers, signs and rulers: those differ from machine to machine."""
    return [re.findall(r"[A-Za-z_]{2,}", line) for line in text.strip().splitlines()]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path):
    pytest.importorskip("sklearn")
    name = NEEDS.get(path.stem)
    if name and not hasattr(normkern, name):
        pytest.skip(f"needs normkern.{name}")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # nothing here is large enough for two
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words(done.stdout) == words((EXAMPLES / "outputs" / f"{path.stem}.txt").read_text())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 40
