"""Processes of a test that talk to each other through gloo."""

import multiprocessing
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

#: What the processes have imported when they begin: each is a fork of one process that has imported it.
IMPORTED = ["torch.distributed.tensor", "torch._dynamo", "normkern"]


def run(worker, *arguments, processes=2):
    """Call ``worker(rank, processes, *arguments)`` in each process; wait for all.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one has raised; the text is its traceback.
        torch.multiprocessing.ProcessExitedException: one has died.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(worker, (processes, *arguments), nprocs=processes, start_method="forkserver")


def start(rank, world, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)


def leave():
    # Without torch's teardown, in which a gloo process aborts now and then, in a program without normkern too.
    dist.barrier()
    time.sleep(0.5)
    os._exit(0)
