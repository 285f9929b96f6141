"""The time that DDPNoise adds to a forward and backward under DistributedDataParallel, in processes of one thread.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.ddp_noise \\
    --json bench/results/ddp_noise.json --readme docs/benchmarks.md

Every process has three copies of a network: with DDP alone, with torch's hook that does what DDP does, and with
DDPNoise. They take turns in an order that is shuffled anew each round, the same in all processes, which wait for each
other before every turn; a turn has taken as long as in the slowest process. The ratio is that of medians.
"""

from __future__ import annotations

import argparse
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import normkern

from .measure import against
from .nets import NETS
from .report import publish, scaled, table_head, table_row
from .results import digits

MARKS = "<!-- bench-ddp:begin -->", "<!-- bench-ddp:end -->"
PLAIN, HOOK, OURS = "DDP", "DDP, torch's hook", "DDP, DDPNoise"
NAMES = ("GPT blocks, B=8, T=128", "GroupNorm ResNet, B=32", "MLP, B=128")
WARM_UP = 3  # DDP orders its buckets anew after the first step


def watch_nothing(model: DistributedDataParallel) -> None:
    pass


WATCH: dict[str, Callable[[DistributedDataParallel], Any]] = {
    PLAIN: watch_nothing,
    HOOK: lambda model: model.register_comm_hook(None, allreduce_hook),
    OURS: normkern.DDPNoise,
}


def stepper(name: str, watch: Callable[[DistributedDataParallel], Any]) -> Callable[[], None]:
    """Return a function that runs a forward and backward of its own copy of the network."""
    torch.manual_seed(0)
    task = NETS[name].make()
    model = DistributedDataParallel(task.model)
    watch(model)

    def step() -> None:
        model.zero_grad()
        task.loss(model(task.inputs), task.target).backward()

    return step


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every turn of each variant, in the slowest process."""
    steps = {who: stepper(name, watch) for who, watch in WATCH.items()}
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    samples: dict[str, list[float]] = {who: [] for who in steps}
    shuffle = random.Random(0)
    for _ in range(rounds):
        for who in shuffle.sample(list(steps), len(steps)):
            dist.barrier()
            begin = time.perf_counter()
            steps[who]()
            taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            samples[who].append(taken.item())
    return samples


def summary(name: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    coordinates = sum(p.numel() for p in NETS[name].make().model.parameters())
    return {
        "network": name,
        "coordinates": coordinates,
        "rounds": len(samples[PLAIN]),
        **against(PLAIN, samples),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = table_head("network", "forward + backward", "torch's hook", "DDPNoise")
    for case in results["cases"]:
        ratios = [f"{case['times_of_plain'][who]:.3f}" for who in (HOOK, OURS)]
        size = digits(case["coordinates"] / 1e6)
        lines.append(table_row(f"{case['network']} ({size}M)", scaled(case["seconds"][PLAIN]["median"]), *ratios))
    processes, version = results["processes"], results["machine_info"]["torch"]
    legend = f"Times plain DDP; {processes} processes of one thread over gloo, torch {version}."
    return "\n".join([*lines, "", legend])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=101, help="turns of each (default: 101)")
    parser.add_argument("--quick", action="store_true", help="one network, four turns")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--readme", type=Path, help="write the table into this file, between its marks")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names, rounds = (NAMES[-1:], 4) if given.quick else (NAMES, given.rounds)
    cases = [summary(name, measure(name, rounds)) for name in names]
    if dist.get_rank() == 0:
        from .machine import machine_info

        document: dict[str, Any] = {"machine_info": machine_info(), "processes": dist.get_world_size()}
        document |= {"quick": given.quick, "cases": cases}
        text = table(document)
        print(text, flush=True)
        publish(document, text, MARKS, given.json, given.readme)
    dist.barrier()
    os._exit(0)  # without torch's teardown, in which a gloo process aborts now and then


if __name__ == "__main__":
    main()
