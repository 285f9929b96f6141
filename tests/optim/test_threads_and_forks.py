"""Threads, forks and the end of the interpreter."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.apart import apart
from support.memory import same_bits
from support.twins import give_gradients, parameters
from torch import nn

import normkern
from normkern import ops

pytestmark = pytest.mark.slow

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
SMALL, LARGE = [(10,), (3, 4)], [(70_000,), (300, 700), (5,)]  # one thread; the pool


def optimizer(name, shapes, **options):
    params = parameters(shapes)
    if name == "normkern":
        opt = normkern.SGD(params, lr=0.01, momentum=0.9, stats="row", **options)
    else:
        opt = torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=name == "torch fused", **options)
    return params, opt


def train(shapes, steps, name="normkern", change=lambda t: None):
    """What `steps` steps leave: parameters, buffers and, of normkern, sums."""
    params, opt = optimizer(name, shapes)
    for t in range(steps):
        give_gradients(params, seed=t)
        change(t)
        opt.step()
    sums = [opt.stats()._table] if name == "normkern" else []
    return [*(p.detach() for p in params), *(opt.state[p]["momentum_buffer"] for p in params), *sums]


def all_same(a, b):
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def in_threads(*functions):
    """Run them at the same time; what they return. The first error is raised here."""
    results = [None] * len(functions)
    gate = threading.Barrier(len(functions))

    def run(i, function):
        gate.wait()
        try:
            results[i] = function()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=x) for x in enumerate(functions)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for x in results:
        if isinstance(x, BaseException):
            raise x
    return results


# ---- Threads -------------------------------------------------------------------------------------------------------


def test_eight_threads_each_with_its_own_optimizer(isa):
    """Small and large lists at the same time: each has the bits of a run alone."""
    work = [lambda: train(SMALL, 300), lambda: train(LARGE, 30)]
    small, large = (run() for run in work)
    for i, result in enumerate(in_threads(*work * 4)):
        assert all_same(result, large if i % 2 else small)


def test_thread_count_may_change_between_steps(isa):
    """1, 2, 3 or 7 threads, a new number before every step: the same bits."""
    expected = train(LARGE, 12)
    assert all_same(expected, train(LARGE, 12, change=lambda t: torch.set_num_threads((1, 7, 2, 3)[t % 4])))


@pytest.mark.parametrize("size", [8, 40_000])
def test_statistics_read_while_others_step(size):
    """Three threads step, two read: every StepStats is of one step, whole, and later ones are of later steps."""
    params = [nn.Parameter(torch.zeros(size)) for _ in range(5)]
    opt = normkern.SGD(params, lr=1.0, stats="tensor")
    for p in params:
        p.grad = torch.full((size,), -1.0)
    opt.step()
    count = 1500 if size == 8 else 100
    stepping = [True] * 3

    def step(i):
        for _ in range(count):
            opt.step()
        stepping[i] = False

    def read():
        seen = []
        while any(stepping):
            s = opt.stats()
            steps_before = (s.weight_sq / size).sqrt()
            assert (steps_before == steps_before[0]).all(), "sums of several steps in one table"
            assert (s.update_sq == size).all()
            assert (s.weight_update_dot == size * steps_before).all()
            seen.append(steps_before[0].item())
        assert seen == sorted(seen)
        return len(seen)

    *_, first, second = in_threads(*(lambda i=i: step(i) for i in range(3)), read, read)
    assert first > 0
    assert second > 0
    assert all((p == 3 * count + 1).all() for p in params)
    assert (opt.stats().weight_sq == size * (3.0 * count) ** 2).all()


@pytest.mark.parametrize(("size", "others_run"), [(3_000_000, True), (100, False)])
def test_a_large_step_lets_other_threads_run(size, others_run):
    """The interpreter lock is released for a large step, and not worth releasing for a small one."""
    w, g = torch.ones(size), torch.ones(size)
    plan, before = ops.Pass(), sys.getswitchinterval()
    gate, ran = threading.Lock(), []

    def other():
        with gate:
            ran.append(True)

    gate.acquire()
    waiting = threading.Thread(target=other)
    waiting.start()
    sys.setswitchinterval(1000)  # from here on, nobody is made to give the lock away
    try:
        gate.release()
        for _ in range(50 if others_run else 5000):  # a busy machine may wake the other thread late
            plan.begin()
            plan.add("sgd_", [w], [g], None, None, ops.Hyper(lr=0.1))
            plan.check(None)
            plan.run(None)
            if ran:
                break
        assert bool(ran) == others_run
    finally:
        sys.setswitchinterval(before)
        waiting.join()


# ---- Forks ---------------------------------------------------------------------------------------------------------


def ready(name, shapes):
    params, opt = optimizer(name, shapes)
    give_gradients(params, seed=1)
    return params, opt


def steps(ready_to_step):
    for _ in range(3):
        ready_to_step[1].step()


def fork_after(name, shapes_in_parent, shapes_in_child, threads_in_child):
    """Steps in this process, then in a forked child, then here again: the child's exit code, and the right bits here."""
    torch.set_num_threads(1)
    alone, parents, childs = (ready(name, shapes) for shapes in (shapes_in_child, shapes_in_parent, shapes_in_child))
    steps(alone)
    torch.set_num_threads(2)
    steps(parents)
    pid = os.fork()
    if pid == 0:
        try:
            if threads_in_child:
                torch.set_num_threads(threads_in_child)
            steps(childs)
            torch.set_num_threads(1)
            os._exit(0 if all_same(childs[0], alone[0]) else 3)
        except BaseException:
            os._exit(4)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps(childs)
    return code, all_same(childs[0], alone[0])


