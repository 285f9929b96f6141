"""Checks of every op, on every instruction-set level and dtype, against `normkern.reference` in float64.

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
from ..ops._load import REINSTALL
from . import adam, sgd, svag, welford
from .differences import NO_FMA, Difference, Written, roundings_allowed
from .finding import Check, Finding, failed, ok
from .places import PLACES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """An op of the binary.

    Attributes:
        rules: name -> options.
        run: runs the op on `PLACES` under one rule, on so many threads.
        expected: returns the exact results of a rule in a dtype.
        compare: compares them with what the op wrote, given how many roundings are allowed.
        roundings: how many are allowed beyond those of a step.
        instead: what to do where no level is right.
    """

    name: str
    rules: dict[str, dict[str, Any]]
    run: Callable[[dict[str, Any], torch.dtype, int], Written]
    expected: Callable[[dict[str, Any], torch.dtype], Any]
    compare: Callable[[Any, Written, float], Difference]
    roundings: float = 0.0
    instead: str = "use normkern.reference, which is torch's own operations"

    def roundings_allowed(self, isa: str, dtype: torch.dtype) -> float:
        """Return how many roundings are allowed on one level in one dtype."""
        return roundings_allowed(isa, dtype) + self.roundings


OPS = [
    Op("sgd_", sgd.RULES, sgd.run, sgd.expected, sgd.compare, instead="train with torch.optim.SGD"),
    Op("sgd_ of pairs", sgd.RULES_OF_PAIRS, sgd.run, sgd.expected, sgd.compare, sgd.PAIR_ROUNDINGS),
    Op(
        "sgd_ of gauges",
        sgd.RULES_OF_GAUGES,
        sgd.run,
        sgd.expected,
        sgd.compare,
        sgd.GAUGE_ROUNDINGS,
        "train with torch.optim.SGD",
    ),
    Op(
        "adamw_",
        adam.RULES,
        adam.run,
        adam.expected,
        adam.compare,
        adam.ROUNDINGS,
        "train with torch.optim.AdamW",
    ),
    Op("svag_combine_", svag.RULES, svag.run, svag.expected, svag.compare),
    Op("pair_sums", svag.SUMS_RULES, svag.run_sums, svag.expected_sums, svag.compare_sums),
    Op("welford_", welford.RULES, welford.run, welford.expected, welford.compare),
]


class _Expected:
    """The exact results of one op in one dtype, which are the same on every level."""

    def __init__(self) -> None:
        self._of: tuple[str, torch.dtype] | None = None
        self._results: dict[str, Any] = {}

    def get(self, op: Op, dtype: torch.dtype, rule: str) -> Any:
        """Return the results of a rule; keeps them until the op or the dtype is another."""
        if self._of != (op.name, dtype):
            self._of, self._results = (op.name, dtype), {}
        if rule not in self._results:
            self._results[rule] = op.expected(op.rules[rule], dtype)
        return self._results[rule]


def against_reference(op: Op, isa: str, dtype: torch.dtype, expected: _Expected | None = None) -> Finding:
    """Check every rule of an op on one level in one dtype."""
    expected = expected or _Expected()
    roundings, fault = _worst(op, isa, dtype, expected)
    allowed = op.roundings_allowed(isa, dtype)
    if fault is None:
        rules = f"{len(op.rules)} rule{'s' * (len(op.rules) != 1)}"
        return ok(f"{rules} x {len(PLACES)} tensors: {roundings:.1f} of {allowed:.0f} roundings")
    others = [other for other in ops.supported_isas() if other != isa and _worst(op, other, dtype, expected)[1] is None]
    if others:
        return failed(fault, f"export NORMKERN_ISA={others[0]}, which is right here, and install anew: {REINSTALL}")
    return failed(fault, f"{op.instead}, and install anew: {REINSTALL}")


def _worst(op: Op, isa: str, dtype: torch.dtype, expected: _Expected) -> tuple[float, str | None]:
    """Return the largest number of roundings among the rules, and the first fault."""
    ops.select_isa(isa)
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other make the check take minutes
    allowed, most = op.roundings_allowed(isa, dtype), 0.0
    for rule, options in op.rules.items():
        found = op.compare(expected.get(op, dtype, rule), op.run(options, dtype, 1), allowed)
        if found.fault:
            return found.roundings, f"{rule}: {found.fault}"
        most = max(most, found.roundings)
    return most, None


def same_bits(op: Op, dtype: torch.dtype) -> Finding:
    """Check that tensors and sums have the same bits on every number of threads, and on all levels with FMA.

    The selected level runs on 1, 3 and torch's number of threads. The others run on 1: the work of a thread does not
    depend on the level, and threads that wait for each other take long on a busy machine.
    """
    threads = sorted({1, 3, torch.get_num_threads()})
    torch.set_num_threads(1)  # for all but the op
    levels, selected = ops.supported_isas(), ops.isa()
    with_fma = [isa for isa in levels if isa not in NO_FMA]
    for rule, options in op.rules.items():
        first: dict[str, tuple[str, list[Tensor]]] = {}  # family of levels -> what every member must give
        for isa in levels:
            ops.select_isa(isa)
            for n in threads if isa == selected else [1]:
                here, got = f"{isa} on {n} thread{'s' * (n != 1)}", op.run(options, dtype, n).bits
                there, expected = first.setdefault("fma" if isa in with_fma else isa, (here, got))
                if not all(map(torch.equal, got, expected)):
                    return failed(
                        f"{rule}: {here} and {there} differ in their bits",
                        f"install anew: {REINSTALL}",
                    )
    across = f"; {' = '.join(with_fma)}" if len(with_fma) > 1 else ""
    return ok(f"{', '.join(map(str, threads))} threads{across}")


def checks() -> list[Check]:
    """Return the checks of the numbers: every op on every level in every dtype."""
    expected = _Expected()
    return [
        Check(f"{op.name} {isa} {_short(t)}", partial(against_reference, op, isa, t, expected), "numbers")
        for op in OPS
        for t in DTYPES
        for isa in ops.supported_isas()
    ]


def bits() -> list[Check]:
    """Return the checks of the bits: every op in every dtype, on several numbers of threads and all levels."""
    return [Check(f"{op.name} bits {_short(t)}", partial(same_bits, op, t), "bits") for op in OPS for t in DTYPES]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
