"""Do the layers of a real network turn and settle as lr, weight decay and momentum say they must?

The demo's ResNet on handwritten digits, at a constant learning rate for 10/(lr * weight_decay) steps; then every
convolution's angular update and length against the prediction (Wan et al., arXiv 2006.08419; Li, Lyu and Arora, arXiv
2010.02916), as a table, as JSON and as a figure.

python -m experiments.papers.equilibrium --json experiments/results/equilibrium.json --plot docs/equilibrium.png
"""

from __future__ import annotations

import argparse
import json
import platform
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import normkern
from normkern import EquilibriumMonitor
from normkern.demo.data import digits, shifted
from normkern.demo.model import ResNet, find_groups
from normkern.demo.settings import BATCH_SIZE

LR, WEIGHT_DECAY, MOMENTUM = 0.1, 0.01, 0.9
#: Of labels that are wrong: a network that fits everything has no gradient left to balance the decay.
WRONG = 0.1


def batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
    """Without end: shifted images, and labels some of which are wrong, each time others."""
    for _ in count():
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        wrong = torch.rand(BATCH_SIZE, generator=generator) < WRONG
        random = torch.randint(10, (BATCH_SIZE,), generator=generator)
        yield shifted(images[chosen], generator), torch.where(wrong, random, labels[chosen])


def run(seed: int, steps: int) -> tuple[EquilibriumMonitor, list[str]]:
    """The monitor after so many steps, and the names of the scale-invariant weights."""
    images, labels, _, _ = digits()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResNet()
    groups = find_groups(model, images, labels)
    names = [name for name, _ in groups[0]["params"]]
    groups[0]["weight_decay"] = WEIGHT_DECAY
    for group in groups[1:]:
        group["lr"] = LR / 10
    optimizer = normkern.SGD(groups, lr=LR, momentum=MOMENTUM, stats="tensor")
    monitor = EquilibriumMonitor(optimizer, ema=0.999)
    source = batches(images, labels, generator)
    for _ in track(range(steps), description="training", transient=True):
        x, y = next(source)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.update()
    return monitor, names


def plot(monitor: EquilibriumMonitor, file: Path) -> None:
    """Draw angles and norms over a logarithmic time axis, as most happens early, with the names of the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    angles, norms = figure.subplots(2, 1, sharex=True)
    monitor.plot([angles, norms])
    angles.set(title="Angle between weights before and after a step", ylabel="radians")
    norms.set(title="Weight norm divided by the predicted norm at equilibrium", ylabel="ratio")
    norms.set(xscale="log", xlabel="time: sum of lr * weight_decay over the steps (1 is the time to equilibrium)")
    if angles.get_legend() is not None:
        angles.get_legend().remove()
    figure.legend(*angles.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    for panel in (angles, norms):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=round(10 / (LR * WEIGHT_DECAY)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    monitor, names = run(given.seed, given.steps)

    report = monitor.report()
    title = f"After {report.groups[0].time:.1f} / (lr * weight_decay) = {report.steps} steps"
    table = Table(title=title, title_style="")
    rows, columns = [], ("angular update", "predicted", "off", "|w|", "at equilibrium", "off")
    for column in ("convolution", *columns):
        table.add_column(column, justify="left" if column == "convolution" else "right", no_wrap=True)
    for name in names:
        told = report.parameters[name]
        angle, length = told.angular_update, told.weight_norm
        angle_off = angle / told.predicted_angular_update - 1
        length_off = length / told.equilibrium_weight_norm - 1
        rows.append({"name": name, **told.to_dict(), "angle_off": angle_off, "length_off": length_off})
        table.add_row(
            name,
            f"{angle:.5f}",
            f"{told.predicted_angular_update:.5f}",
            f"{angle_off:+.1%}",
            f"{length:.4f}",
            f"{told.equilibrium_weight_norm:.4f}",
            f"{length_off:+.1%}",
        )
    console = Console()
    # Piped into a file, rich would cut the table at 80 columns.
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    worst = {key: max(abs(row[key]) for row in rows) for key in ("angle_off", "length_off")}
    console.print(f"At most {worst['angle_off']:.1%} off in angle, {worst['length_off']:.1%} in length.")
    if given.json:
        result = {
            "lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM, "steps": report.steps, "seed": given.seed,
            "worst": worst, "layers": rows,
            "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if given.plot:
        plot(monitor, given.plot)


if __name__ == "__main__":
    main()
