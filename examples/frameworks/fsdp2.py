"""FSDP2: torchrun --nproc-per-node 2 fsdp2.py. The numbers are those of one process with the whole batch."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import normkern

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = normkern.SGD(model.named_parameters(), lr=0.1, momentum=0.9, stats="tensor")

torch.manual_seed(dist.get_rank())  # data of its own for each process
centres = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


for step in range(12):
    labels = torch.randint(10, (32,))
    batch = centres[labels] + torch.randn(32, 32), labels
    values = {}
    if step % 4 == 0:
        values |= normkern.GradientNoise.measure(model, loss, batch).scalars("nsr_batch")  # every process calls it
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
    values |= optimizer.stats().scalars(quantities=("effective_lr",))
    if values and dist.get_rank() == 0 and step % 4 == 0:
        print(step, {name: round(value, 4) for name, value in values.items() if name.endswith(("all", "0.weight"))})
dist.destroy_process_group()
