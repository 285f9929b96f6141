"""The demo's constants, its optimizers, and the options of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import normkern

BATCH_SIZE = 32
EPOCHS = 30
#: Of `python -m normkern advise`.
ADVISE_EPOCHS = 20
LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 4e-3
SVAG_L = 4.0

#: The optimizers whose weight decay can be an exponential learning rate.
EXPONENTIAL = ("normkern", "svag")

#: What the demo imports beyond torch: module -> the package that provides it.
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}

#: The optimizers that can train, and that are timed against each other. `normkern.SVAG`, "svag", trains too.
OPTIMIZERS: dict[str, Callable[..., torch.optim.SGD]] = {
    "normkern": partial(normkern.SGD, stats="tensor"),
    "torch": torch.optim.SGD,
    "torch-foreach": partial(torch.optim.SGD, foreach=True),
    "torch-fused": partial(torch.optim.SGD, fused=True),
}


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        optimizer: a key of `OPTIMIZERS`, or "svag".
        out: the folder for ``train.json`` and ``curves.png``.
        l: SVAG's. An epoch of SVAG is as long in time as one of SGD, and as much of the schedule.
        decay: "coupled", or with the optimizers of `EXPONENTIAL` "exponential".
        noise_every: measure the noise of the samples' gradients every so many steps (not with SVAG); None for never.
        device: where to train; None for the first GPU that torch sees, or else the CPU.
    """

    optimizer: str = "normkern"
    epochs: int = EPOCHS
    seed: int = 0
    out: Path = Path("demo")
    lr: float = LR
    l: float = SVAG_L
    decay: str = "coupled"
    noise_every: int | None = None
    device: str | None = None

    @property
    def options(self) -> str:
        """The command line options that choose the optimizer, for the title of the picture."""
        text = f"--optimizer {self.optimizer}"
        if self.optimizer == "svag":
            text += f" --l {self.l:g}"
        if self.decay != "coupled":
            text += f" --decay {self.decay}"
        if self.lr != LR:
            text += f" --lr {self.lr:g}"
        return text


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float = LR, l: float = SVAG_L) -> torch.optim.SGD:
    """Return one of `OPTIMIZERS`, or SVAG for "svag", for the param groups."""
    construct = partial(normkern.SVAG, l=l, stats="tensor") if name == "svag" else OPTIMIZERS[name]
    return construct([dict(group) for group in groups], lr=lr, momentum=MOMENTUM)
