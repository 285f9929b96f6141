"""`sgd_` under every rule, with one gradient or a pair: runs it at odd places and compares it with the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import machine
from .differences import SUMS_OFF, Difference, Written, difference, sums_difference, worst
from .places import PLACES, SIZES, Laid, flat, trespass, values

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, maximize, decay": {"maximize": True, "weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "momentum, everything": {
        "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True, "grad_scale": 8.0,
    },
    "momentum, first step": {"momentum": 0.9, "weight_decay": 0.01, "first": True},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True, "grad_scale": 3.0},
    "nesterov, first step": {"momentum": 0.9, "nesterov": True, "first": True},
}  # fmt: skip
#: The rules of pairs. Scales are powers of two, so that the sums of each gradient have no rounding.
RULES_OF_PAIRS: dict[str, dict[str, Any]] = {
    "l = 1/2, plain": {"l": 0.5},
    "l = 1, momentum": {"l": 1, "momentum": 0.9, "weight_decay": 0.01},
    "l = 4, momentum, everything": {
        "l": 4, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True, "grad_scale": 8.0,
        "held_scale": 2.0,
    },
    "l = 8, momentum, first step": {"l": 8, "momentum": 0.9, "weight_decay": 0.01, "first": True},
    "l = 8, nesterov": {"l": 8, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
}  # fmt: skip
#: The rules with a gauge, where an exponential learning rate replaces the weight decay. The decay is large enough to
#: change weights of every dtype.
RULES_OF_GAUGES: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.5, "gauge": (1.2, 0.0, 3)},
    "plain, rescaled": {"weight_decay": 5.0, "gauge": (0.8, 0.0, 3), "grad_scale": 8.0, "maximize": True},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02, "gauge": (1.4, 0.05, 7)},
    "momentum, rescaled": {"momentum": 0.9, "weight_decay": 0.02, "gauge": (0.708, 0.1, 7)},
    "momentum, first step": {"momentum": 0.5, "weight_decay": 0.5, "gauge": (1.0, 0.0, 0), "first": True},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02, "gauge": (0.9, 0.1, 1)},
    "nesterov, rescaled, of pairs": {
        "momentum": 0.5, "nesterov": True, "weight_decay": 0.5, "gauge": (0.72, 0.2, 1), "l": 4, "held_scale": 2.0,
    },
    "momentum rests": {"weight_decay": 0.5, "gauge": (0.9, 0.2, 2), "rests": True},
    "back to coupled": {"momentum": 0.9, "weight_decay": 0.02, "gauge": (1.3, 0.1, 2), "leave": True},
}  # fmt: skip
#: Roundings on the way from a pair to its gradient.
PAIR_ROUNDINGS = 2.0
#: Roundings beyond those of a step: a gauge has two more terms, and a pair has its own.
GAUGE_ROUNDINGS = 4.0
_LR = 0.1


def run(options: dict[str, Any], dtype: torch.dtype, threads: int) -> Written:
    """Run `ops.sgd_` with sums, on weights and buffers at odd places and gradients at others."""
    rule = _arguments(options)
    w, g, v, h = _values(options, dtype)
    laid = {"w": Laid(w, first=1), "g": Laid(g, first=4, dense=True), "v": Laid(v, first=2)}
    read = {"gradients": (laid["g"], g)}
    if "l" in rule:
        laid["h"] = Laid(h, first=3)
        read["held gradients"] = laid["h"], h
        rule["held"] = laid["h"].tensors
    buffers: list[Tensor | None] | None = None
    if "momentum" in rule or "rests" in options:
        buffers = [None] * len(PLACES) if "first" in options else list(laid["v"].tensors)
    grads: list[Tensor | None] = list(laid["g"].tensors)
    with machine.threads(threads):
        table = ops.sgd_(laid["w"].tensors, grads, buffers, lr=_LR, stats="tensor", **rule)
    assert table is not None
    tensors = {"w": flat(laid["w"].tensors)}
    if buffers is not None:
        tensors["v"] = flat([x for x in buffers if x is not None])
    return Written(tensors, table, trespass(laid, read))


@dataclass(frozen=True)
class Expected:
    """The exact results of a rule, and the sizes of the intermediate results, which set the allowed errors.

    Attributes:
        w, v: the new weights and buffers; v is None where there are none.
        size_w, size_v: the largest intermediate results on the way to them.
        sums_of: the weights before and the gradients, as the sums have them, and the scale of the new weights there.
        sums_off: the error that each sum may have.
        pair_sums: the sums of the pair and their allowed errors; None for one gradient.
    """

    w: Tensor
    size_w: Tensor
    v: Tensor | None
    size_v: Tensor
    sums_of: tuple[Tensor, Tensor, float]
    sums_off: Tensor
    pair_sums: tuple[Tensor, Tensor] | None


def expected(options: dict[str, Any], dtype: torch.dtype) -> Expected:
    """Return what `reference.sgd_` computes in float64."""
    from .. import reference

    rule = _arguments(options)
    w, g, v, h = (x.double() for x in _values(options, dtype))
    momentum, l = rule.get("momentum", 0.0), rule.get("l")
    g_own = g / rule.get("grad_scale", 1.0)
    h_own = h / rule.get("held_scale", 1.0)
    exact_g = g_own if l is None else reference.svag_combination(h_own, g_own, l)
    # The sizes of the intermediate results of v' and w'.
    size_g = g_own.abs() if l is None else combination_size(h_own, g_own, l)
    d = size_g + rule.get("weight_decay", 0.0) * w.abs()
    size_v = d if "first" in options else momentum * v.abs() + abs(1 - rule.get("dampening", 0.0)) * d
    size_w = w.abs() + _LR * (d + momentum * size_v if rule.get("nesterov") else size_v if momentum else d)
    scale, after, gauge = 1.0, 1.0, rule.get("gauge")
    if gauge is not None:
        (scale, z, _), (after, z_after, _) = gauge.before, gauge.next
        size_v = gauge.momentum * v.abs() + gauge.grad_to_buffer * size_g + gauge.weight_to_buffer * w.abs()
        size_v += 2 * (z + z_after) * w.abs()  # the reference computes the true buffer first
        size_w = gauge.keep * w.abs() + gauge.grad_to_weight * size_g + gauge.buffer_to_weight * size_v
    exact_w, buffers = w.clone(), [None if "first" in options else v.clone()]
    held: list[Tensor | None] | None = None if l is None else [h]
    reference.sgd_([exact_w], [g], buffers, lr=_LR, held=held, **rule)

    off = SUMS_OFF * step_sums(w.abs() * scale, size_g / scale, scale * w.abs() + 2 * size_w / _keep(gauge)).abs()
    pairs = None
    if l is not None:
        pairs = pair_sums(h_own / scale, g_own / scale)
        if l != 1:  # the combination is rounded before it is summed
            unit = 0.5 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            off[:, 1:3] *= 1 + 8 * unit / SUMS_OFF
    exact_v = buffers[0] if momentum or "rests" in options else None
    return Expected(exact_w, size_w, exact_v, size_v, (scale * w, exact_g / scale, after), off + 1e-300, pairs)


def compare(exact: Expected, written: Written, allowed: float) -> Difference:
    """Compare with the exact results, and the sums with those of the weights that were stored."""
    if written.trespass:
        return Difference(0.0, written.trespass)
    found = [difference("w", written.tensors["w"], exact.w, exact.size_w, allowed)]
    if exact.v is not None:
        found.append(difference("v", written.tensors["v"], exact.v, exact.size_v, allowed))

    w, g, after = exact.sums_of
    sums, off = step_sums(w, g, after * written.tensors["w"].double()), exact.sums_off
    columns: tuple[str, ...] = ops.SUMS
    if exact.pair_sums is not None:
        columns = (*ops.SUMS, *ops.PAIR_SUMS)
        sums, off = (torch.cat(tables, 1) for tables in zip((sums, off), exact.pair_sums, strict=True))
    found.append(sums_difference(columns, written.sums, sums, off))
    return worst(found)


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return a rule's options as arguments of `sgd_`."""
    rule = {name: value for name, value in options.items() if name not in ("first", "rests", "leave")}
    if "gauge" not in rule:
        return rule
    kinds = ops.Buffers
    kind = kinds.FIRST if "first" in options else kinds.KEPT if "momentum" in rule else kinds.NONE
    rule["gauge"] = ops.gauge_step(
        rule["gauge"],
        _LR,
        rule.get("momentum", 0.0),
        rule.get("dampening", 0.0),
        rule["weight_decay"],
        rule.get("nesterov", False),
        kinds.RESTING if "rests" in options else kind,
        "leave" in options,
    )
    return rule


