"""The scripts of tests/ranks/, in several gloo processes."""

from pathlib import Path

import pytest
from support import fresh
from support.gloo import run_script

HERE = Path(__file__).parent

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
def test_script(script, processes, tmp_path):
    well, told = run_script(HERE / script, processes=processes, folder=tmp_path)
    assert well, told[-6000:]
    assert "holds: " in told


@pytest.mark.parametrize("others", [1, pytest.param(4, marks=slow)])
def test_checkpoints_go_to_other_worlds(others, tmp_path):
    folders = [tmp_path / name for name in ("saved", "saving", "loading")]
    for folder in folders:
        folder.mkdir()
    saved, saving, loading = folders
    well, told = run_script(HERE / "checkpoints.py", "save", saved, processes=2, folder=saving)
    assert well, told[-6000:]
    if others == 1:
        done = fresh.python("-m", "ranks.checkpoints", "alone", str(saved), cwd=HERE.parent, path=[HERE])
        assert "holds: alone" in done.stdout, done.stderr
    else:
        well, told = run_script(HERE / "checkpoints.py", "load", saved, processes=others, folder=loading)
        assert well, told[-6000:]


def test_a_killed_rank_is_an_error_and_no_hang(tmp_path):
    well, told = run_script(HERE / "killed.py", processes=6, folder=tmp_path)
    assert not well
    assert "nothing happened" not in told
    for where in ("in_a_step", "in_a_hook", "in_a_result"):
        assert f"{where}: True RuntimeError" in told, told[-6000:]
