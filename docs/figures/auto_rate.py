"""Draw the effective learning rate lr / |w|^2 of gradient descent for learning rates from 0.1 to 100."""

import torch
from digits import NAMES, convnet, data
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import normkern


def run(lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the effective learning rate of the second convolution and the loss, at each step."""
    torch.manual_seed(0)
    model = convnet()
    invariant = [(n, p) for n, p in model.named_parameters() if n in list(NAMES)[:2]]
    rest = [(n, p) for n, p in model.named_parameters() if n not in list(NAMES)[:2]]
    opt = normkern.SGD([{"params": invariant, "lr": lr}, {"params": rest, "lr": 0.1}], stats="tensor")
    images, labels = (x[:256] for x in data())
    rates, losses = [], []
    for _ in range(300):
        opt.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        opt.step()
        rates.append(opt.stats().effective_lr[opt.stats().slots["3.weight"]].item())
        losses.append(loss.item())
    return torch.tensor(rates), torch.tensor(losses)


def draw() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for lr in (0.1, 1.0, 10.0, 100.0):
        rates, losses = run(lr)
        left.loglog(range(1, 301), rates, lw=1, label=f"lr {lr:g}")
        right.semilogy(losses, lw=1)
    left.set(title="effective lr of the second convolution", xlabel="step")
    left.legend(frameon=False)
    right.set(title="loss", xlabel="step")
    return figure
