"""Is every op right: on every instruction-set level and dtype, against `normkern.reference` in float64, here and now.

To add an op: a module beside `sgd.py` that runs it on the tensors of `places.py` and compares, and a line in `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import sgd, svag, welford
from .differences import NO_FMA, Difference, Written, roundings_allowed
from .finding import Check, Finding, failed, ok
from .places import PLACES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """A bound op: its rules (name -> options); run on `PLACES`; compare, given how many roundings are allowed.

    roundings: allowed beyond those of a step. instead: what to do where no level is right.
    """

    name: str
    rules: dict[str, dict[str, Any]]
    run: Callable[[dict[str, Any], torch.dtype], Written]
    compare: Callable[[dict[str, Any], torch.dtype, Written, float], Difference]
    roundings: float = 0.0
    instead: str = "use normkern.reference, which is torch's own operations"

    def roundings_allowed(self, isa: str, dtype: torch.dtype) -> float:
        """On one level in one dtype."""
        return roundings_allowed(isa, dtype) + self.roundings


OPS = [
    Op("sgd_", sgd.RULES, sgd.run, sgd.compare, instead="train with torch.optim.SGD"),
    Op("sgd_ of pairs", sgd.RULES_OF_PAIRS, sgd.run, sgd.compare, sgd.PAIR_ROUNDINGS),
    Op("sgd_ of gauges", sgd.RULES_OF_GAUGES, sgd.run, sgd.compare, sgd.GAUGE_ROUNDINGS, "train with torch.optim.SGD"),
    Op("svag_combine_", svag.RULES, svag.run, svag.compare),
    Op("pair_sums", svag.SUMS_RULES, svag.run_sums, svag.compare_sums),
    Op("welford_", welford.RULES, welford.run, welford.compare),
]


def against_reference(op: Op, isa: str, dtype: torch.dtype) -> Finding:
    """Every rule of an op on one level in one dtype."""
    roundings, fault = _worst(op, isa, dtype)
    allowed = op.roundings_allowed(isa, dtype)
    if fault is None:
        rules = f"{len(op.rules)} rule{'s' * (len(op.rules) != 1)}"
        return ok(f"{rules} x {len(PLACES)} tensors: {roundings:.1f} of {allowed:.0f} roundings")
    others = [other for other in ops.supported_isas() if other != isa and _worst(op, other, dtype)[1] is None]
    again = "pip install --force-reinstall --no-deps --no-cache-dir normkern"
    if others:
        return failed(fault, f"export NORMKERN_ISA={others[0]}, which is right here, and install anew: {again}")
    return failed(fault, f"{op.instead}, and install anew: {again}")


def _worst(op: Op, isa: str, dtype: torch.dtype) -> tuple[float, str | None]:
    """The most roundings among the rules, and the first fault."""
    ops.select_isa(isa)
    allowed, most = op.roundings_allowed(isa, dtype), 0.0
    for rule, options in op.rules.items():
        found = op.compare(options, dtype, op.run(options, dtype), allowed)
        if found.fault:
            return found.roundings, f"{rule}: {found.fault}"
        most = max(most, found.roundings)
    return most, None


def same_bits(op: Op, dtype: torch.dtype) -> Finding:
    """On 1, 3 and torch's number of threads, and on all levels with FMA hardware: tensors and sums, bit for bit."""
    threads = sorted({1, 3, torch.get_num_threads()})
    levels = ops.supported_isas()
    with_fma = [isa for isa in levels if isa not in NO_FMA]
    for rule, options in op.rules.items():
        first: dict[str, tuple[str, list[Tensor]]] = {}  # family of levels -> what all of it must give
        for isa in levels:
            ops.select_isa(isa)
            for n in threads:
                torch.set_num_threads(n)
                written = op.run(options, dtype)
                here, got = f"{isa} on {n} thread{'s' * (n != 1)}", written.bits
                there, expected = first.setdefault("fma" if isa in with_fma else isa, (here, got))
                if not all(map(torch.equal, got, expected)):
                    return failed(
                        f"{rule}: {here} and {there} differ in their bits",
                        "install anew: pip install --force-reinstall --no-deps --no-cache-dir normkern",
                    )
    across = f"; {' = '.join(with_fma)}" if len(with_fma) > 1 else ""
    return ok(f"{', '.join(map(str, threads))} threads{across}")


def checks() -> list[Check]:
    """The lines of the table that are about numbers."""
    lines = []
    for op in OPS:
        for isa in ops.supported_isas():
            lines += [Check(f"{op.name} {isa} {_short(t)}", partial(against_reference, op, isa, t)) for t in DTYPES]
        lines += [Check(f"{op.name} bits {_short(t)}", partial(same_bits, op, t)) for t in DTYPES]
    return lines


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
