"""Nothing grows: not with the number of steps, nor of errors, nor of optimizers.

Each case runs in an interpreter of its own. What counts is the memory that the operating system has given it, the bytes
that malloc has given it, the blocks and containers that Python knows, and the references to None, which C++ may get
wrong without anybody noticing.
"""

import copy
import ctypes
import gc
import mmap
import os
import sys
import weakref

import pytest
import torch
from support.apart import apart
from torch import nn

import normkern

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to see how large a process is"),
]

# Over a whole run, and what comes to it for each turn: far less than one of anything. The operating system hands out
# memory in large pieces, malloc in small ones.
ALLOWED = {
    "memory": (4 * 2**20, 0),
    "malloc": (60_000, 0),
    "blocks": (500, 0.05),
    "containers": (500, 0.05),
    "references to None": (500, 0.05),
}


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        ("arena, ordblks, smblks, hblks", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks, fsmblks", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("fordblks, keepcost", ctypes.c_size_t * 2),
    ]


def bytes_of_malloc():
    """What malloc has given away and not got back; 0 where nobody can tell."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = Mallinfo
    told = ask()
    return told.uordblks + told.hblkhd


def size_now():
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "malloc": bytes_of_malloc(),
        "blocks": sys.getallocatedblocks(),
        "containers": len(gc.get_objects()),
        "references to None": sys.getrefcount(None),
    }


def growth(begin, arguments, warm_up, turns):
    """What `turns` calls of `begin(*arguments)()` add to the process, after `warm_up` others, if it is too much."""
    torch.manual_seed(0)
    turn = begin(*arguments)
    for _ in range(4):
        for _ in range(warm_up // 4):
            turn()
        size_now()  # which takes room itself, the first times
    before = size_now()
    for _ in range(turns):
        turn()
    after = size_now()
    grown = {name: after[name] - before[name] for name in before}
    return {name: n for name, n in grown.items() if n > ALLOWED[name][0] + ALLOWED[name][1] * turns}


def small_training(stats, nesterov):
    """A step of a small network, with new gradient tensors; statistics are read, and now and then saved and loaded."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    opt = normkern.SGD(model.named_parameters(), lr=1e-3, momentum=0.9, nesterov=nesterov, stats=stats)
    x = torch.randn(4, 6)
    taken = 0

    def turn():
        nonlocal taken
        taken += 1
        opt.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        opt.step()
        if stats:
            assert opt.stats().angular_update[0] >= 0
            if taken % 100 == 0:
                opt.stats().to_dict()
        if taken % 1000 == 0:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    return turn


@pytest.mark.parametrize(
    ("stats", "nesterov", "turns"), [("tensor", False, 100_000), ("row", True, 20_000), (None, False, 20_000)]
)
def test_steps(stats, nesterov, turns):
    """100,000 steps with statistics (20,000 by row, and without) leave the process as large as they found it."""
    assert not apart(growth, small_training, (stats, nesterov), 5_000, turns)


def every_kind_of_memory():
    """Steps whose memory is described anew each time: strided, shared, expanded, left to torch, large, missing."""
    base = torch.randn(30, 2)
    params = [
        nn.Parameter(x) for x in (base[:, 0], base[:, 1], torch.randn(5, 4).t(), torch.randn(7), torch.randn(70_000))
    ]
    params.append(nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    opt = normkern.SGD(params, lr=1e-3, momentum=0.5, stats="row")
    number = 0

    def turn():
        nonlocal number
        number += 1
        for i, p in enumerate(params):
            p.grad = (
                None
                if (number + i) % 7 == 0
                else torch.ones(1, dtype=p.dtype).expand(p.shape)
                if i % 2
                else torch.ones_like(p)
            )
        if number % 5 == 0:
            params[3].grad = params[3].detach()
        opt.step()
        opt.stats().to_dict()

    return turn


def test_steps_on_every_kind_of_memory():
    """Nor do 5,040 steps on tensors that are strided, shared, expanded, left to torch's loop, or without a gradient."""
    assert not apart(growth, every_kind_of_memory, (), 504, 5_040)


def spoiled(way):
    """A step that raises."""
    params = [nn.Parameter(torch.ones(6)) for _ in range(3)]
    opt = normkern.SGD(params, lr=0.1, momentum=0.9, stats="tensor")
    memory = torch.ones(10)
    if way == "overlap":
        params[0].data, params[1].data = memory[:6], memory[3:9]
    if way == "lr":
        opt.param_groups[0]["lr"] = "fast"
    if way == "integer":
        params[2].requires_grad_(False)
        params[2].data = torch.ones(6, dtype=torch.int64)

    def turn():
        for p in params:
            p.grad = torch.ones_like(p)
        if way == "shape":
            params[2].data = torch.ones(2, 3)
        with pytest.raises((ValueError, RuntimeError)):
            opt.step()
        if way == "shape":
            params[2].data = torch.ones(6)

    return turn


@pytest.mark.parametrize("way", ["shape", "overlap", "lr", "integer"])
def test_errors(way):
    """10,000 steps that raise leak neither tensors nor sentences."""
    assert not apart(growth, spoiled, (way,), 1_000, 10_000)


def short_lives():
    """An optimizer that is made, steps, is copied, saved, loaded, measured and dropped; nobody collects cycles."""
    gc.disable()

    def turn():
        params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 3))]
        opt = normkern.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.9, stats="row")
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        twin = copy.deepcopy(opt)
        twin.load_state_dict(opt.state_dict())
        twin.step()
        twin.stats().to_dict()

    return turn


