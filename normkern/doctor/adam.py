"""`adamw_` under every rule: runs it at odd places and compares it with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import machine
from .differences import SUMS_OFF, Difference, Written, difference, sums_difference, worst
from .places import PLACES, Laid, flat, trespass, values
from .sgd import step_sums

RULES: dict[str, dict[str, Any]] = {
    "decoupled": {"weight_decay": 0.1},
    "decoupled, everything": {"weight_decay": 0.3, "maximize": True, "grad_scale": 8.0, "eps": 1e-3},
    "coupled": {"weight_decay": 0.1, "decoupled": False},
    "first step": {"weight_decay": 0.0, "first": True},
}
#: Roundings beyond those of a step: a root, two divisions, and what both averages bring along.
ROUNDINGS = 8.0
_LR, _BETA1, _BETA2, _STEPS = 0.1, 0.8, 0.9, 7.0


def run(options: dict[str, Any], dtype: torch.dtype, threads: int) -> Written:
    """Run `ops.adamw_` with sums, on weights and averages at odd places and gradients at others."""
    rule = _arguments(options)
    w, g, m, v = _values(options, dtype)
    laid = {"w": Laid(w, first=1), "g": Laid(g, first=4, dense=True), "m": Laid(m, first=2), "v": Laid(v, first=3)}
    grads: list[Tensor | None] = list(laid["g"].tensors)
    exp_avgs: list[Tensor | None] = list(laid["m"].tensors)
    exp_avg_sqs: list[Tensor | None] = list(laid["v"].tensors)
    steps: list[Tensor | None] = [_steps(options) for _ in PLACES]
    with machine.threads(threads):
        table = ops.adamw_(laid["w"].tensors, grads, exp_avgs, exp_avg_sqs, steps, lr=_LR, stats="tensor", **rule)
    assert table is not None
    tensors = {name: flat(laid[name].tensors) for name in "wmv"}
    return Written(tensors, table, trespass(laid, {"gradients": (laid["g"], g)}))


@dataclass(frozen=True)
class Expected:
    """The exact results of a rule, and the largest intermediate results on the way to them; what the sums are of."""

    exact: dict[str, Tensor]
    sizes: dict[str, Tensor]
    before: Tensor
    gradient: Tensor
    sums_off: Tensor


def expected(options: dict[str, Any], dtype: torch.dtype) -> Expected:
    """Return what `reference.adamw_` computes in float64."""
    from .. import reference

    rule = _arguments(options)
    w, g, m, v = (x.double() for x in _values(options, dtype))
    after = [x.clone() for x in (w, m, v)]
    reference.adamw_([after[0]], [g], [after[1]], [after[2]], [_steps(options)], lr=_LR, **rule)
    gradient, decay = g / rule.get("grad_scale", 1.0), rule["weight_decay"]
    d = gradient.abs() + (0.0 if rule.get("decoupled", True) else decay * w.abs())
    size_m, size_v = _BETA1 * m.abs() + (1 - _BETA1) * d, _BETA2 * v + (1 - _BETA2) * d.square()
    t = float(_steps(options)) + 1
    root = (after[2] / (1 - _BETA2**t)).sqrt() + rule.get("eps", 1e-8)
    size_w = w.abs() * (1 + _LR * decay) + _LR * size_m / (1 - _BETA1**t) / root
    off = SUMS_OFF * step_sums(w.abs(), gradient.abs(), w.abs() + 2 * size_w).abs() + 1e-300
    sizes = {"w": size_w, "m": size_m, "v": size_v}
    return Expected(dict(zip("wmv", after, strict=True)), sizes, w, gradient, off)


def compare(exact: Expected, written: Written, allowed: float) -> Difference:
    """Compare with the exact results, and the sums with those of the weights that were stored."""
    if written.trespass:
        return Difference(0.0, written.trespass)
    sums = step_sums(exact.before, exact.gradient, written.tensors["w"].double())
    found = [difference(x, written.tensors[x], exact.exact[x], exact.sizes[x], allowed) for x in "wmv"]
    return worst([*found, sums_difference(ops.SUMS, written.sums, sums, exact.sums_off)])


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return a rule's options as arguments of `adamw_`."""
    return {"beta1": _BETA1, "beta2": _BETA2} | {name: x for name, x in options.items() if name != "first"}


def _steps(options: dict[str, Any]) -> Tensor:
    return torch.tensor(0.0 if "first" in options else _STEPS, dtype=torch.float32)


def _values(options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Return weights, gradients and both averages, zeros at a first step."""
    w, g, m, v = values(dtype)
    return [w, g, torch.zeros_like(m), torch.zeros_like(v)] if "first" in options else [w, g, m, v.abs()]
