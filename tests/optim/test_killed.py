"""A training that is killed at any moment, and started again, ends with the bits of one that was left alone."""

import random
import signal
import sys
import time

import pytest
import torch
from support.gloo import forked
from support.memory import same_bits

from .interrupted import STEPS, train, train_alone


def all_tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    entries = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else []
    return [tensor for entry in entries for tensor in all_tensors(entry)]


def without_tensors(x):
    if isinstance(x, dict):
        return {key: without_tensors(entry) for key, entry in x.items()}
    if isinstance(x, (list, tuple)):
        return [without_tensors(entry) for entry in x]
    return None if isinstance(x, torch.Tensor) else x


def run_and_kill(folder, kills, seed):
    """Kill the child `kills` times, each time a random moment after it has saved something; then let it end."""
    moment, done, path = random.Random(seed), 0, folder / "checkpoint.pt"
    while True:
        before = path.stat().st_mtime_ns if path.exists() else None
        child = forked().Process(target=train_alone, args=(folder,))
        child.start()
        while done < kills and child.exitcode is None:
            if path.exists() and path.stat().st_mtime_ns != before:
                time.sleep(moment.uniform(0, 0.05))
                child.kill()
                break
            time.sleep(0.001)
        child.join(timeout=120)
        if child.exitcode == 0:
            return done
        assert child.exitcode == -signal.SIGKILL
        done += 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_and_started_again_ends_with_the_same_bits(tmp_path, kills):
    alone, interrupted = tmp_path / "alone", tmp_path / "interrupted"
    alone.mkdir()
    interrupted.mkdir()
    assert run_and_kill(interrupted, kills, seed=kills) >= min(kills, 3), "the child was too fast to be killed"
    expected, got = train(alone), torch.load(interrupted / "checkpoint.pt")
    assert got["step"] == STEPS
    assert without_tensors(got) == without_tensors(expected)
    pairs = list(zip(all_tensors(got), all_tensors(expected), strict=True))
    assert len(pairs) >= 12
    assert all(same_bits(a, b) for a, b in pairs)
