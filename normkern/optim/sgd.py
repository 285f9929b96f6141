"""`SGD`: torch.optim.SGD in one pass over memory, with the norms of the step from the same pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import ops
from .clip_options import ClipOptions
from .corrected_decay import MAX_LR, with_decay_of_step
from .exponential_decay import norm_buffers
from .exponential_groups import find_followers, follow, prepare, true_weights, warn_once
from .followers import FOLLOWERS
from .fused import FusedOptimizer
from .group_step import Scaler
from .low_precision import PRECISION
from .options import (
    BUFFER,
    GAUGE,
    NORM,
    NORM_BUFFERS,
    OPTIONS_OF_OTHERS,
    SCALE_INVARIANT,
    SGD_DECAYS,
    check_decay,
    check_decay_options,
)
from .run_state import SgdState
from .sgd_group import SgdGroupStep


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""Drop-in for `torch.optim.SGD`: same arguments, same state, same numbers, one pass over memory.

    .. math::
        d_t = \pm g_t + \lambda w_t, \quad b_{t+1} = \mu b_t + (1-\tau) d_t, \quad w_{t+1} = w_t - \eta b_{t+1}

    with :math:`b_1 = d_0` for the first gradient of each parameter, and :math:`d_t + \mu b_{t+1}` in place of
    :math:`b_{t+1}` for nesterov. float64, float32, bfloat16 and float16 parameters; arithmetic in float32 (float64 for
    float64) with one rounding when a value is stored, so low precision follows the exact result more closely than
    torch's default loop, which rounds after every operation.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`; every one may change
            between steps.
        foreach: accepted, changes nothing.
        differentiable: takes torch's own path.
        fused: True adds the GradScaler protocol (a skipped step leaves no trace and needs no second pass over the
            gradients; they are unscaled inside the step and never written) and torch's errors for unsupported tensors.
        stats: None, "tensor" or "row": which norms `stats()` returns after a step. Also a group key.
        decay: "coupled", weight decay as part of the gradient; "exponential", as a growing learning rate; "corrected",
            coupled, but lr / max_lr times weight_decay. Also a group key, which may change between steps.
        norm: None; "keep" holds the norm of each parameter at its first value R, "keep_rows" that of each index of its
            first dimension: :math:`w' = R\,N(w - \eta R\,N(u))`, :math:`N(x) = x/|x|`, u the step without lr and
            weight decay, which is not applied. Also a group key. See below.
        state_dtype: dtype of momentum buffers, torch.float32 or torch.bfloat16, for parameters of 32 and 16 bits;
            buffers of another dtype are converted at the next step. None: new buffers have their parameter's dtype.
            Also a group key, as are the others below.
        stochastic_rounding: bfloat16 weights are rounded up or down at random when they are stored, such that
            their mean is the exact value: steps too small for bfloat16 are not lost.
        rounding_seed: seed of its random numbers, which also depend on the coordinate, the parameter's index and the
            number of steps so far, ``group["rounding_step"]``, and on nothing else: not on torch's seed, so that
            replicas round alike, nor on threads or devices. Saved, so that a resumed run equals the uninterrupted one.
        master_weights: parameters of 16 bits get a copy in float32, ``state[p]["master_weight"]``, which every step
            updates; the parameter is the rounded copy. `stats()` has the norms of the copy. If you overwrite weights,
            changed entries replace the master copy.
        max_norm: every step clips gradients as ``step(max_norm=...)`` does, which overrides it, but returns what a step
            without clipping returns: trainers that call ``step()`` clip too. The norm is in `last_grad_norm`. Saved.
        norm_type: of the norm to clip by, at least 1; other norms than the Euclidean one, such as torch.inf, need
            another pass by torch's operations. Saved.
        error_if_nonfinite: a clipped step raises where the norm is not finite, and names the parameter; synchronises.
            Saved.
        group: where the parameters are split over processes, each of which has others (`ZeroRedundancyOptimizer`) or
            other parts (`FullyShardedDataParallel`): the process group over which they are split, or "world" for all
            processes; norms to clip by are summed over it. DTensors need none.

    A group may have the key ``lr_multipliers``, a sequence or vector with one number of at least 0 for each of its
    parameters: the step of the i-th one is with lr times the i-th number, and `stats()` has its `effective_lr`. None
    (the default) is 1 for all. It may change between steps and is saved with the group; on a CUDA device the kernel
    reads a vector that lies there, whose numbers are not checked.

    ``decay="exponential"`` is for scale-invariant weights, such as those before a norm. They are not shrunk; instead
    the learning rate inside the kernel grows as they would have shrunk, and at every step the network computes what it
    would with coupled decay, in training mode: for any schedule of lr, momentum, dampening and weight_decay, and for
    nesterov. (In eval mode running statistics, which lag behind weights that shrink, differ a little.) lr, the other
    options and `stats()` stay those of the run with decay. The stored weights are that run's divided by
    `true_scale()`: powers of two are taken out in the step's own pass, so nothing overflows, however long the run, and
    no decay is lost to rounding in bfloat16. All parameters of a group share one gauge, ``group["gauge"]``, which is
    saved with it. Three more keys of such a group:

    * ``scale_invariant``: True trusts the group. Otherwise it is judged at the first step with a gradient, by
      :math:`|\langle w,g\rangle| \le 10^{-3} |w| |g|`, of each parameter or of all together; this synchronises, once.
    * ``norm_buffers``: the batch norms behind the weights, or pairs (running_mean, running_var), which follow when a
      power of two is taken out; [] if there are none. Without the key a warning says that they lag. Not saved.
    * ``followers``: copies of the weights that are averaged or mixed with them, each a module (an `AveragedModel`, an
      EMA) or a list of tensors in the group's order; [] if there are none. They are multiplied at every step such that
      `true_scale()` times a copy is that of the run with weight decay; running statistics in a module follow as those
      of `norm_buffers` do. A module's tensors are found by the group's names, else by shape and value when the group
      is added. Without the key a warning says that copies are stale. Not saved.

    ``decay="corrected"`` is for scale-invariant weights whose learning rate falls: with
    :math:`\lambda_t = \lambda \eta_t/\eta_{\max}` the ratio of gradient norm to weight norm stays where it was; with a
    constant weight decay it grows as :math:`1/\sqrt{\eta_t}`. The largest learning rate is the group's ``max_lr``,
    which `OneCycleLR` sets, else its ``initial_lr``, which every scheduler sets; without either, or with lr above it, a
    step raises ValueError. A tensor lr is read by the host.

    ``norm="keep"`` needs lr from 0 to below 1, the step relative to R, which is read by the host. R is
    ``state[p]["radius"]``, float64, taken from the weights at the first step, saved and loaded. Delete it to take the
    norms of now. A direction of zeros scales w to R; a NaN or an infinity makes the whole parameter or row NaN. CPU
    tensors take a kernel in two passes, those on other devices torch's operations.

    Sparse and complex tensors, tensor subclasses, gradients of another dtype than their parameter, and devices without
    kernels fall back to torch's own loop; logger "normkern" reports it at level DEBUG. So does everything under a
    dispatch mode or a torch.func transform, and, with `stats`, parameters on other devices than the first. A DTensor is
    stepped through its local shard, and with `stats` every rank has the sums of whole parameters: one small all_reduce
    in each step. Several threads may step one optimizer; their steps are taken one after the other.

    On CUDA devices no step synchronises, and a step can be captured in a graph after a first one: lr and weight_decay
    may be CUDA tensors of one number, which the kernel reads. With ``fused=True`` it also reads what a GradScaler has
    found, except with ``decay="exponential"`` or `stochastic_rounding`; a skipped step then keeps the sums of the last
    one. `stochastic_rounding` cannot be captured: each replay would have the same random numbers.

    Raises, at a step, before anything is written:
        RuntimeError: a parameter is of an integer dtype.
        ValueError: shapes differ; a parameter is expanded, or overlaps another partially; `stats` is no known choice.
            `stochastic_rounding` with a float16 parameter or together with `master_weights`; `state_dtype` with one of
            float64 or a complex dtype; any of these with `differentiable`.
            With ``decay="exponential"``: lr * weight_decay is more than (1 - sqrt(momentum))^2, where no growing
            learning rate follows decay; a parameter has no gradient while others of its group have; the group is not
            scale-invariant, or a weight is zero; `differentiable`; `lr_multipliers`. And everywhere: `lr_multipliers`
            are not one finite number of at least 0 for each parameter. With ``norm=``: lr, times a multiplier, is not
            in [0, 1); a new radius is 0 or not finite; rows of a vector; a DTensor or a complex parameter; another
            `decay` than "coupled"; `differentiable`.
        RuntimeError: ``norm=`` with shards of `FullyShardedDataParallel`.

    Reference: torch.optim.SGD; for the exponential learning rate Li and Arora, arXiv 1910.07454, with constant
    hyperparameters; with any, and nesterov, `ops.gauge_step`; kept norms: Hyperball, arXiv 2606.16899.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> opt = SGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> w.grad = torch.tensor([1.0, 1.0])
    >>> opt.step()
    >>> w.detach()
    tensor([0.8990, 1.8980])
    """

    _who = "SGD"
    _own_options = ("stats", "decay", NORM, *PRECISION)
    _keys_of_model = (NORM_BUFFERS, FOLLOWERS)
    _kept_keys = (NORM_BUFFERS, FOLLOWERS, SCALE_INVARIANT)
    _group_keys = (MAX_LR, GAUGE, SCALE_INVARIANT, NORM_BUFFERS, FOLLOWERS, *FusedOptimizer._group_keys)
    _numbers = ("lr", "momentum", "dampening", "weight_decay")
    _identity = ("momentum", "dampening")
    _buffers = (BUFFER,)
    _options_of_others = OPTIONS_OF_OTHERS
    _run: SgdState
    _run_state = SgdState

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        stats: ops.Stats = None,
        decay: str = "coupled",
        norm: ops.Norm = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        master_weights: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        group: Any = None,
    ) -> None:
        check_decay(decay, SGD_DECAYS, "SGD")
        self._begin(
            {"stats": stats, "decay": decay, NORM: norm},
            (state_dtype, stochastic_rounding, rounding_seed, master_weights),
            ClipOptions(max_norm, norm_type, error_if_nonfinite, group),
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
        )
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
        )

    def true_scale(self) -> list[float]:
        r"""Return the factors by which the param groups' weights are to be multiplied to get the run with weight decay.

        1 where decay is coupled; else between :math:`\sqrt{1/2}` and :math:`\sqrt 2`. The network computes the same
        with either.
        """
        return [group.get(GAUGE, ops.NEW_GAUGE)[0] for group in self.param_groups]

    def true_weights(self) -> AbstractContextManager[None]:
        """Multiply the stored weights with `true_scale()` inside of the context: those of the run with weight decay.

        For evaluation by code that looks at weights, and for export: ``with opt.true_weights():
        torch.save(model.state_dict(), ...)``. Running statistics that ``norm_buffers`` names, and ``followers``, are at
        the same scale. Afterwards everything is as before, to the bit. Takes memory for a copy of such groups.

        Raises:
            RuntimeError: a step inside of it; one context inside of another.
        """
        return true_weights(self._run, self.param_groups)

    def _check_new_group(self, param_group: dict[str, Any], where: str) -> None:
        if param_group.get(NORM_BUFFERS) is not None:
            norm_buffers(param_group[NORM_BUFFERS], where)

    def _check_added_group(self, index: int, where: str) -> None:
        find_followers(self._run, self.param_groups, index, where)

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        super()._check_group(group, where)
        check_decay_options(group, where)

    def _check_may_step(self) -> None:
        if self._run.true_weights:
            raise RuntimeError("SGD.step: expected a step outside of true_weights(), which restores the weights")

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[SgdGroupStep]:
        plan, state = self._run.plan, self.state
        return [
            SgdGroupStep(plan, state, at, with_decay_of_step(group, "coupled", at), inverse_scale, scaler)
            for at, group in zip(self._places(), self.param_groups, strict=True)
        ]

    def _kernel_may_skip(self, found_inf: Tensor) -> bool:
        is_coupled = all(group["decay"] != "exponential" and GAUGE not in group for group in self.param_groups)
        return is_coupled and super()._kernel_may_skip(found_inf)

    def _prepare(self, groups: list[SgdGroupStep]) -> tuple[list[SgdGroupStep], str | None] | None:
        for group in groups:
            if group.gauge is not None:
                return groups, prepare(self._run, self.param_groups, groups, self._name)
        return None

    def _follow(self, prepared: tuple[list[SgdGroupStep], str | None]) -> None:
        for group in prepared[0]:
            if group.gauge is not None:
                group.is_rescaled = follow(self._run, self.param_groups, self.state, group)

    def _warn(self, prepared: tuple[list[SgdGroupStep], str | None]) -> None:
        groups, behind = prepared
        rescaled = [group.index for group in groups if group.is_rescaled]
        if rescaled or behind is not None:
            warn_once(self._run, self.param_groups, rescaled, behind)

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if self.defaults["fused"]:  # torch loses it on the way through pickle
            self._need_device_dtype_check_for_fused = True

    def _after_loading(self) -> None:
        self._run.versions.clear()