def _values(options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Return `values`; with a gauge finite ones, as the reference has intermediate results that cancel."""
    given = values(dtype)
    if "gauge" not in options:
        return list(given)
    return [x.nan_to_num(nan=1.0, posinf=1.0, neginf=-1.0) for x in given]


def _keep(gauge: ops.GaugeStep | None) -> float:
    return 1.0 if gauge is None else gauge.keep


def combination_size(a: Tensor, b: Tensor, l: float) -> Tensor:
    """Return the largest intermediate result of SVAG's combination."""
    return a.abs() if l == 1 else (a.abs() + b.abs()) * (0.5 + math.sqrt(2 * l - 1) / 2)


def step_sums(w: Tensor, g: Tensor, w_new: Tensor) -> Tensor:
    """Return `ops.SUMS` of flat values in float64, a row per tensor."""
    from .. import reference

    rows = zip(*(torch.split(x, SIZES) for x in (w, g, w_new)), strict=True)
    return torch.cat([reference.step_sums(w_i, g_i, new_i, "tensor") for w_i, g_i, new_i in rows])


def pair_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return `ops.PAIR_SUMS` of flat values in float64, a row per tensor, and the error that each may have."""
    from .. import reference

    def table(a: Tensor, b: Tensor) -> Tensor:
        rows = zip(torch.split(a, SIZES), torch.split(b, SIZES), strict=True)
        return torch.cat([reference.gradient_sums(x, y, "tensor") for x, y in rows])

    sizes = table(a.abs(), b.abs())
    sizes[:, 1] = sizes[:, 2] + sizes[:, 3] + 2 * sizes[:, 0]  # of |a| + |b|, not of their difference
    return table(a, b), SUMS_OFF * sizes + 1e-300
