"""The time of one step: normkern.SGD, torch's three SGDs and the machine's limit, interleaved, medians and ratios.

    python bench/sgd.py --out bench/results/sgd.json [--seconds 6] [--cases ResNet-50]

Machines are noisy: only ratios within one run are worth quoting. Before anything is timed each competitor's step is
compared with a float64 step; one that is wrong is reported as wrong and not timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import normkern
from normkern import ops, reference

HYPER = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4}
Step = Callable[[], object]


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Every parameter of ResNet-50: 161 tensors, 25.6 M coordinates."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for o, i, k in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(o, i, k, k), (o,), (o,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


CASES: dict[str, tuple[list[tuple[int, ...]], torch.dtype]] = {
    "ResNet-50": (resnet50_shapes(), torch.float32),
    "one of 64M": ([(64 << 20,)], torch.float32),
    "one of 64M, bf16": ([(64 << 20,)], torch.bfloat16),
    "one of 64M, f16": ([(64 << 20,)], torch.float16),
    "161 of 8x8": ([(8, 8)] * 161, torch.float32),
    "161 of 32x32": ([(32, 32)] * 161, torch.float32),
    "20 of 8x8": ([(8, 8)] * 20, torch.float32),
}


def five_streams(n: int) -> Step | None:
    """The flat loop on three arrays of n floats, or None without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    folder = tempfile.mkdtemp()
    source, library = Path(__file__).with_name("five_streams.cpp"), f"{folder}/five_streams.so"
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", library], check=True)
    run = ctypes.CDLL(library).five_streams
    arrays = [torch.randn(n) for _ in range(3)]
    pool = ctypes.c_void_p(ops.torch_symbol("torch_parallel_for"))
    pointers = [ctypes.c_void_p(a.data_ptr()) for a in arrays]
    threads = torch.get_num_threads()

    def step(arrays: list[torch.Tensor] = arrays) -> None:
        run(pool, *pointers, ctypes.c_int64(n), ctypes.c_int64(threads))

    return step


def with_norms(params: list[nn.Parameter], step: Step) -> Step:
    """What one has to add to torch's step to know |w|, |g| and <w, g>; without the update, which would cost a copy."""

    def measured() -> None:
        grads = [p.grad for p in params]
        with torch.no_grad():
            torch._foreach_norm(params)
            torch._foreach_norm(grads)
            for p, g in zip(params, grads, strict=True):
                torch.dot(p.view(-1), g.view(-1))
        step()

    return measured


def competitors(params: list[nn.Parameter]) -> dict[str, Step]:
    fused = torch.optim.SGD(params, fused=True, **HYPER)
    buffers: list[torch.Tensor | None] = [torch.zeros_like(p) for p in params]
    steps: dict[str, Step] = {
        "normkern": normkern.SGD(params, **HYPER).step,
        "normkern tensor": normkern.SGD(params, stats="tensor", **HYPER).step,
        "normkern row": normkern.SGD(params, stats="row", **HYPER).step,
        "torch default": torch.optim.SGD(params, **HYPER).step,
        "torch foreach": torch.optim.SGD(params, foreach=True, **HYPER).step,
        "torch fused": fused.step,
        "torch fused + norms": with_norms(params, fused.step),
    }
    if sum(p.numel() for p in params) < 1 << 20:  # a hundred times slower: it would leave the others no rounds
        steps["reference tensor"] = lambda: reference.sgd_(
            params, [p.grad for p in params], buffers, stats="tensor", **HYPER
        )
    return steps


def is_right(name: str, dtype: torch.dtype) -> bool:
    """Three steps of one odd-sized tensor agree with float64 to the dtype's precision."""
    w, exact = nn.Parameter(torch.linspace(-1, 1, 1003).to(dtype)), nn.Parameter(torch.linspace(-1, 1, 1003).double())
    exact.data.copy_(w.data)
    w.grad = torch.linspace(1, -2, 1003).to(dtype)
    exact.grad = w.grad.double()
    options = {"lr": 0.1, "momentum": 0.9}
    reference_step = torch.optim.SGD([exact], **options)
    choice = {"torch default": {}, "torch foreach": {"foreach": True}}.get(name, {"fused": True})
    ours = name.startswith("normkern")
    opt = normkern.SGD([w], **options) if ours else torch.optim.SGD([w], **options, **choice)
    for _ in range(3):
        opt.step()
        reference_step.step()
    return bool((w.detach().double() - exact.detach()).abs().max() < 8 * torch.finfo(dtype).eps)


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Rounds in which each has its turn, in a new order every time: name -> seconds per step, one number a turn.

    A turn is one untimed step, which meets the caches as the last competitor left them, and then enough steps to be
    longer than the clock's and the scheduler's noise.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    for name, step in steps.items():
        step()
        begin = time.perf_counter()
        step()
        repeats[name] = max(1, min(100, int(2e-3 / (time.perf_counter() - begin))))
    order, shuffle = list(steps), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < 9:
        shuffle.shuffle(order)
        for name in order:
            step = steps[name]
            step()
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return times


