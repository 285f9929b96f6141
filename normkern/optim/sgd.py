"""`SGD`: torch.optim.SGD in one pass over memory, with the norms of the step from the same pass."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._C import _to_dlpack as to_dlpack
from torch._C._autograd import _profiler_enabled
from torch.autograd.graph import increment_version
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import ops
from ..names import parameter_names
from ..tracing import in_dispatch_mode, uncompiled
from .clip_options import CLIPPING, ClipOptions
from .clipping import clip
from .dtensor import has_dtensors, sum_step_over_shards
from .exponential_decay import norm_buffers
from .exponential_groups import find_followers, follow, prepare, true_weights, warn_once
from .fallback import step_with_torch, with_torch_sums
from .followers import FOLLOWERS
from .group_step import GroupStep
from .low_precision import PRECISION, ROUNDING_STEP, check_precision, restore_precision
from .options import (
    GAUGE,
    LR_MULTIPLIERS,
    NORM_BUFFERS,
    SCALE_INVARIANT,
    check_checkpoint,
    check_decay,
    check_key_names,
    check_options,
    check_state,
    number,
    own_tensors,
)
from .parameter_names import PARAM_NAMES, all_names, group_names, names_from_model, remember_names
from .partitions import check_whole, reduced, wrapper_that_splits
from .run_state import RunState, scaler_attribute
from .step_stats import Measured, StepStats


class SGD(torch.optim.SGD):
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
        decay: "coupled", weight decay as part of the gradient; "exponential", as a growing learning rate. Also a group
            key, which may change between steps.
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
            are not one finite number of at least 0 for each parameter.

    Reference: torch.optim.SGD; for the exponential learning rate Li and Arora, arXiv 1910.07454, with constant
    hyperparameters; with any, and nesterov, `ops.gauge_step`.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> opt = SGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> w.grad = torch.tensor([1.0, 1.0])
    >>> opt.step()
    >>> w.detach()
    tensor([0.8990, 1.8980])
    """

    #: Options that torch's SGD does not have.
    _own_options: tuple[str, ...] = ("stats", "decay", *PRECISION)
    _run_state: type[RunState] = RunState

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
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        master_weights: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        group: Any = None,
    ) -> None:
        ops.stats_code(stats, "SGD")
        check_decay(decay, "SGD")
        stored = (state_dtype, stochastic_rounding, rounding_seed, master_weights)
        self._own_defaults: dict[str, Any] = {
            "stats": stats, "decay": decay, **dict(zip(PRECISION, stored, strict=True)),
        }  # fmt: skip
        check_precision(self._own_defaults, "SGD")
        self._check_arguments(params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        clip_options = ClipOptions(max_norm, norm_type, error_if_nonfinite, group)
        clip_options.check("SGD")
        self._run = self._run_state(self, clip_options, wrapper_that_splits())
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
        _alive.add(self)

    def _check_arguments(self, params: Any, **numbers: Any) -> None:
        """Raise for arguments that torch would refuse without their name."""
        who = type(self).__name__
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{who}: params expected parameters or param groups, got the model, {type(params).__name__}; pass "
                "model.parameters() or model.named_parameters()"
            )
        for name, x in numbers.items():
            if not isinstance(x, Tensor):  # reading one would wait for its device
                number(x, name, who)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim.Optimizer`, with the options of a group that the class names.

        A key that is nearly one of them is refused, with the key that was meant; others pass, as in torch. A group
        without names, added to groups that have some, gets those of the model that `name_parameters` was given, else
        its positions, such as "1.0".
        """
        run, index = self._run, len(self.param_groups)
        where = f"SGD: param_groups[{index}]"
        self.defaults.update(self._own_defaults)
        if isinstance(param_group, dict):
            param_group = run.clip_options.without_own_keys(param_group, where)
            check_key_names(param_group, (*self._own_options, *_GROUP_KEYS), where)
            if param_group.get(NORM_BUFFERS) is not None:
                norm_buffers(param_group[NORM_BUFFERS], where)
            self._name_as_others(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group.setdefault(LR_MULTIPLIERS, None) is not None:
                ops.read_lr_multipliers(group[LR_MULTIPLIERS], len(group["params"]), where)
            remember_names(run.names, self.param_groups)
            find_followers(run, self.param_groups, index, where)
        except ValueError:
            self.param_groups.pop()
            raise

    def _name_as_others(self, param_group: dict[str, Any]) -> None:
        """Name the parameters of a new group where the others have names: torch refuses a mixture."""
        params, index = param_group.get("params"), len(self.param_groups)
        if index == 0 or PARAM_NAMES not in self.param_groups[0] or PARAM_NAMES in param_group or params is None:
            return
        model = self._run.model
        known = {} if model is None else parameter_names(model)
        param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        if params and all(isinstance(p, Tensor) for p in params):
            param_group["params"] = [(known.get(p, f"{index}.{i}"), p) for i, p in enumerate(params)]

    def name_parameters(self, model: nn.Module) -> None:
        """Name the parameters as a model does, for `stats`, `SVAG.noise` and monitors, and for checkpoints.

        Frameworks that build param groups without names leave "0.17" for a name. Prefixes of wrappers
        (`DistributedDataParallel`, `torch.compile`, FSDP, Fabric) are left out, as `GradientNoise` does. From now on
        names follow the parameters, when groups are changed, and groups that are added get names of the same model.

        Args:
            model: has all parameters of the optimizer, and may have others.

        Raises:
            TypeError: it is no module. ValueError: a parameter is none of the model's. Nothing is changed.
        """
        run = self._run
        for group, names in zip(self.param_groups, names_from_model(model, self.param_groups), strict=True):
            group[PARAM_NAMES] = names
        run.model = model
        run.names.clear()
        remember_names(run.names, self.param_groups)

    def _names_of(self, groups: list[tuple[int, Any]]) -> list[str]:
        """Return the names of the parameters of groups, given as position and parameters."""
        return all_names(groups, self.param_groups, self._run.names)

    def _name(self, index: int, i: int) -> str:
        """Return the name of a parameter for a sentence."""
        group = self.param_groups[index]
        if not group.get(PARAM_NAMES) and group["params"][i] not in self._run.names:
            return f"params[{i}] of param_groups[{index}]"
        return repr(group_names(index, group, group["params"], self._run.names)[i])

    @property
    def max_norm(self) -> float | None:
        """The limit of the global gradient norm in every step; None: a step clips only with ``step(max_norm=...)``."""
        return self._run.clip_options.max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float | None) -> None:
        self._run.clip_options.max_norm = None if max_norm is None else ops.check_max_norm(max_norm, "SGD.max_norm")

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients before clipping, at the last step that clipped; None before one.

        A float64 tensor of no dimension, not synchronised; what ``step(max_norm=...)`` returns.
        """
        return self._run.grad_norm

    @property
    def found_inf(self) -> Tensor:
        """Whether a GradScaler has found infinities or NaN; set only during its step."""
        return scaler_attribute(self._run.found_inf, "found_inf")

    @found_inf.setter
    def found_inf(self, found: Tensor | None) -> None:
        self._run.found_inf = found

    @found_inf.deleter
    def found_inf(self) -> None:
        self._run.found_inf = None

    @property
    def grad_scale(self) -> Tensor:
        """The factor of the loss in a GradScaler; set only during its step."""
        return scaler_attribute(self._run.grad_scale, "grad_scale")

    @grad_scale.setter
    def grad_scale(self, scale: Tensor | None) -> None:
        self._run.grad_scale = scale

    @grad_scale.deleter
    def grad_scale(self) -> None:
        self._run.grad_scale = None

    def stats(self) -> StepStats:
        """Return the norms and inner products of the last step.

        Returns:
            `StepStats`: float64 tensors on the parameters' device, not synchronised. Each step has its own, which stays
            valid. A step that was skipped by a GradScaler leaves the last one in place.

        Raises:
            RuntimeError: before the first step, or if no param group has ``stats`` set.
        """
        if all(group["stats"] is None for group in self.param_groups):
            raise RuntimeError('SGD.stats: nothing was measured; construct the optimizer with stats="tensor" or "row"')
        if self._run.measured is None:
            raise RuntimeError("SGD.stats: expected a step before it, but none has been taken yet")
        return self._run.measured.stats(self._names_of)

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

    @overload
    def step(self, closure: None = None, *, max_norm: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, max_norm: None = None) -> float: ...
    @overload
    def step(self, closure: None = None, *, max_norm: float | Tensor) -> Tensor: ...
    @overload
    def step(self, closure: Callable[[], float], *, max_norm: float | Tensor) -> tuple[float, Tensor]: ...
    def step(
        self, closure: Callable[[], float] | None = None, *, max_norm: float | Tensor | None = None
    ) -> float | Tensor | tuple[float, Tensor] | None:
        r"""Take a step; with `max_norm`, clip gradients by their global norm n: :math:`g \min(1, m/(n + 10^{-6}))`.

        Args:
            closure: re-evaluates the model and returns the loss.
            max_norm: a number of at least 0. As `torch.nn.utils.clip_grad_norm_` before the step, over all parameters
                of all groups, but that no gradient is written: one pass reads them, the second is the step.

        Without the argument the constructor's `max_norm` holds; torch.inf clips nothing.

        Returns:
            The closure's loss, or None; with `max_norm` the norm before clipping, or (loss, norm): a float64 tensor of
            no dimension on the parameters' device, not synchronised. It is of the unscaled gradients; with
            ``decay="exponential"`` of those of the run with weight decay; without any gradient 0; in a step that a
            GradScaler skips NaN. `stats()` is of the gradients before clipping.

        Raises:
            TypeError: `max_norm` is no number. ValueError: it is negative. Nothing is written, no closure called.
            RuntimeError: the parameters are a part of all, and the norm is not that of all: see `group`.
        """
        if self._needs_torchs_wrapper(SGD.step):
            given: dict[str, Any] = {} if max_norm is None else {"max_norm": max_norm}
            return self._watched_step(**given) if closure is None else self._watched_step(closure, **given)
        return self._plain_step(closure, max_norm=max_norm)

    step.hooked = True  # type: ignore[attr-defined]

    def _needs_torchs_wrapper(self, step: Callable[..., Any]) -> bool:
        """Return whether `step`, of one of our classes, is to run inside torch's wrapper.

        torch wraps every step into hooks and a profiler range, which cost as much as a whole step of twenty small
        tensors. Our steps are marked as wrapped already, and use the wrapper only where there are hooks or a profiler.
        torch has wrapped the step of a subclass that overrides it.
        """
        watched = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        )
        return bool(watched) and type(self).step is step

    def _plain_step(
        self, closure: Callable[[], float] | None = None, *, max_norm: float | Tensor | None = None
    ) -> float | Tensor | tuple[float, Tensor] | None:
        limit = None if max_norm is None else ops.check_max_norm(max_norm, "SGD.step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # One at a time: like torch, an optimizer that two threads step takes the steps in some order.
        with self._run.lock:
            norm = self._step_now(limit)
        if norm is None or max_norm is None:
            return loss
        return norm if loss is None and closure is None else (loss, norm)  # type: ignore[return-value]

    _watched_step = torch.optim.Optimizer.profile_hook_step(_plain_step)

    @uncompiled  # the kernels are opaque to torch.compile; without it would warn at each call of one
    def _step_now(self, max_norm: float | None) -> Tensor | None:
        run = self._run
        clip_options = run.clip_options
        if max_norm is None:
            max_norm = clip_options.max_norm
        if run.true_weights:
            raise RuntimeError("SGD.step: expected a step outside of true_weights(), which restores the weights")
        # A GradScaler leaves these on an optimizer with fused=True for the duration of the call.
        found_inf, grad_scale = run.found_inf, run.grad_scale
        scaler = None
        if found_inf is not None and self._kernel_may_skip(found_inf):
            scaler = (grad_scale, found_inf)
        elif self._skips(found_inf, grad_scale):
            return self._norm_of_skipped(max_norm)
        inverse_scale = 1.0 if grad_scale is None or scaler is not None else 1.0 / float(grad_scale)

        step = run.plan
        step.begin()
        norm = coef = None
        gauged = measures = False
        try:
            groups = self._groups(inverse_scale, scaler)
            if scaler is not None and self._leaves_a_trace(groups) and self._skips(found_inf, grad_scale):
                step.begin()
                return self._norm_of_skipped(max_norm)
            written = step.check(run.written)
            for group in groups:
                measures = measures or group.stats is not None
                gauged = gauged or group.gauge is not None
            if measures or max_norm is not None:
                use = (measures, max_norm is not None)
                if run.whole is not written or run.whole_for != use:
                    params = [p for group in groups for p in group.params]
                    check_whole(params, run.part_of, clip_options.group, *use)
                    run.whole, run.whole_for = written, use
            if max_norm is not None:
                unscaled_by_kernel = None if scaler is None else found_inf
                norm, coef = clip(step, groups, max_norm, clip_options, grad_scale, unscaled_by_kernel, self._name)
            behind = prepare(run, self.param_groups, groups, self._name) if gauged else None
        except BaseException:
            step.begin()  # lets go of the gradients
            raise
        # Nothing has been written so far, and from here on only torch's own loop can fail: it goes first.
        for group in groups:
            if group.left_to_torch:
                step_with_torch(group, grad_scale, coef)
        table = scratch = None
        if measures and not in_dispatch_mode():
            table = ops.new_table(step.slots, step.columns, step.like)
            if step.like is not None:
                scratch = ops.new_scratch(step)
                if scaler is not None and run.measured is not None:  # should the kernel skip
                    table.copy_(run.measured.table)
        step.run(table, scratch)
        increment_version(written)
        if written is not run.written:
            # When C++ takes and drops a reference to a tensor that only Python refers to, torch takes the GIL: a second
            # reference to each buffer saves 25 ns per access. (Not to parameters: they may be part of cycles that only
            # Python's collector can free, and `torch.utils.swap_tensors` requires them to be unshared.)
            run.written = written
            run.dlpack_refs = [to_dlpack(t) for t in written if not t.requires_grad]
        rescaled = self._commit(groups)
        if max_norm is not None:
            run.grad_norm = norm
        if table is not None:
            table = self._measure(table, groups, coef)
        self._stepped(table)
        if rescaled or behind is not None:  # last: a warning may be an error
            warn_once(run, self.param_groups, rescaled, behind)
        return norm

    def _measure(self, table: Tensor, groups: list[GroupStep], clip_coef: Tensor | None) -> Tensor:
        """Complete the table of a step's sums, keep it for `stats`, and return it."""
        run = self._run
        measured: list[tuple[int, float | Tensor, list[Any], int]] = []
        multipliers: dict[int, ops.LrMultipliers] = {}
        fell_back = has_shards = False
        for group in groups:
            if group.stats is not None:
                measured.append((group.index, group.lr_now(), group.params, len(group.params)))
            if group.multipliers is not None:
                multipliers[group.index] = group.multipliers
            fell_back = fell_back or bool(group.torch_sums)
            has_shards = has_shards or (not group.is_whole and has_dtensors(group.params))
        offsets = run.plan.slot_offsets
        if fell_back:
            table = with_torch_sums(table, groups)
        if has_shards:
            self._sum_over_shards(table, groups, offsets)
        run.measured = Measured(table, offsets, measured, multipliers, clip_coef)
        if run.clip_options.group is not None:
            run.measured.totals = reduced(run.measured.own_totals(), run.clip_options.group)
        elif run.part_of is not None:
            run.measured.part_of = run.part_of
        return table

    def _commit(self, groups: list[GroupStep]) -> list[int]:
        """Write what the step has made into the state; return the groups whose stored weights were rescaled."""
        rescaled = []
        for group in groups:
            for p, key, tensor in group.created:
                self.state[p][key] = tensor
            if group.wrappers:
                increment_version(group.wrappers)
            if group.precision is not None:
                group.precision.commit(self.param_groups[group.index])
            if group.gauge is not None and follow(self._run, self.param_groups, self.state, group):
                rescaled.append(group.index)
        return rescaled

    def _norm_of_skipped(self, max_norm: float | None) -> Tensor | None:
        if max_norm is None:
            return None
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        self._run.grad_norm = torch.full((), torch.nan, dtype=torch.float64, device=device)
        return self._run.grad_norm

    def _sum_over_shards(self, table: Tensor, groups: list[GroupStep], offsets: tuple[int, ...]) -> None:
        # Here and not in `stats`, which one rank may ask for alone: a step is what every rank takes.
        if table.shape[1] > len(ops.SUMS) or any(group["stats"] for group in self.param_groups):
            begins = iter(offsets)
            sum_step_over_shards(table, [entry for group in groups for entry in group.measured(begins)])

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        check_options(group, where)
        check_precision(group, where)

    def _skips(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> bool:
        """Return whether a GradScaler has found a gradient with infinities or NaN."""
        return found_inf is not None and float(found_inf) != 0

    def _kernel_may_skip(self, found_inf: Tensor) -> bool:
        """Return whether the kernel is to read `found_inf` itself: it lies beside the parameters, on a CUDA device."""
        there = ops.device_index(found_inf)
        if self._run.clip_options.error_if_nonfinite or self._run.clip_options.norm_type != 2:
            return False
        return there not in (None, -1) and all(
            group["decay"] == "coupled"
            and GAUGE not in group
            and not group["stochastic_rounding"]  # the steps taken are counted here
            and all(p.device == found_inf.device for p in group["params"])
            for group in self.param_groups
        )

    def _leaves_a_trace(self, groups: list[GroupStep]) -> bool:
        """Return whether a step that the kernel skips would still change something, so that the host must know."""
        plan, before = self._run.plan, self._run.measured
        measures = any(group.stats for group in groups)
        return (measures and (before is None or before.table.shape != (plan.slots, plan.columns))) or any(
            group.created or group.left_to_torch or group.wrappers for group in groups
        )

    def _groups(self, inverse_scale: float, scaler: tuple[Tensor | None, Tensor] | None) -> list[GroupStep]:
        """Return every param group, read and checked; write nothing."""
        plan, state = self._run.plan, self.state
        return [
            GroupStep(plan, state, i, group, inverse_scale, scaler=scaler) for i, group in enumerate(self.param_groups)
        ]

    def _stepped(self, table: Tensor | None) -> None:
        """Do what a subclass does after a step, with the table of its sums."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.SGD` does, with the further options, without what belongs to the model.

        That is the norms and followers of a group. With `max_norm` there is one more entry, "clipping".
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop(NORM_BUFFERS, None)
            group.pop(FOLLOWERS, None)
        if self._run.clip_options.max_norm is not None:
            state[CLIPPING] = self._run.clip_options.state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as in `torch.optim.SGD`, whose checkpoints of any age are taken. Options they lack keep their values.

        So do ``stats``, which say how one looks and not what is computed, names of parameters, and what belongs to the
        model. Tensors are copied: no other optimizer shares them afterwards.

        Raises:
            ValueError: entries are missing or no dicts and lists, a buffer does not fit its parameter, an option is no
                number, or the groups differ from the optimizer's. RuntimeError: torch cannot convert a buffer, such as
                one that is quantised. The optimizer is left as it was.
        """
        run = self._run
        owner = run.owner()
        if owner is not None and owner is not self:
            # A wrapper, which torch would load the state into.
            return owner.load_state_dict(state_dict)  # type: ignore[no-any-return]
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"SGD.load_state_dict: expected a dict, got {type(state_dict).__name__}")

        def see(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            check_checkpoint(loaded)
            run.loaded = loaded  # what hooks have made of it, before torch casts everything to the parameters' dtype

        hook = self.register_load_state_dict_pre_hook(see)
        try:
            super().load_state_dict(state_dict)
        except KeyError as missing:
            raise ValueError(
                "SGD.load_state_dict: expected {'state': ..., 'param_groups': [{'params': ..., ...}, ...]}, "
                f"got one without {missing}"
            ) from missing
        finally:
            hook.remove()
            run.loaded = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        options = self._run.clip_options
        return {**state, CLIPPING: (options, self._run.part_of)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by unpickling, deepcopy (no old groups) and load_state_dict (the new groups replace the old ones).
        groups = state["param_groups"]
        is_loading = "_run" in self.__dict__
        defaults = state.get("defaults") or self.defaults
        for i, group in enumerate(groups):
            old = self.param_groups[i] if is_loading else defaults
            for key in defaults:
                group.setdefault(key, old[key])
            for key in (NORM_BUFFERS, FOLLOWERS, SCALE_INVARIANT, ROUNDING_STEP):
                if key in old:
                    group.setdefault(key, old[key])
            group.setdefault(LR_MULTIPLIERS, old.get(LR_MULTIPLIERS))
            self._check_group(group, f"SGD.load_state_dict: param_groups[{i}]")
            for key in ("stats", PARAM_NAMES):
                if is_loading and key in old:
                    group[key] = old[key]
        check_state(state["state"], groups)
        if not is_loading:
            self._restore(state)
            return
        run = self._run
        clip_options = run.clip_options
        if run.loaded is not None:
            restore_precision(state["state"], groups, run.loaded)
            own_tensors(state["state"], run.loaded["state"])
            if CLIPPING in run.loaded:
                clip_options = clip_options.loaded(run.loaded[CLIPPING], "SGD.load_state_dict")
        # In place, for wrappers that have taken these objects.
        own_state, own_groups = self.state, self.param_groups
        new_state = dict(state["state"])
        own_state.clear()
        own_state.update(new_state)
        own_groups[:] = groups
        super().__setstate__({**state, "state": own_state, "param_groups": own_groups})  # type: ignore[no-untyped-call]
        run.clip_options = clip_options
        run.versions.clear()
        remember_names(run.names, own_groups)

    def _restore(self, state: dict[str, Any]) -> None:
        """Take the state of an optimizer that was pickled or copied."""
        options, part_of = state.pop(CLIPPING, (ClipOptions(), None))
        self._run = self._run_state(self, options, part_of)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._own_defaults = {key: self.defaults[key] for key in self._own_options}
        _alive.add(self)
        remember_names(self._run.names, self.param_groups)
        if self.defaults["fused"]:  # torch loses these on the way through pickle
            self._step_supports_amp_scaling = True
            self._need_device_dtype_check_for_fused = True


#: Group keys of ours besides the options.
_GROUP_KEYS = (GAUGE, SCALE_INVARIANT, NORM_BUFFERS, FOLLOWERS, LR_MULTIPLIERS, ROUNDING_STEP)

_alive: weakref.WeakSet[SGD] = weakref.WeakSet()


def _free_locks() -> None:
    """Replace the locks in the child of a fork: a thread that held one exists only in the parent."""
    for optimizer in _alive:
        optimizer._run.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)
