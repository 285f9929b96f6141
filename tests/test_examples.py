"""Run examples and notebooks: they are short, and print what the documentation shows, except for the numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import fresh

import normkern

ROOT = Path(normkern.__file__).parent.parent  # of the normkern of this test
EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS, NOTEBOOKS = sorted(EXAMPLES.glob("*.py")), sorted((EXAMPLES / "notebooks").glob("*.py"))
#: torch's gloo sometimes aborts with this message while a process ends, also in programs without normkern.
OF_GLOO = "terminate called without an active exception"


def words(text):
    """Line by line, without numbers, signs and rulers: those differ from machine to machine."""
    return [re.findall(r"[A-Za-z_]{2,}", line) for line in text.strip().splitlines()]


#: Processes of an example begin as forks, which have torch; `spawn` would import it once more in each.
FORKS = "import functools, torch.multiprocessing as mp; mp.spawn = functools.partial(mp.start_processes, start_method='fork')"


def run(path, folder):
    code = f"import runpy, torch; torch.set_num_threads(1); {FORKS}; runpy.run_path({str(path)!r}, run_name='__main__')"
    return fresh.python(
        "-c", code, cwd=folder, path=[ROOT], flags=("-W", "error"), imported=("sklearn.datasets",), timeout=300
    )


def run_as_a_user(path, folder):
    path_to_package = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path_to_package},  # too small for two threads
        check=False,
    )


@pytest.mark.parametrize(
    ("path", "run"),
    [
        *((path, run) for path in (*SCRIPTS, *NOTEBOOKS)),
        *(
            pytest.param(path, run_as_a_user, marks=pytest.mark.slow)
            for path in SCRIPTS
            if "mp.spawn" in path.read_text()
        ),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value.__name__,
)
def test_example_prints_what_the_documentation_shows(path, run, tmp_path):
    pytest.importorskip("sklearn")
    done = run(path, tmp_path)
    if OF_GLOO in done.stderr:
        done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert words(done.stdout) == words((path.parent / "outputs" / f"{path.stem}.txt").read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_has_fewer_than_40_lines(path):
    assert len(path.read_text().splitlines()) < 40


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_cells_and_a_title_and_fewer_than_100_lines(path):
    text = path.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 3
    assert len(text.splitlines()) < 100


def test_documentation_shows_every_example_with_its_output():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for path in (*SCRIPTS, *NOTEBOOKS):
        folder = path.parent.relative_to(EXAMPLES.parent)
        for shown in (f"{folder}/{path.name}", f"{folder}/outputs/{path.stem}.txt"):
            assert f"{{literalinclude}} ../{shown}" in page
