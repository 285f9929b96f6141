"""Measure the gradient noise scale of a data-parallel run from the gradients that the processes exchange."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import normkern


def train(rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    torch.manual_seed(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)))
    opt = normkern.SGD(model.parameters(), lr=0.1, momentum=0.9)
    noise = normkern.DDPNoise(model, batch_size=32)  # a hook that measures every backward
    for step in range(200):
        batch = torch.randint(1437, (processes, 32))[rank]  # the same generator, one row per process
        opt.zero_grad()
        cross_entropy(model(images[batch].float() / 16), labels[batch]).backward()
        opt.step()
        if (step + 1) % 50 == 0 and rank == 0:  # means over 50 steps, the same on every process
            result = noise.result()
            print(f"step {step + 1}: noise scale {result.gns:.0f} samples, nsr of the batch {result.nsr_batch:.2g}")
            noise.reset()
    dist.barrier()  # wait until all processes have finished
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29500")}
    mp.spawn(train, args=(2,), nprocs=2)
