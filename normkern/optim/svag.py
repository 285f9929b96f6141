"""`SVAG`: steps from two gradients in one pass, with the gradient noise from the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import ops
from .clip_options import ClipOptions
from .corrected_decay import with_decay_of_step
from .group_step import Scaler
from .low_precision import PRECISION
from .options import NORM, At, number
from .pair import Pair
from .pair_steps import Pairs, PairSteps, check_norm_is_free
from .run_state import SgdState
from .sgd import SGD
from .sgd_group import SgdGroupStep

_SCALINGS = ("fixed", "continuous")


class SvagState(SgdState):
    """The mutable state of an `SVAG`."""

    __slots__ = ("pairs",)

    def __init__(self, optimizer: Any, clip_options: ClipOptions, part_of: str | None) -> None:
        super().__init__(optimizer, clip_options, part_of)
        self.pairs = Pairs()


class SVAG(PairSteps, SGD):
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

    _called = "SVAG"
    _run: SvagState
    _run_state = SvagState
    _options_of_svag_names = ("l", "momentum_scaling")
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
        self._begin_pairs(noise_decay)

    @property
    def _pairs(self) -> Pairs:
        return self._run.pairs

    def _check_own(self, group: dict[str, Any], where: str) -> None:
        ops.check_l(group["l"], where)
        _check_scaling(group["momentum_scaling"], where)
        check_norm_is_free(group, where)

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[SgdGroupStep]:
        groups = []
        for at, group in zip(self._places(), self.param_groups, strict=True):
            options = self._kernel_options(at.group, group)
            pair = self._pair(at.group, group, inverse_scale)
            groups.append(SgdGroupStep(self._run.plan, self.state, at, options, inverse_scale, pair=pair))
        return groups

    def _kernel_options(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        self._check_own(group, self._place(index))
        group = with_decay_of_step(group, "coupled", self._place(index))
        l, lr = group["l"], number(group["lr"], "lr", At("SGD", index))
        momentum = number(group["momentum"], "momentum", At("SGD", index))
        if group["momentum_scaling"] == "continuous":
            lr, momentum = lr / l**2, _continuous_momentum(momentum, l, self._place(index))
        else:
            lr = lr / l
        return {**group, "lr": lr, "momentum": momentum, "stats": group["stats"] or "tensor"}

    def _pair(self, index: int, group: dict[str, Any], inverse_scale: float) -> Pair | None:
        gradients = self._two_gradients(index, group)
        if gradients is None:
            return None
        first, grads, are_own = gradients
        return Pair(first, grads, are_own, group["l"], self._inverse_scale_of_first(inverse_scale), inverse_scale)


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
