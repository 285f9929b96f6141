"""`python -m normkern info`: the facts, and the files they are read from."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import fresh

import normkern
from normkern import ops
from normkern.__main__ import main
from normkern.doctor import elf, info, machine

KEYS = {
    "normkern": None,
    "python": None,
    "platform": None,
    "torch": {"version", "floor", "cuda", "dlpack"},
    "binary": {"file", "bytes", "cuda_architectures", "libraries", "symbol_versions"},
    "isa": {"chosen", "supported", "built"},
    "cpu": {"model", "present", "allowed", "quota"},
    "threads": None,
    "openmp_runtimes": None,
    "gpus": None,
    "environment": {"NORMKERN_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD"},
}
BINARY = Path(ops.binary.__file__)


def test_json_has_these_keys(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {k: set(v) if isinstance(v, dict) else None for k, v in facts.items()} == KEYS
    assert facts["normkern"] == normkern.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["floor"] == "2.10"
    assert facts["torch"]["dlpack"].startswith("1.")
    assert facts["binary"]["file"] == str(BINARY)
    assert facts["binary"]["bytes"] == BINARY.stat().st_size
    assert facts["isa"]["chosen"] == ops.isa()
    assert set(facts["isa"]["supported"]) <= set(facts["isa"]["built"])
    assert 1 <= facts["cpu"]["allowed"] <= facts["cpu"]["present"]
    assert facts["threads"] == torch.get_num_threads()


def test_info_follows_what_is_selected(isa, monkeypatch):
    torch.set_num_threads(3)
    monkeypatch.setenv("NORMKERN_ISA", "something")
    facts = info.info()
    assert facts["isa"]["chosen"] == isa
    assert facts["threads"] == 3
    assert facts["environment"]["NORMKERN_ISA"] == "something"


def test_table_has_a_line_each_and_cuts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "Some GPU", "capability": "9.0"}])
    monkeypatch.setattr(machine, "cpus", lambda: machine.Cpus(64, 8, 2.5))
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (
        f"normkern         {normkern.__version__}",
        str(BINARY),
        "64 CPUs, 8 allowed, 2.5 by cgroup quota",
        "Some GPU, 9.0",
        "OMP_NUM_THREADS  17",
        f"{torch.__version__} (needs >= 2.10)",
    ):
        assert text in printed
    assert "…" not in printed
    assert "\x1b" not in printed


def test_import_of_normkern_brings_neither_info_nor_doctor():
    code = "import sys, normkern; print([m for m in sys.modules if m.startswith('normkern.')])"
    done = fresh.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert not re.search("info|doctor|machine|elf|__main__", done.stdout)


# ---- What the binary needs ------------------------------------------------------------------------------------------


def test_elf_agrees_with_readelf():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    said = subprocess.run(
        ["readelf", "--dynamic", "--version-info", "--wide", str(BINARY)], capture_output=True, text=True, check=True
    ).stdout
    found = elf.needs(BINARY)
    assert found.libraries == re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", said)
    highest = {}
    for kind, number in re.findall(r"Name: ([A-Z]+)_([\d.]+) ", said):
        highest[kind] = max(highest.get(kind, ()), tuple(map(int, number.split("."))))
    assert found.versions == {kind: ".".join(map(str, number)) for kind, number in highest.items()}
    assert "GLIBC" in found.versions


def test_what_is_no_elf_file_needs_nothing_known(tmp_path):
    for name, start in (
        ("text", b"hello"),
        ("empty", b""),
        ("mach-o", b"\xcf\xfa\xed\xfe"),
        ("elf32", b"\x7fELF\x01\x01"),
    ):
        (tmp_path / name).write_bytes(start)
        assert elf.needs(tmp_path / name) is None


# ---- What the machine gives -----------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty /proc and /sys/fs/cgroup; write(path, text) fills them."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cgroup")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "cgroup/pod/cpu.max": "100000 100000\n",
                "cgroup/pod/box/cpu.max": "400000 100000\n",
            },
            1.0,
        ),
        ({"proc/self/cgroup": "0::/of/the/host\n", "cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n2:cpuset:/\n",
                "cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
                "cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
                "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
    ],
    ids=["nothing", "v2", "v2 without limit", "v2 root", "v2 tighter around", "v2 path of the host", "v1"],
)
def test_quota_of_cgroups(system, files, quota):
    for path, text in files.items():
        system(path, text)
    assert machine.cpus().quota == quota


def test_usable_cpus():
    assert machine.Cpus(64, 8, None).usable == 8
    assert machine.Cpus(64, 8, 2.5).usable == 3
    assert machine.Cpus(64, 2, 16.0).usable == 2
    assert machine.Cpus(64, 2, 0.5).usable == 1


def test_busy_seconds_are_of_the_cpus_that_are_allowed(system, monkeypatch):
    assert machine.busy_seconds() is None
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    stat = ["cpu 9 9 9 9 9 9 9 9 9 9", "cpu0 100 20 3 9000 9000 4 5 6 50 50", "cpu1 7 7 7 7 7 7 7 7 7 7"]
    system("proc/stat", "\n".join([*stat, "cpu2 200 0 0 9000 0 0 0 0 0 0", "intr 5", ""]))
    assert machine.busy_seconds() == pytest.approx(1.38 + 2.0)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with machine.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_cpu_model(system):
    assert machine.cpu_model()
    system("proc/cpuinfo", "processor : 0\nmodel name\t: Some CPU @ 3 GHz: fast\n")
    assert machine.cpu_model() == "Some CPU @ 3 GHz: fast"


def test_openmp_runtimes_of_the_process_are_files():
    runtimes = machine.openmp_runtimes()
    assert runtimes is None or all(Path(file).is_file() for file in runtimes)


def test_openmp_runtimes_by_name(system):
    assert machine.openmp_runtimes() is None
    ours = ["/a b/libgomp.so.1", "/x/libgomp-e985bcbb.so.1.0.0", "/x/libiomp5.so", "/usr/lib/llvm/libomp.so.5"]
    others = ["/x/libgomp-helper/file.so", "/x/libompi.so", "/x/libomptarget.so.1", "/x/_omp.cpython-311.so", "[heap]"]
    lines = [
        f"7f0000{i:02}000-7f0000{i:02}fff r-xp 00000000 fe:00 {i}  {file}"
        for i, file in enumerate([*ours, *ours, *others])
    ]
    system("proc/self/maps", "\n".join([*lines, "7f00-7f01 rw-p 00000000 00:00 0 ", ""]))
    assert machine.openmp_runtimes() == sorted(ours)
