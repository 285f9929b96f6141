"""`SGD`: torch.optim.SGD in one pass over memory, with the norms of the step from the same pass."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused
from torch.optim.sgd import sgd as torch_sgd

from . import ops
from .stats import StepStats

_log = logging.getLogger("normkern")

_BUFFER = "momentum_buffer"
_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")


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
        stats: None, "tensor" or "row": what `stats()` will tell of each step. Also a group key.
        decay: "coupled", weight decay as part of the gradient. Also a group key.

    Sparse and complex tensors, tensor subclasses, devices other than the CPU, gradients of another dtype than their
    parameter: torch's own loop steps them, with its result; logger "normkern" says so at level DEBUG. A DTensor is
    stepped through its local shard, and its sums are those of the shard.

    Raises, at a step, before anything is written:
        RuntimeError: a parameter is of an integer dtype, or another thread is inside the same optimizer's step.
        ValueError: shapes differ; a parameter is expanded, or overlaps another partially; `stats` is no known choice.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> opt = SGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> w.grad = torch.tensor([1.0, 1.0])
    >>> opt.step()
    >>> w.detach()
    tensor([0.8990, 1.8980])
    """

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
    ) -> None:
        ops.stats_code(stats, "SGD")
        _check_decay(decay, "SGD")
        self._own_defaults = {"stats": stats, "decay": decay}
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
        self._step_plan = ops.SgdStep()
        self._measured: _Measured | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; `stats` and `decay` may be keys of the group."""
        self.defaults.update(self._own_defaults)
        super().add_param_group(param_group)

    def stats(self) -> StepStats:
        """The norms and inner products of the last step.

        Returns:
            `StepStats`: float64 tensors on the parameters' device, not synchronised. Each step has its own, which stays
            valid. A step that was skipped by a GradScaler leaves the last one in place.

        Raises:
            RuntimeError: before the first step, or if no param group has ``stats`` set.
        """
        if all(group["stats"] is None for group in self.param_groups):
            raise RuntimeError('SGD.stats: nothing was measured; construct the optimizer with stats="tensor" or "row"')
        if self._measured is None:
            raise RuntimeError("SGD.stats: expected a step before it, but none has been taken yet")
        return self._measured.stats(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. `closure` re-evaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # GradScaler leaves these on an optimizer with fused=True for the duration of the call.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            return loss
        inverse_scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)

        step = self._step_plan
        step.begin()
        groups = [_Group(step, self.state, i, group, inverse_scale) for i, group in enumerate(self.param_groups)]
        step.check()
        # Nothing has been written so far, and from here on only torch's own loop can fail: it goes first.
        for group in groups:
            if group.left_to_torch:
                group.step_with_torch(grad_scale)
        table = ops.new_table(step.slots) if step.slots else None
        if table is not None and not ops.kernel_takes(table):  # under FakeTensorMode there is nothing to measure
            table = None
        torch.autograd.graph.increment_version(step.run(table))
        for group in groups:
            for p, buffer in group.created:
                self.state[p][_BUFFER] = buffer
        if table is not None:
            for group in groups:
                for slot, sums in group.torch_sums:
                    table[slot : slot + len(sums)] = sums
            measured = [(group.index, group.lr, len(group.params)) for group in groups if group.stats]
            self._measured = _Measured(table, step.slot_offsets, measured)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in `torch.optim.SGD`, whose checkpoints of any age are welcome. Options they lack keep their values.

        Raises:
            ValueError: entries are missing, a buffer does not fit its parameter, an option is no number, or the groups
                differ from the optimizer's. The optimizer is left as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"SGD.load_state_dict: expected a dict, got {type(state_dict).__name__}")
        try:
            super().load_state_dict(state_dict)
        except KeyError as missing:
            raise ValueError(
                "SGD.load_state_dict: expected {'state': ..., 'param_groups': [{'params': ..., ...}, ...]}, "
                f"got one without {missing}"
            ) from missing

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by unpickling, deepcopy (no old groups) and load_state_dict (the new groups replace the old ones).
        groups = state["param_groups"]
        defaults = state.get("defaults") or self.defaults
        for i, group in enumerate(groups):
            old = self.param_groups[i] if "param_groups" in self.__dict__ else defaults
            for key in defaults:
                group.setdefault(key, old[key])
            _check_options(group, f"SGD.load_state_dict: param_groups[{i}]")
        _check_state(state["state"], groups)
        super().__setstate__(state)
        self._own_defaults = {key: self.defaults[key] for key in ("stats", "decay")}
        self.__dict__.setdefault("_step_plan", ops.SgdStep())
        self.__dict__.setdefault("_measured", None)
        if self.defaults["fused"]:  # torch loses these on the way through pickle
            self._step_supports_amp_scaling = True
            self._need_device_dtype_check_for_fused = True


class _Group:
    """One param group during one step: what runs on our kernel, what on torch's loop, which buffers are new."""

    __slots__ = (
        "buffers", "created", "grads", "index", "left_to_torch", "lr", "options", "params", "plan", "refused", "slot",
        "state", "stats", "torch_sums",
    )  # fmt: skip

    def __init__(self, plan: ops.SgdStep, state: Any, index: int, options: dict[str, Any], inverse_scale: float) -> None:
        """Reads and checks the group; writes nothing."""
        where = f"SGD.step: param_groups[{index}]"
        self.plan, self.state, self.index, self.options = plan, state, index, options
        self.params = params = options["params"]
        self.lr, self.stats = _number(options["lr"], "lr", where), options["stats"]
        momentum = _number(options["momentum"], "momentum", where)
        if options["decay"] != "coupled":
            _check_decay(options["decay"], where)
        self.slot = plan.slots
        self.created: list[tuple[Tensor, Tensor]] = []
        self.left_to_torch: list[int] = []
        self.torch_sums: list[tuple[int, Tensor]] = []

        grads, buffers, missing = ops.gather(params, state if momentum != 0 else None, _BUFFER)
        self.grads, self.buffers = grads, buffers
        if options["differentiable"]:
            grads = [None] * len(params)
        for i in missing:
            if ops.kernel_takes(params[i]) and ops.kernel_takes(grads[i]) and params[i].dtype == grads[i].dtype:
                buffers[i] = torch.empty_like(params[i], requires_grad=False)
                self.created.append((params[i], buffers[i]))
        arguments = (
            self.lr,
            momentum,
            _number(options["dampening"], "dampening", where),
            _number(options["weight_decay"], "weight_decay", where),
            bool(options["nesterov"]),
            bool(options["maximize"]),
            inverse_scale,
            ops.stats_code(self.stats, where),
            index,
        )
        refused = plan.add(params, grads, buffers, missing, *arguments, None)
        if options["differentiable"]:
            self.left_to_torch = [i for i, g in enumerate(self.grads) if g is not None]
        elif refused:
            self._find_another_way(refused, set(missing), arguments, where)

    def _find_another_way(self, refused: list[int], missing: set[int], arguments: tuple[Any, ...], where: str) -> None:
        """A DTensor runs through its local shard; what the kernel cannot take is left to torch's loop."""
        shards: list[tuple[int, Tensor, Tensor, Tensor | None, int]] = []
        for i in refused:
            p, grad, buffer = self.params[i], self.grads[i], self.buffers[i]
            if not (p.is_floating_point() or p.is_complex()):
                raise RuntimeError(
                    f"{where}: params[{i}] is {ops.describe(p)}; expected a floating point or complex dtype"
                )
            if self.options["fused"]:
                _device_dtype_check_for_fused(p)
            if not _is_dtensor(p):
                _log.debug("%s: params[%d], %s, is stepped by torch's own loop", where, i, ops.describe(p))
                self.left_to_torch.append(i)
                continue
            if arguments[1] != 0 and buffer is None:
                buffer = torch.zeros_like(p, requires_grad=False)
                self.created.append((p, buffer))
            with torch.no_grad():
                local = [None if x is None else _shard(x, like=p) for x in (p, grad, buffer)]
            shards.append((i, local[0], local[1], local[2], self._first_slot(i)))  # type: ignore[arg-type]
        if shards:
            index, params, grads, buffers, slots = (list(column) for column in zip(*shards, strict=True))
            first = [k for k, i in enumerate(index) if i in missing]
            for k in self.plan.add(params, grads, buffers, first, *arguments, slots):
                i = index[k]
                _log.debug("%s: the shard of params[%d], %s, is stepped by torch's own loop", where, i, params[k].dtype)
                self.created = [(p, b) for p, b in self.created if p is not self.params[i]]
                self.left_to_torch.append(i)

    def _first_slot(self, i: int) -> int:
        """Where the sums of parameter i begin; for the shard of a DTensor, those of its first own row."""
        if self.stats is None:
            return 0
        slot = self.slot + sum(_slot_count(p, self.stats) for p in self.params[:i])
        if self.stats == "row" and self.params[i].ndim >= 2 and _is_dtensor(self.params[i]):
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            p = self.params[i]
            _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            slot += offset[0]
        return slot

    def step_with_torch(self, grad_scale: Tensor | None) -> None:
        """torch's for-loop, on those parameters that the kernel cannot take."""
        options = self.options
        params = [self.params[i] for i in self.left_to_torch]
        grads = [self.grads[i] if grad_scale is None else self.grads[i] / grad_scale for i in self.left_to_torch]
        buffers = [self.buffers[i] for i in self.left_to_torch]
        sparse = any(g.layout != torch.strided for g in grads)
        before = [p.detach().clone() for p in params] if self.stats else []
        with torch.set_grad_enabled(bool(options["differentiable"])):
            torch_sgd(
                params,
                grads,
                buffers,
                has_sparse_grad=sparse,
                foreach=False,
                fused=bool(options["fused"]) and sparse,  # raises torch's error
                weight_decay=options["weight_decay"],
                momentum=options["momentum"],
                lr=options["lr"],
                dampening=options["dampening"],
                nesterov=options["nesterov"],
                maximize=options["maximize"],
            )
        if options["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p][_BUFFER] = buffer
        if self.stats:
            from .reference import step_sums

            for i, w, g, p in zip(self.left_to_torch, before, grads, params, strict=True):
                if not p.is_meta and not _is_a(p, "torch._subclasses.fake_tensor", "FakeTensor"):
                    self.torch_sums.append((self._first_slot(i), step_sums(w, g, p, self.stats)))


class _Measured:
    """What a step left for `stats()`; names are made when somebody asks."""

    __slots__ = ("groups", "offsets", "table", "told")

    def __init__(self, table: Tensor, offsets: tuple[int, ...], groups: list[tuple[int, float, int]]) -> None:
        self.table, self.offsets, self.groups = table, offsets, groups
        self.told: StepStats | None = None

    def stats(self, param_groups: list[dict[str, Any]]) -> StepStats:
        if self.told is None:
            names: list[str] = []
            lr: list[float] = []
            for index, group_lr, size in self.groups:
                given = param_groups[index].get("param_names")
                names += given[:size] if given else [f"{index}.{i}" for i in range(size)]
                lr += [group_lr] * size
            self.told = StepStats(self.table, names, self.offsets, lr)
        return self.told


def _slot_count(p: Tensor, stats: ops.Stats) -> int:
    return p.shape[0] if stats == "row" and p.ndim >= 2 else 1


def _is_a(x: Any, module: str, name: str) -> bool:
    """isinstance, without an import: where nobody imported the module there are no such objects."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(x, getattr(loaded, name))


def _is_dtensor(x: Any) -> bool:
    return _is_a(x, "torch.distributed.tensor", "DTensor")


def _shard(x: Any, like: Any) -> Tensor:
    """The local part of a DTensor, laid out over the mesh as `like` is."""
    if not _is_dtensor(x):
        raise RuntimeError(f"SGD.step: expected a DTensor to go with a DTensor parameter, got {ops.describe(x)}")
    if x.device_mesh != like.device_mesh or x.placements != like.placements:
        x = x.redistribute(like.device_mesh, like.placements)
    local = x.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def _number(x: Any, name: str, where: str) -> float:
    if type(x) is float:
        return x
    if isinstance(x, Tensor):
        if x.numel() != 1 or x.is_complex():
            raise ValueError(f"{where}: {name} expected one number, got a tensor of shape {tuple(x.shape)}")
        return float(x.detach())
    if isinstance(x, Real):
        return float(x)
    raise ValueError(f"{where}: {name} expected a number, got {x!r}")


def _check_decay(decay: object, where: str) -> None:
    if decay != "coupled":
        raise ValueError(f'{where}: decay expected "coupled", got {decay!r}')


def _check_options(group: dict[str, Any], where: str) -> None:
    for name in _NUMBERS:
        _number(group[name], name, where)
    ops.stats_code(group["stats"], where)
    _check_decay(group["decay"], where)


def _check_state(state: Any, groups: list[dict[str, Any]]) -> None:
    """Every buffer fits its parameter. An old checkpoint's None is no buffer yet."""
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            entry = state.get(p, {})
            where = f"SGD.load_state_dict: the state of param_groups[{g}]['params'][{i}]"
            if not isinstance(entry, Mapping):
                raise ValueError(f"{where} expected a dict, got {type(entry).__name__}")
            buffer = entry.get(_BUFFER)
            if buffer is None:
                continue
            if not isinstance(buffer, Tensor):
                raise ValueError(f"{where}: momentum_buffer expected a tensor, got {type(buffer).__name__}")
            if buffer.shape != p.shape:
                raise ValueError(
                    f"{where}: momentum_buffer expected shape {tuple(p.shape)}, got {tuple(buffer.shape)}"
                )
