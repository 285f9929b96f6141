"""``decay="exponential"`` in one param group: its gauge, its checks, and the running statistics of norms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tracing import is_materialized
from .dtensor import check_summable, is_dtensor, shard, sum_over_shards
from .options import (
    BUFFER,
    GAUGE,
    NORM_BUFFERS,
    SCALE_INVARIANT,
    SGD_DECAYS,
    At,
    caller_level,
    check_decay,
    check_gauge,
    place,
)

#: |<w,g>| / (|w| |g|) above which a loss sees the scale of w.
_COSINE = 1e-3
_NO_NORMS: list[tuple[Tensor, Tensor]] = []
_NONE, _FIRST, _KEPT, _RESTING = ops.Buffers


class GroupGauge:
    """The gauge of one param group during one step; nothing is written before `commit`."""

    __slots__ = ("_at", "_factor", "_judged", "_leaves", "_norms", "_numbers", "_options", "step")

    def __init__(
        self, options: dict[str, Any], at: At, grads: list[Any] | None, state: Any, numbers: Sequence[Any]
    ) -> None:
        """`grads`: where they are not the parameters' own. `numbers`: lr, momentum, dampening, weight_decay, nesterov.

        Raises:
            ValueError: the form of decay is unknown; lr * weight_decay is too large for the momentum; the group is
                differentiable, incomplete, or not scale-invariant.
        """
        self._options, self._at, self._numbers = options, at, numbers
        self._leaves = options["decay"] != "exponential"
        self._judged, self._norms = False, _NO_NORMS
        self._factor = 1.0  # what the stored weights are multiplied with, besides stepping
        self.step: ops.GaugeStep | None = None  # None: nothing to do, or nothing to undo
        if self._leaves:
            check_decay(options["decay"], SGD_DECAYS, at)
        gauge, params = options.get(GAUGE, ops.NEW_GAUGE), options["params"]
        if type(gauge) is not tuple or len(gauge) != 3 or not 0.5 < gauge[0] < 2:
            check_gauge(gauge, place(at))
        if (self._leaves and gauge[:2] == ops.NEW_GAUGE[:2]) or not params:
            return
        if (params[0].grad if grads is None else grads[0]) is None:
            self.check_complete([p.grad for p in params] if grads is None else grads, [])
            return
        if options["differentiable"]:
            raise ValueError(f'{place(at)}: differentiable expected False with decay="exponential", got True')
        # Missing buffers are reported to `check_complete`, where they are read.
        buffers = _KEPT if numbers[1] != 0 else _RESTING if state.get(params[0], {}).get(BUFFER) is not None else _NONE
        self.step = self._take(buffers)
        if numbers[3] != 0 and not self._leaves and not options.get(SCALE_INVARIANT):
            given = [p.grad for p in params] if grads is None else grads
            self.check_complete(given, [])
            self._judged = check_scale_invariance(options, at, params, given)

    def _take(self, buffers: ops.Buffers) -> ops.GaugeStep:
        lr, momentum, dampening, weight_decay, nesterov, *_ = self._numbers
        gauge = self._options.get(GAUGE, ops.NEW_GAUGE)
        step = ops.gauge_step(gauge, lr, momentum, dampening, weight_decay, nesterov, buffers, self._leaves)
        if step is None:
            raise ValueError(self._why_none(gauge[1], lr, momentum, weight_decay))
        self._factor = step.scale if self._leaves else 1 / step.unkeep if step.shift else 1.0
        if self._factor != 1 and self._options.get(NORM_BUFFERS):
            self._norms = norm_buffers(self._options[NORM_BUFFERS], place(self._at))
        return step

    def _why_none(self, z: float, lr: float, momentum: float, weight_decay: float) -> str:
        """Return the sentence for numbers that no step of the gauge follows."""
        most = ops.most_decay(momentum)
        if z != 0 and lr * weight_decay <= most:
            return (
                f"{place(self._at)}: lr {lr!r} is too large for the decay that momentum still carries from earlier "
                f"steps, {momentum!r} * {z:.6g}: expected less than 1 of lr times decay, beyond which no exponential "
                "learning rate follows"
            )
        return (
            f"{place(self._at)}: lr * weight_decay expected at most (1 - sqrt(momentum))^2 = {most:.6g}, and less "
            f"than 1, with momentum {momentum!r}, beyond which no exponential learning rate follows weight decay; got "
            f"{lr!r} * {weight_decay!r} = {lr * weight_decay:.6g}"
        )

    def check_complete(self, grads: Sequence[Any], missing: Sequence[int]) -> None:
        """Check that all parameters of the group take part and have the same past, as they share one gauge.

        Where all are `missing` their buffer, it is the first step with momentum.

        Raises:
            ValueError: some have no gradient; some are `missing` their buffer, and the gauge knows of decay.
        """
        without = [i for i, g in enumerate(grads) if g is None]
        if without and len(without) < len(grads):
            raise ValueError(
                f"{place(self._at)}: {_name(self._options, without[0])} has no gradient but others of its group "
                'have; expected one for each, as decay="exponential" decays a group as a whole'
            )
        if not missing or self.step is None:
            return
        if len(missing) == len(grads):
            self.step = self._take(_FIRST)
            return
        if self.step.before[1] != 0 or self._options["dampening"] != 0 or self._options["momentum"] == 0:
            raise ValueError(
                f"{place(self._at)}: {_name(self._options, missing[0])} has no {BUFFER} but others of its group "
                'have; expected all or none with decay="exponential"'
            )

    @property
    def ratio(self) -> float:
        """The factor for copies of the weights that follow the step: scale before the step over scale after it."""
        if self.step is None:
            return 1.0
        return self.step.scale if self._leaves else self.step.before[0] / self.step.next[0]

    @property
    def factor(self) -> float:
        """The factor for the stored weights, apart from the step."""
        return self._factor

    def commit(self, group: dict[str, Any]) -> bool:
        """Write the new gauge into the param group; return whether the stored weights were rescaled."""
        if self.step is None:
            return False
        if self._leaves:
            del group[GAUGE]
        else:
            group[GAUGE] = self.step.next
            if self._judged:
                group[SCALE_INVARIANT] = True
        if self._factor == 1:
            return False
        rescale_norms(self._norms, self._factor)
        return True


def check_scale_invariance(options: dict[str, Any], at: At, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    r"""Check that the group is scale-invariant, so that a learning rate can take the place of weight decay.

    For every parameter :math:`|\langle w,g\rangle| \le 10^{-3} |w| |g|`, or of the group as a whole where several
    are invariant only together. Synchronises.

    Returns:
        Whether the gradients decide: False where they are zero, infinite or NaN.

    Raises:
        ValueError: it is not so, or a weight is zero.
    """
    sums = _sums(params, grads)
    if sums is None:
        return False
    dots, w_sq, g_sq = sums
    group_grad = math.sqrt(sum(g_sq))
    sizes = [math.sqrt(w * g) for w, g in zip(w_sq, g_sq, strict=True)]
    suspects = []
    for i, p in enumerate(params):
        eps = torch.finfo(p.dtype).eps
        # A gradient of zero, or of rounding errors as a bias before a norm has, decides nothing.
        if math.sqrt(g_sq[i]) <= min(_COSINE, 256 * eps) * group_grad:
            continue
        if w_sq[i] == 0 and p.numel():
            raise ValueError(
                f'{place(at)}: {_name(options, i)} is all zeros, and decay="exponential" expected weights of which '
                "only the direction matters. normkern.invariance.param_groups puts those into a group of their own; "
                "scale_invariant=True in the group skips this check"
            )
        if abs(dots[i]) > max(_COSINE, 4 * eps / math.sqrt(p.numel() or 1)) * sizes[i]:
            suspects.append(i)
    if suspects and abs(sum(dots)) > _COSINE * sum(sizes[i] for i in suspects):
        i = max(suspects, key=lambda i: abs(dots[i]) / sizes[i])
        raise ValueError(
            f"{place(at)}: {_name(options, i)} is not scale-invariant, and would lose its weight decay: "
            f'decay="exponential" expected |<w,g>| of at most {_COSINE:g} |w| |g|, got {dots[i] / sizes[i]:.3g}. '
            "normkern.invariance.param_groups puts the scale-invariant parameters of a model into a group; give the "
            "others coupled decay"
        )
    return math.isfinite(group_grad) and group_grad > 0


def _sums(params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[float], list[float], list[float]] | None:
    """Return <w,g>, |w|^2, |g|^2 of each parameter; None if they have no values."""
    if not all(is_dtensor(x) or is_materialized(x) for x in (*params, *grads)):
        return None
    if ops.kernels_take((*params, *grads)):
        dtypes = zip(params, grads, strict=True)
        if all(p.dtype == g.dtype and p.shape == g.shape for p, g in dtypes):
            return _dots_and_norms(ops.pair_sums(params, grads))
    from ..reference import gradient_sums

    rows = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if is_dtensor(p):
            check_summable(p, f'decay="exponential": params[{i}]')
        w, g = (shard(x, like=p) if is_dtensor(p) else x for x in (p.detach(), g.detach()))
        if not is_materialized(w) or not is_materialized(g):
            return None
        rows.append(gradient_sums(w, g, "tensor").to(params[0].device))
    table = torch.cat(rows)
    sum_over_shards(table, [(slice(i, i + 1), p) for i, p in enumerate(params)])
    return _dots_and_norms(table)


def _dots_and_norms(table: Tensor) -> tuple[list[float], list[float], list[float]]:
    columns = dict(zip(ops.PAIR_SUMS, table.T.tolist(), strict=True))
    return columns["pair_dot"], columns["first_sq"], columns["second_sq"]


def _name(options: dict[str, Any], i: int) -> str:
    names = options.get("param_names")
    return f"params[{i}] ({names[i]!r})" if names else f"params[{i}]"


def norm_buffers(given: Any, where: str) -> list[tuple[Tensor, Tensor]]:
    """Return running means and variances, given norms or pairs of tensors.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(given, (torch.nn.Module, Sequence)):
        raise ValueError(f"{where}: norm_buffers expected a list, got {type(given).__name__}")
    pairs = []
    for i, entry in enumerate([given] if isinstance(given, torch.nn.Module) else given):
        if isinstance(entry, torch.nn.Module):
            mean, var = getattr(entry, "running_mean", 0), getattr(entry, "running_var", 0)
            if mean is None and var is None:  # one that keeps none
                continue
        else:
            mean, var = entry if isinstance(entry, (tuple, list)) and len(entry) == 2 else (entry, None)
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            raise ValueError(
                f"{where}: norm_buffers[{i}] expected a norm with running statistics or a pair (running_mean, "
                f"running_var), got {type(entry).__name__}"
            )
        pairs.append((mean, var))
    return pairs


@torch.no_grad()
def rescale_norms(buffers: list[tuple[Tensor, Tensor]], factor: float) -> None:
    """Rescale running statistics after the weights before them were multiplied by `factor`."""
    for mean, var in buffers:
        mean.mul_(factor)
        var.mul_(factor * factor)


def warn_of_lag(norms: bool, averages: bool) -> None:
    """Warn of running statistics and averages that no group names; the warning points at the caller of the step."""
    parts = []
    if norms:
        parts.append(
            "Running statistics of batch norms behind them are right again after a few batches in training mode; to "
            "keep them right name those norms in the group: norm_buffers=[model.bn1, ...], or norm_buffers=[] if there "
            "are none"
        )
    if averages:
        parts.append(
            "Averages and other copies of the weights (EMA, SWA, Lookahead) are stale: name them in the group: "
            "followers=[ema_model, ...], or followers=[] if there are none"
        )
    warnings.warn(
        'normkern: decay="exponential" has rescaled weights by a power of two. ' + ". ".join(parts),
        UserWarning,
        stacklevel=caller_level(),
    )
