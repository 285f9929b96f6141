"""The gate lets repeats pass, and stops what costs more: it names the function, in Python and in C."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import normkern
from normkern import ops

from . import __main__ as gate
from . import budgets, bytecodes, callgrind, compare, parent
from .counts import TESTS, THE_REST, Counts, PathCounts, count
from .paths import SIZES, YARDSTICK, name_of, paths

PROFILE = """# callgrind format
desc: Trigger: Client Request: plain, 20 tensors
events: Ir
summary: 60

ob=/usr/lib/libpython.so
fl=ceval.c
fn=eval
0 10
cfn=free
calls=3 7
0 1000
0 5

fn=eval'2
0 20

ob=/here/_C.so
fn=0x0000000000001234
0 4
fn=0x0000000000001238
0 1
"""


def counts(instructions=1000, functions=None, python=None, build="Python 3.99, torch 9", yardstick=100):
    """What was counted on one path, and on the yardstick."""
    functions = {"eval": instructions} if functions is None else functions
    path = PathCounts(instructions, functions, python or {"normkern/optim/sgd.py:SGD.step": 50})
    return Counts(build, {"plain": path, YARDSTICK: PathCounts(yardstick, {"eval": yardstick}, {"paths.py:inside": 9})})


# ---- Reading profiles -----------------------------------------------------------------------------------------------


def test_profile_has_own_instructions_of_each_function():
    profile = callgrind.parse(PROFILE)
    assert profile.path == "plain, 20 tensors"
    assert profile.functions == {"eval": 35, "functions without a name in _C.so": 5}
    assert profile.instructions == 40


def test_binary_without_names_is_noticed():
    assert callgrind.has_names(["eval", "functions without a name in libmkl.so"])
    assert not callgrind.has_names(callgrind.parse(PROFILE.replace("_C.so", "_C.cpython-311.so")).functions)


def test_profile_of_the_end_of_the_process_is_no_step():
    assert callgrind.parse(PROFILE.replace("desc: Trigger", "desc: Nothing")) is None


def test_cheapest_step_of_each_path_counts():
    steps = [callgrind.Profile("a", {"f": n}) for n in (7, 5, 6)] + [callgrind.Profile("b", {"f": 9})]
    assert {path: profile.instructions for path, profile in callgrind.least(steps).items()} == {"a": 5, "b": 9}


# ---- Bytecodes ------------------------------------------------------------------------------------------------------


def spin(n):
    for _ in range(n):
        pass


@pytest.mark.parametrize("n", [10, 1000])
def test_bytecodes_see_a_loop_that_calls_nothing(n):
    found = []
    for size in (n, n, 2 * n):
        counted = Counter()
        bytecodes.count(lambda size=size: spin(size), counted)
        named = bytecodes.by_name(counted)
        found.append(sum(count for name, count in named.items() if name.endswith("test_instructions.py:spin")))
    assert found[0] == found[1]
    assert n <= found[2] - found[0] <= 10 * n


def test_files_are_named_from_the_folder_of_their_package():
    counted = Counter()
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = normkern.SGD([w])
    bytecodes.count(optimizer.step, counted)
    assert any(name.startswith("normkern/optim/sgd.py:") for name in bytecodes.by_name(counted, normkern))


# ---- Comparing ------------------------------------------------------------------------------------------------------


def test_growth_within_the_allowance_passes():
    assert compare.too_much(counts(1050), counts(1000), "in the budget") == []


def test_growth_beyond_the_allowance_fails_and_is_named():
    now = counts(1100, {"eval": 950, "brand_new": 150}, {"normkern/optim/sgd.py:SGD.step": 400, "a.py:f": 3})
    then = counts(1000, {"eval": 900, "gone": 100}, {"normkern/optim/sgd.py:SGD.step": 50, "a.py:f": 3})
    (text,) = compare.too_much(now, then, "in the budget")
    assert text.splitlines() == [
        "plain: 1,100 instructions a step, 1,000 in the budget: +10.0%, expected at most +5%",
        "  Python functions that execute more bytecodes:",
        "          +350  normkern/optim/sgd.py:SGD.step (50 -> 400)",
        "  C functions that execute more instructions:",
        "          +150  brand_new (new)",
        "           +50  eval (900 -> 950)",
    ]


def test_growth_in_c_alone_says_that_no_python_function_grew():
    (text,) = compare.too_much(counts(1100), counts(1000), "in abc")
    assert "  Python functions that execute more bytecodes: none grew" in text


def test_new_path_and_yardstick_are_not_compared():
    then = counts(1000, yardstick=1)
    assert compare.too_much(counts(5000), Counts(then.build, {YARDSTICK: then.paths[YARDSTICK]}), "in abc") == []


def steps(few, many):
    """Bytecodes of a plain step of 20 tensors and of 161."""
    return Counts("", {f"plain, {n} tensors": PathCounts(1, {}, python) for n, python in ((20, few), (161, many))})


def test_loop_that_costs_less_than_the_allowance_fails_and_is_named():
    then = steps({"a.py:f": 700}, {"a.py:f": 700})
    now = steps({"a.py:f": 700, "b.py:g": 20}, {"a.py:f": 700, "b.py:g": 161})
    assert compare.loops(then, then, "in abc") == []
    assert compare.loops(now, then, "in abc") == [
        "plain: Python executes 1.0 bytecodes for each tensor, 0.0 in abc: a loop over the parameters?\n  +1.0  b.py:g"
    ]


def test_bytecodes_of_the_step_itself_are_no_loop():
    then = steps({"a.py:f": 700}, {"a.py:f": 700})
    assert compare.loops(steps({"a.py:f": 800}, {"a.py:f": 800}), then, "in abc") == []


# ---- Budgets --------------------------------------------------------------------------------------------------------


def test_budget_of_one_build_is_replaced_and_others_stay(tmp_path):
    file = tmp_path / "budgets.json"
    budgets.write(counts(1000, {"eval": 997, "small": 3}), file)
    budgets.write(counts(build="other"), file)
    budgets.write(counts(2000), file)
    assert budgets.read("Python 3.99, torch 9", file) == counts(2000)
    assert budgets.read("other", file) == counts(build="other")
    assert budgets.read("unknown", file) is None


def test_small_functions_are_counted_together_in_the_file(tmp_path):
    budgets.write(counts(1000, {"eval": 997, "small": 3}), tmp_path / "budgets.json")
    found = budgets.read("Python 3.99, torch 9", tmp_path / "budgets.json").paths["plain"].functions
    assert found == {"eval": 997, THE_REST: 3}


def test_budget_of_another_interpreter_is_not_used():
    assert budgets.why_not(counts(), counts(9999)) is None
    assert "another interpreter: 100 instructions" in budgets.why_not(counts(yardstick=100), counts(yardstick=110))
    assert budgets.why_not(counts(), None) == "no budget for Python 3.99, torch 9"


def test_every_budget_has_every_path():
    for build, found in json.loads(budgets.FILE.read_text()).items():
        assert list(found) == list(paths()), build


# ---- What the gate does ---------------------------------------------------------------------------------------------


def test_without_valgrind_it_is_skipped_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gate.main([]) == 0
    assert capsys.readouterr().out.startswith("instructions: skipped: expected valgrind on the path, found none")


@pytest.fixture
def counted(monkeypatch):
    """counted(now, before): the gate counts one thing here, and another in the build of the parent commit."""

    def install(now, before=None):
        monkeypatch.setattr(callgrind, "missing", lambda: None)
        monkeypatch.setattr(gate, "count", lambda tree=None: now if tree is None else before)

    return install


def test_step_above_its_budget_fails_and_says_how_to_accept_it(counted, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(budgets, "FILE", tmp_path / "budgets.json")
    budgets.write(counts(1000), budgets.FILE)
    monkeypatch.setattr(budgets, "read", lambda build, file=budgets.FILE, read=budgets.read: read(build, file))
    counted(counts(1000))
    assert gate.main([]) == 0
    counted(counts(1100))
    assert gate.main([]) == 1
    said = capsys.readouterr().err
    assert "plain: 1,100 instructions a step, 1,000 in the budget: +10.0%" in said
    assert "python -m instructions --write" in said


def repository(folder, *commits):
    """A repository whose file `a` has been each of these in turn."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    folder.mkdir()
    git("init", "--quiet")
    revisions = []
    for text in commits:
        (folder / "a").write_text(text)
        git("add", "a")
        git("commit", "--quiet", "-m", text)
        revisions.append(git("rev-parse", "HEAD"))
    return revisions


