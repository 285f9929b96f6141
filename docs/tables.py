"""Write every table of results into the pages that show it, between their marks: python docs/tables.py

A page asks for a table by two comments, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, with a NAME of `TABLES`. The
numbers are those of bench/results and experiments/. The benchmarks write their own tables too; this writes all of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import ddp_noise, noise_models, report  # noqa: E402
from bench.report import digits, scaled, table_head, table_row  # noqa: E402
from bench.results import load  # noqa: E402
from experiments import low_precision  # noqa: E402

BENCH, EXPERIMENTS = ROOT / "bench" / "results", ROOT / "experiments" / "results"
SHORT_COLUMNS = ("normkern", "torch fused", "normkern with norms", "torch fused with norms")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


#: README's rows: a case of bench/results/gpu.json, and how the table calls it.
GPU_SHORT = {
    "ResNet-50, float32": "ResNet-50, float32",
    "ResNet-50, bfloat16": "ResNet-50, bfloat16",
    "transformer, float32": "124M transformer, float32",
    "161 of 8x8, float32": "161 tensors of 8x8, float32",
}
#: The steps of the four columns in bench/results/gpu.json.
GPU_SHORT_STEPS = ("normkern.SGD", "torch fused", 'normkern.SGD, stats="tensor"', "torch fused + norms of w and g")


def gpu_short() -> str:
    told = read(BENCH / "gpu.json")
    time = {(row["case"], row["step"]): row["step_us"] for row in told["rows"]}
    lines = table_head("time per step", *SHORT_COLUMNS)
    for case, name in GPU_SHORT.items():
        lines.append(table_row(name, *(f"{time[case, step]:.0f} us" for step in GPU_SHORT_STEPS)))
    return "\n".join([*lines, "", f"{told['gpu']}, torch {told['torch']}."])


#: The same for bench/results/bench.json.
CPU_SHORT = {
    "ResNet-50, float32": "ResNet-50, float32",
    "transformer, float32": "124M transformer, float32",
    "one of 64M, bfloat16": "one tensor of 64M, bfloat16",
    "161 of 8x8, float32": "161 tensors of 8x8, float32",
}
CPU_SHORT_STEPS = ("normkern", "torch fused", "normkern tensor", "torch fused + norms")


def cpu_short() -> str:
    results = load(BENCH / "bench.json")
    lines = table_head("time per step", *SHORT_COLUMNS)
    for case, name in CPU_SHORT.items():
        rows, out = results.groups[case], results.left_out.get(case, {})
        cells = [
            scaled(rows[p].seconds) if p in rows else f"{report.short_reason(out[p])} result" for p in CPU_SHORT_STEPS
        ]
        lines.append(table_row(name, *cells))
    return "\n".join([*lines, "", report.where(results)])


#: The steps of bench/results/gpu.json, and the columns' heads.
GPU_STEPS = {
    "normkern.SGD": "normkern",
    'normkern.SGD, stats="tensor"': "stats tensor",
    'normkern.SGD, stats="row"': "stats row",
    "torch fused": "torch fused",
    "torch foreach": "torch foreach",
    "torch fused + norms of w and g": "torch fused + norms",
}


def gpu(column: str) -> str:
    told = read(BENCH / "gpu.json")
    rows = {(row["case"], row["step"]): row for row in told["rows"]}
    lines = table_head("case, us", *GPU_STEPS.values(), "of copy speed")
    for case in dict.fromkeys(case for case, _ in rows):
        found = [rows.get((case, step), {}) for step in GPU_STEPS]
        share = f"{found[0]['of_roof']:.0%}" if "of_roof" in found[0] else "-"
        lines.append(table_row(case, *(digits(r[column]) if column in r else "-" for r in found), share))
    speed = told["roof_bytes_per_second"] / 1e12
    return "\n".join([*lines, "", f"{told['gpu']}, torch {told['torch']}. A copy moves {speed:.2f} TB/s."])


def equilibrium() -> str:
    told = read(EXPERIMENTS / "equilibrium.json")
    lines = table_head("layer", "angle", "predicted", "difference", "weight norm", "predicted", "difference")
    for layer in told["layers"]:
        cells: list[str] = []
        for measured, predicted, off in (
            ("angular_update", "predicted_angular_update", "angle_off"),
            ("weight_norm", "equilibrium_weight_norm", "length_off"),
        ):
            cells += [f"{layer[measured]:.4g}", f"{layer[predicted]:.4g}", f"{layer[off]:.2%}"]
        lines.append(table_row(f"`{layer['name']}`", *cells))
    run = ", ".join(f"{name.replace('_', ' ')} {told[name]:g}" for name in ("lr", "weight_decay", "momentum", "steps"))
    return "\n".join([*lines, "", f"{run}."])


def papers() -> str:
    lines = table_head("paper", "claim", "what the paper says", "verdict here")
    lines[1] = "|---|--:|---|---|"
    for name in ("auto_rate", "exponential", "intrinsic", "svag"):
        told = read(ROOT / "experiments" / "papers" / "results" / f"{name}.json")
        for claim in told["claims"]:
            said = claim["paper"].replace("|", "\\|")
            lines.append(table_row(told["authors"], str(claim["number"]), said, f"**{claim['verdict']}**"))
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "bench": lambda: report.readme_table(load(BENCH / "bench.json")),
    "bench-adamw": lambda: report.adamw_table(load(BENCH / "bench.json")),
    "bench-svag": lambda: report.svag_table(load(BENCH / "bench.json")),
    "bench-noise": lambda: report.noise_table(load(BENCH / "noise.json")),
    "bench-noise-models": lambda: noise_models.table(read(BENCH / "noise_models.json")),
    "bench-ddp": lambda: ddp_noise.table(read(BENCH / "ddp_noise.json")),
    "low-precision": lambda: low_precision.readme_table(read(EXPERIMENTS / "low_precision.json")),
    "cpu-short": cpu_short,
    "gpu-short": gpu_short,
    "gpu-call": lambda: gpu("step_us"),
    "gpu-device": lambda: gpu("device_us"),
    "equilibrium": equilibrium,
    "papers": papers,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def main() -> None:
    for page in pages():
        for name, table in TABLES.items():
            if marks(name)[0] in page.read_text():
                report.write_between_marks(page, table(), marks(name))


if __name__ == "__main__":
    main()
