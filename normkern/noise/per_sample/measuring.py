"""Helpers of `GradientNoise.measure`: checks of its arguments, and contexts that restore the state of training."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence

from . import errors
from .parallel import Shards
from .record import ParameterRecord


def check_arguments(model: Any, loss: Any, batch: Any, batch_size: int | None, samples: str | None) -> int | None:
    """Return the leading dimension of the first tensor of the batch that has samples; None if it is not known.

    Raises:
        TypeError: no module, no function.
        ValueError: no tensor in the batch, or one sample, and neither batch_size nor samples.
    """
    if not isinstance(model, nn.Module):
        raise errors.not_a_model(type(model).__name__)
    if not callable(loss):
        raise errors.not_a_loss(type(loss).__name__)
    if samples is not None:  # the model is given a vector that says it
        return None
    sizes = [
        int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else x.shape[0]
        for x in _leaves(batch)
        if isinstance(x, PackedSequence) or x.dim()
    ]
    if batch_size is None and not sizes:
        raise errors.batch_without_tensors(type(batch).__name__)
    if batch_size is None and max(sizes) < 2:
        raise errors.batch_of_one(max(sizes))
    return sizes[0] if sizes and sizes[0] >= 2 else None


def check_loss(value: Any) -> Tensor:
    """Return the loss, a scalar with a graph.

    Raises:
        TypeError, ValueError: it is something else.
        FloatingPointError: it is NaN or infinite.
    """
    if not isinstance(value, Tensor):
        raise errors.not_a_scalar_loss(f"{type(value).__name__}, no tensor")
    if value.numel() != 1:
        raise errors.not_a_scalar_loss(f"a tensor of shape {tuple(value.shape)}")
    if not value.requires_grad:
        raise errors.detached_loss()
    with torch._C.DisableTorchFunction():
        number = value.detach().double().item()
    if number != number or number in (float("inf"), float("-inf")):
        raise errors.loss_not_finite(number)
    return value


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, depth first."""
    return (x.data if isinstance(x, PackedSequence) else x for x in _leaves(batch))


def _leaves(batch: Any) -> Iterator[Tensor | PackedSequence]:
    """Yield the tensors and packed sequences of a batch, depth first."""
    if isinstance(batch, (Tensor, PackedSequence)):
        yield batch
    elif isinstance(batch, Mapping):
        for x in batch.values():
            yield from _leaves(x)
    elif isinstance(batch, (list, tuple)):
        for x in batch:
            yield from _leaves(x)
    elif hasattr(batch, "__dict__") and not isinstance(batch, (nn.Module, type)):
        for x in vars(batch).values():
            if isinstance(x, (Tensor, Mapping, list, tuple)):
                yield from _leaves(x)


def without_inference(batch: Any) -> Any:
    """Return the batch with copies of tensors made under inference_mode, which a backward does not take."""
    if not any(t.is_inference() for t in _tensors(batch)):
        return batch
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, dict):
        return {key: without_inference(x) for key, x in batch.items()}
    if isinstance(batch, Mapping):
        return type(batch)({key: without_inference(x) for key, x in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, PackedSequence):
        return batch._replace(data=without_inference(batch.data))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(without_inference, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(without_inference, batch))
    return batch


@contextmanager
def keep(model: nn.Module, records: Sequence[ParameterRecord], ddp: nn.Module | None) -> Iterator[None]:
    """Keep the state of training: what the body changes is as before when it ends or fails.

    In the body gradients are recorded and `.grad` is empty, parameters have no hooks, and BatchNorm layers with running
    statistics are in eval mode.
    """
    modules = list(model.modules())
    with ExitStack() as after:
        _keep_generators(after, {p.device for p in model.parameters()})
        _keep_modes(after, modules)
        _keep_buffers(after, modules)
        _keep_gradients(after, model, modules, records)
        if ddp is not None:
            after.callback(setattr, ddp, "require_forward_param_sync", ddp.require_forward_param_sync)
            after.enter_context(ddp.no_sync())  # type: ignore[operator]
        after.enter_context(torch.inference_mode(False))
        after.enter_context(torch.enable_grad())
        yield


def _keep_generators(after: ExitStack, devices: set[torch.device]) -> None:
    for kind in {d.type for d in devices} - {"cpu", "meta"}:
        there = [d for d in devices if d.type == kind]
        after.enter_context(torch.random.fork_rng(devices=there, device_type=kind))
    after.enter_context(torch.random.fork_rng(devices=[]))
    after.callback(random.setstate, random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        after.callback(numpy.random.set_state, numpy.random.get_state())


def _keep_modes(after: ExitStack, modules: Sequence[nn.Module]) -> None:
    def restore(modes: list[bool]) -> None:
        for module, training in zip(modules, modes, strict=True):
            module.training = training

    after.callback(restore, [m.training for m in modules])
    for module in modules:
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.training = False


def _keep_buffers(after: ExitStack, modules: Sequence[nn.Module]) -> None:
    kept = [
        (module, name, b, None if b is None else (b._version, b.clone()))
        for module in modules
        for name, b in module._buffers.items()
    ]

    def restore() -> None:
        for module, name, b, copy in kept:
            module._buffers[name] = b
            if b is not None and copy is not None and b._version != copy[0]:
                with torch.no_grad():
                    b.copy_(copy[1])

    after.callback(restore)


def _keep_gradients(
    after: ExitStack, model: nn.Module, modules: Sequence[nn.Module], records: Sequence[ParameterRecord]
) -> None:
    shards = Shards.of(modules).managed.values()
    holders: list[tuple[Any, str]] = [(p, "grad") for p in {*model.parameters(), *(r.param for r in records)}]
    holders += [(p, "unsharded_accumulated_grad") for p in shards]
    for r in records:
        holders += [(r.param, hooks) for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks")]

    def set_all(values: Sequence[Any]) -> None:
        for (holder, name), value in zip(holders, values, strict=True):
            setattr(holder, name, value)

    after.callback(set_all, [getattr(holder, name) for holder, name in holders])
    set_all([None] * len(holders))
