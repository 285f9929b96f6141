"""Peak memory of a peer's step on a network, in a process that has done nothing else.

A server process imports everything once and forks a child for each measurement: its heap is fresh, and it starts in
milliseconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

#: The kernel keeps the peak of resident memory, and forgets it on request: Linux only.
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MMAP_THRESHOLD = -3  # of glibc's mallopt
#: What the server imports before it forks; packages that are not installed are passed over. No thread starts there.
SERVER_IMPORTS = ("bench.nets", "bench.noise_peers", "backpack", "opacus")


def peak_megabytes(net: str, peer: str, threads: int, timeout: float = 300.0) -> float | None:
    """Return what two steps need beyond the model and its batch, gradients included; None where there is no /proc.

    Raises:
        RuntimeError: the child process died, or sent an error.
    """
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SERVER_IMPORTS))
    answer, end = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(end, net, peer, threads))
    child.start()
    end.close()
    try:
        sent = answer.recv() if answer.poll(timeout) else f"no answer after {timeout:.0f} s"
    except EOFError:
        sent = "it died"
    finally:
        child.kill()
        child.join()
    if isinstance(sent, str):
        raise RuntimeError(f"{peer} on {net}: {sent}")
    return float(sent)


def _megabytes(field: str) -> float:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def _measure(answer: Connection, net: str, peer: str, threads: int) -> None:
    import torch

    from .nets import NETS
    from .noise_peers import NOISE_PEERS

    try:
        # Blocks of 64 KiB and more go back when they are freed: what is counted is in use, whatever was in use before.
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        watched = next(p for p in NOISE_PEERS if p.name == peer).make(NETS[net].make())
        CLEAR.write_text("5")
        before = _megabytes("VmRSS")
        for _ in range(2):
            watched.run()
        answer.send(_megabytes("VmHWM") - before)
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
