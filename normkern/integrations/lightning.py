"""`LightningCallback`, for ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ._recorder import Recorder

if "lightning.pytorch" not in sys.modules and "pytorch_lightning" in sys.modules:
    from pytorch_lightning import Callback
else:
    from lightning.pytorch import Callback


class LightningCallback(Callback):  # type: ignore[misc]
    """Log the statistics of steps, and gradient noise, to the loggers of a Lightning ``Trainer``.

    ``Trainer(callbacks=[LightningCallback(every=10, noise_every=100)])`` logs ``effective_lr/{parameter}`` and
    ``angular_update/{parameter}`` after every 10th step, and ``noise/gns/{parameter}``, ``noise/gns/all`` and others of
    every 100th, by a forward and backward of its own (`normkern.GradientNoise.measure`), which leaves gradients, modes,
    buffers and random numbers as they were. With gradient accumulation the noise is of all micro-batches of the step.

    Args:
        every: log the statistics of every n-th step; None: never.
        noise_every: measure the gradient noise of every n-th step; None: never.
        loss: ``loss(module, batch)`` returns the mean loss over the samples; None: the module's ``training_step``, run
            once more without its logging. Metrics that ``training_step`` updates are updated twice then.
        quantities: of a step, as for `normkern.StepStats.scalars`.
        noise_quantities: as for `normkern.GradientNoiseResult.scalars`.
        noise_options: as for `normkern.GradientNoise.measure`: ``batch_size``, ``uncovered``, ``reduction``.

    Raises:
        ValueError: arguments, or an optimizer that measures nothing.
        RuntimeError: a module with manual optimization and no `loss`.
    """

    def __init__(
        self,
        every: int | None = 50,
        noise_every: int | None = None,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        quantities: Iterable[str] = ("effective_lr", "angular_update"),
        noise_quantities: Iterable[str] | None = None,
        **noise_options: Any,
    ) -> None:
        self._recorder = Recorder("LightningCallback", every, noise_every, quantities, noise_quantities, noise_options)
        self._loss = loss
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Name the parameters of the optimizers, and check that there is something to log."""
        if self._loss is None and self._recorder.noise_every is not None and not pl_module.automatic_optimization:
            raise RuntimeError(
                f"LightningCallback: {type(pl_module).__name__} optimizes manually, so its training_step returns no "
                "loss to measure; expected loss=, a function loss(module, batch) that returns a scalar"
            )
        self._recorder.begin(trainer.optimizers, pl_module)
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure the gradient noise of a micro-batch, before the step that it is a part of."""
        if not self._recorder.is_noise_due(trainer.global_step):
            return
        loss = self._loss or (lambda module, x: _training_loss(module, x, batch_idx))
        with trainer.precision_plugin.forward_context(), _without_logging(pl_module):
            self._recorder.measure(pl_module, loss, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, if the batch ended with a step of the optimizer."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        values = self._recorder.noise_scalars()
        if self._recorder.is_due(self._steps):
            values |= self._recorder.step_scalars(trainer.optimizers)
        if values:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self._steps)


def _training_loss(module: Any, batch: Any, batch_idx: int) -> Any:
    out = module.training_step(batch, batch_idx)
    return out["loss"] if isinstance(out, dict) else out


@contextmanager
def _without_logging(module: Any) -> Iterator[None]:
    """Let the module log nothing: the numbers of the batch are logged by the training step itself."""
    names = ("log", "log_dict")
    kept = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        vars(module)[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(kept)