def run_case(name: str, seconds: float) -> dict[str, Any]:
    shapes, dtype = CASES[name]
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    coordinates = sum(p.numel() for p in params)
    steps = competitors(params)
    wrong = [n for n in steps if n.startswith("torch") and not is_right(n, dtype)]
    steps = {n: s for n, s in steps.items() if n not in wrong}
    if coordinates > 1 << 20 and dtype == torch.float32 and (limit := five_streams(coordinates)):
        steps = {"five-stream loop": limit, **steps}
    if dtype != torch.float32:
        floats = nn.Parameter(torch.randn(coordinates))
        floats.grad = torch.randn(coordinates)
        steps["normkern float32"] = normkern.SGD([floats], **HYPER).step
    times = interleaved(steps, seconds)
    medians = {n: statistics.median(t) for n, t in times.items()}
    return {
        "tensors": len(params),
        "coordinates": coordinates,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_moved": 5 * coordinates * params[0].element_size(),
        "wrong": wrong,
        "rounds": len(next(iter(times.values()))),
        "seconds": medians,
        "quartiles": {n: statistics.quantiles(t, n=4)[::2] for n, t in times.items()},
        "times_of_normkern": {n: m / medians["normkern"] for n, m in medians.items()},
    }


def build_numbers() -> dict[str, float]:
    """Seconds to build a wheel from clean, its megabytes, milliseconds that the import adds to torch's."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        options = ["--no-deps", "--quiet", "-w", folder, f"--config-settings=build-dir={folder}/build"]
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(root)], check=True)
        build = time.perf_counter() - begin
        size = next(Path(folder).glob("*.whl")).stat().st_size / 1e6
    code = "import torch, time; t = time.perf_counter(); import normkern; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    return {"build_seconds": build, "wheel_megabytes": size, "import_milliseconds": 1e3 * statistics.median(imports)}


def machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": ops.isa(),
        "torch": torch.__version__,
        "normkern": normkern.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def show(console: Console, name: str, case: dict[str, Any]) -> None:
    seconds, ratios, quartiles = (case[k] for k in ("seconds", "times_of_normkern", "quartiles"))
    table = Table(title=f"{name}: {case['tensors']} tensors, {case['coordinates']:,} coordinates, {case['dtype']}")
    for column in ("step", "median us", "quartiles us", "GB/s", "ratio"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    for n, t in seconds.items():
        low, high = quartiles[n]
        rate = case["bytes_moved"] / t / 1e9
        table.add_row(n, f"{t * 1e6:,.1f}", f"{low * 1e6:,.1f} - {high * 1e6:,.1f}", f"{rate:.1f}", f"{ratios[n]:.2f}")
    for n in case["wrong"]:
        table.add_row(n, "wrong", "", "", "")
    console.print(table)


def readme_table(results: dict[str, Any]) -> str:
    """The cases as Markdown: microseconds of ours, and how many times longer the others take."""
    columns = [
        "normkern tensor",
        "normkern row",
        "torch fused",
        "torch default",
        "torch fused + norms",
        "five-stream loop",
    ]
    lines = [
        "| case | normkern | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name, case in results["cases"].items():
        ratios = case["times_of_normkern"]
        cells = ["wrong" if c in case["wrong"] else f"{ratios[c]:.2f} x" if c in ratios else "" for c in columns]
        microseconds = case["seconds"]["normkern"] * 1e6
        lines.append(f"| {name}, {case['dtype']} | {microseconds:,.0f} us | " + " | ".join(cells) + " |")
    m = results["machine"]
    return "\n".join([*lines, "", f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}."])


def write_between_marks(file: Path, text: str) -> None:
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    head, rest = file.read_text().split(begin)
    file.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--readme", type=Path, help="write the table into this file, between its marks")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--no-build", action="store_true", help="leave out build time, wheel size and import time")
    arguments = parser.parse_args()
    console = Console()
    results: dict[str, Any] = {"machine": machine(), "hyperparameters": HYPER, "cases": {}}
    for name in arguments.cases:
        case = run_case(name, arguments.seconds)
        results["cases"][name] = case
        show(console, name, case)
    if not arguments.no_build:
        results["build"] = build_numbers()
        console.print(results["build"])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.readme:
        write_between_marks(arguments.readme, readme_table(results))


if __name__ == "__main__":
    main()
