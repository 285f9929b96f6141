"""Where the binary comes from: the package's folder, or in a source tree without one the installed normkern."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from support import fresh

import normkern
from normkern import ops
from normkern.ops import _load

PACKAGE = Path(normkern.__file__).resolve().parent
BINARY = Path(ops.binary.__file__)


def copy_package(folder, with_binary):
    """Copy the Python files into `folder`, and the binary if asked for."""
    shutil.copytree(PACKAGE, folder / "normkern", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    if with_binary:
        shutil.copy(BINARY, folder / "normkern" / BINARY.name)


@pytest.fixture
def tree(tmp_path):
    """A checkout that was never built in place."""
    folder = tmp_path / "checkout"
    copy_package(folder, with_binary=False)
    (folder / "csrc").mkdir()
    (folder / "pyproject.toml").touch()
    return folder


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages, as `pip install .` leaves it."""
    folder = tmp_path / "site-packages"
    copy_package(folder, with_binary=True)
    about = folder / f"normkern-{normkern.__version__}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: normkern\nVersion: {normkern.__version__}\n")
    return folder


def python(*arguments, cwd, path=()):
    """Start Python in `cwd`; torch is installed beside what lies in `path`, and nothing else."""
    return fresh.python(*arguments, cwd=cwd, path=path, flags=("-S",))


WHERE = (
    "import normkern, sys; print(normkern.__file__); print(normkern.ops.binary.__file__, sys.modules['normkern._C'])"
)


def test_checkout_takes_the_binary_of_the_installed_package(tree, site):
    done = python("-c", WHERE, cwd=tree, path=[site])
    assert done.returncode == 0, done.stderr
    package, binary = done.stdout.splitlines()
    assert package == str(tree / "normkern" / "__init__.py")
    assert binary.startswith(str(site / "normkern" / BINARY.name))


def test_command_line_in_a_checkout_says_which_binary_it_has(tree, site):
    done = python("-m", "normkern", "info", cwd=tree, path=[site])
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^binary +{re.escape(str(site / 'normkern' / BINARY.name))}$", done.stdout, re.MULTILINE)
    code = "from normkern.doctor import environment; print(environment.binary())"
    done = python("-c", code, cwd=tree, path=[site])
    assert f"the Python files of {tree / 'normkern'} with the binary {site / 'normkern' / BINARY.name}" in done.stdout


def test_binary_of_the_checkout_comes_first(tree, site):
    shutil.copy(BINARY, tree / "normkern" / BINARY.name)
    done = python("-c", WHERE, cwd=tree, path=[site])
    assert done.stdout.splitlines()[1].startswith(str(tree / "normkern" / BINARY.name)), done.stderr


def test_installed_package_does_not_look_elsewhere(site, tree, tmp_path):
    done = python("-c", WHERE, cwd=tmp_path, path=[site])
    assert done.stdout.splitlines()[1].startswith(str(site / "normkern" / BINARY.name)), done.stderr


def other_signatures(site):
    with (site / "normkern" / "_C.pyi").open("a") as stub:
        stub.write("def another() -> int: ...\n")


def other_version(site):
    (metadata,) = site.glob("*.dist-info/METADATA")
    metadata.write_text(metadata.read_text().replace(f"Version: {normkern.__version__}", "Version: 99.1"))


def other_interpreter(site):
    (site / "normkern" / BINARY.name).rename(site / "normkern" / "_C.cpython-27-x86_64-linux-gnu.so")


@pytest.mark.parametrize("change", [other_signatures, other_version, other_interpreter])
def test_binary_of_other_sources_is_not_taken(change, tree, site):
    change(site)
    done = python("-m", "normkern", "info", cwd=tree, path=[site])
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert f"{tree / 'normkern'} is the source tree" in sentence
    assert f" in {site / 'normkern'} has none of the same sources" in sentence
    assert f"Use `pip install -e .` in {tree}, or `pip install .` there and start Python in another folder" in sentence


def test_checkout_without_any_binary_is_explained(tree):
    about = tree / "normkern" / "__init__.py"  # a version that is installed nowhere
    about.write_text(about.read_text().replace(f'__version__ = "{normkern.__version__}"', '__version__ = "98.7"'))
    done = python("-c", "import normkern", cwd=tree)
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("ImportError: normkern's binary could not be loaded (No module named 'normkern._C'): ")
    assert f"{tree / 'normkern'} is the source tree, and pip built no binary in it" in sentence
    assert f"Use `pip install -e .` in {tree}, or" in sentence


def test_installed_package_without_its_binary_is_explained(site, tmp_path):
    (site / "normkern" / BINARY.name).unlink()
    done = python("-c", "import normkern", cwd=tmp_path, path=[site])
    assert done.returncode == 1
    assert f"Build it for this interpreter, Python 3.{sys.version_info.minor}: {_load.REINSTALL}" in done.stderr


def test_no_sentence_installs_normkern_from_an_index():
    """No package index has it: `pip` is given a source folder, or another package."""
    sentences = {
        file: re.findall(r"pip install [^`\n]*\bnormkern\b(?!'s)", file.read_text()) for file in PACKAGE.rglob("*.py")
    }
    assert {file: found for file, found in sentences.items() if found} == {}
