"""`sgd_` under every rule: how it is run at odd places, and what is right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .differences import Difference, Written, bits, difference, same
from .places import PLACES, SIZES, Laid, flat, values

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
_LR = 0.1


def run(options: dict[str, Any], dtype: torch.dtype) -> Written:
    """`ops.sgd_` with sums, on weights and buffers at odd places and gradients at others."""
    rule = {name: value for name, value in options.items() if name != "first"}
    w, g, v = values(dtype)
    laid = {"w": Laid(w, first=1), "g": Laid(g, first=4, dense=True), "v": Laid(v, first=2)}
    buffers: list[Tensor | None] | None = None
    if "momentum" in rule:
        buffers = [None] * len(PLACES) if "first" in options else list(laid["v"].tensors)
    grads: list[Tensor | None] = list(laid["g"].tensors)
    table = ops.sgd_(laid["w"].tensors, grads, buffers, lr=_LR, stats="tensor", **rule)
    assert table is not None
    tensors = {"w": flat(laid["w"].tensors)}
    if buffers is not None:
        tensors["v"] = flat([x for x in buffers if x is not None])
    trespass = None if torch.equal(bits(flat(laid["g"].tensors)), bits(g)) else "the gradients were written"
    outside = [name for name, x in laid.items() if not x.is_fenced()]
    if outside:
        trespass = f"memory beside {' and '.join(outside)} was written"
    return Written(tensors, table, trespass)


def compare(options: dict[str, Any], dtype: torch.dtype, written: Written, allowed: float) -> Difference:
    """With `reference.sgd_` in float64; the sums with those of the weights that were stored."""
    from .. import reference

    if written.trespass:
        return Difference(0.0, written.trespass)
    rule = {name: value for name, value in options.items() if name != "first"}
    w, g, v = (x.double() for x in values(dtype))
    scale, momentum = rule.get("grad_scale", 1.0), rule.get("momentum", 0.0)
    # The sizes of what is computed on the way to v' and w'.
    d = g.abs() / scale + rule.get("weight_decay", 0.0) * w.abs()
    size_v = d if "first" in options else momentum * v.abs() + abs(1 - rule.get("dampening", 0.0)) * d
    size_w = w.abs() + _LR * (d + momentum * size_v if rule.get("nesterov") else size_v if momentum else d)
    exact_w, buffers = w.clone(), [None if "first" in options else v.clone()]
    reference.sgd_([exact_w], [g], buffers, lr=_LR, **rule)
    found = [difference("w", written.tensors["w"], exact_w, size_w, allowed)]
    if momentum and buffers[0] is not None:
        found.append(difference("v", written.tensors["v"], buffers[0], size_v, allowed))

    parts = [torch.split(x, SIZES) for x in (w, g / scale, written.tensors["w"].double(), size_w)]
    for i, (w_i, g_i, new_i, size_i) in enumerate(zip(*parts, strict=True)):
        sums = reference.step_sums(w_i, g_i, new_i, "tensor")
        largest = reference.step_sums(w_i.abs(), g_i.abs(), w_i.abs() + size_i, "tensor").abs() + 1e-300
        off = ((written.sums[i] - sums[0]).abs() / largest[0]).nan_to_num(nan=math.inf)
        off[same(written.sums[i], sums[0])] = 0
        if off.max() > 1e-13:
            k = int(off.argmax())
            got, exact = (f"{float(x):.15g}" for x in (written.sums[i, k], sums[0, k]))
            found.append(Difference(math.inf, f"{ops.SUMS[k]} of shape {PLACES[i][0]} is {got}, expected {exact}"))
    return next((x for x in found if x.fault), max(found, key=lambda x: x.roundings))
