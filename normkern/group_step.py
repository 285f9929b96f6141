"""One param group during one step: what runs on our kernel, what on torch's loop."""

from __future__ import annotations

import logging
import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.optim.sgd import sgd as torch_sgd

from . import ops
from .options import BUFFER, check_decay, number, place

_log = logging.getLogger("normkern")

# lr, momentum, dampening, weight_decay, nesterov, maximize, inverse_scale, stats, group
_Arguments: TypeAlias = tuple[float, float, float, float, bool, bool, float, int, int]


class GroupStep:
    """One param group during one step: what runs on our kernel, what on torch's loop, which buffers are new."""

    __slots__ = (
        "buffers", "code", "created", "grads", "index", "left_to_torch", "lr", "options", "params", "plan", "slot",
        "state", "stats", "torch_sums", "wrappers",
    )  # fmt: skip

    def __init__(
        self, plan: ops.SgdStep, state: Any, index: int, options: dict[str, Any], inverse_scale: float
    ) -> None:
        """Reads and checks the group; writes nothing."""
        self.plan, self.state, self.index, self.options = plan, state, index, options
        params = options["params"]
        self.params = params = params if type(params) is list else list(params)
        self.lr, self.stats = number(options["lr"], "lr", index), options["stats"]
        self.code = 0 if self.stats is None else ops.stats_code(self.stats, place(index))
        momentum = number(options["momentum"], "momentum", index)
        if options["decay"] != "coupled":
            check_decay(options["decay"], place(index))
        self.slot = plan.slots
        self.created: list[tuple[Tensor, Tensor]] = []
        self.left_to_torch: list[int] = []
        self.torch_sums: list[tuple[int, Tensor]] = []
        self.wrappers: list[Tensor] = []  # DTensors whose local part the kernel writes

        arguments = (
            self.lr,
            momentum,
            number(options["dampening"], "dampening", index),
            number(options["weight_decay"], "weight_decay", index),
            bool(options["nesterov"]),
            bool(options["maximize"]),
            inverse_scale,
            self.code,
            index,
        )
        all_to_torch = options["differentiable"] or somebody_watches()
        state = state if momentum != 0 else None
        if not all_to_torch and plan.add_whole(params, state, BUFFER, *arguments):
            return
        self.grads, self.buffers, missing = ops.gather(params, state, BUFFER)
        grads = [None] * len(params) if all_to_torch else self.grads
        for i in missing:
            p, g = params[i], grads[i]
            if g is not None and ops.kernel_takes(p) and ops.kernel_takes(g) and p.dtype == g.dtype:
                self.buffers[i] = torch.empty_like(p, requires_grad=False)
                self.created.append((p, self.buffers[i]))
        refused = plan.add(params, grads, self.buffers, missing, *arguments, slots=None)
        if all_to_torch:
            self.left_to_torch = [i for i, g in enumerate(self.grads) if g is not None]
        elif refused:
            self._find_another_way(refused, set(missing), arguments)

    def _find_another_way(self, refused: list[int], missing: set[int], arguments: _Arguments) -> None:
        """A DTensor runs through its local shard; what the kernel cannot take is left to torch's loop."""
        where = place(self.index)
        for i in refused:
            p = self.params[i]
            if not (p.is_floating_point() or p.is_complex()):
                raise RuntimeError(
                    f"{where}: params[{i}] is {ops.describe(p)}; expected a floating point or complex dtype"
                )
            if self.options["fused"]:
                _device_dtype_check_for_fused(p)
            if not (_is_dtensor(p) and self._add_shard(i, i in missing, arguments)):
                _log.debug("%s: params[%d], %s, is stepped by torch's own loop", where, i, ops.describe(p))
                self.left_to_torch.append(i)

    def _add_shard(self, i: int, first: bool, arguments: _Arguments) -> bool:
        """Hands the kernel the local part of DTensor i; False if it cannot take that either."""
        p, buffer = self.params[i], self.buffers[i]
        if first:
            buffer = torch.zeros_like(p, requires_grad=False)
        whole = [p, self.grads[i]] + ([] if buffer is None else [buffer])
        with torch.no_grad():
            local = [[_shard(x, like=p)] for x in whole]
        if buffer is None:
            local.append([])
        slots = [self._first_slot(i)]
        if self.plan.add(local[0], local[1], local[2] or None, [0] if first else None, *arguments, slots=slots):
            return False
        if first:
            self.created.append((p, buffer))
        self.wrappers += [x for x in (p, buffer) if x is not None]
        return True

    def _first_slot(self, i: int) -> int:
        """Where the sums of parameter i begin; for the shard of a DTensor, those of its first own row."""
        if self.stats is None:
            return 0
        slot = self.slot + sum(ops.slot_count(p, self.code) for p in self.params[:i])
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
                self.state[p][BUFFER] = buffer
        if self.stats:
            from .reference import step_sums

            for i, w, g, p in zip(self.left_to_torch, before, grads, params, strict=True):
                if (
                    not p.is_meta
                    and not somebody_watches()
                    and not _is_a(p, "torch._subclasses.fake_tensor", "FakeTensor")
                ):
                    self.torch_sums.append((self._first_slot(i), step_sums(w, g, p, self.stats)))


def somebody_watches() -> bool:
    """A dispatch mode (make_fx, FakeTensorMode) or a torch.func transform wants to see every operation on a tensor."""
    return _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None


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