def test_optimizers():
    """10,000 optimizers (and their copies) come and go without a trace."""
    assert not apart(growth, short_lives, (), 500, 10_000)


def left_without_a_collector():
    """Which optimizers are gone, with everything they held, as soon as nobody names them."""
    gone = {}
    gc.disable()
    for _ in range(2):  # the first one of all makes torch import things
        for optimizer, own in ((torch.optim.SGD, {"foreach": False}), (normkern.SGD, {"stats": "row"})):
            params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(70_000))]
            opt = optimizer(params, lr=0.1, momentum=0.9, **own)
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
            opt.step()
            told = opt.stats() if own.get("stats") else None
            held = [opt, *params, *(p.grad for p in params), *(opt.state[p]["momentum_buffer"] for p in params)]
            seen = [weakref.ref(x) for x in held]
            del opt, params, p, held
            gone[optimizer.__module__] = [s() is None for s in seen]
            del told
    return gone


def test_dropped_optimizer_lets_go_at_once():
    """Without the cycle collector, as with torch: optimizer, parameters, gradients, buffers; its statistics may stay."""
    gone = apart(left_without_a_collector)
    assert all(gone["torch.optim.sgd"])
    assert all(gone["normkern.optim.sgd"])


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_are_let_go_after_a_step(fails):
    """What a step has read is not kept: zero_grad gives the memory of the gradients back."""
    params = [nn.Parameter(torch.ones(6)) for _ in range(3)]
    opt = normkern.SGD(params, lr=0.1, momentum=0.9, stats="tensor")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.param_groups[0]["lr"] = "fast" if fails else 0.1
    try:
        opt.step()
    except ValueError:
        assert fails
    seen = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert all(s() is None for s in seen)


def test_gradients_are_let_go_after_a_refused_step():
    """So it should be after a step that was refused in C++."""
    memory = torch.ones(10)
    params = [nn.Parameter(memory[:6]), nn.Parameter(memory[3:9])]
    opt = normkern.SGD(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="partially overlaps"):
        opt.step()
    seen = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert all(s() is None for s in seen)


def leaking(what):
    """A step that leaks one of something."""
    turn, kept, page = small_training("tensor", False), [], os.sysconf("SC_PAGE_SIZE")
    room = mmap.mmap(-1, 30_000 * page)
    taken = 0

    def leak():
        nonlocal taken
        turn()
        taken += 1
        if what == "number":
            kept.append(float(taken))
        if what == "container":
            kept.append([])
        if what == "memory of C":
            ctypes.CDLL(None).malloc(20)
        if what == "page":
            room[taken * page] = 1
        if what == "None":
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(None))

    return leak


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("number", "blocks"),
        ("container", "containers"),
        ("memory of C", "malloc"),
        ("page", "memory"),
        ("None", "references to None"),
    ],
)
def test_a_leak_would_be_seen(what, seen):
    """These tests can fail: one small thing per step is noticed."""
    if what == "None" and sys.version_info >= (3, 12):
        pytest.skip("None is immortal from Python 3.12 on: nobody counts its references")
    if what == "memory of C" and not bytes_of_malloc():
        pytest.skip("this C library does not tell what malloc has given away")
    assert seen in apart(growth, leaking, (what,), 1_000, 20_000)