def test_unknown_build_is_compared_with_the_parent_commit(counted, monkeypatch, capsys, tmp_path):
    first, _ = repository(tmp_path / "here", "1", "2")
    seen = []

    class Built:
        def __init__(self, revision, named):
            seen.append((revision, named))

        def __enter__(self):
            return tmp_path

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(parent, "built", Built)
    monkeypatch.setattr(parent.commit, "__defaults__", (tmp_path / "here",))
    counted(counts(1100), before=counts(1000))
    assert gate.main([]) == 1
    said = capsys.readouterr()
    assert f"no budget for Python 3.99, torch 9; building the parent commit {first[:12]}" in said.out
    assert f"1,000 in {first[:12]}: +10.0%" in said.err
    assert seen == [(first, True)]


def test_parent_of_a_changed_tree_is_its_commit(tmp_path):
    _, second = repository(tmp_path / "here", "1", "2")
    (tmp_path / "here" / "a").write_text("3")
    assert parent.commit(tmp_path / "here") == second


def test_clone_without_a_parent_skips_and_says_why(counted, monkeypatch, capsys, tmp_path):
    repository(tmp_path / "here", "1", "2")
    source, shallow = f"file://{tmp_path / 'here'}", tmp_path / "shallow"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", source, str(shallow)], check=True)
    monkeypatch.setattr(parent.commit, "__defaults__", (shallow,))
    counted(counts())
    assert gate.main([]) == 0
    assert "this clone is shallow and ends at HEAD; git fetch --deepen=1 gets its parent" in capsys.readouterr().out
    repository(tmp_path / "first", "1")
    with pytest.raises(parent.NoParent, match="HEAD is the first commit"):
        parent.commit(tmp_path / "first")
    with pytest.raises(parent.NoParent, match="expected a clone of the repository"):
        parent.commit(tmp_path)


