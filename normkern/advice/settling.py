r"""Whether lr * weight_decay has reached equilibrium, from reports of an `EquilibriumMonitor`, with intervals.

Each report has for each parameter the ratio :math:`\rho = |w|_*^4/|w|^4` of the norm that balances its gradients to the
one it has. The interval is that of the mean of :math:`\ln\rho` over the reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..monitors.equilibrium import EquilibriumMonitor
from ..monitors.equilibrium_report import Equilibrium, EquilibriumReport, steps_left
from .answer import UNKNOWN, Answer, missing
from .intervals import Interval, Mean, further_measurements

#: Relaxation times that reports must span: with 10, simulations of the noise model cover as often as they say.
_ENOUGH_TIMES = 10
#: So many times the reports are no advice.
_TOO_MANY = 50
QUESTION = "equilibrium of lr * weight_decay"


class Length(NamedTuple):
    """The norm of one parameter or group over that at equilibrium.

    Attributes:
        name: of the parameter, or "group i" where only the group has an equilibrium.
        ratio: :math:`|w|/|w|_*`; its ends are NaN from one report alone.
        steps: the steps until it has settled, with their interval; the ends are NaN from one report alone.
    """

    name: str
    ratio: Interval
    steps: Interval


def read(equilibrium: Any) -> list[EquilibriumReport]:
    """Return reports in the order of time; the argument is that of `normkern.advise`.

    Raises:
        TypeError, ValueError: it is no such thing, or reports are of different parameters.
    """
    if equilibrium is None:
        return []
    given = [equilibrium] if isinstance(equilibrium, (EquilibriumMonitor, EquilibriumReport)) else equilibrium
    reports = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
    if reports and isinstance(reports[0], EquilibriumMonitor) and len(reports) == 1:
        reports = [reports[0].report()]
    if not reports or not all(isinstance(r, EquilibriumReport) for r in reports):
        raise TypeError(
            "advise: equilibrium expected reports of an EquilibriumMonitor, as monitor.report() returns them, a "
            f"monitor, or None, got {type(equilibrium).__name__}{'' if reports is None else ' with other things'}"
        )
    if any(r.parameters.keys() != reports[0].parameters.keys() for r in reports):
        raise ValueError("advise: equilibrium expected reports of the same parameters, got different ones")
    if any(later.steps <= earlier.steps for earlier, later in pairwise(reports)):
        raise ValueError(
            "advise: equilibrium expected reports in the order of time, each after more steps than the one before, got "
            f"steps {[r.steps for r in reports][:8]}"
        )
    return reports


def lengths(reports: Sequence[EquilibriumReport], confidence: float) -> list[Length]:
    """Return the norm of each parameter over that at equilibrium; simultaneous intervals."""
    rows = _rows(reports)
    each = _each(confidence, len(rows))
    out = []
    for name, series in rows.items():
        slow = series[-1].steps_to_equilibrium
        if len(series) < 2:
            ratio = 1 + (series[0].residual or 0.0)
            steps = Interval(series[0].steps_left or 0.0, math.nan, math.nan)
            out.append(Length(name, Interval(_length(ratio), math.nan, math.nan), steps))
            continue
        mean = _mean(series).interval(each)
        at = [steps_left(math.expm1(min(x, 700.0)), slow) for x in mean]
        least = 0.0 if mean.low <= 0 <= mean.high else min(at[1:])
        high = _length(math.exp(mean.low)) if mean.low > -700 else math.inf
        middle, low = (_length(math.exp(min(x, 700.0))) for x in (mean.estimate, mean.high))
        out.append(Length(name, Interval(middle, low, high), Interval(at[0], least, max(at[1:]))))
    return out


def answer(reports: Sequence[EquilibriumReport], confidence: float) -> Answer:
    """Return whether all norms have settled, and how many steps are left."""
    if not reports:
        return Answer(QUESTION, "not asked: no reports were given", False, note="pass equilibrium=")
    rows = _rows(reports)
    if not rows:
        reason = next((x.reason for x in (*reports[-1].groups.values(), *reports[-1].parameters.values())), None)
        return Answer(QUESTION, "no equilibrium: nothing settles", False, note=reason or "")
    of_rows = lengths(reports, confidence)
    steps = [row.steps for row in of_rows]
    worst = max(range(len(steps)), key=lambda i: steps[i].estimate)
    if len(reports) < 2:
        verdict = "settled" if steps[worst].estimate == 0 else f"not yet, about {_steps(steps[worst].estimate)} more"
        note = f"one report has no interval (its verdict: {verdict}); collect monitor.report() every few steps"
        estimate = steps[worst].estimate
        return Answer(
            QUESTION, UNKNOWN, False, estimate if math.isfinite(estimate) else None, unit="steps left", note=note
        )
    low, high = max(s.low for s in steps), max(s.high for s in steps)
    estimate = steps[worst].estimate
    fields: dict[str, Any] = {
        "estimate": estimate if math.isfinite(estimate) else None,
        "low": low if math.isfinite(low) else None,
        "high": high if math.isfinite(high) else None,
        "unit": "steps left",
    }
    short = _short(reports, max(series[-1].steps_to_equilibrium for series in rows.values()))
    if high == 0:
        return Answer(QUESTION, f"settled: {len(rows)} of {len(rows)}", True, more=0, note=short, **fields)
    if low > 0:
        moving = sum(s.low > 0 for s in steps)
        if math.isinf(estimate):
            return Answer(QUESTION, "not yet: the weights shrink to zero", True, more=0, **fields)
        text = f"not yet: {moving} of {len(rows)} move, about {_steps(estimate)} more steps"
        note = f"slowest: {of_rows[worst].name}" + (f"; {short}" if short else "")
        return Answer(QUESTION, text, True, more=0, note=note, **fields)
    undecided = [i for i, s in enumerate(steps) if s.low == 0 < s.high]
    needed = [_further(rows[of_rows[i].name], _each(confidence, len(rows))) for i in undecided]
    known = [n for n in needed if n is not None]
    more = max(known) if len(known) == len(needed) else None
    note = f"{len(undecided)} of {len(rows)} undecided"
    if math.isfinite(high):
        note += f"; at most about {_steps(high)} more steps"
    if more is not None and more > _TOO_MANY * len(reports):
        more, note = None, f"{note}; some lie at the edge of what counts as settled"
    note += f"; {missing(more, 'reports')}" if more else ""
    note += f"; {short}" if short else ""
    return Answer(QUESTION, UNKNOWN, False, more=more, note=note, **fields)


def _short(reports: Sequence[EquilibriumReport], slow: float) -> str:
    """Return a warning if the reports span less time than their interval needs."""
    times = (reports[-1].steps - reports[0].steps) / slow
    return "" if times >= _ENOUGH_TIMES else f"reports span {times:.1f} relaxation times, better {_ENOUGH_TIMES}"


def _each(confidence: float, rows: int) -> float:
    """Return the confidence of each interval with which all together have `confidence`."""
    return 1 - (1 - confidence) / max(rows, 1)


def _rows(reports: Sequence[EquilibriumReport]) -> dict[str, list[Equilibrium]]:
    """Return the series of each parameter with a prediction in all reports, or of its group where none has one."""
    rows: dict[str, list[Equilibrium]] = {}
    for i in reports[-1].groups:
        names = [name for name, p in reports[-1].parameters.items() if p.group == i]
        own = {name: [r.parameters[name] for r in reports] for name in names}
        own = {name: series for name, series in own.items() if _is_predicted(series)}
        of_group = [r.groups[i] for r in reports if i in r.groups]
        if not own and len(of_group) == len(reports) and _is_predicted(of_group):
            own = {f"group {i}": of_group}
        rows |= own
    return rows


def _is_predicted(series: Sequence[Equilibrium]) -> bool:
    return all(x.residual is not None for x in series)


def _mean(series: Sequence[Equilibrium]) -> Mean:
    logs = [math.log1p(max(x.residual or 0.0, -1 + 1e-300)) if x.residual != -1 else -745.0 for x in series]
    return Mean.of_series(torch.tensor(logs, dtype=torch.float64))


def _length(ratio: float) -> float:
    """Return |w|/|w|_* from |w|_*^4/|w|^4."""
    return math.inf if ratio <= 0 else ratio**-0.25


def _further(series: Sequence[Equilibrium], confidence: float) -> int | None:
    """Return how many more reports decide about one parameter."""
    slow = series[-1].steps_to_equilibrium

    def decides(x: Interval) -> bool:
        ends = [steps_left(math.expm1(min(end, 700.0)), slow) for end in x[1:]]
        return max(ends) == 0 or (min(ends) > 0 and not x.low <= 0 <= x.high)

    return further_measurements(_mean(series), confidence, decides)


def _steps(steps: float) -> str:
    return f"{float(f'{steps:.1e}'):,.0f}"
