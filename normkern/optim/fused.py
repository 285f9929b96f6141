"""`FusedOptimizer`: what the optimizers share: a step of all groups in one pass, its sums, clipping, checkpoints."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch._C import _to_dlpack as to_dlpack
from torch._C._autograd import _profiler_enabled
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import ops
from ..names import parameter_names
from ..tracing import in_dispatch_mode, uncompiled
from .clip_options import CLIPPING, ClipOptions
from .clipping import clip
from .dtensor import has_dtensors, sum_step_over_shards
from .fallback import step_with_torch, with_torch_sums
from .group_step import Scaler
from .low_precision import PRECISION, ROUNDING_STEP, check_precision, restore_precision
from .options import (
    LR_MULTIPLIERS,
    NORM,
    At,
    check_checkpoint,
    check_key_names,
    check_options,
    check_state,
    number,
    own_tensors,
)
from .parameter_names import PARAM_NAMES, all_names, group_names, names_from_model, remember_names
from .partitions import check_whole, reduced, wrapper_that_splits
from .run_state import RunState, scaler_attribute
from .sphere import check_radii
from .step_stats import Measured, StepStats


class FusedOptimizer(torch.optim.Optimizer):
    """The part of an optimizer that knows no update rule. A subclass inherits from it and from torch's optimizer."""

    #: The name in error sentences.
    _who: ClassVar[str]
    #: Options that torch's optimizer does not have, and other group keys of ours.
    _own_options: tuple[str, ...] = ("stats", NORM, *PRECISION)
    _group_keys: tuple[str, ...] = (LR_MULTIPLIERS, ROUNDING_STEP)
    #: Of those, what belongs to the model and is not saved, and what a checkpoint without it does not change.
    _keys_of_model: tuple[str, ...] = ()
    _kept_keys: tuple[str, ...] = ()
    #: Options that are numbers; entries of the state that are as large as their parameter.
    _numbers: tuple[str, ...]
    _buffers: tuple[str, ...]
    #: Options that tell its checkpoints from those of others, and sets of options that it does not have, each with a
    #: sentence about optimizers that do.
    _identity: tuple[str, ...]
    _options_of_others: Mapping[tuple[str, ...], str]
    #: Whether the size of an update does not depend on that of the gradient.
    _is_adaptive = False
    _run_state: type[RunState] = RunState

    def _begin(
        self,
        own_defaults: dict[str, Any],
        stored: tuple[Any, ...],
        clip_options: ClipOptions,
        params: Any,
        **numbers: Any,
    ) -> None:
        """Check what torch's constructor does not know, and make the run state; to be called before it.

        Args:
            own_defaults: defaults of `_own_options` without those of `PRECISION`.
            stored: those of `PRECISION`, in order.
            clip_options: how the optimizer clips.
            params, numbers: arguments that torch would refuse without their name.
        """
        ops.stats_code(own_defaults["stats"], self._who)
        ops.check_norm(own_defaults[NORM], self._who)
        self._own_defaults: dict[str, Any] = {**own_defaults, **dict(zip(PRECISION, stored, strict=True))}
        check_precision(self._own_defaults, self._who)
        self._check_arguments(params, **numbers)
        clip_options.check(self._who)
        self._run = self._run_state(self, clip_options, wrapper_that_splits())
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
        where = f"{self._who}: param_groups[{index}]"
        self.defaults.update(self._own_defaults)
        if isinstance(param_group, dict):
            param_group = run.clip_options.without_own_keys(param_group, where)
            check_key_names(param_group, (*self._own_options, *self._group_keys), where)
            self._check_new_group(param_group, where)
            self._name_as_others(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group.setdefault(LR_MULTIPLIERS, None) is not None:
                ops.read_lr_multipliers(group[LR_MULTIPLIERS], len(group["params"]), where)
            remember_names(run.names, self.param_groups)
            self._check_added_group(index, where)
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
        for group, names in zip(self.param_groups, names_from_model(model, self.param_groups, self._who), strict=True):
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
        where = f"{self._who}.max_norm"
        self._run.clip_options.max_norm = None if max_norm is None else ops.check_max_norm(max_norm, where)

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
            raise RuntimeError(
                f'{self._who}.stats: nothing was measured; construct the optimizer with stats="tensor" or "row"'
            )
        if self._run.measured is None:
            raise RuntimeError(f"{self._who}.stats: expected a step before it, but none has been taken yet")
        return self._run.measured.stats(self._names_of)

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
        if self._needs_torchs_wrapper(FusedOptimizer.step):
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
        limit = None if max_norm is None else ops.check_max_norm(max_norm, f"{self._who}.step")
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
        self._check_may_step()
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
        measures = keeps = False
        try:
            groups = self._groups(inverse_scale, scaler)
            if scaler is not None and self._leaves_a_trace(groups) and self._skips(found_inf, grad_scale):
                step.begin()
                return self._norm_of_skipped(max_norm)
            written = step.check(run.written)
            for group in groups:
                measures = measures or group.stats is not None
                keeps = keeps or group.sphere is not None
            if measures or keeps or max_norm is not None:
                use = (measures, max_norm is not None, keeps)
                if run.whole is not written or run.whole_for != use:
                    params = [p for group in groups for p in group.params]
                    check_whole(self._who, params, run.part_of, clip_options.group, *use)
                    run.whole, run.whole_for = written, use
            if max_norm is not None:
                unscaled_by_kernel = None if scaler is None else found_inf
                norm, coef = clip(step, groups, max_norm, clip_options, grad_scale, unscaled_by_kernel, self._name)
            prepared = self._prepare(groups)
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
        self._commit(groups)
        if prepared is not None:
            self._follow(prepared)
        if max_norm is not None:
            run.grad_norm = norm
        if table is not None:
            table = self._measure(table, groups, coef)
        self._stepped(table)
        if prepared is not None:  # last: a warning may be an error
            self._warn(prepared)
        return norm

    def _measure(self, table: Tensor, groups: list[Any], clip_coef: Tensor | None) -> Tensor:
        """Complete the table of a step's sums, keep it for `stats`, and return it."""
        run = self._run
        measured: list[tuple[int, float | Tensor, list[Any], int]] = []
        kept: set[int] = set()
        multipliers: dict[int, ops.LrMultipliers] = {}
        fell_back = has_shards = False
        for group in groups:
            if group.stats is not None:
                measured.append((group.index, group.lr_now(), group.params, len(group.params)))
            if group.sphere is not None:
                kept.add(group.index)
            if group.multipliers is not None:
                multipliers[group.index] = group.multipliers
            fell_back = fell_back or bool(group.torch_sums)
            has_shards = has_shards or (not group.is_whole and has_dtensors(group.params))
        offsets = run.plan.slot_offsets
        if fell_back:
            table = with_torch_sums(table, groups)
        if has_shards:
            self._sum_over_shards(table, groups, offsets)
        run.measured = Measured(table, offsets, measured, multipliers, clip_coef, self._who, self._is_adaptive, kept)
        if run.clip_options.group is not None:
            run.measured.totals = reduced(run.measured.own_totals(), run.clip_options.group)
        elif run.part_of is not None:
            run.measured.part_of = run.part_of
        return table

    def _commit(self, groups: list[Any]) -> None:
        """Write what the step has made into the state."""
        for group in groups:
            for p, key, tensor in group.created:
                self.state[p][key] = tensor
            if group.wrappers:
                increment_version(group.wrappers)
            if group.precision is not None:
                group.precision.commit(self.param_groups[group.index])

    def _norm_of_skipped(self, max_norm: float | None) -> Tensor | None:
        if max_norm is None:
            return None
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        self._run.grad_norm = torch.full((), torch.nan, dtype=torch.float64, device=device)
        return self._run.grad_norm

    def _sum_over_shards(self, table: Tensor, groups: list[Any], offsets: tuple[int, ...]) -> None:
        # Here and not in `stats`, which one rank may ask for alone: a step is what every rank takes.
        if table.shape[1] > len(ops.SUMS) or any(group["stats"] for group in self.param_groups):
            begins = iter(offsets)
            sum_step_over_shards(table, [entry for group in groups for entry in group.measured(begins)])

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        """Check the options of a loaded param group."""
        check_options(group, self._numbers, where)
        check_precision(group, where)
        ops.check_norm(group[NORM], where)

    def _check_state(self, state: Any, groups: list[dict[str, Any]]) -> None:
        """Check a loaded state."""
        check_state(state, groups, self._buffers, self._who)

    def _skips(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> bool:
        """Return whether a GradScaler has found a gradient with infinities or NaN."""
        return found_inf is not None and float(found_inf) != 0

    def _kernel_may_skip(self, found_inf: Tensor) -> bool:
        """Return whether the kernel is to read `found_inf` itself: it lies beside the parameters, on a CUDA device."""
        there = ops.device_index(found_inf)
        if self._run.clip_options.error_if_nonfinite or self._run.clip_options.norm_type != 2:
            return False
        return there not in (None, -1) and all(
            not group["stochastic_rounding"]  # the steps taken are counted here
            and group[NORM] is None  # no kernel
            and all(p.device == found_inf.device for p in group["params"])
            for group in self.param_groups
        )

    def _leaves_a_trace(self, groups: list[Any]) -> bool:
        """Return whether a step that the kernel skips would still change something, so that the host must know."""
        plan, before = self._run.plan, self._run.measured
        measures = any(group.stats for group in groups)
        return (measures and (before is None or before.table.shape != (plan.slots, plan.columns))) or any(
            group.created or group.left_to_torch or group.wrappers for group in groups
        )

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[Any]:
        """Return every param group as a `GroupStep`, read and checked; write nothing."""
        raise NotImplementedError

    def _places(self) -> list[At]:
        """Return how error sentences name the param groups; the same objects at every step."""
        places, count = self._run.places, len(self.param_groups)
        if len(places) != count:
            places[:] = [At(self._who, i) for i in range(count)]
        return places

    def _check_new_group(self, param_group: dict[str, Any], where: str) -> None:
        """Check keys of a group that is to be added."""

    def _check_added_group(self, index: int, where: str) -> None:
        """Check a group that was added; a ValueError removes it again."""

    def _check_may_step(self) -> None:
        """Raise if this is no time for a step."""

    def _prepare(self, groups: list[Any]) -> Any:
        """Do what must be done before anything is written; return what `_follow` and `_warn` are to get, or None."""

    def _follow(self, prepared: Any) -> None:
        """Let follow what goes with the stepped weights."""

    def _warn(self, prepared: Any) -> None:
        """Give the warnings of the step."""

    def _stepped(self, table: Tensor | None) -> None:
        """Do what a subclass does after a step, with the table of its sums."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizer does, with the further options, without what belongs to the model.

        With `max_norm` there is one more entry, "clipping".
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            for key in self._keys_of_model:
                group.pop(key, None)
        if self._run.clip_options.max_norm is not None:
            state[CLIPPING] = self._run.clip_options.state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch's optimizer does, whose checkpoints of any age are taken. Options they lack keep their values.

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
            raise ValueError(f"{self._who}.load_state_dict: expected a dict, got {type(state_dict).__name__}")

        def see(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            check_checkpoint(loaded, self._who, self._options_of_others, self._identity)
            run.loaded = loaded  # what hooks have made of it, before torch casts everything to the parameters' dtype

        hook = self.register_load_state_dict_pre_hook(see)
        try:
            super().load_state_dict(state_dict)
        except KeyError as missing:
            raise ValueError(
                f"{self._who}.load_state_dict: expected {{'state': ..., 'param_groups': [{{'params': ..., ...}}, ...]}}"
                f", got one without {missing}"
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
            for key in (*self._kept_keys, ROUNDING_STEP):
                if key in old:
                    group.setdefault(key, old[key])
            group.setdefault(LR_MULTIPLIERS, old.get(LR_MULTIPLIERS))
            self._check_group(group, f"{self._who}.load_state_dict: param_groups[{i}]")
            for key in ("stats", PARAM_NAMES):
                if is_loading and key in old:
                    group[key] = old[key]
        self._check_state(state["state"], groups)
        if not is_loading:
            self._restore(state)
            return
        run = self._run
        clip_options = run.clip_options
        if run.loaded is not None:
            restore_precision(state["state"], groups, run.loaded, self._buffers)
            own_tensors(state["state"], run.loaded["state"])
            if CLIPPING in run.loaded:
                clip_options = clip_options.loaded(run.loaded[CLIPPING], f"{self._who}.load_state_dict")
        check_radii(state["state"], groups, self._who)
        # In place, for wrappers that have taken these objects.
        own_state, own_groups = self.state, self.param_groups
        new_state = dict(state["state"])
        own_state.clear()
        own_state.update(new_state)
        own_groups[:] = groups
        super().__setstate__({**state, "state": own_state, "param_groups": own_groups})
        run.clip_options = clip_options
        self._after_loading()
        remember_names(run.names, own_groups)

    def _after_loading(self) -> None:
        """Do what a subclass does after a state dict was loaded."""

    def _restore(self, state: dict[str, Any]) -> None:
        """Take the state of an optimizer that was pickled or copied."""
        options, part_of = state.pop(CLIPPING, (ClipOptions(), None))
        self._run = self._run_state(self, options, part_of)
        super().__setstate__(state)
        self._own_defaults = {key: self.defaults[key] for key in self._own_options}
        _alive.add(self)
        remember_names(self._run.names, self.param_groups)
        if self.defaults["fused"]:  # torch loses these on the way through pickle
            self._step_supports_amp_scaling = True


_alive: weakref.WeakSet[FusedOptimizer] = weakref.WeakSet()


def _free_locks() -> None:
    """Replace the locks in the child of a fork: a thread that held one exists only in the parent."""
    for optimizer in _alive:
        optimizer._run.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)
