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
#: With these AdamW turns the weights as far in a step at equilibrium as SGD does with those above.
ADAMW_LR = 4e-3
ADAMW_WEIGHT_DECAY = 0.5
ADAMW_BETAS = (MOMENTUM, 0.99)
SVAG_L = 4.0

#: The optimizers whose weight decay can be an exponential learning rate.
EXPONENTIAL = ("normkern", "svag")

#: What the demo imports beyond torch: module -> the package that provides it.
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}

#: Implementations of SGD, which can train and are timed against each other. `normkern.SVAG`, "svag", trains too.
SGDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "normkern": partial(normkern.SGD, stats="tensor"),
    "torch": torch.optim.SGD,
    "torch-foreach": partial(torch.optim.SGD, foreach=True),
    "torch-fused": partial(torch.optim.SGD, fused=True),
}
#: Implementations of AdamW, in the same way.
ADAMWS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(normkern.AdamW, stats="tensor"),
    "torch-adamw": torch.optim.AdamW,
    "torch-adamw-foreach": partial(torch.optim.AdamW, foreach=True),
    "torch-adamw-fused": partial(torch.optim.AdamW, fused=True),
}
OPTIMIZERS = {**SGDS, **ADAMWS}


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        optimizer: a key of `OPTIMIZERS`, or "svag".
        lr: the learning rate at the start; None for the default of the optimizer.
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
    lr: float | None = None
    l: float = SVAG_L
    decay: str = "coupled"
    noise_every: int | None = None
    device: str | None = None

    @property
    def is_adamw(self) -> bool:
        """Whether an AdamW trains."""
        return self.optimizer in ADAMWS

    @property
    def first_lr(self) -> float:
        """The learning rate at the start."""
        return self.default_lr if self.lr is None else self.lr

    @property
    def default_lr(self) -> float:
        """The learning rate at the start, where none is given."""
        return ADAMW_LR if self.is_adamw else LR

    @property
    def weight_decay(self) -> float:
        """The weight decay of the scale-invariant weights."""
        return ADAMW_WEIGHT_DECAY if self.is_adamw else WEIGHT_DECAY

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The options that the optimizer is constructed with, besides learning rate and weight decay."""
        return {"betas": ADAMW_BETAS} if self.is_adamw else {"momentum": MOMENTUM}

    @property
    def options(self) -> str:
        """The command line options that choose the optimizer, for the title of the picture."""
        text = f"--optimizer {self.optimizer}"
        if self.optimizer == "svag":
            text += f" --l {self.l:g}"
        if self.decay != "coupled":
            text += f" --decay {self.decay}"
        if self.first_lr != self.default_lr:
            text += f" --lr {self.first_lr:g}"
        return text


def make_optimizer(settings: Settings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return one of `OPTIMIZERS`, or SVAG for "svag", for the param groups."""
    svag = partial(normkern.SVAG, l=settings.l, stats="tensor")
    construct = svag if settings.optimizer == "svag" else OPTIMIZERS[settings.optimizer]
    return construct([dict(group) for group in groups], lr=settings.first_lr, **settings.hyperparameters)