@forks
@pytest.mark.parametrize(
    ("in_parent", "in_child", "threads"),
    [
        (SMALL, SMALL, None),
        (SMALL, LARGE, None),  # the child is the first to need the pool
        (LARGE, SMALL, None),
        (LARGE, LARGE, 1),  # what a DataLoader does in its workers
        (LARGE, SMALL, 1),
    ],
    ids=["small small", "small large", "large small", "large large, one thread", "large small, one thread"],
)
def test_steps_after_a_fork(in_parent, in_child, threads):
    """A forked child steps, with the right bits, and so does its parent afterwards."""
    assert apart(fork_after, "normkern", in_parent, in_child, threads, timeout=120) == (0, True)


def hangs(name):
    try:
        return apart(fork_after, name, LARGE, LARGE, None, timeout=20) != (0, True)
    except TimeoutError:
        return True


@forks
def test_pool_after_a_fork_is_torchs():
    """Where the parent has used the pool, a child of several threads can no more than with torch's own optimizer.

    GNU's OpenMP, which torch's Linux wheels come with, waits in the child for threads that a fork does not copy: large
    steps of torch.optim.SGD hang there, every variant, and so do ours. torch.set_num_threads(1) in the child helps both.
    """
    assert not hangs("normkern") or hangs("torch")


class Stepping(torch.utils.data.Dataset):
    """Trains while it loads."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.cat([x.flatten()[:3].double() for x in train(LARGE, 2)])


def load_in_workers():
    torch.set_num_threads(2)
    expected = train(LARGE, 2)  # wakes the pool
    loader = torch.utils.data.DataLoader(Stepping(), num_workers=2, multiprocessing_context="fork")
    wanted = torch.cat([x.flatten()[:3].double() for x in expected])
    return [torch.equal(batch[0], wanted) for batch in loader]


@forks
def test_steps_in_dataloader_workers():
    """Forked workers of a DataLoader take large steps after their parent has done so."""
    assert apart(load_in_workers, timeout=120) == [True] * 4


class Waiting:
    """A learning rate that is read slowly."""

    def __init__(self):
        self.asked, self.answer = threading.Event(), threading.Event()

    def __float__(self):
        self.asked.set()
        self.answer.wait()
        return 0.1


def fork_during_a_step():
    """A thread is in the middle of a step when the process forks; the child takes a step. Its exit code."""
    _, opt = ready("normkern", SMALL)
    opt.param_groups[0]["lr"] = waiting = Waiting()
    thread = threading.Thread(target=opt.step)
    thread.start()
    waiting.asked.wait()
    pid = os.fork()
    if pid == 0:
        opt.param_groups[0]["lr"] = 0.1
        opt.step()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    waiting.answer.set()
    thread.join()
    return code


@forks
def test_fork_while_another_thread_is_stepping():
    """The child's copy of the optimizer can step: the thread that held it does not exist there."""
    assert apart(fork_during_a_step, timeout=20) == 0


# ---- The end of the interpreter ------------------------------------------------------------------------------------

ENDS = {
    "alive": "keep = [opt]",
    "in a cycle": "opt.myself = opt; opt.stats().told = opt; params[0].optimizer = opt; del opt",
    "in an atexit function": "import atexit; atexit.register(opt.step)",
    "in a finalizer": """
class Last:
    def __del__(self, opt=opt): opt.step()
last = Last()
opt.last = last""",
    "in a thread that goes on": """
import threading
threading.Thread(target=lambda: [opt.step() for _ in range(200)]).start()""",
    "after an error": """
opt.param_groups[0]["lr"] = "fast"
try: opt.step()
except ValueError: pass""",
}


def script(name, shapes, end):
    """Two steps, and `end`, in an interpreter of its own that then comes to its end by itself."""
    begin = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from optim.test_threads_and_forks import ready
params, opt = ready({name!r}, {shapes!r})
opt.step(); opt.step()
"""
    return subprocess.run([sys.executable, "-c", begin + end], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("end", ENDS)
def test_interpreter_ends(end, shapes):
    """Exit status 0 and not a word, whatever becomes of the optimizer."""
    done = script("normkern", shapes, ENDS[end])
    assert (done.returncode, done.stderr) == (0, "")


@forks
@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
def test_interpreter_ends_under_a_daemon_thread(shapes):
    """With a daemon thread that steps on and on: no worse than torch, whose steps are aborted at the end as well."""
    end = """
import resource, threading
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
often = threading.Event()
def go():
    for i in range(10**9):
        opt.step()
        if i == 20: often.set()
threading.Thread(target=go, daemon=True).start()
often.wait()"""
    ours = script("normkern", shapes, end).returncode
    assert ours == 0 or ours == script("torch", shapes, end).returncode
