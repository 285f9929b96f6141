"""`PairSteps`: what optimizers share that step from two gradients: hold, step, noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .. import ops
from ..noise.pairs import Noise, NoiseAverage
from ..tracing import uncompiled
from .dtensor import is_dtensor, sum_over_shards
from .fused import FusedOptimizer
from .options import NORM
from .pair_writes import ClippedPairs, SecondGradient, warn_of_clipped_pairs, writes
from .run_state import scaler_attribute

#: The entry of a pickled optimizer.
_NOISE_DECAY = "noise_decay"


class Pairs:
    """What changes in steps from two gradients: what is held, and the averages of signal and noise."""

    __slots__ = ("clipped", "held", "noise", "noise_offsets", "second")

    def __init__(self) -> None:
        self.held: _Held | None = None
        self.clipped = ClippedPairs()
        self.second: SecondGradient | None = None  # of the last step
        self.begin_noise(0.99)

    def begin_noise(self, decay: float) -> None:
        """Begin the averages of signal and noise anew."""
        self.noise = NoiseAverage(decay)
        self.noise_offsets: tuple[int, ...] = ()


class PairSteps(FusedOptimizer):
    """The part of an optimizer that takes steps from the gradients of two independent batches.

    A subclass inherits from it and from a fused optimizer, and names itself in `_called`.
    """

    #: The name of the class in error sentences about pairs.
    _called: ClassVar[str]
    #: Options of pairs, and the values that the constructor was given.
    _options_of_svag_names: ClassVar[tuple[str, ...]]
    _options_of_svag: dict[str, Any]

    @property
    def _pairs(self) -> Pairs:
        """What the run state keeps of pairs."""
        raise NotImplementedError

    def _check_own(self, group: dict[str, Any], where: str) -> None:
        """Check the options of `_options_of_svag` in a group."""
        raise NotImplementedError

    def _kernel_options(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group as the optimizer without pairs must see it, with the numbers of one step, always measured."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as the optimizer without pairs does; `l` and the other options of pairs may be keys of it."""
        self._own_defaults.update(self._options_of_svag)
        if isinstance(param_group, dict):
            where = f"{self._called}: param_groups[{len(self.param_groups)}]"
            self._check_own({**self._options_of_svag, **param_group}, where)
        super().add_param_group(param_group)

    @classmethod
    def _check_decay_of_noise(cls, decay: object) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(
                f"{cls._called}: noise_decay expected a number of at least 0 and less than 1, got {decay!r}"
            )

    @uncompiled  # what it keeps and clears are attributes of objects, no values of a graph
    def hold(self, copy: bool = False, *, scale: float | None = None) -> None:
        """Take the accumulated gradients as the first of each pair, and leave ``.grad`` None for the second.

        Args:
            copy: hold copies; needed where the next backward writes into the same memory.
            scale: the factor of the loss, where ``scaler.unscale_`` will only reach the second set.

        A second call before a step takes nothing, and makes the step raise; `release` undoes both. `zero_grad` leaves
        the held gradients alone.

        Raises:
            RuntimeError: there is no gradient, or the second one of the last step is in it, because nothing cleared it.
            ValueError: scale is not a positive number.
        """
        if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
            raise ValueError(f"{self._called}.hold: scale expected a positive number, got {scale!r}")
        held = self._pairs.held
        if held is not None:
            held.twice = True
            return
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            raise RuntimeError(f"{self._called}.hold: expected a backward before it, but no parameter has a gradient")
        if self._pairs.second is not None and self._pairs.second.was_added_to():
            raise RuntimeError(
                f"{self._called}.hold: the backward has added to the second gradient of the last step, which was "
                "still in .grad; expected zero_grad() after each step, before the next backward"
            )
        self._pairs.second = None
        if copy:
            grads = [None if g is None else g.clone() for g in grads]
        self._pairs.held = _Held(params, grads, scale, copy)
        for p in params:
            p.grad = None

    def release(self) -> None:
        """Forget the held gradients."""
        self._pairs.held = None

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        closure_b: Callable[[], Any] | None = None,
        *,
        max_norm: float | Tensor | None = None,
    ) -> Any:
        """Take a step.

        Args:
            closure: computes the gradients of the second batch, if the first is held; with `closure_b`, of the first.
            closure_b: computes the gradients of the second batch. Each clears the gradients and returns its loss.
            max_norm: as in `SGD.step`, for the combined gradient.

        Returns:
            The closure's loss; with two of them a tuple of both; else None. With `max_norm` (that, norm), or the norm.
        """
        if self._needs_torchs_wrapper(PairSteps.step):
            given: dict[str, Any] = {"closure_b": closure_b, "max_norm": max_norm}
            given = {name: x for name, x in given.items() if x is not None}
            return self._watched_step(**given) if closure is None else self._watched_step(closure, **given)
        return self._plain_step(closure, closure_b, max_norm=max_norm)

    step.hooked = True  # type: ignore[attr-defined]

    def _plain_step(
        self,
        closure: Callable[[], Any] | None = None,
        closure_b: Callable[[], Any] | None = None,
        *,
        max_norm: float | Tensor | None = None,
    ) -> Any:
        limit = None if max_norm is None else ops.check_max_norm(max_norm, f"{self._called}.step")
        result = None
        if closure_b is not None:
            if closure is None:
                raise ValueError(f"{self._called}.step: closure_b expected a closure before it, got None")
            if self._pairs.held is not None:
                raise RuntimeError(
                    f"{self._called}.step: expected nothing held before two closures, but hold() was called"
                )
            with torch.enable_grad():
                first = closure()
            self.hold()
            try:
                with torch.enable_grad():
                    result = (first, closure_b())
                norm = self._step_locked(limit)
            finally:
                self._pairs.held = None
            return result if norm is None or max_norm is None else (result, norm)
        if closure is not None:
            self._check_order()
            with torch.enable_grad():
                result = closure()
        norm = self._step_locked(limit)
        if norm is None or max_norm is None:
            return result
        return norm if closure is None else (result, norm)

    _watched_step = torch.optim.Optimizer.profile_hook_step(_plain_step)  # type: ignore[arg-type]

    def _step_locked(self, max_norm: float | None) -> Tensor | None:
        with self._run.lock:
            return self._step_now(max_norm)

    def noise(self) -> Noise:
        """Return signal and noise of the batch gradient, averaged over the steps so far; see `Noise`.

        Averages are not part of the state_dict; they begin anew when the parameters change.

        Raises:
            RuntimeError: no step has had a pair of gradients yet.
        """
        pairs, part_of = self._pairs, self._run.part_of
        if pairs.noise.count == 0:
            raise RuntimeError(
                f"{self._called}.noise: expected a step from two gradients before it, but none has been taken yet"
            )
        if part_of is not None:
            raise RuntimeError(
                f"{self._called}.noise: {part_of} has given this rank a part of the parameters, and the noise of all "
                "is not known here; expected torch.distributed.fsdp.fully_shard, or an optimizer of all parameters"
            )
        names = self._names_of([(i, group["params"]) for i, group in enumerate(self.param_groups)])
        ends = (*pairs.noise_offsets[1:], pairs.noise.slots)
        slots = {n: slice(a, b) for n, a, b in zip(names, pairs.noise_offsets, ends, strict=False)}
        return pairs.noise.result(list(slots), slots)

    def _check_order(self) -> None:
        """Check the order of backward, hold, backward, step."""
        held = self._pairs.held
        if held is None and not self.state and not any(float(g["lr"]) for g in self.param_groups):
            return  # torch.distributed.checkpoint makes the state by a step with lr 0, which moves nothing
        if held is not None and held.twice:
            raise RuntimeError(
                f"{self._called}.step: hold() was called twice; expected backward, hold, backward, step "
                "(release() forgets what is held)"
            )
        if held is None:
            for index, group in enumerate(self.param_groups):
                if group["l"] != 1:
                    raise RuntimeError(
                        f"{self._place(index)}: l is {group['l']!r} but nothing is held; "
                        "expected hold() between two backwards"
                    )

    def _place(self, index: int) -> str:
        return f"{self._called}.step: param_groups[{index}]"

    def _skips(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> bool:
        self._check_order()
        held = self._pairs.held
        if found_inf is None or held is None:
            return super()._skips(found_inf, grad_scale)
        if grad_scale is None and held.scale is None:
            raise RuntimeError(
                f"{self._called}.step: the scaler has unscaled .grad but not the held gradients; "
                "expected hold(scale=scaler.get_scale())"
            )
        skips = super()._skips(found_inf, grad_scale)
        if skips:
            self._pairs.held = None
        return skips

    @property
    def found_inf(self) -> Tensor:
        """Infinities or NaN that a GradScaler has found in ``.grad`` or in held gradients; set only during its step."""
        return scaler_attribute(self._run.found_inf, "found_inf")

    @found_inf.setter
    def found_inf(self, found: Tensor | None) -> None:
        # The scaler looks at `.grad` alone, and passes copies of what it found. Its own findings, from which it will
        # choose the next scale, lie in the frame that sets this attribute; there is no public way to add to them.
        held = self._pairs.held
        if found is not None and held is not None and not held.is_finite():
            findings = sys._getframe(1).f_locals.get("optimizer_state", {}).get("found_inf_per_device", {})
            for device_found in findings.values():
                device_found.fill_(1.0)
            found = torch.ones_like(found)
        self._run.found_inf = found

    @found_inf.deleter
    def found_inf(self) -> None:
        self._run.found_inf = None

    def _kernel_may_skip(self, found_inf: Tensor) -> bool:
        return False  # a skipped step must release the held gradients, on the host

    def _two_gradients(self, index: int, group: dict[str, Any]) -> tuple[list[Any], list[Any], bool] | None:
        """Return the first and the second gradients of a group, and whether the second are its parameters' own.

        None if nothing is held. At l = 1 a parameter that has one gradient has it as the second one.
        """
        held, l = self._pairs.held, group["l"]
        if held is None:
            return None
        params = group["params"]
        first: list[Any] = held.grads_of(params)
        grads: list[Any] = [p.grad for p in params]
        if not _has_none(first) and not _has_none(grads):
            return first, grads, True
        for i, (a, b) in enumerate(zip(first, grads, strict=True)):
            if a is not None and b is not None:
                continue
            if l == 1:
                first[i], grads[i] = None, a  # the first batch's, if it has one
                continue
            if (a is None) != (b is None):
                which, other = ("held", "new") if a is None else ("new", "held")
                raise RuntimeError(
                    f"{self._place(index)}: params[{i}] has a {other} gradient but no {which} one; "
                    "expected both or neither"
                )
        return first, grads, False

    def _inverse_scale_of_first(self, inverse_scale: float) -> float:
        """Return 1/scale of the held gradients, where `inverse_scale` is that of the others."""
        held = self._pairs.held
        return inverse_scale if held is None or held.scale is None else 1 / held.scale

    def _stepped(self, table: Tensor | None) -> None:
        pairs, measured = self._pairs, self._run.measured
        held, pairs.held = pairs.held, None
        if table is None or table.shape[1] == len(ops.SUMS):
            return
        if not pairs.noise.fits(len(table)):
            pairs.begin_noise(pairs.noise.decay)
        assert measured is not None
        pairs.noise_offsets = measured.offsets

        def seen() -> Tensor:
            # NaN means no pair, or a pair that holds a NaN: then the step has one in a parameter that had none before.
            weight_sq, grad_sq, pair_dot = (ops.column(table, name) for name in ("weight_sq", "grad_sq", "pair_dot"))
            return ~pair_dot.isnan() | (grad_sq.isnan() & ~weight_sq.isnan())

        pairs.noise.add(table[:, len(ops.SUMS) :], seen)
        # scaler.unscale_, which `hold` was told of, has written the second gradients once
        if held is not None:
            pairs.second = SecondGradient(held.params)
            if pairs.clipped.add(len(held.params), held.writes_of, held.scale is not None):
                warn_of_clipped_pairs()

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        super()._check_group(group, where)
        self._check_own(group, where)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), _NOISE_DECAY: self._pairs.noise.decay}

    def _restore(self, state: dict[str, Any]) -> None:
        noise_decay = state.pop(_NOISE_DECAY, 0.99)
        super()._restore(state)
        self._options_of_svag = {key: self.defaults[key] for key in self._options_of_svag_names}
        self._begin_pairs(noise_decay)

    def _begin_pairs(self, noise_decay: float) -> None:
        """Begin the averages, after the constructor of torch's optimizer."""
        self._pairs.begin_noise(noise_decay)
        # The scaler passes its scale instead of unscaling `.grad`, which has only half of the gradients.
        self._step_supports_amp_scaling = True


