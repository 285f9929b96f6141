"""Draw weight decay as a growing learning rate: the same run with other norms, and in bfloat16."""

import copy

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import normkern


def groups(model: nn.Sequential, **options: object) -> list[dict[str, object]]:
    """Return the param groups of the scale-invariant convolutions and of the rest."""
    convolutions = [model[0].weight, model[3].weight]
    rest = [p for p in model.parameters() if p.ndim != 4]
    return [{"params": convolutions, **options}, {"params": rest, "weight_decay": 0.0}]


def growth(axes: list[plt.Axes]) -> None:
    """Draw both runs in float64: loss, norms, learning rate."""
    torch.manual_seed(0)
    coupled = convnet().double()
    grown = copy.deepcopy(coupled)
    opt = normkern.SGD(groups(coupled, weight_decay=5e-3), lr=0.1, momentum=0.9, stats="tensor")
    opt_grown = normkern.SGD(groups(grown), lr=0.1, momentum=0.9, stats="tensor")
    lr = normkern.EquivalentExponentialLR(opt_grown, weight_decay=5e-3, groups=[0])
    rows = []
    for images, labels in batches(300):
        row = []
        for model, optimizer in ((coupled, opt), (grown, opt_grown)):
            optimizer.zero_grad()
            loss = cross_entropy(model(images.double()), labels)
            loss.backward()
            optimizer.step()
            row += [loss.item(), optimizer.stats().weight_norm[1].item()]
        rows.append([*row, lr.get_last_lr()[0]])
        lr.step()
    loss, length, loss_grown, length_grown, rate = torch.tensor(rows).unbind(1)
    axes[0].plot(loss, lw=1, label="weight decay")
    axes[0].plot(loss_grown, "--", lw=1, label="growing lr")
    axes[0].set(title="loss: both runs", xlabel="step")
    axes[0].legend(frameon=False)
    axes[1].semilogy(length, lw=1, label="|w|, weight decay")
    axes[1].semilogy(length_grown, "--", lw=1, label="|w|, growing lr")
    axes[1].semilogy(rate, ":", lw=1, label="the growing lr")
    axes[1].set(title="weight norm and learning rate", xlabel="step")
    axes[1].set(ylim=(None, 400))
    axes[1].legend(frameon=False, loc="upper left")


def rounding(ax: plt.Axes) -> None:
    """Draw the norm of a convolution with lr * weight_decay = 5e-4 in float64 and in bfloat16."""
    for name, dtype, decay, style in (
        ("float64", torch.float64, "coupled", "-"),
        ("bfloat16, coupled", torch.bfloat16, "coupled", "-"),
        ("bfloat16, exponential", torch.bfloat16, "exponential", "--"),
    ):
        torch.manual_seed(0)
        model = convnet().to(dtype)
        norms = [model[1], model[4]]
        options = {
            "weight_decay": 0.25,
            "decay": decay,
            "scale_invariant": True,
            "norm_buffers": norms,
            "followers": [],
        }
        opt = normkern.SGD(groups(model, **options), lr=0.002, stats="tensor")
        lengths = []
        for images, labels in batches(1000):
            opt.zero_grad()
            cross_entropy(model(images.to(dtype)).float(), labels).backward()
            opt.step()
            lengths.append(opt.stats().weight_norm[1].item())
        ax.plot(lengths, style, lw=1, label=name)
    ax.set(title="|w| in low precision", xlabel="step")
    ax.legend(frameon=False)


def draw() -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.7), layout="constrained")
    growth(list(axes[:2]))
    rounding(axes[2])
    return figure
