"""The machine code of every kernel, of every architecture, without a GPU: see sass_check.py.

NORMKERN_CUDA_BINARY names a binary of all architectures, which `make cuda` builds; else the kernels are compiled for one.
"""

import dataclasses
import os
from pathlib import Path

import pytest

from . import build, nvcc, sass, sass_check, sass_products
from .needs import need

BINARY = os.environ.get("NORMKERN_CUDA_BINARY")


@pytest.fixture(scope="module")
def verdicts():
    need(sass.missing())
    if BINARY:
        paths = [Path(BINARY)]
    else:
        need(nvcc.missing())
        paths = nvcc.objects(sorted((build.CSRC / "cuda").glob("*.cu")), [90])
    return [sass_check.judge(kernel) for path in paths for kernel in sass.read_binary(path)]


@pytest.mark.nvcc
def test_no_fault_in_any_kernel(verdicts):
    faults = [f"{v.kernel.arch} {v.kernel.name}: {fault}" for v in verdicts for fault in v.faults]
    assert not faults, "\n".join(faults)


@pytest.mark.nvcc
def test_every_architecture_has_every_kernel(verdicts):
    by_name = {}
    for v in verdicts:
        by_name.setdefault(v.kernel.name, []).append(v.kernel.arch)
    expected = sorted(sass_check.ARCHITECTURES) if BINARY else ["sm_90"]
    assert len(by_name) >= 100
    wrong = {name: archs for name, archs in by_name.items() if sorted(archs) != expected}
    assert not wrong, "missing, or there twice"


EXPECTED = {
    "Sgd": None,
    "SgdMomentum": "a loop over packs has accesses of 4 bytes",
    "SgdMomentumFirst": "reads 48 bytes where it writes 32; the formula reads 8 bytes of a coordinate and writes 8",
    "SgdNesterov": "spills or local memory",
    "SgdNesterovFirst": "no loop loads packs of 16 bytes",
    "Gauged": "KiB on their way to a multiprocessor of H100 SXM",
    "float": "a loop over packs has 1 narrow loads beside 2 of 16 bytes",
}


def test_the_judge_is_judged():
    need(sass.missing())
    need(nvcc.missing())
    [binary] = nvcc.objects([build.HERE / "sass_planted.cu"], [90])
    kernels = {kernel.arguments[0]: kernel for kernel in sass.read_binary(binary)}
    assert kernels.keys() == EXPECTED.keys()
    for rule, fault in EXPECTED.items():
        faults = sass_check.judge(kernels[rule]).faults
        assert bool(faults) == bool(fault), (rule, faults)
        assert not fault or any(fault in f for f in faults), (rule, faults)


def changed(kernel, old, new):
    """The kernel with another opcode in its innermost loop, or everywhere."""
    hot = sass_products.hot_loop(kernel).instructions
    chosen = hot if any(i.opcode == old for i in hot) else kernel.instructions
    new = [
        dataclasses.replace(i, opcode=new) if i.opcode.startswith(old) and i in chosen else i
        for i in kernel.instructions
    ]
    return dataclasses.replace(kernel, instructions=new)


@pytest.mark.nvcc
def test_the_judge_of_products_is_judged(verdicts):
    kernel = next(v.kernel for v in verdicts if v.kernel.name == "outer_products<float>" and v.kernel.arch == "sm_90")
    assert not sass_check.judge(kernel).faults
    broken = {
        "loads 8 bytes at once": changed(kernel, "LDS.128", "LDS.64"),
        "expected 32 for 3": changed(kernel, "LDS.128", "NOP"),
        "other instructions": changed(kernel, "FFMA", "FMUL"),
        "moves more than": changed(kernel, "LDS.128", "LDG.E.128"),
        "packs of 16": changed(kernel, "LDG.E.128", "LDG.E.64"),
        "holds 2 blocks": dataclasses.replace(kernel, registers=176),
        "spills": dataclasses.replace(kernel, stack=8),
    }
    for fault, bad in broken.items():
        assert any(fault in f for f in sass_check.judge(bad).faults), fault


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(sass_check.MARKS) + "\nafter\n")
    sass_check.write_docs(page, "| new |\n")
    assert page.read_text() == "before\n" + "\n| new |\n".join(sass_check.MARKS) + "\nafter\n"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="expected the lines <!-- sass_check: begin -->"):
        sass_check.write_docs(page, "")
