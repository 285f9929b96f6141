"""timm builds the optimizer from a name; so does its training script with --opt normkern_sgd."""

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.functional import cross_entropy

from normkern.integrations import register_with_timm

register_with_timm(stats="tensor")  # without this line "normkern_sgd" is torch.optim.SGD

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
optimizer = create_optimizer_v2(model, opt="normkern_sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
optimizer.name_parameters(model)  # timm's groups have no names
for _ in range(10):
    optimizer.zero_grad()
    cross_entropy(model(torch.randn(32, 3, 8, 8)), torch.randint(10, (32,))).backward()
    optimizer.step()
for name, value in optimizer.stats().scalars(quantities=("effective_lr",)).items():
    print(f"{name:25} {value:.4f}")
