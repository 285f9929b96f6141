"""The demo: a small batch-normalised ResNet on handwritten digits, and what normkern's optimizers tell of its training.

A convolution that is followed by BatchNorm computes the same function whatever the length of its weights, so only their
direction learns. Weight decay sets how far that direction turns in a step: the length settles where decay and updates
balance, and the angle between w and the next w becomes a number that the learning rate, the decay and the momentum
decide alone. The demo prints and draws that angle beside its prediction.

`normkern.SVAG` takes l times as many steps of 1/l the size, from two batches each, and an epoch of its run is as much
time as one of the others': l times their steps, 2l times their passes over the data. It tells of the gradient noise.

With ``--noise-every 10`` every tenth batch is looked at once more, for the noise of its samples' gradients, and the run
is the same to the bit.

With ``--decay exponential`` nothing shrinks the weights: an exponentially growing learning rate does what the decay
did, and the run is the same.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkern
from normkern import invariance
from normkern.optim.halves import halves
from normkern.schedules import SvagSchedule
from normkern.theory import svag_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

BATCH_SIZE = 32
EPOCHS = 30
LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 4e-3
SVAG_L = 4.0

#: Those whose weight decay can be an exponential learning rate.
EXPONENTIAL = ("normkern", "svag")

#: What the demo imports beyond torch: module -> the package that brings it.
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}

#: Those that can train, and that are timed against each other. `normkern.SVAG`, "svag", trains too.
OPTIMIZERS: dict[str, Callable[..., torch.optim.SGD]] = {
    "normkern": partial(normkern.SGD, stats="tensor"),
    "torch": torch.optim.SGD,
    "torch-foreach": partial(torch.optim.SGD, foreach=True),
    "torch-fused": partial(torch.optim.SGD, fused=True),
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, split 80:20 with the same share of every digit on both sides.

    Returns:
        Training images, training labels, test images, test labels: float32 (n, 1, 8, 8) from 0 to 1, int64 (n,).
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, shuffle=True, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def conv_norm(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and the BatchNorm that makes its weights scale-invariant."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False),
        # At equilibrium the weights turn by a degree a step: averages over the usual ten batches would be out of date.
        nn.BatchNorm2d(channels_out, momentum=0.3),
    )


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(channels_in, channels_out, 3, stride)
        self.second = conv_norm(channels_out, channels_out, 3)
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Images (n, 1, 8, 8) -> logits (n, 10): three blocks, at 8 x 8, 4 x 4 and 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(1, 16, 3)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def find_groups(model: nn.Module, images: Tensor, labels: Tensor, decay: str = "coupled") -> list[dict[str, Any]]:
    """Param groups by what is measured on a few images: those that the loss sees the direction of only, which decay."""
    found = invariance.find(model, F.cross_entropy, [(images[:16], labels[:16])], granularity="tensor")
    decaying: dict[str, Any] = {"weight_decay": WEIGHT_DECAY}
    if decay == "exponential":
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        decaying |= {"decay": decay, "norm_buffers": norms, "followers": []}
    return invariance.param_groups(model, found, scale_invariant=decaying)


def make_optimizer(name: str, groups: list[dict[str, Any]], l: float = SVAG_L) -> torch.optim.SGD:
    """One of `OPTIMIZERS`, or "svag", for the param groups."""
    construct = partial(normkern.SVAG, l=l, stats="tensor") if name == "svag" else OPTIMIZERS[name]
    return construct([dict(group) for group in groups], lr=LR, momentum=MOMENTUM)


def exponential_lr(optimizer: normkern.SGD, lr: float) -> float:
    """What `lr` is in the run without weight decay: lr / a^2, where a is all the decay so far."""
    scale, _, exponent = optimizer.param_groups[0].get("gauge", normkern.ops.NEW_GAUGE)
    return math.ldexp(lr / scale**2, 2 * exponent)


def told_groups(groups: list[dict[str, Any]]) -> str:
    """How many tensors and weights are in each group, in a line."""
    parts = []
    for group in groups:
        params = [p for _, p in group["params"]]
        parts.append(f"{group['name'].replace('_', ' ')}: {len(params)} tensors, {sum(p.numel() for p in params)}")
    return f"Found {'; '.join(parts)}. The first decay."


def predicted_angle(lr: float) -> float:
    r"""The angular update at equilibrium, in radians: :math:`\sqrt{2 \eta \lambda / (1 + \mu)}`.

    The root mean square over the steps, for scale-invariant weights under SGD with momentum and coupled weight decay
    (arXiv 2006.08419; arXiv 2305.17212). Neither the network nor the data has a say in it.
    """
    return math.sqrt(2 * lr * WEIGHT_DECAY / (1 + MOMENTUM))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by at most one pixel in each direction, zeros moving in."""
    size = images.shape[-1]
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, size, 1).unfold(3, size, 1)
    down, right = torch.randint(3, (2, len(images)), generator=generator).to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


