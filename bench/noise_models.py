"""The time of a GradientNoise context on networks that people train: times a plain forward and backward, one thread.

python -m bench.noise_models --json bench/results/noise_models.json --readme docs/benchmarks.md

The three take turns in a shuffled order, on a model of their own each. The first context, which compares every layer
with autograd, is not timed. Ratios are those of medians.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import normkern

from .measure import against, interleave
from .published import PUBLISHED, Published, made
from .report import digits, publish, scaled, table_head, table_row

MARKS = "<!-- bench-noise-models:begin -->", "<!-- bench-noise-models:end -->"
PLAIN, NSR, VARIANCE = "plain", "nsr", "norms + variance"
STATS: dict[str, tuple[str, ...]] = {PLAIN: (), NSR: ("nsr",), VARIANCE: ("norms", "variance")}
LEAST = 5
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def stepper(net: Published, stats: tuple[str, ...]) -> Callable[[], object]:
    """Return a function that runs a forward and backward of its own copy of the network."""
    model, loss = made(net)

    def plain() -> None:
        model.zero_grad()
        loss().backward()

    if not stats:
        return plain
    noise = normkern.GradientNoise(model, stats)

    def ours() -> object:
        model.zero_grad()
        with noise:
            loss().backward()
        return noise.result()

    return ours


def measure(net: Published, seconds: float, clock: str) -> dict[str, Any]:
    steps = {name: stepper(net, stats) for name, stats in STATS.items()}
    samples, _ = interleave(steps, seconds, CLOCKS[clock], LEAST)
    parameters = list(made(net)[0].parameters())
    return {
        "network": net.name,
        "tensors": len(parameters),
        "coordinates": sum(p.numel() for p in parameters),
        "turns": {name: len(x) for name, x in samples.items()},
        **against(PLAIN, samples),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = table_head("network", "parameters", "forward + backward", NSR, VARIANCE)
    for case in results["cases"]:
        ratios = [f"{case['times_of_plain'][who]:.2f}" for who in (NSR, VARIANCE)]
        size = f"{digits(case['coordinates'] / 1e6)}M in {case['tensors']}"
        lines.append(table_row(case["network"], size, scaled(case["seconds"][PLAIN]["median"]), *ratios))
    for net, library in results["left_out"].items():
        lines.append(table_row(net, "-", f"needs {library}", "-", "-"))
    m = results["machine_info"]
    kind = "" if results["clock"] == "wall" else f" CPU time of the {results['clock']}."
    legend = f"Times a plain forward and backward. {m['cpu']}, one thread, {m['isa']}, torch {m['torch']}.{kind}"
    return "\n".join([*lines, "", legend])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=12, help="for each network (default: 12)")
    parser.add_argument("--only", default="", help="networks whose names have this")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU time, for a machine that is busy")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--readme", type=Path, help="write the table into this file, between its marks")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from .machine import machine_info

    nets = [net for net in PUBLISHED if given.only in net.name]
    left_out = {net.name: net.missing() for net in nets if net.missing()}
    document: dict[str, Any] = {"machine_info": machine_info(), "clock": given.clock, "seconds": given.seconds}
    cases = []
    for net in nets:
        if net.name not in left_out:
            cases.append(measure(net, given.seconds, given.clock))
            print(net.name, {k: round(v, 3) for k, v in cases[-1]["times_of_plain"].items()}, flush=True)
    document |= {"cases": cases, "left_out": left_out}
    text = table(document)
    print(text, flush=True)
    publish(document, text, MARKS, given.json, given.readme)


if __name__ == "__main__":
    main()
