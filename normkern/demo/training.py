"""The demo's training loops, and its run from the data to the files that it leaves."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkern

from ..optim.halves import halves
from ..schedules import SvagSchedule
from ..theory import svag_steps
from . import output, plots, timing
from .data import batches_of_pairs, digits, shifted
from .measurements import exponential_lr, measured, predicted_angle, root_mean_square
from .model import ResNet, accuracy, find_groups
from .noise import SampleNoise, pair_noise
from .settings import BATCH_SIZE, Settings, make_optimizer


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    after_step: Callable[[], None],
    noise: SampleNoise | None = None,
) -> tuple[float, list[normkern.StepStats]]:
    """Train for one pass over the images in random order; return the mean loss and the statistics of every step."""
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
        if isinstance(optimizer, (normkern.SGD, normkern.AdamW)):
            steps.append(optimizer.stats())
        total += loss.detach() * len(batch)
        after_step()
    return total.item() / len(images), steps


def train_pairs(
    model: nn.Module,
    optimizer: normkern.SVAG,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterator[tuple[Tensor, Tensor]],
    count: int,
    after_step: Callable[[], None],
) -> tuple[float, list[normkern.StepStats]]:
    """Take `count` steps of SVAG from a pair of batches each; return the mean loss and the statistics of every step."""
    model.train()
    total = torch.zeros((), device=next(model.parameters()).device)
    steps = []
    for _ in range(count):
        (images_a, labels_a), (images_b, labels_b) = halves(next(batches))
        optimizer.zero_grad()
        # A forward for each: the batches that batch normalisation sees keep their size.
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


class Diverged(ArithmeticError):
    """The loss of a run is no longer a finite number."""


def run(settings: Settings) -> None:
    """Train, print a line per epoch, time the optimizers; write ``train.json`` and ``curves.png``.

    Raises:
        Diverged: the loss of an epoch is not finite.
    """
    from rich.console import Console
    from rich.progress import Progress

    l, epochs, lr = settings.l, settings.epochs, settings.first_lr
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images, labels, test_images, test_labels = (x.to(device) for x in digits())
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = ResNet().to(device)
    groups = find_groups(model, images, labels, settings.decay, settings.weight_decay)
    optimizer = make_optimizer(settings, groups)
    epoch_steps = math.ceil(len(images) / BATCH_SIZE)
    names = [name for name, _ in groups[0]["params"]]
    sample_noise = None if settings.noise_every is None else SampleNoise(model, optimizer, settings.noise_every)

    # Constant for the first half, in which the equilibrium shows; then linearly to zero.
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
    introduction = output.introduction(
        len(names), l if pairs else None, epoch_ends[1], epoch_steps, settings.noise_every, settings.decay,
        settings.is_adamw,
    )  # fmt: skip
    console.print(
        f"A ResNet of {sum(p.numel() for p in model.parameters())} weights on {len(images)} handwritten digits, "
        f"{len(test_images)} to test, on {device}.\n{output.group_sizes(groups)}\n{introduction}"
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
            if not math.isfinite(row["loss"]):
                raise Diverged(f"the loss of epoch {epoch} is {row['loss']}: try an --lr below {lr:g}")
            row["test_accuracy"] = accuracy(model, test_images, test_labels)
            row["predicted_angular_update"] = predicted_angle(row["lr"] / l if pairs else row["lr"], settings.is_adamw)
            row["effective_lr"] = row["angular_update"] = None
            if new_steps:
                effective_lr, angular_update = measured(new_steps, names)
                row["effective_lr"] = effective_lr.mean().item()
                row["angular_update"] = root_mean_square(angular_update).item()
            if isinstance(optimizer, normkern.SVAG):
                row["passes"] = epoch_ends[epoch] / steps_per_pass
                row |= pair_noise(optimizer.noise())
            if sample_noise is not None:
                row |= sample_noise.take()
            if settings.decay == "exponential" and isinstance(optimizer, normkern.SGD):
                row["exponential_lr"] = exponential_lr(optimizer, row["lr"])
            steps += new_steps
            curves.append(row)
            console.print(output.epoch_line(row))

    if (advice := output.advice(curves)) is not None:
        console.print(advice)
    step_seconds = timing.time_steps(model, settings)
    console.print()
    output.print_times(console, step_seconds, len(list(model.parameters())))
    hyperparameters: dict[str, Any] = {
        "lr": lr, **settings.hyperparameters, "weight_decay": settings.weight_decay, "batch_size": BATCH_SIZE
    }  # fmt: skip
    if pairs:
        hyperparameters["l"] = l
    if settings.decay != "coupled":
        hyperparameters["decay"] = settings.decay
    result = {
        "test_accuracy": curves[-1]["test_accuracy"],
        "epochs": epochs,
        "seed": settings.seed,
        "step_seconds": step_seconds,
        "optimizer": settings.optimizer,
        "groups": {group["name"]: [name for name, _ in group["params"]] for group in groups},
        "hyperparameters": hyperparameters,
        "noise_every": settings.noise_every,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"normkern": normkern.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "curves": curves,
    }
    report, picture = settings.out / "train.json", settings.out / "curves.png"
    report.write_text(json.dumps(result, indent=2) + "\n")
    title = f"A small ResNet on handwritten digits, {settings.options}, seed {settings.seed}"
    plots.plot(picture, title, curves, steps, names, lr, settings.is_adamw)
    console.print(f"\n{result['test_accuracy']:.2%} test accuracy; wrote {report} and {picture}")
