"""Replace the optimizer of an ordinary training script: one line changes, and every step returns its norms."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
first = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
second = [nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))

# Before: opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
opt = normkern.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, stats="tensor")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4 * 45)

for epoch in range(4):
    model.train()
    for batch in torch.randperm(1437).split(32):
        opt.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        opt.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1437:]).argmax(1) == labels[1437:]).double().mean().item()
    conv = opt.stats().to_dict()["4.weight"]  # the last step, as plain numbers for a logger
    norms = "  ".join(f"{name} {conv[name]:.2g}" for name in ("weight_norm", "grad_norm", "angular_update", "cosine"))
    print(f"epoch {epoch}  accuracy {accuracy:.2f}  second convolution: {norms}")
