"""`UltralyticsCallback`, for the trainers of Ultralytics YOLO. It imports nothing of Ultralytics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from ._recorder import Recorder, Scalars


class UltralyticsCallback:
    """Log the statistics of steps, and gradient noise, of a trainer of Ultralytics.

    ``UltralyticsCallback(log, every=10, noise_every=100).attach(trainer)`` calls ``log(values, step)`` with
    ``effective_lr/{parameter}`` and ``angular_update/{parameter}`` after every 10th step, and with
    ``noise/gns/{parameter}``, ``noise/gns/all`` and others of every 100th. A step is one of the optimizer; the noise is
    of all batches that it accumulates, by a forward and backward of its own (`normkern.GradientNoise.measure`), which
    leaves training as it was. `log` may be ``lambda values, step: wandb.log(values, step=step)``.

    The trainer's ``build_optimizer`` must return an optimizer of normkern; the guide "In your framework" shows how.
    With several GPUs Ultralytics starts a process for each, which imports the trainer's class and knows no callbacks:
    attach the callback in the ``__init__`` of the class. `log` is called in the process of rank 0.

    Args:
        log: ``log(values, step)`` gets a flat dict of finite floats and the number of the step, counted from 1.
        every: log the statistics of every n-th step; None: never.
        noise_every: measure the gradient noise of every n-th step; None: never.
        loss: ``loss(model, batch)`` returns a scalar; None: ``model.loss(batch, model(batch["img"]))[0].sum()``, the
            loss that is trained. Ultralytics multiplies detection losses by the batch size, and so ``trace_sigma`` by
            its square; ``gns`` and ``nsr_batch`` are not changed by such factors.
        quantities: of a step, as for `normkern.StepStats.scalars`.
        noise_quantities: as for `normkern.GradientNoiseResult.scalars`.
        noise_options: as for `normkern.GradientNoise.measure`: ``batch_size``, ``uncovered``, ``reduction``.

    Raises:
        TypeError, ValueError: arguments, or an optimizer that measures nothing.
    """

    def __init__(
        self,
        log: Callable[[Scalars, int], Any],
        every: int | None = 50,
        noise_every: int | None = None,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        quantities: Iterable[str] = ("effective_lr", "angular_update"),
        noise_quantities: Iterable[str] | None = None,
        **noise_options: Any,
    ) -> None:
        if not callable(log):
            raise TypeError(
                f"UltralyticsCallback: log expected a function log(values, step), got {type(log).__name__}; for "
                "example lambda values, step: wandb.log(values, step=step)"
            )
        self._recorder = Recorder(
            "UltralyticsCallback", every, noise_every, quantities, noise_quantities, noise_options
        )
        self._log = log
        self._loss = loss or _training_loss
        self._step = self._epoch = -1
        self._is_training = False

    def attach(self, trainer: Any) -> None:
        """Follow a trainer, from its next ``train()`` on.

        Raises:
            TypeError: it is no trainer of Ultralytics.
        """
        if not (hasattr(trainer, "add_callback") and hasattr(trainer, "preprocess_batch")):
            raise TypeError(
                f"UltralyticsCallback: attach expected a trainer of Ultralytics, got {type(trainer).__name__}; for "
                "YOLO(...).train(trainer=...) attach it in the __init__ of the trainer's class"
            )
        trainer.add_callback("on_train_start", self._start)
        trainer.add_callback("on_train_epoch_start", self._start_epoch)
        trainer.add_callback("on_train_batch_end", self._end_batch)
        trainer.preprocess_batch = self._measuring(trainer, trainer.preprocess_batch)

    def _start(self, trainer: Any) -> None:
        """Name the parameters of the optimizer, which Ultralytics groups without names."""
        self._recorder.begin([trainer.optimizer], trainer.model)
        self._step, self._epoch, self._is_training = trainer.ema.updates, -1, True

    def _start_epoch(self, trainer: Any) -> None:
        """Forget what belongs to no step, where an epoch is run once more after too little memory or a NaN."""
        if trainer.epoch == self._epoch:
            self._recorder.noise_scalars()
        self._epoch = trainer.epoch

    def _measuring(self, trainer: Any, preprocess_batch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return the trainer's last function before its forward, with a measurement after it: both under autocast."""

        def call(batch: Any) -> Any:
            batch = preprocess_batch(batch)
            if self._is_training and self._recorder.is_noise_due(trainer.ema.updates):
                self._recorder.measure(trainer.model, self._loss, {"img": batch["img"], **batch})  # samples first
            return batch

        return call

    def _end_batch(self, trainer: Any) -> None:
        """Log, if the batch ended with a step of the optimizer; the average of weights counts them."""
        if trainer.ema.updates == self._step:
            return
        self._step = trainer.ema.updates
        values = self._recorder.noise_scalars()
        if self._recorder.is_due(self._step):
            values |= self._recorder.step_scalars([trainer.optimizer])
        if values and not (dist.is_initialized() and dist.get_rank()):
            self._log(values, self._step)


def _training_loss(model: Any, batch: Any) -> Any:
    """Return the loss; the model is called with images alone, because rows of labels are boxes, not samples."""
    return model.loss(batch, model(batch["img"]))[0].sum()
