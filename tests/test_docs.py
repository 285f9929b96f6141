"""Run every Python block of README and docs as pasted, and compare every table with the results that it shows."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.gloo import run_script

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
#: The first line of a block that needs those above it on the page.
CONTINUES = "# Continues the code above.\n"
#: The first line of a block that is a file of its own, for torchrun.
TORCHRUN = re.compile(r"# Save as (\w+\.py) and run: torchrun --nproc-per-node (\d+) \1\n")
#: torch's gloo sometimes aborts with this message while a process ends, also in programs without normkern.
OF_GLOO = "terminate called without an active exception"


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def id_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


WITH_CODE = [path for path in PAGES if blocks(path)]
FOR_TORCHRUN = [(path, block) for path in WITH_CODE for block in blocks(path) if TORCHRUN.match(block)]


def groups(path):
    """Return the page's code, cut where a block does not continue the one above it."""
    found = []
    for block in blocks(path):
        if TORCHRUN.match(block):
            continue
        if block.startswith(CONTINUES):
            assert found, f"{path.name} begins with a block that continues another"
            found[-1] += block
        else:
            found.append(block)
    return found


@pytest.mark.parametrize("path", WITH_CODE, ids=id_of)
def test_code_of_page_runs_as_pasted(path, tmp_path, monkeypatch, capsys):
    if "matplotlib" in path.read_text() or ".plot(" in path.read_text():
        pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)  # for what the code saves
    for code in groups(path):
        torch.manual_seed(0)
        exec(compile(code, str(path), "exec"), {"__name__": "__main__"})


def saved(block, folder):
    """Save it as its comment says; return the file and the number of processes."""
    name, processes = TORCHRUN.match(block).groups()
    (folder / name).write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{block}")
    return folder / name, processes


for_torchrun = pytest.mark.parametrize(("path", "block"), FOR_TORCHRUN, ids=[id_of(path) for path, _ in FOR_TORCHRUN])


@for_torchrun
def test_code_for_torchrun_runs(path, block, tmp_path):
    """In forks, in the environment that torchrun makes."""
    script, processes = saved(block, tmp_path)
    for attempt in range(2):
        (folder := tmp_path / str(attempt)).mkdir()
        right, told = run_script(script, processes=int(processes), folder=folder)
        if OF_GLOO not in told:
            break
    assert right, told
    assert told.strip()


@pytest.mark.slow
@for_torchrun
def test_code_for_torchrun_runs_as_its_comment_says(path, block, tmp_path):
    script, processes = saved(block, tmp_path)
    name = script.name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, name]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        if OF_GLOO not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_page_with_code_is_found():
    assert len(WITH_CODE) >= 11
    assert FOR_TORCHRUN
    others = {path.name for path in PAGES if "init_process_group" in path.read_text()}
    assert others == {path.name for path, _ in FOR_TORCHRUN}


@pytest.fixture(scope="module")
def tables():
    pytest.importorskip("rich")
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=id_of)
def test_tables_are_those_of_the_results(path, tables):
    text = path.read_text()
    for name in re.findall(r"<!-- ([\w-]+):begin -->", text):
        begin, end = tables.marks(name)
        shown = text.partition(begin)[2].partition(end)[0].strip()
        assert shown == tables.TABLES[name](), f"{path.name}: {name} is not up to date: python docs/tables.py writes it"


def test_every_table_is_shown(tables):
    everything = "".join(path.read_text() for path in PAGES)
    assert [name for name in tables.TABLES if tables.marks(name)[0] not in everything] == []


def test_every_picture_has_its_code():
    pictures = {path.stem for path in (DOCS / "figures").glob("*.png")}
    code = {path.stem for path in (DOCS / "figures").glob("*.py")} - {"__main__", "digits"}
    assert pictures == code


@pytest.mark.parametrize("path", PAGES, ids=id_of)
def test_links_to_files_and_headings_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, heading = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{path.name} links to {target}"
        if heading:
            found = {slug(h) for h in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}
            assert heading in found, f"{path.name} links to {target}"


def slug(heading):
    """Return the anchor of a heading, as GitHub and Sphinx make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_readme_is_short_and_its_first_screen_says_what_where_and_how_to_install():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:30])
    for word in (
        "PyTorch",
        "CUDA",
        "Linux",
        "Python >= 3.10",
        "torch >= 2.10",
        "MIT",
        "185 us",
        "282 us",
        "pip install",
    ):
        assert word in first
    shown = "\n".join(lines)
    for number in ("185 us", "282 us", "190 us", "911 us"):  # of the first screen: in the table of measurements too
        assert f"| {number} " in shown


def test_words_are_plain():
    idioms = re.compile(r"\b(nobody|somebody|whoever|speaks of|says of|tells of|dearer)\b", re.IGNORECASE)
    texts = [*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "examples").rglob("*.py"), *(DOCS / "figures").glob("*.py")]
    found = [f"{path.name}: {hit.group()}" for path in texts for hit in idioms.finditer(path.read_text())]
    assert found == []