def test_package_from_elsewhere_is_refused(tmp_path):
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    package = elsewhere / "normkern" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    command = [sys.executable, "-m", "instructions.child", "python", str(tmp_path / "out"), "--tree", str(tree)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (elsewhere, TESTS)))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert f"expected normkern in {tree}, imported {package}" in done.stderr


# ---- A planted loop -------------------------------------------------------------------------------------------------

PLANTED_FILE, PLANTED_IN = "optim/sgd.py", "def _step_now("


def plant(package):
    """Put a loop over the parameters at the beginning of the step, and nothing else."""
    file = package / PLANTED_FILE
    before = file.read_text()
    loop = "        for group in self.param_groups:\n            for p in group['params']:\n                p.grad is None\n"
    after = re.sub(rf"( {{4}}{re.escape(PLANTED_IN)}.*?:\n)", lambda found: found[1] + loop, before, count=1)
    assert after != before
    file.write_text(after)


@pytest.mark.slow
def test_planted_loop_over_the_parameters_fails_and_is_named(tmp_path):
    if reason := callgrind.missing():
        pytest.skip(reason)
    trees = [tmp_path / "before", tmp_path / "planted"]
    for tree in trees:
        shutil.copytree(Path(normkern.__file__).parent, tree / "normkern", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ops.binary.__file__, tree / "normkern")
    plant(trees[1] / "normkern")
    with ThreadPoolExecutor() as pool:
        before, now = pool.map(lambda tree: count(tree, [name_of("plain", n) for n in SIZES]), trees)
    found = compare.too_much(now, before, "before")
    print("\n\n".join([compare.table(now, before), *found, *compare.loops(now, before, "before")]))
    for text in found:
        assert re.match(r" +\+[\d,]+  normkern/optim/sgd\.py:(SGD\.)?_step_now ", text.splitlines()[2]), text
        assert "_PyEval_EvalFrame" in text
    assert found[-1].startswith("plain, 161 tensors: ")
    (text,) = compare.loops(now, before, "before")
    assert re.search(r"\n  \+\d+\.\d  normkern/optim/sgd\.py:(SGD\.)?_step_now$", text), text