class _Held:
    """The first gradients of a step's pairs."""

    __slots__ = ("are_copies", "grads", "params", "scale", "twice")

    def __init__(self, params: list[Tensor], grads: list[Any], scale: float | None, are_copies: bool) -> None:
        # By id: hashing a tensor calls Python code. The list keeps the ids from being used again.
        self.params, self.grads = params, dict(zip(map(id, params), grads, strict=True))
        self.scale, self.are_copies, self.twice = scale, are_copies, False

    def writes_of(self, i: int) -> tuple[int | None, int | None]:
        """Return how often both gradients of the i-th parameter were written in place, for `ClippedPairs`."""
        p = self.params[i]
        return (None if self.are_copies else writes(self.grads[id(p)])), writes(p.grad)

    def grads_of(self, params: list[Tensor]) -> list[Any]:
        """Return the held gradient of each parameter; None for one without."""
        return list(map(self.grads.get, map(id, params)))

    def is_finite(self) -> bool:
        """Return whether every coordinate is finite."""
        grads = [g for g in self.grads.values() if g is not None]
        values = [g.to_local() if is_dtensor(g) else g if g.layout == torch.strided else g.to_dense() for g in grads]
        total = get_total_norm([x for x in values if x.numel()], math.inf)
        table = (~torch.isfinite(total)).double().expand(len(grads)).reshape(-1, 1).clone()
        sum_over_shards(table, [(slice(i, i + 1), g) for i, g in enumerate(grads)])  # all ranks must know
        return not bool(table.any())


def check_norm_is_free(group: dict[str, Any], where: str) -> None:
    """Check that a group keeps no norms."""
    if group.get(NORM) is not None:
        raise ValueError(
            f"{where}: norm expected None, as the equation that SVAG follows is that of steps whose norm is free, got "
            f"{group[NORM]!r}"
        )


def _has_none(entries: list[Any]) -> bool:
    return type(None) in set(map(type, entries))
