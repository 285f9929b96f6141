"""The rules of the house, checked by reading the files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normkern
from normkern import ops

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
LOADS = sorted((ROOT / "normkern").rglob("*.py"))


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def test_core_headers_include_nothing_but_stdint_and_each_other():
    core = {path.name: includes(path) for path in (CSRC / "core").glob("*.h")}
    assert {"scalar.h", "philox.h", "formulas.h", "hyper.h", "gauge.h", "backend.h"} == core.keys()
    assert core["scalar.h"] == ["<stdint.h>"]
    for name, included in core.items():
        assert set(included) <= {"<stdint.h>", *(f'"{other}"' for other in core)}, name


def test_core_and_loops_know_nothing_of_the_binding():
    for path in [*CSRC.glob("core/*"), *CSRC.glob("cpu/*"), *CSRC.glob("cuda/*")]:
        assert not [n for n in includes(path) if "binding" in n or "Python" in n or "pybind" in n], path


def test_loops_include_no_standard_library():
    per_level = re.search(r"OBJECT\s+(csrc/[^)]*)\)", (ROOT / "CMakeLists.txt").read_text()).group(1).split()
    seen, todo = set(), [ROOT / path for path in per_level]
    assert CSRC / "cpu" / "loops.cpp" in todo
    while todo:
        path = todo.pop()
        for name in includes(path):
            if name.startswith('"'):
                inner = (path.parent / name.strip('"')).resolve()
                if inner not in seen:
                    seen.add(inner)
                    todo.append(inner)
            else:
                assert name in ("<stdint.h>", "<immintrin.h>", "<arm_neon.h>"), f"{path.name} includes {name}"


def test_kernels_include_no_standard_library():
    for path in (CSRC / "cuda").glob("*.cu*"):
        assert all(name.startswith('"') for name in includes(path)), path
    assert includes(CSRC / "cuda" / "device.h") == ['"../core/formulas.h"', "<cuda_runtime.h>", '"simt.h"']


def test_only_device_h_knows_who_compiles_the_kernels():
    knowing = {p.name for p in CSRC.rglob("*.[ch]*") if "__CUDACC__" in p.read_text()}
    assert knowing == {"device.h", "scalar.h"}


def test_each_rule_declares_what_the_back_ends_ask_of_it():
    text = (CSRC / "core" / "formulas.h").read_text()
    for name in re.search(r"using Rules = List<([^>]*)>", text)[1].replace("\n", " ").split(","):
        body = re.search(rf"struct {name.strip()} \{{(.*?)\n\}};", text, re.DOTALL)[1]
        for part in ("static constexpr Traits traits", "using First", "using Coefficients", "NK_HD void apply("):
            assert part in body, f"{name.strip()} has no {part}"


def test_columns_of_sums_have_the_names_of_formulas_h():
    text = (CSRC / "core" / "formulas.h").read_text()
    for names in (ops.SUMS, ops.PAIR_SUMS):
        assert f"enum Column {{ {', '.join(names)}, count }};" in text


def test_dtypes_are_those_of_scalar_h():
    text = (CSRC / "core" / "scalar.h").read_text()
    types = re.search(r"using StorageTypes = List<(.*)>;", text)[1].split(", ")
    names = [re.search(rf'storage_of<{t}>\{{"(\w+)"', text)[1] for t in types]
    assert [f"torch.{name}" for name in names] == [str(dtype) for dtype in ops.DTYPES]


def test_no_torch_header_anywhere():
    for path in CSRC.rglob("*.[ch]*"):
        assert not [n for n in includes(path) if re.search("torch/|ATen/|c10/", n)], path


def test_only_ops_imports_the_binary():
    importers = [p.name for p in LOADS if re.search(r"import _C\b|from \._C|normkern\._C", p.read_text())]
    assert importers == ["_binary.py"]


def test_nobody_imports_the_reference_at_the_top():
    for path in LOADS:
        if path.name == "__init__.py":  # the public name
            continue
        assert not re.search(r"^(from|import) .*reference", path.read_text(), re.MULTILINE), path


def test_four_macros():
    names = {m for p in CSRC.rglob("*.[ch]*") for m in re.findall(r"#define\s+(\w+)", p.read_text())}
    assert names <= {"NK_HD", "NK_ISA", "NK_LAUNCH", "NK_SHARED"}


def test_binary_names_no_library_of_torch():
    binary = Path(ops.binary.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"libgomp", b"libtorch_python", b"_ZN2at", b"_ZN3c10"):
        assert name not in binary


def test_version_stands_in_one_place():
    from importlib.metadata import version

    assert version("normkern") == normkern.__version__


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def test_import_brings_no_compiler_and_no_plots():
    heavy = ("torch._dynamo", "torch._inductor", "matplotlib", "sklearn", "rich", "numpy.testing")
    done = python(f"import sys, torch; before = set(sys.modules); import normkern; "
                  f"print([m for m in {heavy!r} if m in set(sys.modules) - before])")  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0", "2.9.0+cu128"])
def test_old_torch_is_refused_with_a_sentence(version):
    done = python(f"import torch; torch.__version__ = {version!r}; import normkern")
    assert done.returncode != 0
    assert f"needs torch >= 2.10, whose DLPack exchange API it is built on; found torch {version}" in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_newer_torch_is_welcome(version):
    done = python(f"import torch; torch.__version__ = {version!r}; import normkern; print('in')")
    assert done.stdout.strip() == "in", done.stderr


def test_missing_binary_is_explained():
    done = python("import sys, torch; sys.modules['normkern._C'] = None; import normkern")
    assert "normkern's binary could not be loaded" in done.stderr
    assert "pip install --force-reinstall --no-deps normkern" in done.stderr


@pytest.mark.parametrize("name", ops.supported_isas())
def test_environment_forces_an_isa(name):
    done = python("from normkern import ops; print(ops.isa())", NORMKERN_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_unknown_isa_in_the_environment_is_refused():
    done = python("import normkern", NORMKERN_ISA="v9")
    assert "ImportError: NORMKERN_ISA: select_isa: expected one of" in done.stderr
    assert "got 'v9'" in done.stderr


def test_best_isa_is_the_default():
    environment = {k: v for k, v in os.environ.items() if k != "NORMKERN_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", "from normkern import ops; print(ops.isa(), *ops.supported_isas())"],
        capture_output=True, text=True, timeout=120, env=environment, check=True,
    )  # fmt: skip
    chosen, best, *_ = done.stdout.split()
    assert chosen == best


def targets():
    """What the Makefile makes for people: its .PHONY line."""
    return re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()


def test_no_other_file_has_a_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert re.search(r'metadata\.version\]\nprovider = ".*regex"\ninput = "normkern/__init__.py"', project)
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert not re.search(r"project\([^)]*VERSION", (ROOT / "CMakeLists.txt").read_text())


@pytest.mark.parametrize("target", targets())
def test_every_target_is_explained(target):
    head = (ROOT / "Makefile").read_text().split("PYTHON ?=")[0]
    assert re.search(rf"\b{target}\b", head), f"make {target} is missing in the Makefile's first comment"
    assert f"`make {target}" in (ROOT / "CONTRIBUTING.md").read_text()


def test_hooks_are_what_lint_does():
    lint = re.search(r"^lint: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    hooks = re.findall(r"entry: make --silent (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == [*lint, "tidy"]


def test_bug_reports_ask_for_info():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "python -m normkern info --json" in form
