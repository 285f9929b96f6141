"""Check the rules of the architecture by reading the files: docs/architecture.md has them in words."""

import re
import subprocess
from pathlib import Path

import pytest
from support import fresh, import_graph

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
    assert sorted(importers) == ["_binary.py", "_load.py"]


def test_only_the_package_imports_the_reference_at_module_level():
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


def test_import_brings_no_compiler_and_no_plots():
    heavy = ("torch._dynamo", "torch._inductor", "matplotlib", "sklearn", "rich", "numpy.testing")
    code = (
        "import sys, torch; before = set(sys.modules); import normkern; "
        f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    )
    done = fresh.python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0", "2.9.0+cu128"])
def test_old_torch_is_refused_with_a_sentence(version):
    done = fresh.python("-c", f"import torch; torch.__version__ = {version!r}; import normkern")
    assert done.returncode != 0
    assert f"needs torch >= 2.10, whose DLPack exchange API it is built on; found torch {version}" in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_newer_torch_is_welcome(version):
    done = fresh.python("-c", f"import torch; torch.__version__ = {version!r}; import normkern; print('in')")
    assert done.stdout.strip() == "in", done.stderr


def test_missing_binary_is_explained():
    done = fresh.python("-c", "import sys, torch; sys.modules['normkern._C'] = None; import normkern")
    assert "normkern's binary could not be loaded" in done.stderr
    assert "`pip install -e .`" in done.stderr


@pytest.mark.parametrize("name", ops.supported_isas())
def test_environment_forces_an_isa(name):
    done = fresh.python("-c", "from normkern import ops; print(ops.isa())", env={"NORMKERN_ISA": name})
    assert done.stdout.strip() == name, done.stderr


def test_unknown_isa_in_the_environment_is_refused():
    done = fresh.python("-c", "import normkern", env={"NORMKERN_ISA": "v9"})
    assert "ImportError: NORMKERN_ISA: select_isa: expected one of" in done.stderr
    assert "got 'v9'" in done.stderr


def test_best_isa_is_the_default():
    code = "from normkern import ops; print(ops.isa(), *ops.supported_isas())"
    done = fresh.python("-c", code, env={"NORMKERN_ISA": None})
    chosen, best, *_ = done.stdout.split()
    assert chosen == best


MAKEFILE = (ROOT / "Makefile").read_text()


def targets():
    """Return the targets that `make help` lists."""
    return re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)


def test_no_other_file_has_a_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert re.search(r'metadata\.version\]\nprovider = ".*regex"\ninput = "normkern/__init__.py"', project)
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert not re.search(r"project\([^)]*VERSION", (ROOT / "CMakeLists.txt").read_text())


@pytest.mark.parametrize("target", targets())
def test_every_target_is_explained(target):
    assert f"`make {target}" in (ROOT / "CONTRIBUTING.md").read_text()


def test_make_help_lists_every_target_but_parts_of_others():
    phony = MAKEFILE.split(".PHONY: ")[1].split("\n\n")[0].replace("\\\n", " ").split()
    parts = {name for name in phony if name.startswith(("lint-", "bench-")) and name != "bench-compare"}
    assert set(phony) - parts == set(targets())


def test_make_alone_prints_the_targets():
    made = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = made.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["make", target] for target in targets()]
    assert all(len(line) <= 120 for line in lines), "a line of make help is too long for a terminal"


