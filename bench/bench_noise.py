"""A test per network and peer: time and peak memory of a forward and backward with per-sample gradient statistics."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from .conftest import LEFT_OUT, seconds_of_a_case
from .measure import interleave
from .nets import NETS, Net
from .noise_peers import NOISE_PEERS, PLAIN
from .noise_right import fault
from .peak import peak_megabytes
from .tape import Tape

TAPE = Tape()
#: The least number of turns, as a step of seconds is known well enough after three.
LEAST = 3
JOB_OF = {peer.name: peer.job for peer in NOISE_PEERS}


@dataclass
class Measured:
    """One network: the times of the peers with right results, and why the others were not timed."""

    net: Net
    samples: dict[str, list[float]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def info(self, name: str) -> dict[str, Any]:
        """Return what pytest-benchmark does not know about one peer."""
        plain, median = (statistics.median(self.samples[n]) for n in (PLAIN, name))
        return {
            "case": self.net.name,
            "dtype": "float32",
            "tensors": len(self.sizes),
            "coordinates": sum(self.sizes),
            "tags": sorted(self.net.tags),
            "peer": name,
            "job": JOB_OF[name],
            "steps_per_turn": self.repeats[name],
            "anchor": PLAIN,
            "times_of_anchor": median / plain,
            "peak_megabytes": peak_megabytes(self.net.name, name, torch.get_num_threads()),
        }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    tests = [
        pytest.param(
            net.name,
            peer.name,
            marks=pytest.mark.benchmark(group=net.name, timer=TAPE),
            id=f"{net.name}-{peer.name}".replace(", ", "-").replace(" ", "_"),
        )
        for net in NETS.values()
        if "quick" in net.tags or not quick
        for peer in NOISE_PEERS
    ]
    metafunc.parametrize(("net", "peer"), tests)


@functools.lru_cache(maxsize=1)
def measure_once(name: str, seconds: float) -> Measured:
    """Check every peer, then time those with right results, interleaved, each on its own model."""
    result, steps = Measured(NETS[name]), {}
    for peer in NOISE_PEERS:
        if reason := fault(peer, name):
            result.left_out[peer.name] = reason
            continue
        torch.manual_seed(0)
        task = NETS[name].make()
        result.sizes = [p.numel() for p in task.model.parameters()]
        steps[peer.name] = peer.make(task).run
    result.samples, result.repeats = interleave(steps, seconds, least=LEAST)
    return result


def test_noise(net: str, peer: str, benchmark, pytestconfig: pytest.Config) -> None:
    measured = measure_once(net, seconds_of_a_case(pytestconfig))
    pytestconfig.stash[LEFT_OUT][net] = measured.left_out
    if peer in measured.left_out:
        pytest.skip(measured.left_out[peer])
    samples = measured.samples[peer]
    TAPE.load(samples)
    benchmark.extra_info.update(measured.info(peer))
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
