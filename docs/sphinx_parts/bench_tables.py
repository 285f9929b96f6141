"""The benchmark page's tables, made from bench/results/*.json when the site is built: ``{bench} NAME``."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bench.ddp_noise import table as ddp_noise_table
from bench.report import COLUMNS, NOISE_COLUMNS, SVAG_COLUMNS, digits, scaled, table_head, table_row, times, where
from bench.results import Results, load
from experiments.low_precision import readme_table as low_precision_table

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
#: README's columns, in two tables that fit a page.
MEASURED = ("normkern tensor", "normkern row", "torch fused + norms", "torch compile + norms")
PLAIN = ("normkern exponential", "torch fused", "torch compile", "torch default", "reference", "five-stream loop")


def of_peers(results: Results, ours: str, columns: dict[str, str], rate: bool = False) -> list[str]:
    """Our time for each case, and how many times longer each peer took."""
    lines = table_head("case", ours, *(["GB/s"] if rate else []), *columns.values())
    for group, rows in results.groups.items():
        if (row := rows.get(ours)) and any(peer in rows for peer in columns):
            speed = [digits(row.rate or 0.0)] if rate else []
            lines.append(table_row(group, scaled(row.seconds), *speed, *times(results, row, columns)))
    return [*lines, "", where(results)]


def step() -> list[str]:
    return of_peers(load(RESULTS / "bench.json"), "normkern", {p: COLUMNS[p] for p in PLAIN}, rate=True)


def statistics() -> list[str]:
    return of_peers(load(RESULTS / "bench.json"), "normkern", {p: COLUMNS[p] for p in MEASURED})


def svag() -> list[str]:
    return of_peers(load(RESULTS / "bench.json"), "normkern SVAG", SVAG_COLUMNS)


def noise() -> list[str]:
    return of_peers(load(RESULTS / "noise.json"), "plain", NOISE_COLUMNS)


def noise_memory() -> list[str]:
    results = load(RESULTS / "noise.json")
    lines = table_head("network, MB", "plain", *NOISE_COLUMNS.values())
    for group, rows in results.groups.items():
        if "plain" in rows:
            peaks = [rows[p].peak if p in rows else None for p in ("plain", *NOISE_COLUMNS)]
            lines.append(table_row(group, *("-" if x is None else digits(x) for x in peaks)))
    return lines


def low_precision() -> list[str]:
    return low_precision_table(json.loads((RESULTS / "low_precision.json").read_text())).splitlines()


def ddp_noise() -> list[str]:
    return ddp_noise_table(json.loads((RESULTS / "ddp_noise.json").read_text())).splitlines()


#: bench.gpu's names, and the columns' heads.
GPU_STEPS = {
    "normkern.SGD": "normkern",
    'normkern.SGD, stats="tensor"': "stats tensor",
    'normkern.SGD, stats="row"': "stats row",
    "torch fused": "torch fused",
    "torch foreach": "torch foreach",
    "torch fused + norms of w and g": "torch fused + norms",
}


def gpu() -> list[str]:
    told = json.loads((RESULTS / "gpu.json").read_text())
    rows = {(row["case"], row["step"]): row for row in told["rows"]}
    lines = table_head("case, us on the device", *GPU_STEPS.values(), "of a copy")
    for case in dict.fromkeys(case for case, _ in rows):
        found = [rows.get((case, step), {}) for step in GPU_STEPS]
        share = f"{found[0]['of_roof']:.0%}" if "of_roof" in found[0] else "-"
        lines.append(table_row(case, *(digits(r["device_us"]) if "device_us" in r else "-" for r in found), share))
    speed = told["roof_bytes_per_second"] / 1e12
    return [*lines, "", f"{told['gpu']}, torch {told['torch']}; a copy moves {speed:.2f} TB/s."]


def equilibrium() -> list[str]:
    told = json.loads((RESULTS / "equilibrium.json").read_text())
    lines = table_head("layer", "angle", "predicted", "off", "length", "predicted", "off")
    for layer in told["layers"]:
        cells: list[str] = []
        for measured, predicted, off in (
            ("angular_update", "predicted_angular_update", "angle_off"),
            ("weight_norm", "equilibrium_weight_norm", "length_off"),
        ):
            cells += [f"{layer[measured]:.4g}", f"{layer[predicted]:.4g}", f"{layer[off]:.2%}"]
        lines.append(table_row(f"`{layer['name']}`", *cells))
    run = ", ".join(f"{name.replace('_', ' ')} {told[name]:g}" for name in ("lr", "weight_decay", "momentum", "steps"))
    return [*lines, "", f"{run}."]


TABLES: dict[str, tuple[Callable[[], Iterable[str]], tuple[str, ...]]] = {
    "step": (step, ("bench.json",)),
    "statistics": (statistics, ("bench.json",)),
    "svag": (svag, ("bench.json",)),
    "noise": (noise, ("noise.json",)),
    "noise-memory": (noise_memory, ("noise.json",)),
    "low-precision": (low_precision, ("low_precision.json",)),
    "ddp-noise": (ddp_noise, ("ddp_noise.json",)),
    "gpu": (gpu, ("gpu.json",)),
    "equilibrium": (equilibrium, ("equilibrium.json",)),
}


class Bench(SphinxDirective):
    """``{bench} NAME``: one of `TABLES`."""

    required_arguments = 1
    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        if self.arguments[0] not in TABLES:
            raise self.error(f"bench: expected one of {', '.join(TABLES)}, got {self.arguments[0]}")
        make, files = TABLES[self.arguments[0]]
        for name in files:
            self.env.note_dependency(str(RESULTS / name))
        return self.parse_text_to_nodes("\n".join(make()))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("bench", Bench)
    return {"parallel_read_safe": True}
