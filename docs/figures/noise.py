"""The gradient noise scale of a run, and the gradient norms of its samples at two moments."""

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

STEPS, SPAN = 300, 20


def draw() -> Figure:
    torch.manual_seed(0)
    model = convnet(nn.GroupNorm)
    opt = normkern.SGD(model.parameters(), lr=0.05, momentum=0.9)
    noise = normkern.GradientNoise(model, stats=("nsr", "norms"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    seen: list[tuple[float, float]] = []
    norms = []
    for images, labels in batches(STEPS, 64, wrong=0.05):
        opt.zero_grad()
        with noise:
            cross_entropy(model(images), labels).backward()
        opt.step()
        result = noise.result()
        assert result.sq_norms is not None
        seen.append((result.trace_sigma.item(), result.grad_sq_norm_unbiased.item()))
        norms.append(result.sq_norms.sqrt())
    trace, signal = torch.tensor(seen).unfold(0, SPAN, SPAN).mean(2).unbind(1)  # each averaged before the division
    left.semilogy(torch.arange(len(trace)) * SPAN + SPAN / 2, trace / signal, "o-", ms=3, lw=1)
    left.set(title=f"noise scale in samples, means of {SPAN} steps", xlabel="step")
    for name, part in (("first 20 steps", norms[:SPAN]), ("last 20 steps", norms[-SPAN:])):
        right.hist(torch.cat(part).clamp(min=1e-3).log10(), bins=40, histtype="step", label=name)
    right.set(title="gradient norms of the samples", xlabel="log10 |g_b|")
    right.legend(frameon=False)
    return figure
