"""Find the scale-invariant weights and replace their weight decay by an exponentially growing learning rate."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images.double().view(-1, 1, 8, 8) / 16
first = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-12), nn.ReLU()]
second = [nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16, eps=1e-12), nn.ReLU(), nn.Flatten()]
model = nn.Sequential(*first, *second, nn.Linear(256, 10)).double()
twin = copy.deepcopy(model)

found = normkern.invariance.find(model, cross_entropy, [(images[:32], labels[:32])])
print(found)

groups = normkern.invariance.param_groups(model, found, scale_invariant={"weight_decay": 5e-3})
opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
opt_twin = torch.optim.SGD(normkern.invariance.param_groups(twin, found), lr=0.1, momentum=0.9)  # no weight decay
growing = normkern.EquivalentExponentialLR(opt_twin, weight_decay=5e-3, groups=[0])

for step in range(301):
    batch = torch.randint(1437, (32,))
    outputs = [net(images[batch]) for net in (model, twin)]
    if step % 100 == 0:
        lengths = " and ".join(f"{net[0].weight.norm().item():.3g}" for net in (model, twin))
        print(f"step {step}: lr {growing.get_last_lr()[0]:.3g}, |w| {lengths}, ", end="")
        print(f"outputs differ by {(outputs[0] - outputs[1]).abs().max().item():.0e}")
    for optimizer, output in zip((opt, opt_twin), outputs, strict=True):
        optimizer.zero_grad()
        cross_entropy(output, labels[batch]).backward()
        optimizer.step()
    growing.step()
