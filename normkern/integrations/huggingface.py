"""`HuggingFaceCallback`, for the ``Trainer`` of the transformers library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ._recorder import Recorder, Scalars


class HuggingFaceCallback(TrainerCallback):  # type: ignore[misc]
    """Log the statistics of steps, and gradient noise, where a transformers ``Trainer`` reports to.

    ``trainer.add_callback(HuggingFaceCallback(trainer, every=10, noise_every=100))`` reports
    ``effective_lr/{parameter}`` and ``angular_update/{parameter}`` after every 10th step, and
    ``noise/gns/{parameter}``, ``noise/gns/all`` and others of every 100th. The numbers go to TensorBoard, Weights &
    Biases and all others in ``report_to``, but not to the console. The noise is measured by a forward and backward of
    its own (`normkern.GradientNoise.measure`) with the trainer's ``compute_loss``, of all micro-batches of the step.

    Args:
        trainer: gives the loss, the optimizer, and the places to report to.
        every: log the statistics of every n-th step; None: never.
        noise_every: measure the gradient noise of every n-th step; None: never.
        loss: ``loss(model, inputs)`` returns the mean loss over the samples; None: ``trainer.compute_loss``.
        quantities: of a step, as for `normkern.StepStats.scalars`.
        noise_quantities: as for `normkern.GradientNoiseResult.scalars`.
        noise_options: as for `normkern.GradientNoise.measure`: ``batch_size``, ``uncovered``.

    Raises:
        TypeError, ValueError: arguments, or an optimizer that measures nothing.
    """

    def __init__(
        self,
        trainer: Any,
        every: int | None = 50,
        noise_every: int | None = None,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        quantities: Iterable[str] = ("effective_lr", "angular_update"),
        noise_quantities: Iterable[str] | None = None,
        **noise_options: Any,
    ) -> None:
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(
                f"HuggingFaceCallback: trainer expected a transformers.Trainer, got {type(trainer).__name__}; make the "
                "trainer first, then trainer.add_callback(HuggingFaceCallback(trainer))"
            )
        self._recorder = Recorder(
            "HuggingFaceCallback", every, noise_every, quantities, noise_quantities, noise_options
        )
        self._trainer = trainer
        self._loss = loss
        self._is_measuring = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the parameters of the optimizer, which the trainer built without names."""
        self._stop()  # a training before may have failed within a step
        self._recorder.begin([self._trainer.optimizer], self._trainer.model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every micro-batch of this step, before the trainer computes its loss."""
        self._stop()
        if self._recorder.is_noise_due(state.global_step):
            self._is_measuring = True
            self._trainer.compute_loss = _measuring(self._trainer.compute_loss, self._loss, self._recorder)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the numbers of this step."""
        self._stop()
        values = self._recorder.noise_scalars()
        if self._recorder.is_due(state.global_step):
            values |= self._recorder.step_scalars([self._trainer.optimizer])
        if values:
            self._report(values, args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its loss back, if the training ended within a step."""
        self._stop()

    def _stop(self) -> None:
        if self._is_measuring:
            self._is_measuring = False
            original = self._trainer.compute_loss.original
            del self._trainer.compute_loss
            if self._trainer.compute_loss != original:  # it was an attribute of the trainer, not a method
                self._trainer.compute_loss = original

    def _report(self, values: Scalars, args: Any, state: Any, control: Any) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            if callback is not self and not isinstance(callback, (PrinterCallback, ProgressCallback)):
                callback.on_log(args, state, control, logs=dict(values), model=self._trainer.model)


def _measuring(
    compute_loss: Callable[..., Any], loss: Callable[[Any, Any], Any] | None, recorder: Recorder
) -> Callable[..., Any]:
    """Return compute_loss with a measurement before it; the function itself is its attribute `original`."""
    # compute_loss takes the labels out of its inputs
    of_batch = loss or (lambda model, inputs: compute_loss(model, dict(inputs)))

    def call(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.measure(model, of_batch, inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    call.original = compute_loss  # type: ignore[attr-defined]
    return call
