"""The scripts of tests/ranks/, in several gloo processes that torchrun starts, as users do."""

import subprocess
import sys

import pytest

from . import torchrun

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "processes"),
    [
        ("sums.py", 4),
        pytest.param("sums.py", 2, marks=slow),
        ("clipping.py", 2),
        pytest.param("clipping.py", 4, marks=slow),
        ("partitions.py", 2),
        pytest.param("partitions.py", 4, marks=slow),
        ("ddp_noise.py", 2),
        pytest.param("ddp_noise.py", 4, marks=slow),
        ("single_gradients.py", 2),
        pytest.param("single_gradients.py", 4, marks=slow),
    ],
)
def test_script(script, processes):
    status, told = torchrun.run(script, processes)
    assert status == 0, told[-6000:]
    assert "holds: " in told


@pytest.mark.parametrize("others", [1, pytest.param(4, marks=slow)])
def test_checkpoints_go_to_other_worlds(others, tmp_path):
    status, told = torchrun.run("checkpoints.py", 2, "save", tmp_path)
    assert status == 0, told[-6000:]
    if others == 1:
        command = [sys.executable, str(torchrun.HERE / "checkpoints.py"), "alone", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "holds: alone" in done.stdout, done.stderr
    else:
        status, told = torchrun.run("checkpoints.py", others, "load", tmp_path)
        assert status == 0, told[-6000:]


def test_a_killed_rank_is_an_error_and_no_hang():
    status, told = torchrun.run("killed.py", 6, seconds=90)
    assert status != 0
    assert "nothing happened" not in told
    for where in ("in_a_step", "in_a_hook", "in_a_result"):
        assert f"{where}: True RuntimeError" in told, told[-6000:]
