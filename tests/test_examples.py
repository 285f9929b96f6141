"""examples/*.py run, are short, and print what the documentation shows, but for the numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
#: What torch's gloo says when it aborts while a process ends, now and then, in programs without normkern too.
OF_GLOO = "terminate called without an active exception"


def words(text):
    """Line by line, without numbers, signs and rulers: those differ from machine to machine."""
    return [re.findall(r"[A-Za-z_]{2,}", line) for line in text.strip().splitlines()]


def run(path):
    return subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # nothing here is large enough for two
        check=False,
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path):
    pytest.importorskip("sklearn")
    done = run(path)
    if OF_GLOO in done.stderr:
        done = run(path)
    assert done.returncode == 0, done.stderr
    assert words(done.stdout) == words((EXAMPLES / "outputs" / f"{path.stem}.txt").read_text())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 40
