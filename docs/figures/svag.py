"""SVAG on the way to the stochastic differential equation, and the noise that it measures as it goes."""

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import normkern

STEPS, LR = 200, 0.8


def run(l: int) -> tuple[list[float], list[float], list[float]]:
    """Time in steps of SGD, |w|^2 of the second convolution, the noise-to-signal ratio of the batch gradient."""
    torch.manual_seed(0)
    model = convnet()
    opt = normkern.SVAG(model.named_parameters(), lr=LR, l=l, weight_decay=0.01, noise_decay=0.95, stats="tensor")
    time, length, ratio = [], [], []
    steps = normkern.theory.svag_steps(steps=STEPS, l=l)
    for step, (images, labels) in enumerate(batches(steps, 64, seed=l), 1):
        opt.zero_grad()
        (x, y), (x_b, y_b) = normkern.halves((images, labels))
        cross_entropy(model(x), y).backward()
        opt.hold()
        cross_entropy(model(x_b), y_b).backward()
        opt.step()
        time.append(step / l)
        length.append(opt.stats().weight_sq[opt.stats().slots["3.weight"]].item())
        ratio.append(opt.noise().nsr_batch.item())
    return time, length, ratio


def draw() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for l in (1, 2, 4):
        time, length, ratio = run(l)
        left.plot(time, length, lw=1, label=f"l = {l}")
        right.semilogy(time[9::l], ratio[9::l], lw=1)
    left.set(title="|w|² of the second convolution", xlabel="time: steps / l")
    left.legend(frameon=False)
    right.set(title="nsr_batch: noise over signal", xlabel="time: steps / l")
    return figure