class SampleNoise:
    """The noise of the samples' gradients in every n-th batch, from a forward and backward apart from the training's.

    In eval mode: with the statistics of its batch, a sample has no gradient of its own.
    """

    #: Sums of a measurement, in this order.
    SUMS = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased")

    def __init__(self, model: nn.Module, optimizer: torch.optim.SGD, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self.measured: list[tuple[int, Tensor]] = []  # since they were told: batch size, `SUMS`
        self._noise = normkern.GradientNoise(model)
        self._names = {p: name for name, p in model.named_parameters()}

    def before_step(self, images: Tensor, labels: Tensor) -> None:
        """Of the batch that the step is to be from; leaves no gradients."""
        self.steps += 1
        if self.steps % self.every:
            return
        self.optimizer.zero_grad()
        self.model.eval()
        with self._noise:
            F.cross_entropy(self.model(images), labels).backward()  # type: ignore[no-untyped-call]
        self.model.train()
        result = self._noise.result()
        self.optimizer.zero_grad()
        # Under --decay exponential gradients are those of the weights without decay times the scale between the two.
        scales = self.optimizer.true_scale() if isinstance(self.optimizer, normkern.SGD) else None
        sums = torch.zeros(len(self.SUMS), dtype=torch.float64, device=images.device)
        for i, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                of = result.per_param[self._names[p]]
                sums += torch.stack([getattr(of, key) for key in self.SUMS]) / (scales[i] if scales else 1.0) ** 2
        self.measured.append((result.batch_size, sums))

    def told(self) -> dict[str, float | None]:
        """Ratios of means over what was measured since the last call; None for what is no finite number.

        `nsr_batch` and `gns` as in `GradientNoise`, with the means that they are ratios of.
        """
        measured, self.measured = self.measured, []
        if not measured:
            return dict.fromkeys(("gns", "nsr_batch", *self.SUMS))
        trace, square, unbiased = torch.stack([sums for _, sums in measured]).mean(0)
        of_batch = torch.stack([sums[0] / batch for batch, sums in measured]).mean()
        numbers = {"gns": trace / unbiased, "nsr_batch": of_batch / square}
        return finite(numbers | dict(zip(self.SUMS, (trace, square, unbiased), strict=True)))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    after_step: Callable[[], None],
    noise: SampleNoise | None = None,
) -> tuple[float, list[normkern.StepStats]]:
    """One pass over the training images in random order: the mean loss, and what each step measured."""
    model.train()
    total = torch.zeros((), device=images.device)
    steps = []
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for batch in torch.split(order, BATCH_SIZE):
        batch_images = shifted(images[batch], generator)
        if noise is not None:
            noise.before_step(batch_images, labels[batch])
        loss = F.cross_entropy(model(batch_images), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if isinstance(optimizer, normkern.SGD):
            steps.append(optimizer.stats())
        total += loss.detach() * len(batch)
        after_step()
    return total.item() / len(images), steps


def batches_of_pairs(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, images and labels of twice the batch size: pass after pass, each in another random order.

    What is left of a pass would be a smaller batch, with noise of another size, and is left out.
    """
    size = 2 * BATCH_SIZE
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in torch.split(order[: len(order) // size * size], size):
            yield shifted(images[batch], generator), labels[batch]


def train_pairs(
    model: nn.Module,
    optimizer: normkern.SVAG,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterator[tuple[Tensor, Tensor]],
    count: int,
    after_step: Callable[[], None],
) -> tuple[float, list[normkern.StepStats]]:
    """So many steps of SVAG, from a pair of batches each: the mean loss, and what each step measured."""
    model.train()
    total = torch.zeros((), device=next(model.parameters()).device)
    steps = []
    for _ in range(count):
        (images_a, labels_a), (images_b, labels_b) = halves(next(batches))
        optimizer.zero_grad()
        # A forward for each: batch normalisation sees batches of the size that it always sees.
        loss_a = F.cross_entropy(model(images_a), labels_a)
        loss_a.backward()  # type: ignore[no-untyped-call]
        optimizer.hold()
        loss_b = F.cross_entropy(model(images_b), labels_b)
        loss_b.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        steps.append(optimizer.stats())
        total += (loss_a.detach() + loss_b.detach()) / 2
        after_step()
    return total.item() / count, steps


#: What `told_noise` puts into a row: key -> field of `normkern.Noise`.
NOISE = {
    "nsr": "nsr_batch",
    "trace_sigma": "trace_sigma",
    "grad_sq_norm_unbiased": "grad_sq_norm_unbiased",
    "nsr_stderr": "nsr_batch_stderr",
    "trace_sigma_stderr": "trace_sigma_stderr",
    "grad_sq_norm_unbiased_stderr": "grad_sq_norm_unbiased_stderr",
}


def told_noise(noise: normkern.Noise) -> dict[str, float | None]:
    """Signal, noise and their ratio with standard errors."""
    return finite({key: getattr(noise, field) for key, field in NOISE.items()})


def finite(numbers: dict[str, Tensor]) -> dict[str, float | None]:
    """As JSON can hold them: None for what is no finite number."""
    return {key: x.item() if x.isfinite() else None for key, x in numbers.items()}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model, in eval mode, gets right: 0 to 1."""
    model.eval()
    right = model(images).argmax(dim=1) == labels
    return float(right.double().mean())


def measured(steps: list[normkern.StepStats], names: list[str]) -> tuple[Tensor, Tensor]:
    """Effective LR and angular update of the named parameters, both (steps, names) on the CPU."""
    slots = [steps[0].slots[name].start for name in names]
    effective_lr = torch.stack([step.effective_lr for step in steps])
    angular_update = torch.stack([step.angular_update for step in steps])
    return effective_lr[:, slots].cpu(), angular_update[:, slots].cpu()


def root_mean_square(x: Tensor, dim: int | None = None) -> Tensor:
    """Over all of `x`, or over one of its dimensions."""
    return x.square().mean(dim).sqrt()


@torch.no_grad()
def step_and_norms(optimizer: torch.optim.SGD, before: list[Tensor]) -> tuple[list[Tensor], ...]:
    """A step of any optimizer with |w|, |g|, <w, g>, |u| and <w, u> of every parameter; `before` keeps the old w.

    `normkern.SGD` has them already. Anybody else's are computed as one would: batched where torch can.
    """
    if isinstance(optimizer, normkern.SGD):
        optimizer.step()
        s = optimizer.stats()
        return ([s.weight_norm], [s.grad_norm], [s.weight_grad_dot], [s.update_norm], [s.weight_update_dot])
    params = optimizer.param_groups[0]["params"]
    grads = [p.grad for p in params]
    torch._foreach_copy_(before, params)
    optimizer.step()
    updates = torch._foreach_sub(params, before)
    weight_grad_dots = [torch.dot(w.flatten(), g.flatten()) for w, g in zip(before, grads, strict=True)]
    weight_update_dots = [torch.dot(w.flatten(), u.flatten()) for w, u in zip(before, updates, strict=True)]
    weight_norms, grad_norms, update_norms = (list(torch._foreach_norm(x)) for x in (before, grads, updates))
    return weight_norms, grad_norms, weight_grad_dots, update_norms, weight_update_dots


def time_steps(model: nn.Module, rounds: int = 300) -> dict[str, float]:
    """Median seconds of `step_and_norms` per optimizer, each on a copy of the model's weights and last gradients."""
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    runs = {}
    for name, construct in OPTIMIZERS.items():
        params = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for copy, p in zip(params, model.parameters(), strict=True):
            copy.grad = None if p.grad is None else p.grad.clone()
        optimizer = construct(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        runs[name] = partial(step_and_norms, optimizer, [torch.empty_like(p) for p in params])
    wait: Callable[[], object] = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    # They take turns, so that whatever else the machine does meets all of them.
    for _ in range(rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    warm_up = rounds // 10
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def plot(
    file: Path, title: str, curves: list[dict[str, Any]], steps: list[normkern.StepStats], names: list[str]
) -> None:
    """Panels over the epochs, as PNG: loss, test accuracy, effective LR, angular update against its prediction.

    And of a run that has it the gradient noise: its ratio to the signal, or the noise scale; and both.
    """
    from matplotlib.figure import Figure

    ends = [row["epoch"] for row in curves]
    middles = [end - 0.5 for end in ends]
    has_noise = "trace_sigma" in curves[0]
    figure = Figure(figsize=(10, 10.5 if has_noise else 7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(3 if has_noise else 2, 2)
    (loss, correct), (rate, angle) = panels[:2]

    loss.plot(middles, [row["loss"] for row in curves])
    loss.set(title="Training loss", ylabel="cross entropy (nats)", yscale="log")

    correct.plot(ends, [100 * row["test_accuracy"] for row in curves], marker=".")
    correct.set(title=f"Test accuracy: {curves[-1]['test_accuracy']:.2%} at the end", ylabel="correct (%)")

    rate.set(title="Effective learning rate", ylabel="lr / |w|$^2$")
    angle.set(title="Angular update", ylabel="angle that w turns in a step (rad)")
    if steps:
        when = [(i + 1) * len(curves) / len(steps) for i in range(len(steps))]
        effective_lr, angular_update = measured(steps, names)
        each = rate.plot(when, effective_lr, color="C0", alpha=0.35, linewidth=0.8)
        each[0].set_label("each convolution")
        rate.plot(when, effective_lr.mean(1), color="C0", label="their mean")
        rate.set(yscale="log")
        rate.legend(loc="lower left")
        angle.plot(when, root_mean_square(angular_update, 1), color="C1", alpha=0.35, linewidth=0.8, label="each step")
        angle.plot(middles, [row["angular_update"] for row in curves], color="C1", label="each epoch")
    else:
        rate.text(0.5, 0.5, "torch.optim.SGD does not measure it", transform=rate.transAxes, ha="center")
    predicted = [row["predicted_angular_update"] for row in curves]
    angle.plot(
        [0, *ends], [predicted[0], *predicted], drawstyle="steps-pre", color="black", linestyle="--",
        label=r"at equilibrium: $\sqrt{2 \cdot \mathrm{lr} \cdot \mathrm{wd} / (1 + \mathrm{momentum})}$",
    )  # fmt: skip
    angle.set_ylim(bottom=0)
    angle.legend(loc="upper right")
    if has_noise:
        (plot_noise if "nsr" in curves[0] else plot_noise_scale)(panels[2, 0], panels[2, 1], curves)

    falling = [row["epoch"] - 1 for row in curves if row["lr"] < LR]
    for panel in panels.flat:
        if falling:
            panel.axvspan(falling[0], ends[-1], color="black", alpha=0.06, linewidth=0)
        panel.set(xlabel="epoch (grey: the learning rate falls to 0)", xlim=(0, ends[-1]))
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def plot_noise(ratio: Axes, parts: Axes, curves: list[dict[str, Any]]) -> None:
    """The panels of the noise of batch gradients."""
    draw_positive(ratio, "nsr", "", curves)
    ratio.set(title="Noise-to-signal ratio of a batch gradient", ylabel=r"tr $\Sigma$ / $|\nabla L|^2$")
    plot_noise_and_signal(parts, curves)
    parts.set(title="Noise and signal (bars: standard errors)")


def plot_noise_scale(scale: Axes, parts: Axes, curves: list[dict[str, Any]]) -> None:
    """The panels of the noise of the samples' gradients."""
    draw_positive(scale, "gns", "", curves)
    scale.axhline(BATCH_SIZE, color="black", linestyle="--", label=f"the batch: {BATCH_SIZE}")
    scale.set(title="Gradient noise scale", ylabel=r"tr $\Sigma$ / $|\nabla L|^2$ (samples)", yscale="log")
    scale.legend()
    plot_noise_and_signal(parts, curves)
    parts.set(title="Noise of a sample, and signal")


def plot_noise_and_signal(parts: Axes, curves: list[dict[str, Any]]) -> None:
    """What their ratio is made of."""
    draw_positive(parts, "trace_sigma", r"noise: tr $\Sigma$", curves)
    draw_positive(parts, "grad_sq_norm_unbiased", r"signal: $|\nabla L|^2$", curves)
    if parts.has_data():
        parts.legend()


def draw_positive(panel: Axes, key: str, label: str, curves: list[dict[str, Any]]) -> None:
    """A curve over the epochs. Estimates may be negative, and a logarithmic axis leaves those out."""
    known = [(row["epoch"], row[key], row.get(f"{key}_stderr") or 0.0) for row in curves if row[key]]
    if any(value > 0 for _, value, _ in known):
        where, values, errors = zip(*[entry for entry in known if entry[1] > 0], strict=True)
        bars = errors if any(errors) else None
        panel.errorbar(where, values, yerr=bars, marker=".", capsize=2, linewidth=1, label=label)
        panel.set_yscale("log", nonpositive="clip")


def print_times(console: Console, seconds: dict[str, float], parameters: int) -> None:
    """The table of `time_steps`."""
    from rich.table import Table

    title = f"A step with |w|, |g|, <w,g>, |u|, <w,u> of all {parameters} parameter tensors"
    table = Table(title=title, title_style="")
    table.add_column("optimizer")
    table.add_column("microseconds", justify="right")
    table.add_column("ratio to normkern", justify="right")
    labels = {
        "normkern": 'normkern.SGD(stats="tensor")',
        "torch": "torch.optim.SGD, norms eagerly",
        "torch-foreach": "torch.optim.SGD(foreach=True), norms eagerly",
        "torch-fused": "torch.optim.SGD(fused=True), norms eagerly",
    }
    for name, time_of_step in seconds.items():
        table.add_row(labels[name], f"{1e6 * time_of_step:.0f}", f"{time_of_step / seconds['normkern']:.2f}")
    console.print(table)


def introduction(
    convolutions: int, l: float | None, svag_steps: int, epoch_steps: int, noise_every: int | None, decay: str
) -> str:
    """What the columns of `told_epoch` are, and their heads. `l`: None without SVAG."""
    told = (
        f"Effective LR: mean over its {convolutions} convolutions. Angular update: root mean square, in radians;\n"
        "predicted: sqrt(2 * lr * weight_decay / (1 + momentum)).\n"
    )
    heads = "\nepoch     loss   test accuracy   effective LR   angular update   predicted"
    if l is not None:
        told += (
            f"SVAG, l = {l:g}: steps with lr / l from two batches of {BATCH_SIZE}; an epoch is {svag_steps}, "
            f"as much time as {epoch_steps} of SGD.\n"
            "Passes: over the data, so far. nsr: noise-to-signal ratio of a batch gradient, and its standard error.\n"
        )
        heads += "   passes      nsr   +-"
    if noise_every is not None:
        told += (
            f"From the samples' gradients, in eval mode, every {noise_every} steps: the gradient noise scale, gns, in "
            "samples (unbiased, so\nnegative where noise hides the signal); the noise-to-signal ratio of a batch "
            "gradient, nsr_batch.\n"
        )
        heads += "       gns   nsr_batch"
    if decay == "exponential":
        told += (
            "Weight decay as an exponential learning rate, on the convolutions; exponential LR: that of the run "
            "without decay\nwhose network is this one's.\n"
        )
        heads += "   exponential LR"
    return told + heads


def told_epoch(row: dict[str, Any]) -> str:
    """A line of the table, of what the row has."""

    def told(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    line = (
        f"{row['epoch']:5}  {row['loss']:7.4f}  {row['test_accuracy']:14.2%}  {told('effective_lr', '.5f'):>13}  "
        f"{told('angular_update', '.5f'):>15}  {row['predicted_angular_update']:10.5f}"
    )
    if "passes" in row:
        line += f"  {row['passes']:7.1f}  {told('nsr', '.3g'):>7}   {told('nsr_stderr', '.3g')}"
    if "gns" in row:
        line += f"{told('gns', '.3g'):>10}  {told('nsr_batch', '.3g'):>10}"
    if "exponential_lr" in row:
        line += f"{row['exponential_lr']:17.5g}"
    return line


def run(
    optimizer_name: str,
    epochs: int,
    seed: int,
    out: Path,
    l: float = SVAG_L,
    decay: str = "coupled",
    noise_every: int | None = None,
) -> None:
    """Train, print a line per epoch, time the optimizers; leave ``train.json`` and ``curves.png`` in `out`.

    `l` is SVAG's. Its epochs are those of the original run: as long in time, and as much of the schedule. `decay`: of
    `EXPONENTIAL`, "coupled" or "exponential". `noise_every`: of all but SVAG, so many steps apart the noise of the
    samples' gradients is measured.
    """
    from rich.console import Console
    from rich.progress import Progress

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, test_images, test_labels = (x.to(device) for x in digits())
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResNet().to(device)
    groups = find_groups(model, images, labels, decay)
    optimizer = make_optimizer(optimizer_name, groups, l)
    epoch_steps = math.ceil(len(images) / BATCH_SIZE)
    names = [name for name, _ in groups[0]["params"]]
    sample_noise = None if noise_every is None else SampleNoise(model, optimizer, noise_every)

    # Constant for the first half, which is when the equilibrium shows; then straight to zero.
    def factor(epoch: int) -> float:
        return min(1.0, 2 * (1 - epoch / epochs))

    schedule: torch.optim.lr_scheduler.LRScheduler
    epoch_ends = [epoch * epoch_steps for epoch in range(epochs + 1)]
    pairs = isinstance(optimizer, normkern.SVAG)
    if pairs:
        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step // epoch_steps))
        schedule = SvagSchedule(by_step, l)
        epoch_ends = [svag_steps(steps=steps, l=l) for steps in epoch_ends]
        batches = batches_of_pairs(images, labels, generator)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    steps_per_pass = len(images) // (2 * BATCH_SIZE) if pairs else epoch_steps

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"A ResNet of {sum(p.numel() for p in model.parameters())} weights on {len(images)} handwritten digits, "
        f"{len(test_images)} to test, on {device}.\n"
        f"{told_groups(groups)}\n"
        f"{introduction(len(names), l if pairs else None, epoch_ends[1], epoch_steps, noise_every, decay)}"
    )
    curves: list[dict[str, Any]] = []
    steps: list[normkern.StepStats] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=epoch_ends[-1])
        advance = partial(progress.advance, bar)
        for epoch in range(1, epochs + 1):
            row: dict[str, Any] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            if isinstance(optimizer, normkern.SVAG):
                count = epoch_ends[epoch] - epoch_ends[epoch - 1]
                row["loss"], new_steps = train_pairs(model, optimizer, schedule, batches, count, advance)
            else:
                row["loss"], new_steps = train_epoch(model, optimizer, images, labels, generator, advance, sample_noise)
                schedule.step()
            row["test_accuracy"] = accuracy(model, test_images, test_labels)
            row["predicted_angular_update"] = predicted_angle(row["lr"] / l if pairs else row["lr"])
            row["effective_lr"] = row["angular_update"] = None
            if new_steps:
                effective_lr, angular_update = measured(new_steps, names)
                row["effective_lr"] = effective_lr.mean().item()
                row["angular_update"] = root_mean_square(angular_update).item()
            if isinstance(optimizer, normkern.SVAG):
                row["passes"] = epoch_ends[epoch] / steps_per_pass
                row |= told_noise(optimizer.noise())
            if sample_noise is not None:
                row |= sample_noise.told()
            if decay == "exponential" and isinstance(optimizer, normkern.SGD):
                row["exponential_lr"] = exponential_lr(optimizer, row["lr"])
            steps += new_steps
            curves.append(row)
            console.print(told_epoch(row))

    step_seconds = time_steps(model)
    console.print()
    print_times(console, step_seconds, len(list(model.parameters())))
    result = {
        "test_accuracy": curves[-1]["test_accuracy"],
        "epochs": epochs,
        "seed": seed,
        "step_seconds": step_seconds,
        "optimizer": optimizer_name,
        "groups": {group["name"]: [name for name, _ in group["params"]] for group in groups},
        "hyperparameters": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "batch_size": BATCH_SIZE}
        | ({"l": l} if pairs else {})
        | ({"decay": decay} if decay != "coupled" else {}),
        "noise_every": noise_every,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"normkern": normkern.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "curves": curves,
    }
    (out / "train.json").write_text(json.dumps(result, indent=2) + "\n")
    which = f"{optimizer_name} --l {l:g}" if pairs else optimizer_name
    which += " --decay exponential" * (decay == "exponential")
    title = f"A small ResNet on handwritten digits, --optimizer {which}, seed {seed}"
    plot(out / "curves.png", title, curves, steps, names)
    console.print(f"\n{result['test_accuracy']:.2%} test accuracy; wrote {out / 'train.json'} and {out / 'curves.png'}")
