"""Adds to the JSON of pytest-benchmark: the machine, versions, and which peers were left out."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from .arrays import HYPER
from .machine import build_numbers, machine_info
from .noise_peers import NOISE_PEERS
from .peers import PEERS

JOB_OF = {peer.name: peer.job for peer in (*PEERS, *NOISE_PEERS)}
LEFT_OUT = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="few cases, two seconds each, no build")
    parser.addoption("--seconds", type=float, help="of interleaved turns per case")


def seconds_of_a_case(config: pytest.Config) -> float:
    """Return how long the turns of one case are to take."""
    return config.getoption("seconds") or (2.0 if config.getoption("quick") else 14.0)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = {}


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine_info()


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    for key in ("project", "branch"):  # names of this checkout, not of what was measured
        commit_info.pop(key, None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    quick = config.getoption("quick")
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)  # thousands of lines that no reader here needs: the quartiles stay
        entry.pop("options", None)
    output_json["normkern"] = {
        "quick": quick,
        "hyperparameters": HYPER,
        "left_out": [
            {"group": group, "peer": peer, "job": JOB_OF[peer], "reason": reason}
            for group, peers in config.stash[LEFT_OUT].items()
            for peer, reason in peers.items()
        ],
    }
    if not quick:
        try:
            output_json["normkern"]["build"] = build_numbers()
        except (OSError, subprocess.CalledProcessError) as error:  # no network, no pip: the times are worth keeping
            output_json["normkern"]["build"] = {"failed": str(error)}
