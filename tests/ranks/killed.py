"""A rank that is killed is an error on the others, within seconds: in pairs, of which one dies."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from support.gloo import meet
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import normkern


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(dies, group):
    """Before the sums of the step are added up: the other one waits in step()."""
    model = fully_shard(nn.Linear(4, 4), mesh=DeviceMesh.from_group(group, "cpu"))
    opt = normkern.SGD(model.parameters(), lr=0.1, stats="tensor")
    for t in range(3):
        model(torch.ones(2, 4)).sum().backward()
        if dies and t == 2:
            die()
        opt.step()


def in_a_hook(dies, group):
    """In a bucket that the other one has sent, and waits for in backward()."""

    buckets = []

    def last_words(state, bucket):
        buckets.append(bucket.index())
        if dies and len(buckets) == 3:
            die()
        return allreduce_hook(state, bucket)

    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=group)
    normkern.DDPNoise(model, last_words)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()


def in_a_result(dies, group):
    """While all ask for the noise of all samples."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=group)
    noise = normkern.GradientNoise(model)
    with noise:
        model(torch.randn(3, 4)).square().mean().backward()
    if dies:
        die()
    noise.result(sync=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all as soon as one has died: let them speak
    meet()
    rank = dist.get_rank()
    groups = [dist.new_group([2 * i, 2 * i + 1]) for i in range(dist.get_world_size() // 2)]
    check = (in_a_step, in_a_hook, in_a_result)[rank // 2]
    begin = time.monotonic()
    try:
        check(rank % 2 == 1, groups[rank // 2])
        print(f"{check.__name__}: nothing happened", flush=True)
    except RuntimeError as error:
        says = str(error).splitlines()[0]
        print(f"{check.__name__}: {time.monotonic() - begin < 20} RuntimeError {says}", flush=True)
    os._exit(1)
