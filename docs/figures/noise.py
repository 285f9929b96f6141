"""Draw the gradient noise scale of a run, and the gradient norms of its samples at the start and at the end."""

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

STEPS, SPAN, SEEDS = 400, 50, 5


def run(seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the noise scale of each span of steps, and the gradient norms of the samples of each step."""
    torch.manual_seed(seed)
    model = convnet(nn.GroupNorm)
    opt = normkern.SGD(model.parameters(), lr=0.05, momentum=0.9)
    noise = normkern.GradientNoise(model, stats=("nsr", "norms"))
    seen: list[tuple[float, float]] = []
    norms = []
    for images, labels in batches(STEPS, 64, wrong=0.05, seed=seed):
        opt.zero_grad()
        with noise:
            cross_entropy(model(images), labels).backward()
        opt.step()
        result = noise.result()
        seen.append((result.trace_sigma.item(), result.grad_sq_norm_unbiased.item()))
        norms.append(result.sq_norms.sqrt())
    trace, signal = torch.tensor(seen).unfold(0, SPAN, SPAN).mean(2).unbind(1)  # each averaged before the division
    return torch.where(signal > 0, trace / signal, torch.inf), norms  # inf: the signal is lost in the noise


def draw() -> Figure:
    scales, norms = zip(*(run(seed) for seed in range(SEEDS)), strict=True)
    scale = torch.stack(scales)
    low, median, high = scale.amin(0), scale.median(0).values, scale.amax(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
    steps = torch.arange(len(median)) * SPAN + SPAN / 2
    left.fill_between(steps, low, high.clamp(max=1e4), alpha=0.2, lw=0, label=f"lowest to highest of {SEEDS} seeds")
    left.semilogy(steps, median, "o-", ms=3, lw=1.2, label="median")
    top = 3 * high[high.isfinite()].max().item()
    left.set(title="gradient noise scale", ylabel=f"samples, means of {SPAN} steps", xlabel="step", ylim=(None, top))
    left.legend(frameon=False, loc="upper left")
    for name, part in (("first 20 steps", norms[0][:20]), ("last 20 steps", norms[0][-20:])):
        right.hist(torch.cat(part).clamp(min=1e-3).log10(), bins=40, histtype="step", label=name)
    right.set(title="gradient norms of the samples", xlabel="log10 |g_b|", ylabel="samples")
    right.legend(frameon=False)
    return figure
