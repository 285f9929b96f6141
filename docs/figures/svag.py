"""Draw SVAG runs with growing l, which approach the SDE, and the noise that they measure."""

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import normkern

STEPS, LR, SEEDS = 200, 0.8, 5


def run(l: int, seed: int) -> torch.Tensor:
    """Return rows: time in steps of SGD, |w|^2 of the second convolution, noise over signal of the batch gradient."""
    torch.manual_seed(seed)
    model = convnet()
    opt = normkern.SVAG(model.named_parameters(), lr=LR, l=l, weight_decay=0.01, noise_decay=0.95, stats="tensor")
    time, length, ratio = [], [], []
    steps = normkern.theory.svag_steps(steps=STEPS, l=l)
    for step, (images, labels) in enumerate(batches(steps, 64, seed=10 * seed + l), 1):
        opt.zero_grad()
        (x, y), (x_b, y_b) = normkern.halves((images, labels))
        cross_entropy(model(x), y).backward()
        opt.hold()
        cross_entropy(model(x_b), y_b).backward()
        opt.step()
        time.append(step / l)
        length.append(opt.stats().weight_sq[opt.stats().slots["3.weight"]].item())
        ratio.append(opt.noise().nsr_batch.item())
    return torch.tensor([time, length, ratio])


def draw() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
    for l in (1, 2, 4):
        time, length, ratio = torch.stack([run(l, seed) for seed in range(SEEDS)]).unbind(1)
        for panel, y, every in ((left, length, slice(None)), (right, ratio, slice(10 * l - 1, None, l))):
            x, y = time[0, every], y[:, every]
            panel.plot(x, y.mean(0), lw=1.2, label=f"l = {l}")
            panel.fill_between(x, y.amin(0), y.amax(0), alpha=0.2, lw=0)
    left.set(title="|w|² of the second convolution", xlabel="time: steps / l")
    left.legend(frameon=False, title=f"line: mean of {SEEDS} seeds\nband: lowest to highest", title_fontsize=8)
    right.set(title="nsr_batch: noise over signal", xlabel="time: steps / l", ylim=(0, None))
    return figure
