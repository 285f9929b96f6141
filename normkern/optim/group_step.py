"""One param group during one step: what runs on the kernel, and what falls back to torch."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from .. import ops
from ..tracing import in_dispatch_mode
from .dtensor import check_summable, is_dtensor, own_rows, shard
from .exponential_decay import GroupGauge
from .low_precision import GroupPrecision, group_precision
from .options import LR_MULTIPLIERS, MASTER, RADIUS, STEP, At, number, place
from .pair import Pair
from .sphere import GroupSphere, group_sphere

_log = logging.getLogger("normkern")

#: grad_scale and found_inf of a GradScaler, which the kernel will read.
Scaler = tuple[Tensor | None, Tensor]


class GroupStep:
    """One param group during one step. A subclass has the options and the state of one optimizer."""

    __slots__ = (
        "at",
        "code",
        "created",
        "entries",
        "gauge",
        "grads",
        "has_entries",
        "index",
        "is_whole",
        "left_to_torch",
        "lr",
        "masters",
        "multipliers",
        "on_device",
        "options",
        "pair",
        "params",
        "plan",
        "precision",
        "radii",
        "row",
        "slot",
        "sphere",
        "state",
        "stats",
        "torch_sums",
        "wrappers",
    )

    #: The op, as the binary knows it.
    op: ClassVar[str]
    #: The entries of a parameter's state: buffers, and the count of steps where there is one.
    state_keys: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        plan: ops.Pass,
        state: Any,
        at: At,
        options: dict[str, Any],
        inverse_scale: float,
        scaler: Scaler | None = None,
        pair: Pair | None = None,
    ) -> None:
        """Read and check the group; write nothing. `pair`: the gradients of a step from two."""
        self.plan, self.state, self.at, self.index, self.options = plan, state, at, at.group, options
        self.pair = pair
        self.gauge: GroupGauge | None = None  # of a group whose decay is an exponential learning rate
        self.lr: float | Tensor  # a tensor where the kernel reads it
        params = options["params"]
        self.params: list[Any] = params if type(params) is list else list(params)
        self.stats: ops.Stats = options["stats"]
        self.on_device: ops.OnDevice | None = None
        self.code = 0 if self.stats is None else ops.stats_code(self.stats, place(at))
        self.slot, self.row = plan.slots, plan.parameters
        multipliers = options.get(LR_MULTIPLIERS)
        self.multipliers: ops.LrMultipliers | None = None
        if multipliers is not None:
            self.multipliers = ops.read_lr_multipliers(multipliers, len(self.params), place(at))
        self.created: list[tuple[Tensor, str, Tensor]] = []  # parameter, key of its state, new entry
        self.left_to_torch: list[int] = []
        self.has_entries = False  # whether `grads` and `entries` are read
        self.torch_sums: list[tuple[int, Tensor]] = []
        self.wrappers: list[Tensor] = []  # DTensors whose local part the kernel writes
        self.is_whole = False  # the kernel takes every parameter, all of them plain tensors

        self.radii: list[Any] | None = None
        self.sphere: GroupSphere | None = group_sphere(options, at, self.multipliers)

        keys = self._read(inverse_scale, scaler)
        entries = keys if self.sphere is None else (*keys, RADIUS)
        self.precision: GroupPrecision | None = group_precision(options, at, self.row)
        all_to_torch = self._is_left_to_torch() or in_dispatch_mode()
        if (
            not all_to_torch
            and (self.pair is None or self.pair.has_own_grads)
            and (self.precision is None or not self.precision.has_masters)
            and plan.add_whole(
                self.op, self.params, state if entries else None, entries or self.state_keys, self._hyper(), self.code,
                self.index, self.multipliers, self.row, None if self.pair is None else self.pair.held,
            )
        ):  # fmt: skip
            self.is_whole = True
            return
        self._add_entries(keys, all_to_torch)

    def _read(self, inverse_scale: float, scaler: Scaler | None) -> tuple[str, ...]:
        """Read the numbers of the step, and return which of `state_keys` it needs: all or none."""
        raise NotImplementedError

    def _hyper(self) -> ops.Hyper:
        """Return the numbers for the kernel; the last step's object where they are the same."""
        raise NotImplementedError

    def _new_entry(self, p: Tensor, key: str) -> Tensor:
        """Return a new entry of a parameter's state."""
        raise NotImplementedError

    def _is_left_to_torch(self) -> bool:
        """Return whether torch's loop steps the whole group."""
        return bool(self.options["differentiable"])

    def step_by_torch(self, which: list[int], grads: list[Tensor], lr: Any, sparse: bool) -> None:
        """Step some parameters, by position, with these gradients and this learning rate by torch's own loop."""
        raise NotImplementedError

    def step_by_reference(self, i: int, grad: Tensor, stats: ops.Stats, more: dict[str, Any]) -> Tensor | None:
        """Step parameter i by `reference`, which has the options that torch's loop lacks; return the sums."""
        raise NotImplementedError

    def buffers(self) -> tuple[str, ...]:
        """Return the entries that are as large as their parameter."""
        return tuple(key for key in self.state_keys if key != STEP)

    def _numbers_on_device(
        self, given: dict[str, Any], scaler: Scaler | None, may_read: bool = True
    ) -> tuple[list[Any], list[Tensor | None]]:
        """Return numbers as tensors where the kernel will read them, if it may, and those tensors, else None."""
        there = ops.device_index(self.params[0]) if self.params else None
        read: list[Tensor | None] = [
            x if may_read and ops.if_on_device(x) is not None and ops.device_index(x) == there else None
            for x in given.values()
        ]
        values = [
            number(x, name, self.at) if at is None else at.detach()
            for (name, x), at in zip(given.items(), read, strict=True)
        ]
        return values, read

    def _add_entries(self, keys: tuple[str, ...], all_to_torch: bool) -> None:
        """Add the group parameter by parameter, where it cannot go as a whole."""
        params, pair, precision = self.params, self.pair, self.precision
        self.has_entries = True
        self.grads: list[Any]
        self.grads, lists, lacking = ops.gather(params, self.state if keys else None, self.state_keys)
        self.entries: dict[str, list[Any]] = dict(zip(self.state_keys, lists, strict=True))
        if pair is not None and not pair.has_own_grads:
            self.grads = pair.grads
        is_complete = not lacking and (pair is None or pair.has_own_grads)
        missing = {key: [] if is_complete else self._missing(key) for key in keys}
        if self.gauge is not None:
            self.gauge.check_complete(self.grads, [i for of_key in missing.values() for i in of_key])
        grads = [None] * len(params) if all_to_torch else self.grads
        for key, of_key in missing.items():
            for i in of_key:
                p, g = params[i], grads[i]
                if g is not None and ops.kernels_take((p, g)) and p.dtype == g.dtype:
                    self.entries[key][i] = self._new_entry(p, key)
                    self.created.append((p, key, self.entries[key][i]))
        self.masters: list[Any] | None = None
        if precision is not None:
            self.masters, new = precision.masters(params, self.grads, self.state)
            if self.masters is not None:
                self.created += [(params[i], MASTER, self.masters[i]) for i in new]
            for key in self.buffers():
                converted = precision.convert(params, self.grads, self.entries[key])
                self.created += [(params[i], key, self.entries[key][i]) for i in converted]
        if self.sphere is not None:
            radii, new = self.sphere.radii(params, self.grads, self.masters, self.state)
            self.radii = radii
            self.created += [(params[i], RADIUS, radii[i]) for i in new]
        refused = self._add(
            params, grads, self.entries, self._unwritten(missing), held=None if pair is None else pair.held,
            masters=self.masters, lr_multipliers=self.multipliers, first_parameter=self.row, radii=self.radii,
        )  # fmt: skip
        if all_to_torch:
            self.left_to_torch = [i for i, g in enumerate(self.grads) if g is not None]
            for i in self.left_to_torch:
                self._check_for_torch(i)
        elif refused:
            self._find_another_way(refused, {key: set(of_key) for key, of_key in missing.items()})
        if pair is not None:
            self._check_held(pair)

    def _missing(self, key: str) -> list[int]:
        """Return which parameters have a gradient but no such entry."""
        entries = self.entries[key]
        return [i for i, g in enumerate(self.grads) if g is not None and entries[i] is None]

    def _unwritten(self, missing: dict[str, list[int]]) -> list[int]:
        """Return which parameters have new state that is memory without values, for the rule of a first step."""
        return []

    def _add(self, params: list[Any], grads: list[Any], entries: dict[str, list[Any]], first: list[int],
             **more: Any) -> list[int]:  # fmt: skip
        """Add parameters to the pass; return the positions that the kernel cannot take."""
        return self.plan.add(
            self.op, params, grads, [entries[key] for key in self.buffers()], first, self._hyper(), self.code,
            self.index, counts=entries.get(STEP), **more,
        )  # fmt: skip

    def _check_for_torch(self, i: int) -> None:
        """Check that what torch's loop would read of parameter i is there."""
        lists = {
            "params": self.params, "grads": self.grads, **self.entries, MASTER: self.masters,
            "held": None if self.pair is None else self.pair.held,
        }  # fmt: skip
        for name, tensors in lists.items():
            if tensors is not None:
                ops.check_storage(tensors[i], f"{place(self.at)}: {name}[{i}]")

    def _check_held(self, pair: Pair) -> None:
        """Check held gradients that fall back to torch, as the kernel checks those that it takes."""
        for i in self.left_to_torch:
            held, p = pair.held[i], self.params[i]
            if held is None:
                continue
            if held.shape != p.shape:
                raise ValueError(
                    f"{place(self.at)}: held[{i}] has shape {tuple(held.shape)} but params[{i}] has shape "
                    f"{tuple(p.shape)}"
                )
            if share_memory(held, pair.grads[i]):
                raise RuntimeError(ops.shared_pair(self.index, i))

    def _find_another_way(self, refused: list[int], missing: dict[str, set[int]]) -> None:
        """Step a DTensor through its local shard, and leave what the kernel cannot take to torch's loop."""
        where = place(self.at)
        for i in refused:
            p = self.params[i]
            self._check_for_torch(i)
            if not (p.is_floating_point() or p.is_complex()):
                raise RuntimeError(
                    f"{where}: params[{i}] is {ops.describe(p)}; expected a floating point or complex dtype"
                )
            if self.options["fused"]:
                _device_dtype_check_for_fused(p)
            if self.stats is not None and is_dtensor(p):
                check_summable(p, f"{where}: params[{i}]")
            new = [key for key, of_key in missing.items() if i in of_key]
            if not (is_dtensor(p) and self._add_shard(i, new)):
                _log.debug("%s: params[%d], %s, is stepped by torch's own loop", where, i, ops.describe(p))
                if p.is_cuda and not ops.cuda_architectures():
                    _warn_of_gpu()
                self.left_to_torch.append(i)

    def _add_shard(self, i: int, new: list[str]) -> bool:
        """Add the local part of DTensor i to the pass; return False if the kernel cannot take it either.

        `new`: entries of its state that it does not have yet.
        """
        p = self.params[i]
        entries = {key: of_key[i] for key, of_key in self.entries.items()} | {
            key: self._new_entry(p, key) for key in new
        }
        held = None if self.pair is None else self.pair.held[i]
        master = None if self.masters is None else self.masters[i]

        def local(x: Any) -> list[Any]:
            return [None if x is None else shard(x, like=p)]

        with torch.no_grad():
            w, g, h, m = map(local, (p, self.grads[i], held, master))
            parts = {key: [x] if key == STEP else local(x) for key, x in entries.items()}
        refused = self._add(
            w, g, parts, [0] if self._unwritten({key: [0] for key in new}) else [], slots=[self.first_slot(i)],
            held=None if self.pair is None else h, masters=None if self.masters is None else m, row=self.row + i,
            first_parameter=self.row + i,
            lr_multipliers=None if self.multipliers is None else self.multipliers.only(i),
        )  # fmt: skip
        if refused:
            return False
        self.created += [(p, key, entries[key]) for key in new]
        self.wrappers += [x for x in (p, *(entries[key] for key in self.buffers()), master) if x is not None]
        return True

    def measured(self, offsets: Iterator[int]) -> list[tuple[Any, int, bool]]:
        """Return for each parameter where its slots begin, read from `offsets`, and whether it has one per row."""
        return [(p, next(offsets), self.stats == "row") for p in self.params] if self.stats else []

    def first_slot(self, i: int) -> int:
        """Return where the sums of parameter i begin; for the shard of a DTensor, those of its first own row."""
        if self.stats is None:
            return 0
        slot = self.slot + sum(ops.slot_count(p, self.code) for p in self.params[:i])
        p = self.params[i]
        return slot + own_rows(p).start if self.stats == "row" and p.ndim >= 2 and is_dtensor(p) else slot

    def lr_now(self) -> float | Tensor:
        """Return the learning rate of this step; a copy if it is a tensor, which may change."""
        return self.lr.clone() if isinstance(self.lr, Tensor) else self.lr

    def reference_options(self, i: int) -> dict[str, Any]:
        """Return how parameter i is stored and which norms stay, as `reference` takes it."""
        kept: dict[str, Any] = {}
        if self.sphere is not None and self.radii is not None:
            kept = {"norm": self.sphere.norm, "radii": [self.radii[i]]}
        if self.precision is None:
            return kept
        rounding = self.precision.rounding
        return kept | {
            "state_dtype": self.precision.state_dtype,
            "masters": None if self.masters is None else [self.masters[i]],
            "rounding": None if rounding is None else rounding._replace(first=self.precision.first + i),
        }


@functools.cache
def _warn_of_gpu() -> None:
    """Warn once that the fallback on a GPU is slow."""
    warnings.warn(
        "normkern: this binary was built for CPUs only, and torch's own loop steps parameters on GPUs. To have kernels "
        "for them: `NORMKERN_CUDA=ON pip install --force-reinstall --no-deps .` in normkern's source folder",
        UserWarning,
        stacklevel=2,
    )


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two gradients overlap in memory."""
    if a is b:
        return True
    if a.layout != torch.strided or b.layout != torch.strided or a.is_meta or type(a) is not Tensor:
        return False  # torch makes new values for every such gradient
    ends = [
        x.data_ptr() + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
        for x in (a, b)
    ]
    return a.numel() > 0 and b.numel() > 0 and a.data_ptr() < ends[1] and b.data_ptr() < ends[0]
