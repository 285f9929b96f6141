"""What every script of this folder does first and last."""

import faulthandler
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from support.gloo import leave, meet


def run(*checks):
    """Each check (rank, world) in turn; a word for each that holds."""
    faulthandler.dump_traceback_later(150, exit=True)  # who waits for whom
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meet()
    rank, world = dist.get_rank(), dist.get_world_size()
    for check in checks:
        torch.manual_seed(0)
        check(rank, world)
        if rank == 0:
            print("holds:", check.__name__, flush=True)
    leave()
