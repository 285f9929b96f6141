"""Arguments that the steps of optimizers share: numbers on a device, learning rates per parameter, master copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._binary import LrMultipliers, describe, device_index, kernel_takes
from .checks import as_float
from .types import LOW_PRECISION, Norm, check_lr_on_sphere, check_norm


def check_norm_arguments(
    op: str,
    norm: Norm,
    radii: Sequence[Any] | None,
    lr: float,
    params: Sequence[Any],
    grads: Sequence[Any],
    multipliers: LrMultipliers | None = None,
) -> None:
    """Check what a step that keeps norms needs of its arguments.

    Raises:
        ValueError: radii without a norm, lr times a multiplier is not in [0, 1), rows of a vector are wanted.
    """
    check_norm(norm, op)
    if norm is None:
        if radii is not None:
            raise ValueError(f"{op}: radii expected None without norm, got {type(radii).__name__}")
        return
    check_lr_on_sphere(lr, op)
    for i, (p, g) in enumerate(zip(params, grads, strict=False)):
        if g is None or not isinstance(p, Tensor):
            continue
        if norm == "keep_rows" and p.ndim < 2:
            raise ValueError(rows_of_vector(f"{op}: params[{i}]", p))
        if multipliers is not None:
            check_lr_on_sphere(lr * float(multipliers.value(i)), f"{op}: params[{i}], with its multiplier")


def rows_of_vector(what: str, p: Tensor) -> str:
    """Return the sentence for a parameter that has no rows."""
    return f'{what}: norm="keep_rows" expected at least two dimensions, got shape {tuple(p.shape)}; "keep" takes any'


def if_on_device(x: object) -> Tensor | None:
    """Return x if it is one number in the memory of a CUDA device, which a kernel can read by itself; else None."""
    if not isinstance(x, Tensor) or x.numel() != 1 or x.dtype not in (torch.float32, torch.float64):
        return None
    return x if device_index(x) not in (None, -1) else None


def split_numbers(op: str, given: dict[str, Any]) -> tuple[list[float], list[Tensor | None]]:
    """Return numbers as floats, 1 for those that a kernel reads, and the tensors that it reads, else None.

    Raises:
        ValueError: one is no number.
    """
    there = [if_on_device(x) for x in given.values()]
    floats = [as_float(op, name, x) if at is None else 1.0 for (name, x), at in zip(given.items(), there, strict=True)]
    return floats, there


def read_lr_multipliers(given: object, count: int, where: str) -> LrMultipliers:
    """Return `lr_multipliers`, of an op or of a param group, as the binary takes them; `where` begins the error.

    Raises:
        ValueError: they are no sequence or vector of `count` finite numbers of at least 0.
    """
    if isinstance(given, Tensor) and device_index(given) not in (None, -1):
        given = given.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return LrMultipliers(given, count, where)


def with_new_masters(
    params: Sequence[Any], grads: Sequence[Any], masters: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return master copies, those that are None made new for parameters of 16 bits that have a gradient."""
    copies = list(masters)
    for i, (p, g, m) in enumerate(zip(params, grads, copies, strict=False)):
        if m is None and g is not None and isinstance(p, Tensor) and p.dtype in LOW_PRECISION:
            copies[i] = p.detach().float()
    return copies


def check_on_cpu(op: str, i: int, params: list[Any]) -> None:
    """Raise TypeError if parameter i lies where no kernel keeps norms."""
    p = params[i]
    if kernel_takes(p) and p.device.type != "cpu":
        raise TypeError(
            f"{op}: params[{i}] is {describe(p)}, but norm= has kernels on the CPU alone; expected it there. "
            f"reference.{op} runs anywhere"
        )


def check_masters(op: str, i: int, params: list[Any], masters: list[Any]) -> None:
    """Raise TypeError if it is the master copy i that no kernel takes."""
    p, m = params[i], masters[i]
    if m is None or not isinstance(p, Tensor) or not kernel_takes(p):
        return
    if p.dtype not in LOW_PRECISION:
        raise TypeError(f"{op}: masters[{i}] expected None beside params[{i}], {describe(p)}, got {describe(m)}")
    if not kernel_takes(m) or m.dtype != torch.float32 or m.device != p.device:
        raise TypeError(f"{op}: masters[{i}] expected float32 beside params[{i}], {describe(p)}, got {describe(m)}")
