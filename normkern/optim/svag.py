"""`SVAG`: steps from two gradients in one pass, with the gradient noise from the same pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import ParamsT

from .. import ops
from ..noise.pairs import Noise, NoiseAverage
from ..tracing import uncompiled
from .clip_options import ClipOptions
from .corrected_decay import with_decay_of_step
from .dtensor import is_dtensor, sum_over_shards
from .group_step import Scaler
from .low_precision import PRECISION
from .options import NORM, At, number
from .pair import Pair
from .pair_writes import ClippedPairs, SecondGradient, warn_of_clipped_pairs, writes
from .run_state import SgdState, scaler_attribute
from .sgd import SGD
from .sgd_group import SgdGroupStep

_SCALINGS = ("fixed", "continuous")
#: The entry of a pickled optimizer.
_NOISE_DECAY = "noise_decay"


class SvagState(SgdState):
    """The mutable state of an `SVAG`."""

    __slots__ = ("clipped_pairs", "held", "noise", "noise_offsets", "second")

    def __init__(self, optimizer: Any, clip_options: ClipOptions, part_of: str | None) -> None:
        super().__init__(optimizer, clip_options, part_of)
        self.held: _Held | None = None
        self.clipped_pairs = ClippedPairs()
        self.second: SecondGradient | None = None  # of the last step
        self.begin_noise(0.99)

    def begin_noise(self, decay: float) -> None:
        """Begin the averages of signal and noise anew."""
        self.noise = NoiseAverage(decay)
        self.noise_offsets: tuple[int, ...] = ()


class SVAG(SGD):
    r"""Stochastic Variance Amplified Gradient: SGD whose noise and step are scaled towards the stochastic differential
    equation, :class:`normkern.SGD` in all else.

    .. math::
        g = \tfrac12 (g_1 + g_2) + \tfrac12\sqrt{2l-1}\,(g_1 - g_2), \qquad w' = w - \tfrac{\eta}{l}\,(g + \lambda w)

    with the gradients :math:`g_1, g_2` of two independent batches of one size: the mean of either and l times its
    covariance. Take l times as many steps to cover the same training time; as l grows the run approaches the SDE with
    error O(1/l). The combination is formed in the step's own pass and never written.

    A step is ``loss_a.backward(); opt.hold(); loss_b.backward(); opt.step()``, after an ``opt.zero_grad()``, or
    ``opt.step(closure_a, closure_b)``. Each half has its own forward pass, so batch normalisation sees batches of the
    usual size; its running statistics see both. `halves` splits a loader's batch, `SvagSchedule` runs a
    schedule l times slower.

    Args:
        params, lr, momentum, ...: as in `SGD`. ``group["lr"]`` stays the user's; the kernel's is lr/l.
        l: real, at least 1/2, which is one step with a doubled batch and a doubled learning rate; 1 is SGD. Also a
            group key; may change between steps.
        momentum_scaling: "fixed" keeps the momentum as l grows; "continuous" keeps the time it averages over:
            :math:`1-\mu_l = (1-\mu)/l` with :math:`\eta/l^2` in the kernel. Also a group key.
        noise_decay: decay per step of the averages that `noise` returns.

    Do not clip between `hold` and `step` (``clip_grad_norm_``, the default of some trainers): that sees ``.grad``, the
    second gradient alone, and the two are no longer a pair. `max_norm` clips their combination. A warning is given
    where something writes the second gradients in place and not the first ones (not after ``hold(copy=True)``).

    Weight decay is not scaled: a step decays by lr/l times it. `stats()` is of the combined gradient and of lr as the
    kernel has it. With l = 1 one backward is enough, held or not, and the step is SGD's to the bit; of two gradients
    the first is used. Under a GradScaler both sets are unscaled and checked; after ``scaler.unscale_(opt)``, which sees
    ``.grad`` alone, the step needs ``hold(scale=scaler.get_scale())``.

    Raises, at a step, before anything is written:
        RuntimeError: l is not 1 and nothing is held; `hold` was called twice; a parameter has only one of its two
            gradients; both share memory (as with DDP's ``gradient_as_bucket_view=True``: ``hold(copy=True)``).
        ValueError: l < 1/2, momentum_scaling is unknown or gives a negative momentum; as `SGD`.

    Reference: Li, Malladi and Arora, arXiv 2102.12470, section 4; momentum is not in the paper.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> opt = SVAG([w], lr=0.4, l=5)
    >>> w.grad = torch.tensor([1.0])
    >>> opt.hold()
    >>> w.grad = torch.tensor([3.0])
    >>> opt.step()  # g = 2 + 3/2 (1 - 3) = -1, lr = 0.08
    >>> w.detach()
    tensor([1.0800])
    >>> opt.noise().trace_sigma.item()
    2.0
    """

    _run: SvagState
    _run_state = SvagState
    _own_options = ("stats", "decay", NORM, *PRECISION, "l", "momentum_scaling")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        l: float = 1.0,
        *,
        momentum_scaling: str = "fixed",
        noise_decay: float = 0.99,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        stats: ops.Stats = None,
        decay: str = "coupled",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        master_weights: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        group: Any = None,
    ) -> None:
        ops.check_l(l, "SVAG")
        _check_scaling(momentum_scaling, "SVAG")
        self._check_decay_of_noise(noise_decay)
        self._options_of_svag = {"l": l, "momentum_scaling": momentum_scaling}
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            stats=stats,
            decay=decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
            master_weights=master_weights,
            max_norm=max_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
            group=group,
        )
        self._run.begin_noise(noise_decay)
        # The scaler passes its scale instead of unscaling `.grad`, which has only half of the gradients.
        self._step_supports_amp_scaling = True

    @staticmethod
    def _check_decay_of_noise(decay: object) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(f"SVAG: noise_decay expected a number of at least 0 and less than 1, got {decay!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `SGD`; `l` and `momentum_scaling` may be keys of the group."""
        self._own_defaults.update(self._options_of_svag)
        if isinstance(param_group, dict):
            _check_own({**self._options_of_svag, **param_group}, f"SVAG: param_groups[{len(self.param_groups)}]")
        super().add_param_group(param_group)

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
            raise ValueError(f"SVAG.hold: scale expected a positive number, got {scale!r}")
        held = self._run.held
        if held is not None:
            held.twice = True
            return
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            raise RuntimeError("SVAG.hold: expected a backward before it, but no parameter has a gradient")
        if self._run.second is not None and self._run.second.was_added_to():
            raise RuntimeError(
                "SVAG.hold: the backward has added to the second gradient of the last step, which was still in .grad; "
                "expected zero_grad() after each step, before the next backward"
            )
        self._run.second = None
        if copy:
            grads = [None if g is None else g.clone() for g in grads]
        self._run.held = _Held(params, grads, scale, copy)
        for p in params:
            p.grad = None

    def release(self) -> None:
        """Forget the held gradients."""
        self._run.held = None

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
        if self._needs_torchs_wrapper(SVAG.step):
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
        limit = None if max_norm is None else ops.check_max_norm(max_norm, "SVAG.step")
        result = None
        if closure_b is not None:
            if closure is None:
                raise ValueError("SVAG.step: closure_b expected a closure before it, got None")
            if self._run.held is not None:
                raise RuntimeError("SVAG.step: expected nothing held before two closures, but hold() was called")
            with torch.enable_grad():
                first = closure()
            self.hold()
            try:
                with torch.enable_grad():
                    result = (first, closure_b())
                norm = self._step_locked(limit)
            finally:
                self._run.held = None
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
        run = self._run
        if run.noise.count == 0:
            raise RuntimeError("SVAG.noise: expected a step from two gradients before it, but none has been taken yet")
        if run.part_of is not None:
            raise RuntimeError(
                f"SVAG.noise: {run.part_of} has given this rank a part of the parameters, and the noise of all is not "
                "known here; expected torch.distributed.fsdp.fully_shard, or an optimizer of all parameters"
            )
        names = self._names_of([(i, group["params"]) for i, group in enumerate(self.param_groups)])
        ends = (*run.noise_offsets[1:], run.noise.slots)
        slots = {n: slice(a, b) for n, a, b in zip(names, run.noise_offsets, ends, strict=False)}
        return run.noise.result(list(slots), slots)

    def _check_order(self) -> None:
        """Check the order of backward, hold, backward, step."""
        held = self._run.held
        if held is None and not self.state and not any(float(g["lr"]) for g in self.param_groups):
            return  # torch.distributed.checkpoint makes the state by a step with lr 0, which moves nothing
        if held is not None and held.twice:
            raise RuntimeError(
                "SVAG.step: hold() was called twice; expected backward, hold, backward, step "
                "(release() forgets what is held)"
            )
        if held is None:
            for index, group in enumerate(self.param_groups):
                if group["l"] != 1:
                    raise RuntimeError(
                        f"{self._place(index)}: l is {group['l']!r} but nothing is held; "
                        "expected hold() between two backwards"
                    )

    @staticmethod
    def _place(index: int) -> str:
        return f"SVAG.step: param_groups[{index}]"

    def _skips(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> bool:
        self._check_order()
        held = self._run.held
        if found_inf is None or held is None:
            return super()._skips(found_inf, grad_scale)
        if grad_scale is None and held.scale is None:
            raise RuntimeError(
                "SVAG.step: the scaler has unscaled .grad but not the held gradients; "
                "expected hold(scale=scaler.get_scale())"
            )
        skips = super()._skips(found_inf, grad_scale)
        if skips:
            self._run.held = None
        return skips

    @property
    def found_inf(self) -> Tensor:
        """Infinities or NaN that a GradScaler has found in ``.grad`` or in held gradients; set only during its step."""
        return scaler_attribute(self._run.found_inf, "found_inf")

    @found_inf.setter
    def found_inf(self, found: Tensor | None) -> None:
        # The scaler looks at `.grad` alone, and passes copies of what it found. Its own findings, from which it will
        # choose the next scale, lie in the frame that sets this attribute; there is no public way to add to them.
        held = self._run.held
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

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[SgdGroupStep]:
        groups = []
        for at, group in zip(self._places(), self.param_groups, strict=True):
            options = self._kernel_options(at.group, group)
            pair = self._pair(at.group, group, inverse_scale)
            groups.append(SgdGroupStep(self._run.plan, self.state, at, options, inverse_scale, pair=pair))
        return groups

    def _kernel_options(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the group as SGD must see it: lr and momentum as they are in the kernel, and always measured."""
        _check_own(group, self._place(index))
        group = with_decay_of_step(group, "coupled", self._place(index))
        l, lr = group["l"], number(group["lr"], "lr", At("SGD", index))
        momentum = number(group["momentum"], "momentum", At("SGD", index))
        if group["momentum_scaling"] == "continuous":
            lr, momentum = lr / l**2, _continuous_momentum(momentum, l, self._place(index))
        else:
            lr = lr / l
        return {**group, "lr": lr, "momentum": momentum, "stats": group["stats"] or "tensor"}

    def _pair(self, index: int, group: dict[str, Any], inverse_scale: float) -> Pair | None:
        held, l = self._run.held, group["l"]
        if held is None:
            return None
        params = group["params"]
        first = held.grads_of(params)
        grads: list[Any] = [p.grad for p in params]
        of_first = inverse_scale if held.scale is None else 1 / held.scale
        if not _has_none(first) and not _has_none(grads):
            return Pair(first, grads, True, l, of_first, inverse_scale)
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
        return Pair(first, grads, False, l, of_first, inverse_scale)

    def _stepped(self, table: Tensor | None) -> None:
        run = self._run
        held, run.held = run.held, None
        if table is None or table.shape[1] == len(ops.SUMS):
            return
        if not run.noise.fits(len(table)):
            run.begin_noise(run.noise.decay)
        assert run.measured is not None
        run.noise_offsets = run.measured.offsets

        def seen() -> Tensor:
            # NaN means no pair, or a pair that holds a NaN: then the step has one in a parameter that had none before.
            weight_sq, grad_sq, pair_dot = (ops.column(table, name) for name in ("weight_sq", "grad_sq", "pair_dot"))
            return ~pair_dot.isnan() | (grad_sq.isnan() & ~weight_sq.isnan())

        run.noise.add(table[:, len(ops.SUMS) :], seen)
        # scaler.unscale_, which `hold` was told of, has written the second gradients once
        if held is not None:
            run.second = SecondGradient(held.params)
            if run.clipped_pairs.add(len(held.params), held.writes_of, held.scale is not None):
                warn_of_clipped_pairs()

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        super()._check_group(group, where)
        _check_own(group, where)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), _NOISE_DECAY: self._run.noise.decay}

    def _restore(self, state: dict[str, Any]) -> None:
        noise_decay = state.pop(_NOISE_DECAY, 0.99)
        super()._restore(state)
        self._options_of_svag = {key: self.defaults[key] for key in ("l", "momentum_scaling")}
        self._run.begin_noise(noise_decay)
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


def _has_none(entries: list[Any]) -> bool:
    return type(None) in set(map(type, entries))


def _check_own(group: dict[str, Any], where: str) -> None:
    ops.check_l(group["l"], where)
    _check_scaling(group["momentum_scaling"], where)
    if group.get(NORM) is not None:
        raise ValueError(
            f"{where}: norm expected None, as the equation that SVAG follows is that of steps whose norm is free, got "
            f"{group[NORM]!r}"
        )


def _check_scaling(scaling: object, where: str) -> None:
    if scaling not in _SCALINGS:
        raise ValueError(f'{where}: momentum_scaling expected "fixed" or "continuous", got {scaling!r}')


def _continuous_momentum(momentum: float, l: float, where: str) -> float:
    scaled = 1 - (1 - momentum) / l
    if scaled < 0:
        raise ValueError(
            f'{where}: momentum_scaling="continuous" expected 1 - (1 - momentum)/l of at least 0, '
            f"got {scaled:.6g} from momentum {momentum!r} and l {l!r}"
        )
    return scaled if l != 1 else momentum


def svag_combine_(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], l: float) -> None:
    r"""Combine two gradients as SVAG does, in place into `grads_a`, for any other optimizer; see `ops.svag_combine_`.

    Tensors that no kernel takes (other devices, sparse, complex, subclasses) fall back to torch. Divide the optimizer's
    learning rate by l.

    Raises:
        ValueError: lengths or shapes differ, l < 1/2. TypeError: dtypes differ, only one of two is None. Nothing is
            written.

    >>> a, b = torch.tensor([1.0]), torch.tensor([3.0])
    >>> svag_combine_([a], [b], l=5)
    >>> a
    tensor([-1.])
    """
    a, b = list(grads_a), list(grads_b)
    if ops.kernels_take((*a, *b)):
        return ops.svag_combine_(a, b, l)
    from .. import reference

    ops.check_l(l, "svag_combine_")
    ops.check_pairs("svag_combine_", a, b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        ops.check_storage(x, f"svag_combine_: grads_a[{i}]")
        ops.check_storage(y, f"svag_combine_: grads_b[{i}]")
    reference.svag_combine_(a, b, l)
