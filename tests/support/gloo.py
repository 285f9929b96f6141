"""Processes of a test that talk to each other through gloo."""

import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

#: What the processes have imported when they begin: each is a fork of one process that has imported it.
IMPORTED = ["torch.distributed.tensor", "torch._dynamo", "normkern"]


def forked():
    """Return a context of multiprocessing whose processes are such forks."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def run(worker, *arguments, processes=2):
    """Call ``worker(rank, processes, *arguments)`` in each process; wait for all.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one has raised; the text is its traceback.
        torch.multiprocessing.ProcessExitedException: one has died.
    """
    forked()
    torch.multiprocessing.start_processes(worker, (processes, *arguments), nprocs=processes, start_method="forkserver")


def run_script(script, *arguments, processes, folder):
    """Run a script in each process, as torchrun does; return whether all have ended well, and what they have said.

    Args:
        script: a path.
        arguments: of the script.
        processes: how many.
        folder: an empty one, for the processes to meet in; what the script saves goes there.
    """
    told = Path(folder) / "told"
    try:
        run(_script, Path(folder), _free_port(), str(script), list(map(str, arguments)), processes=processes)
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        return False, f"{told.read_text()}{error}"
    return True, told.read_text()


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _script(rank, world, folder, port, script, arguments):
    faulthandler.dump_traceback_later(120, exit=True)  # who waits for whom
    told = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(told, number)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "RENDEZVOUS": f"file://{folder / 'rendezvous'}",
    }  # fmt: skip
    sys.argv, sys.path[:0] = [script, *arguments], [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")


def meet():
    """In a script: find the other processes, under torchrun or `run_script`."""
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group("gloo", init_method=os.environ.get("RENDEZVOUS"), rank=rank, world_size=world)


def start(rank, world, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)


def leave():
    # Without torch's teardown, in which a gloo process aborts now and then, in a program without normkern too.
    dist.barrier()
    time.sleep(0.5)
    os._exit(0)
