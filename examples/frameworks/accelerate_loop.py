"""A training loop of accelerate, with plain TensorBoard."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import normkern
from normkern.integrations import unwrap_optimizer

torch.manual_seed(0)
labels = torch.randint(10, (512,))
data = TensorDataset(torch.randn(10, 32)[labels] + torch.randn(512, 32), labels)
model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
optimizer = normkern.SGD(model.parameters(), lr=0.1, momentum=0.9, stats="tensor")

accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=64, shuffle=True))
sgd = unwrap_optimizer(optimizer)  # accelerate's wrapper has no stats()
sgd.name_parameters(model)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


step = 0
with SummaryWriter("runs/accelerate") as writer:
    for _ in range(4):
        for batch in loader:
            values = {}
            if step % 8 == 0:
                values |= normkern.GradientNoise.measure(model, loss, batch).scalars()
            optimizer.zero_grad()
            accelerator.backward(loss(model, batch))
            optimizer.step()
            step += 1
            values |= sgd.stats().scalars(quantities=("effective_lr", "angular_update"))
            for name, value in values.items():
                writer.add_scalar(name, value, step)  # with wandb: wandb.log(values, step=step), no loop
print("steps:", step)