def test_texts_name_only_targets_that_exist():
    """Check every `make NAME` in code of the documents."""
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".ci/cuda", ".pre-commit-config.yaml")]
    texts += [*(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.yml"), *(ROOT / "bench").glob("*.md")]
    quoted = r"(?:`|run: |entry: )make (?:--silent )?([a-z-]+)"
    alone = r"^ *make ([a-z-]+)(?: +#.*| [A-Z]+=.*)?$"
    unknown = {
        f"{path.name}: make {name}"
        for path in texts
        for pattern in (quoted, alone)
        for name in re.findall(pattern, path.read_text() if path.exists() else "", re.MULTILINE)  # no .ci in an sdist
        if name not in targets()
    }
    assert not unknown


def test_hooks_are_what_lint_does():
    lint = re.search(r"^lint: \$\(addprefix lint-,\$\(or \$\(ONLY\),(.*)\)\)", MAKEFILE, re.MULTILINE).group(1).split()
    hooks = re.findall(r"entry: make --silent lint ONLY=(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == [*lint, "tidy"]


def test_bug_reports_ask_for_info():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "python -m normkern info --json" in form


# --- who imports whom -------------------------------------------------------------------------------------------------

GRAPH = import_graph.import_graph(ROOT, "normkern", "bench", "experiments")
#: The parts of normkern, the lowest layer first. A part imports lower layers only, also inside functions.
LAYERS = [
    {"normkern.names", "normkern.tracing", "normkern.theory"},
    {"normkern.ops"},
    {"normkern.reference"},
    {"normkern.noise"},
    {"normkern.optim"},
    {"normkern.invariance", "normkern.monitors", "normkern.schedules"},
    {"normkern.advice"},
    {"normkern"},
    {"normkern.demo", "normkern.doctor", "normkern.integrations"},
    {"normkern.__main__"},
]
#: The files of normkern/ops. The ops themselves, all other files, form one layer between the two lists.
BELOW_THE_OPS = [{"_load", "_torch_library"}, {"_binary"}, {"types"}, {"checks", "launch"}, {"step_arguments"}]
ABOVE_THE_OPS = [{"fake"}, {"schemas"}, {"__init__"}]


def within(package):
    """Return the graph of the files in one folder, by their last name."""
    inner = {name for name in GRAPH if name == package or name.rpartition(".")[0] == package}

    def last(name):
        return "__init__" if name == package else name.removeprefix(f"{package}.")

    return {last(name): {last(target) for target in GRAPH[name] & inner} for name in inner}


def test_no_import_cycle():
    found = [" -> ".join([*cycle, cycle[0]]) for cycle in import_graph.cycles(GRAPH)]
    assert not found, "\n".join(["import cycles:", *found])


def test_each_part_imports_lower_layers_only():
    graph = import_graph.parts({name: GRAPH[name] for name in GRAPH if name.startswith("normkern")}, 2)
    problems = import_graph.upward_imports(graph, LAYERS)
    assert not problems, "\n".join(problems)


def test_files_of_ops_import_lower_layers_only():
    graph = within("normkern.ops")
    ops_themselves = set(graph).difference(*BELOW_THE_OPS, *ABOVE_THE_OPS)
    problems = import_graph.upward_imports(graph, [*BELOW_THE_OPS, ops_themselves, *ABOVE_THE_OPS])
    assert not problems, "\n".join(problems)


def test_normkern_and_bench_import_no_experiments():
    tops = import_graph.parts(GRAPH, 1)
    problems = import_graph.upward_imports(tops, [{"normkern"}, {"bench"}, {"experiments"}])
    assert not problems, "\n".join(problems)


def test_the_top_of_the_package_is_small():
    files = [p.name for p in (ROOT / "normkern").iterdir() if p.is_file() and p.suffix != ".so"]
    assert len(files) <= 8, f"a new file belongs into a folder of normkern/: {sorted(files)}"


def graph_of(folder, files):
    """Return the import graph of a package `p` of these files."""
    for name, text in files.items():
        path = folder / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return import_graph.import_graph(folder, "p")


IMPORTS = {
    "at the top": "from p import a",
    "of a name": "from p.a import x",
    "of a module": "import p.a",
    "relative": "from . import a",
    "relative, of a name": "from .a import x as y",
    "in a function": "def f():\n    from .a import x",
    "for types alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x",
}


@pytest.mark.parametrize("statement", IMPORTS.values(), ids=IMPORTS)
def test_planted_cycle_is_found(tmp_path, statement):
    graph = graph_of(tmp_path, {"__init__.py": "from .a import x", "a.py": "import p.b", "b.py": statement})
    assert import_graph.cycles(graph) == [["p.a", "p.b"]]


def test_planted_cycle_across_folders_is_found(tmp_path):
    files = {"__init__.py": "", "c.py": "from .sub import x", "sub/__init__.py": "from .d import x"}
    assert not import_graph.cycles(graph_of(tmp_path, {**files, "sub/d.py": "import p, torch"}))
    graph = graph_of(tmp_path, {**files, "sub/d.py": "from ..c import x"})
    assert import_graph.cycles(graph) == [["p.c", "p.sub", "p.sub.d"]]


def test_a_diamond_is_no_cycle_and_a_shortest_cycle_is_named(tmp_path):
    files = {"a.py": "from . import b, c", "b.py": "from . import d", "c.py": "from . import d", "d.py": "x = 1"}
    assert import_graph.cycles(graph_of(tmp_path, files)) == []
    graph = graph_of(tmp_path, {**files, "d.py": "from . import a, c"})
    assert import_graph.cycles(graph) == [["p.c", "p.d"]]


def test_planted_import_of_a_higher_layer_is_found(tmp_path):
    graph = graph_of(
        tmp_path, {"low.py": "import p.high", "high.py": "", "side.py": "from . import high", "new.py": ""}
    )
    assert import_graph.upward_imports(graph, [{"p.low"}, {"p.high", "p.side"}]) == [
        "p.new is in no layer",
        "p.low imports p.high, which is not in a lower layer",
        "p.side imports p.high, which is not in a lower layer",
    ]
