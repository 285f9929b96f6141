"""Monitor how each layer reaches the equilibrium of weight decay and updates, from the sums of the step."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
first = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
second = [nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()]
model = nn.Sequential(*first, *second, nn.Linear(256, 10))

found = normkern.invariance.find(model, cross_entropy, [(images[:32], labels[:32])])
groups = normkern.invariance.param_groups(model, found, scale_invariant={"weight_decay": 0.02})
opt = normkern.SGD(groups, lr=0.1, momentum=0.9, stats="tensor")
monitor = normkern.EquilibriumMonitor(opt)

for step in range(1, 601):
    batch = torch.randint(1437, (32,))
    noisy = torch.where(torch.rand(32) < 0.1, torch.randint(10, (32,)), labels[batch])  # or gradients vanish
    opt.zero_grad()
    cross_entropy(model(images[batch]), noisy).backward()
    opt.step()
    monitor.update()
    if step in (50, 600):
        print(monitor.report(), end="\n\n")

for name, layer in monitor.report().parameters.items():
    if layer.predicted_angular_update is not None:
        print(f"{name} turns by {layer.angular_update:.4f} a step, predicted {layer.predicted_angular_update:.4f}")
