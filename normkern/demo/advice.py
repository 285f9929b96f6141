"""`python -m normkern advise`: a short run of the demo's network, and what `normkern.advise` makes of its noise."""

from __future__ import annotations

import itertools
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import normkern

from ..monitors.equilibrium_report import EquilibriumReport
from .data import digits, shifted
from .model import ResNet, accuracy, find_groups
from .settings import BATCH_SIZE, MOMENTUM, WEIGHT_DECAY
from .training import Diverged, train_pairs

#: Steps between two reports of the monitor.
_REPORT_EVERY = 10


def _independent_pairs(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two batches as one, without end, drawn with replacement: the noise scale is not small beside the data set,
    and two batches of one pass would lean away from each other."""
    while True:
        chosen = torch.randint(len(images), (2 * BATCH_SIZE,), generator=generator).to(images.device)
        yield shifted(images[chosen], generator), labels[chosen]


def run(*, epochs: int, lr: float, seed: int, device: str | None, out: Path) -> None:
    """Train at a constant learning rate; print the advice, and write ``advise.json`` and ``advise.png``.

    The optimizer is SVAG with l = 1: SGD to the bit, with a second batch in each step that measures the noise in
    training mode. The noise is that of the scale-invariant weights, which the criterion is for. The advice is from the
    last half of the run.

    Raises:
        Diverged: the loss is not finite.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images, labels, test_images, test_labels = (x.to(where) for x in digits())
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResNet().to(where)
    groups = find_groups(model, images, labels)
    names = [name for name, _ in groups[0]["params"]]
    optimizer = normkern.SVAG(groups, lr=lr, l=1, momentum=MOMENTUM, noise_decay=0, stats="tensor")
    monitor = normkern.EquilibriumMonitor(optimizer)
    steps = epochs * math.ceil(len(images) / BATCH_SIZE)
    noise: list[normkern.Noise] = []
    reports: list[EquilibriumReport] = []
    count = itertools.count(1)

    def after_step() -> None:
        step = next(count)
        monitor.update()
        if 2 * step > steps:
            noise.append(optimizer.noise())
            if step % _REPORT_EVERY == 0:
                reports.append(monitor.report())

    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    batches = _independent_pairs(images, labels, generator)
    print(
        f"{steps} steps of SGD at a constant lr of {lr:g}, batch {BATCH_SIZE}, on {where}. The noise of the "
        f"{len(names)} scale-invariant tensors is measured in the last {steps - steps // 2}."
    )
    loss, _ = train_pairs(model, optimizer, constant, batches, steps, after_step)
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss}: try an --lr below {lr:g}")
    # The pairs are independent: no population.
    advice = normkern.advise(
        noise, batch_size=BATCH_SIZE, optimizer=optimizer, equilibrium=reports or monitor, parameters=names
    )
    print(f"Test accuracy {accuracy(model, test_images, test_labels):.2%}.\n\n{advice}\n")
    result: dict[str, Any] = {
        "hyperparameters": {
            "lr": lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "batch_size": BATCH_SIZE
        },
        "epochs": epochs,
        "seed": seed,
        "parameters": names,
        "versions": {"normkern": normkern.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    text, picture = out / "advise.json", out / "advise.png"
    text.write_text(json.dumps({"run": result, **advice.to_dict()}, indent=2, allow_nan=False) + "\n")
    advice.plot(picture)
    print(f"Wrote {text} and {picture}")
