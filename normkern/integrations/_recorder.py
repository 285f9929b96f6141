"""`Recorder`: what the callbacks have in common. It knows no framework."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from ..noise.per_sample import GradientNoise, GradientNoiseResult
from ..optim.fused import FusedOptimizer
from ..optim.unwrap import unwrap_optimizer

Scalars = dict[str, float]


class Recorder:
    """Collects the numbers of steps, and measures gradient noise.

    Args:
        where: the callback's name, for errors.
        every: log the statistics of every n-th step; None: never.
        noise_every: measure the gradient noise of every n-th step; None: never.
        quantities: of a step, as for `StepStats.scalars`.
        noise_quantities: as for `GradientNoiseResult.scalars`; None: its default.
        noise_options: as for `GradientNoise.measure`.
    """

    def __init__(
        self, where: str, every: int | None, noise_every: int | None, quantities: Iterable[str],
        noise_quantities: Iterable[str] | None, noise_options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        for name, n in (("every", every), ("noise_every", noise_every)):
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
                raise ValueError(f"{where}: {name} expected a positive number of steps or None, got {n!r}")
        if every is None and noise_every is None:
            raise ValueError(f"{where}: expected every= or noise_every=, got neither: there is nothing to log")
        self.where, self.every, self.noise_every = where, every, noise_every
        self.quantities = (quantities,) if isinstance(quantities, str) else tuple(quantities)
        self.noise_quantities = None if noise_quantities is None else tuple(noise_quantities)
        self.noise_options = dict(noise_options)
        self._noise: GradientNoiseResult | None = None
        self._has_measured = False
        self._has_warned = False

    def begin(self, optimizers: Iterable[Any], model: nn.Module) -> None:
        """Name the parameters of optimizers that were built without names; check that there is something to log.

        Raises:
            ValueError: no optimizer measures its steps, but statistics of steps are wanted.
        """
        self._noise = None  # of a training that ended within a step
        found = [opt for opt in map(unwrap_optimizer, optimizers) if isinstance(opt, FusedOptimizer)]
        for optimizer in found:
            optimizer.name_parameters(model)
        if self.every is not None and not any(map(_measures, found)):
            raise ValueError(
                f'{self.where}: expected an optimizer such as normkern.SGD(..., stats="tensor"), whose steps are '
                f"measured, got {', '.join(type(unwrap_optimizer(o)).__name__ for o in optimizers) or 'none'}"
                f"{' without stats' if found else ''}; or every=None, to log gradient noise alone"
            )

    def is_due(self, step: int) -> bool:
        """Return whether the statistics of the step with this number are logged, counted from 1."""
        return self.every is not None and step > 0 and step % self.every == 0

    def is_noise_due(self, steps: int) -> bool:
        """Return whether the gradient noise of the next step is measured, after so many steps."""
        return self.noise_every is not None and steps % self.noise_every == 0

    def step_scalars(self, optimizers: Iterable[Any]) -> Scalars:
        """Return the numbers of the last step of every optimizer that measures; with several, by their index."""
        every = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        values: Scalars = {}
        for i, optimizer in enumerate(every):
            if isinstance(optimizer, FusedOptimizer) and _measures(optimizer):
                prefix = f"optimizer{i}/" if len(every) > 1 else ""
                with suppress(RuntimeError):  # a GradScaler has skipped every step so far
                    values |= optimizer.stats().scalars(quantities=self.quantities, prefix=prefix)
        return values

    def measure(self, model: nn.Module, loss: Callable[[Any, Any], Any], batch: Any) -> None:
        """Measure one micro-batch of the next step, and join it with those before.

        The first measurement raises what is wrong with the model. A loss that is not finite, as mixed precision has
        now and then, is left out with a warning.
        """
        try:
            result = GradientNoise.measure(
                model, loss, batch, **{"check": False if self._has_measured else "first", **self.noise_options}
            )
        except FloatingPointError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{self.where}: no gradient noise of this step: {error}", RuntimeWarning, stacklevel=2)
            return
        self._has_measured = True
        self._noise = result if self._noise is None else GradientNoiseResult.join([self._noise, result])

    def noise_scalars(self) -> Scalars:
        """Return the numbers of the micro-batches measured since the last call, and forget them."""
        result, self._noise = self._noise, None
        if result is None:
            return {}
        return result.scalars() if self.noise_quantities is None else result.scalars(self.noise_quantities)


def _measures(optimizer: FusedOptimizer) -> bool:
    return any(group["stats"] is not None for group in optimizer.param_groups)
