"""Does a network whose weights are stored in bfloat16 become what it becomes in float32?

The demo's ResNet on handwritten digits, with arithmetic in float32, so that only how weights, gradients and momentum
are stored is on trial. The convolutions begin far longer than they are at equilibrium, and a step of weight decay is
less than bfloat16 tells apart: where that rounds away they stay as long as they are, and their direction hardly learns.

python -m experiments.low_precision --json experiments/results/low_precision.json \
    --plot docs/low_precision.png --readme docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

import normkern
from bench.report import table_head, table_row, write_between_marks
from normkern.demo.data import digits, shifted
from normkern.demo.model import ResNet, find_groups
from normkern.demo.settings import BATCH_SIZE

#: lr * weight_decay / (1 - momentum) is 1.8e-3 a step; half of what bfloat16 tells apart is 2^-9 to 2^-8 of a weight.
LR, WEIGHT_DECAY, MOMENTUM = 0.05, 3.6e-3, 0.9
#: How much longer than PyTorch makes them the convolutions are at first.
LONGER = 128.0
#: The last epochs have a tenth of the learning rate, as a net at equilibrium is as noisy as its rate is high.
COOL_DOWN = 5
MARKS = "<!-- low-precision:begin -->", "<!-- low-precision:end -->"

#: How weights are stored, and what the optimizer of the decaying group is asked for.
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32 momentum": (torch.bfloat16, {"state_dtype": torch.float32}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "master weights": (torch.bfloat16, {"master_weights": True}),
    "exponential decay": (torch.bfloat16, {"decay": "exponential"}),
}


class Stored:
    """A model and its parameters as they are stored: those of the optimizer."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.params = {name: nn.Parameter(p.detach().to(dtype)) for name, p in model.named_parameters()}

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.model, {name: p.float() for name, p in self.params.items()}, (x,))
        return out


def run(variant: str, seed: int, epochs: int) -> Iterator[tuple[float, float]]:
    """After every epoch: the share of test images that it gets right, and |w| of all convolutions."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResNet()
    dtype, options = VARIANTS[variant]
    groups = find_groups(model, images, labels, options.get("decay", "coupled"))
    names = [name for name, _ in groups[0]["params"]]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(LONGER)
    stored = Stored(model, dtype)
    for group in groups:
        group["params"] = [stored.params[name] for name, _ in group["params"]]
    groups[0]["weight_decay"] = WEIGHT_DECAY
    optimizer = normkern.SGD(groups, lr=LR, momentum=MOMENTUM, **{k: x for k, x in options.items() if k != "decay"})
    for epoch in range(epochs):
        if epoch == epochs - COOL_DOWN:
            for group in optimizer.param_groups:
                group["lr"] = LR / 10
        model.train()
        for batch in torch.split(torch.randperm(len(images), generator=generator), BATCH_SIZE):
            loss = F.cross_entropy(stored(shifted(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = float((stored(test_images).argmax(1) == test_labels).double().mean())
        square = sum(float(stored.params[name].detach().double().square().sum()) for name in names)
        yield right, optimizer.true_scale()[0] * math.sqrt(square)


def storage(variant: str) -> str:
    """Return the name of a variant as the table and the figure show it."""
    return variant if variant in ("float32", "bfloat16") else f"bfloat16, {variant}"


def readme_table(results: dict[str, Any]) -> str:
    """Means over the seeds, and how far these scatter."""

    def told(numbers: list[float], form: str) -> str:
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return f"{format(statistics.mean(numbers), form)} ± {format(spread, form)}"

    lines = table_head("storage", "test accuracy (%)", "norm of the convolutions")
    for name, runs in results["variants"].items():
        ends = [seed[-1] for seed in runs]
        accuracy, norm = told([100 * right for right, _ in ends], ".2f"), told([w for _, w in ends], ".1f")
        lines.append(table_row(storage(name), accuracy, norm))
    return "\n".join(lines)


#: Line widths and dashes, so that curves that coincide stay visible: wide ones are drawn first.
STYLES = {
    "float32": ("#9aa5b1", 5.0, "-"),
    "bfloat16": ("#d9542b", 3.0, "-"),
    "float32 momentum": ("#1b3a6b", 1.4, "--"),
    "stochastic rounding": ("#2f6fb5", 2.2, "-"),
    "master weights": ("#1a9988", 1.6, "--"),
    "exponential decay": ("#8a2c5d", 1.4, ":"),
}


def plot(file: Path, results: dict[str, Any]) -> None:
    """Draw accuracy and weight norm over the epochs, means over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    correct, length = figure.subplots(1, 2)
    for name, runs in results["variants"].items():
        color, width, dashes = STYLES[name]
        for panel, i, unit in ((correct, 0, 100.0), (length, 1, 1.0)):
            means = [unit * statistics.mean(values) for values in zip(*([e[i] for e in r] for r in runs), strict=True)]
            epochs = range(1, len(means) + 1)
            panel.plot(epochs, means, dashes, label=storage(name), color=color, linewidth=width)
    seeds = len(next(iter(results["variants"].values())))
    correct.set(title=f"Test accuracy, mean of {seeds} seeds", ylabel="correct (%)")
    length.set(title="Norm of the convolutions' weights", ylabel="|w|", yscale="log")
    figure.legend(*correct.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for panel in (correct, length):
        panel.set(xlabel="epoch")
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--readme", type=Path, help="write the table into this file, between its marks")
    given = parser.parse_args()
    todo = [(name, seed) for name in VARIANTS for seed in range(given.seeds)]
    runs: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in VARIANTS}
    for name, seed in track(todo, description="training", transient=True):
        runs[name].append(list(run(name, seed, given.epochs)))
    results = {
        "lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM, "longer": LONGER,
        "cool_down": COOL_DOWN, "epochs": given.epochs,
        "variants": runs, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    told = readme_table(results)
    table = Table(*[cell.strip() for cell in told.splitlines()[0].strip("|").split("|")])
    for line in told.splitlines()[2:]:
        table.add_row(*[cell.strip() for cell in line.strip("|").split("|")])
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    if given.plot:
        plot(given.plot, results)
    if given.readme:
        write_between_marks(given.readme, told, MARKS)


if __name__ == "__main__":
    main()
