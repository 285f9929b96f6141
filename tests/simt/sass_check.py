"""A gate for the machine code of the kernels, and the table of it in docs/cuda.md. Needs no GPU.

    python -m simt.sass_check BINARY [--docs docs/cuda.md]      (from tests/; BINARY: a CUDA build of normkern's _C)

For every architecture in the binary: no spills, no local memory; in the loops over packs every load and store of 16
bytes, and as many bytes per coordinate as the formula needs, no more; and enough bytes on their way at once to keep
memory busy (Little's law: bandwidth times latency).
"""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import byte_model, sass, sass_products

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
THREADS = 256  # per block: csrc/cuda/block.cuh
LATENCY_NS = 700  # of a load from memory under load: a planning figure


@dataclass(frozen=True)
class Gpu:
    """From public data sheets, of the fastest card of an architecture."""

    name: str
    gigabytes_per_second: int
    multiprocessors: int
    threads: int  # and blocks, and bytes of shared memory, that a multiprocessor can hold
    blocks: int
    shared: int
    registers: int = 65536
    is_gated: bool = True  # False: too few bytes on their way is no fault, but told in the table

    def resident(self, kernel: sass.Kernel) -> int:
        """Threads of the kernel that a multiprocessor holds at once."""
        registers = -(-max(kernel.registers, 1) // 8) * 8 * THREADS
        blocks = min(self.threads // THREADS, self.blocks, self.registers // registers)
        if kernel.shared:
            blocks = min(blocks, self.shared // (kernel.shared + 1024))
        return blocks * THREADS

    @property
    def bytes_needed(self) -> float:
        """On their way to each multiprocessor, to keep memory busy."""
        return self.gigabytes_per_second * LATENCY_NS / self.multiprocessors


GPUS = {
    "sm_75": Gpu("T4", 320, 40, 1024, 16, 64 << 10),
    "sm_80": Gpu("A100 80GB", 2039, 108, 2048, 32, 164 << 10),
    "sm_86": Gpu("RTX 3090", 936, 82, 1536, 16, 100 << 10),
    "sm_89": Gpu("RTX 4090", 1008, 128, 1536, 24, 100 << 10),
    "sm_90": Gpu("H100 SXM", 3350, 132, 2048, 32, 228 << 10),
    "sm_100": Gpu("B200", 8000, 148, 2048, 32, 228 << 10, is_gated=False),  # steps that sum: 64 to 88 %
    "sm_120": Gpu("RTX 5090", 1792, 170, 1536, 24, 100 << 10),
}


@dataclass(frozen=True, order=True)
class Promise:
    """What the loops over packs of a kernel move per coordinate."""

    measure: str
    storage: str
    read: int
    written: int
    beside: int | None = field(default=None, compare=False)  # narrow loads for each of a pack; None: of no kind


def promise(kernel: sass.Kernel) -> Promise | None:
    """None: a kernel that is no pass over tensors, of which no bandwidth is expected."""
    if kernel.family == "update":
        rule, measure, storage = kernel.arguments
        measure = byte_model.MEASURES[int(measure)]
        return Promise(measure, storage, *byte_model.bytes_per_coordinate(rule, measure, storage))
    if kernel.family in byte_model.SAMPLE_KERNELS:
        op, beside = byte_model.SAMPLE_KERNELS[kernel.family]
        storage = kernel.arguments[0]
        streams = 2 if op.startswith("norm_sums") else 1
        return Promise(op, storage, streams * byte_model.STORAGE[storage], 0, beside)
    return None


def faults_of_loop(loop: sass.Loop, promised: Promise) -> list[str]:
    """What a loop over packs does that it should not."""
    if promised.beside is not None:  # stores are of sums, of a row or a sample: few
        packs = loop.loads.count(16)
        narrow = len(loop.loads) - packs
        if narrow > promised.beside * packs:
            return [f"a loop over packs has {narrow} narrow loads beside {packs} of 16 bytes"]
        return []
    faults = []
    narrow_widths = sorted({w for w in loop.loads + loop.stores if w != 16})
    if narrow_widths:
        faults.append(f"a loop over packs has accesses of {', '.join(map(str, narrow_widths))} bytes")
    read, written = sum(loop.loads), sum(loop.stores)
    if read * promised.written != written * promised.read:
        faults.append(
            f"a loop over packs reads {read} bytes where it writes {written}; the formula reads {promised.read} "
            f"bytes of a coordinate and writes {promised.written}"
        )
    return faults


@dataclass
class Verdict:
    kernel: sass.Kernel
    faults: list[str]
    in_flight: float = 0  # per multiprocessor
    promise: Promise | None = None


def judge(kernel: sass.Kernel) -> Verdict:
    faults = []
    if kernel.stack or kernel.local or kernel.local_accesses():
        faults.append(
            f"spills or local memory: {kernel.stack} bytes of stack, {kernel.local} of local memory, "
            f"{kernel.local_accesses()} accesses"
        )
    if kernel.family in sass_products.FAMILIES:
        return Verdict(kernel, faults + sass_products.faults(kernel, GPUS[kernel.arch].shared))
    promised = promise(kernel)
    if not promised:
        return Verdict(kernel, faults)
    packed = [loop for loop in kernel.loops() if 16 in loop.loads]
    if not packed:
        return Verdict(kernel, [*faults, "no loop loads packs of 16 bytes"], promise=promised)
    gpu = GPUS[kernel.arch]
    in_flight = min(loop.in_flight for loop in packed) * gpu.resident(kernel)
    for loop in packed:
        faults += faults_of_loop(loop, promised)
    if gpu.is_gated and in_flight < gpu.bytes_needed:
        faults.append(
            f"{in_flight / 1024:.1f} KiB on their way to a multiprocessor of {gpu.name}, "
            f"{gpu.bytes_needed / 1024:.1f} are needed for {gpu.gigabytes_per_second} GB/s and {LATENCY_NS} ns"
        )
    return Verdict(kernel, faults, in_flight, promised)


def table(verdicts: list[Verdict]) -> str:
    """Markdown: a row for the kernels that move the same bytes of the same type, a column for each architecture."""
    architectures = [a for a in ARCHITECTURES if any(v.kernel.arch == a for v in verdicts)]
    rows: dict[Promise, dict[str, list[Verdict]]] = {}
    for v in verdicts:
        if v.promise:
            rows.setdefault(v.promise, {}).setdefault(v.kernel.arch, []).append(v)
    needed = " | ".join(f"*{GPUS[a].bytes_needed / 1024:.1f}*" for a in architectures)
    lines = [
        "| measured | type | bytes read + written | "
        + " | ".join(f"{a}<br>{GPUS[a].name}" for a in architectures)
        + " |",
        "|---|---|---|" + "---|" * len(architectures),
        f"| *KiB needed* | | | {needed} |",
    ]
    for promised in sorted(rows):
        by_arch = rows[promised]
        cells = [
            _cell(max(v.kernel.registers for v in by_arch[a]), min(v.in_flight for v in by_arch[a]), GPUS[a])
            for a in architectures
        ]
        what = f"| {promised.measure} | {promised.storage} | {promised.read} + {promised.written} | "
        lines.append(what + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(registers: int, in_flight: float, gpu: Gpu) -> str:
    kib = f"{in_flight / 1024:.0f}"
    return f"{registers} · {kib if in_flight >= gpu.bytes_needed else f'**{kib}**'}"


MARKS = ("<!-- sass_check: begin -->", "<!-- sass_check: end -->")


PRODUCT_MARKS = ("<!-- sass_products: begin -->", "<!-- sass_products: end -->")


def write_docs(path: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Puts a table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    old = path.read_text()
    begin, end = (old.find(mark) for mark in marks)
    if begin < 0 or end < begin:
        raise ValueError(f"{path}: expected the lines {marks[0]} and {marks[1]}, found no such pair")
    path.write_text(f"{old[: begin + len(marks[0])]}\n{text}{old[end:]}")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="+", type=Path, help="objects or libraries with device code")
    parser.add_argument("--docs", type=Path, help="the page whose table is written")
    parser.add_argument("--show", default="$^", help="print each kernel whose name this pattern finds")
    chosen = parser.parse_args(arguments)
    if lack := sass.missing():
        parser.error(lack)
    verdicts = [judge(k) for path in chosen.binary for k in sass.read_binary(path)]
    bad = [v for v in verdicts if v.faults]
    for v in verdicts:
        if v.faults or re.search(chosen.show, v.kernel.name):
            k = v.kernel
            print(f"{k.arch} {k.name}: {k.registers} registers, {v.in_flight / 1024:.1f} KiB in flight")
            for fault in v.faults:
                print(f"    {fault}")
    if chosen.docs:
        write_docs(chosen.docs, table(verdicts))
        gpus = {arch: (gpu.name, gpu.shared) for arch, gpu in GPUS.items()}
        write_docs(chosen.docs, sass_products.table([v.kernel for v in verdicts], gpus), PRODUCT_MARKS)
    print(f"sass_check: {len(verdicts) - len(bad)} passed, {len(bad)} failed")
    return bool(bad) or not verdicts


if __name__ == "__main__":
    sys.exit(main())
