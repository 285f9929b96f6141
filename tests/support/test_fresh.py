"""Programs that are forks of one process behave as if Python had been started for each."""

import os
import sys

from . import fresh


def test_each_begins_with_torch_and_ends_with_what_it_did():
    done = fresh.python("-c", "import os, sys; print(*{'torch', 'normkern', 'pytest'} & set(sys.modules)); os.kept = 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch\n", "")
    assert fresh.python("-c", "import os; print(hasattr(os, 'kept'))").stdout == "False\n"
    assert fresh.python("-c", "raise SystemExit(3)").returncode == 3
    assert fresh.python("-c", "import atexit; atexit.register(print, 'end')").stdout == "end\n"
    done = fresh.python("-c", "1 / 0")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def test_a_program_that_is_killed_or_hangs_leaves_the_next_one_alone():
    assert fresh.python("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -9
    assert fresh.python("-c", "import time; time.sleep(60)", timeout=1).returncode == -14
    assert fresh.python("-c", "print(input())").stderr.endswith("EOFError: EOF when reading a line\n")
    assert fresh.python("-c", "print('next')").stdout == "next\n"


def test_folder_path_and_environment_are_its_own(tmp_path, monkeypatch):
    (tmp_path / "near.py").write_text("import sys; print(__name__, *sys.argv[1:])")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "distant.py").write_text("x = 7")
    done = fresh.python("-m", "near", "a", "b", cwd=tmp_path)
    assert done.stdout == "__main__ a b\n", done.stderr
    code = "import os, near, distant; print(os.getcwd(), distant.x, os.environ['MINE'], 'HOME' in os.environ)"
    env = {"MINE": "1", "HOME": None}
    done = fresh.python("-c", code, cwd=tmp_path, path=[tmp_path / "far"], env=env)
    assert done.stdout.splitlines()[-1] == f"{tmp_path} 7 1 False", done.stderr
    assert "MINE" not in os.environ


def test_without_site_it_finds_what_is_beside_torch_alone():
    code = "import sys; print(sys.flags.no_site, *sys.path, sep='\\n')"
    no_site, empty, *folders = fresh.python("-c", code, flags=("-S",)).stdout.splitlines()
    assert (no_site, empty) == ("1", "")
    assert set(folders) <= set(sys.path)


def test_what_it_begins_with_beside_torch():
    code = "import sys; print('statistics' in sys.modules, 'torch' in sys.modules)"
    assert fresh.python("-c", code, imported=("statistics",)).stdout == "True True\n"
    assert fresh.python("-c", "import sys; print('wave' in sys.modules)").stdout == "False\n"
