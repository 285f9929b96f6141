"""Draw a run whose learning rate falls to a quarter at equilibrium: angle and norm, and their prediction."""

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import normkern

LR, DECAY, MOMENTUM, STEPS, DROP = 0.1, 0.02, 0.9, 1200, 600


def draw() -> Figure:
    torch.manual_seed(0)
    model = convnet()
    found = normkern.invariance.find(model, cross_entropy, list(batches(2)), granularity="tensor")
    groups = normkern.invariance.param_groups(model, found, scale_invariant={"weight_decay": DECAY})
    opt = normkern.SGD(groups, lr=LR, momentum=MOMENTUM, stats="tensor")
    monitor = normkern.EquilibriumMonitor(opt, ema=0.95)
    rows = []
    for step, (images, labels) in enumerate(batches(STEPS)):
        if step == DROP:
            opt.param_groups[0]["lr"] = LR / 4
        opt.zero_grad()
        cross_entropy(model(images), labels).backward()
        opt.step()
        monitor.update()
        if step % 10 == 9:
            layer = monitor.report().parameters["3.weight"]
            length = layer.equilibrium_weight_norm or float("nan")
            rows.append([step, layer.angular_update, layer.predicted_angular_update, layer.weight_norm, length])
    step, angle, angle_there, norm, norm_there = torch.tensor(rows).unbind(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    left.plot(step, angle, lw=1, label="measured")
    left.plot(step, angle_there, "k:", lw=1, label="equilibrium")
    left.set(title="angular update of the second convolution", xlabel="step", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(step, norm, lw=1)
    right.plot(step, norm_there, "k:", lw=1)
    right.set(title="its norm |w|", xlabel="step", ylim=(0, None))
    return figure
