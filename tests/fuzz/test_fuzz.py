"""Arguments and checkpoints that nobody would write are taken or refused, and a refusal has written nothing.

The strings of bytes are those that `make fuzz` found to go different ways, and some more at random.
"""

import random
from pathlib import Path

import pytest
import torch

from normkern import ops

from . import calls, checkpoints
from .junk import Memory

CORPUS = Path(__file__).parent / "corpus"
TARGETS = {"ops": calls.call, "checkpoints": checkpoints.load}
pytestmark = pytest.mark.filterwarnings("ignore")  # of what torch makes strange tensors from


def kept(name):
    return [bytes.fromhex(line) for line in (CORPUS / f"{name}.txt").read_text().split()]


def at_random(count):
    make = random.Random(0)
    for _ in range(count):
        usual = make.random()
        yield bytes(0 if make.random() < usual else make.randrange(256) for _ in range(make.randrange(120)))


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_kept_goes_many_ways_and_none_is_wrong(name):
    seen = {TARGETS[name](data)[:40] for data in kept(name)}
    assert "done" in seen
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("name", "count"),
    [("ops", 1000), ("checkpoints", 400), *(pytest.param(n, 50_000, marks=pytest.mark.slow) for n in TARGETS)],
)
def test_random_bytes_go_no_wrong_way(name, count):
    for data in at_random(count):
        TARGETS[name](data)


def test_an_op_that_writes_and_then_refuses_is_seen(monkeypatch):
    def careless(params, *_, **__):
        params[0].fill_(3.0)
        raise ValueError("too late")

    monkeypatch.setattr(ops, "sgd_", careless)
    with pytest.raises(AssertionError, match="sgd_ has written, and then refused: too late"):
        calls.call(b"")


def test_an_op_that_writes_beside_its_results_is_seen(monkeypatch):
    monkeypatch.setattr(ops, "row_sums", lambda x: x.fill_(3.0))
    with pytest.raises(AssertionError, match="row_sums has written what is none of its results"):
        calls.call(bytes([8]))


def test_a_load_that_refuses_too_late_is_seen(monkeypatch):
    def careless(self, saved):
        self.param_groups[0]["lr"] = 3.0
        raise ValueError("too late")

    monkeypatch.setattr(checkpoints.normkern.SGD, "load_state_dict", careless)
    with pytest.raises(AssertionError, match="load_state_dict has changed something, and then refused: too late"):
        checkpoints.load(b"")


def test_memory_knows_what_was_written():
    memory = Memory()
    x = memory.blocks[0].view(torch.float32)[3:5]
    assert not memory.was_written()
    x.add_(1)
    assert memory.was_written()
    assert not memory.outside_was_written([x])
    assert memory.outside_was_written([x[1:]])
