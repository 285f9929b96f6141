"""Draw what `SGD.stats()` returns: how far weights turn, and their cosine with the gradient."""

import torch
from digits import NAMES, batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import normkern


def draw() -> Figure:
    torch.manual_seed(0)
    model = convnet()
    opt = normkern.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3, stats="tensor")
    angles, cosines = [], []
    for images, labels in batches(300):
        opt.zero_grad()
        cross_entropy(model(images), labels).backward()
        opt.step()
        stats = opt.stats()
        of = [stats.slots[name].start for name in NAMES]
        angles.append(stats.angular_update[of])
        cosines.append(stats.cosine[of].abs())
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    left.semilogy(torch.stack(angles), lw=0.9, label=list(NAMES.values()))
    left.set(title="angular_update: radians a step", xlabel="step")
    left.legend(frameon=False)
    right.semilogy(torch.stack(cosines), lw=0.6)
    right.set(title="|cosine| of weights and gradient", xlabel="step")
    return figure
