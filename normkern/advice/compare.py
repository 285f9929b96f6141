"""`compare_runs`: whether runs are C-close to a reference, from numbers logged for several seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..monitors.report import table
from ..theory.arguments import CLOSENESS, number
from .answer import ends
from .intervals import SHARE, Interval, RatioOfMeans
from .student import two_sided

#: The measures of closeness, and what they are.
MEASURES = {"R": "|w|^2", "G": "|grad L|^2", "N": "tr Sigma"}
CLOSE, NOT_CLOSE, UNDECIDED = "close", "not close", "undecided"


@dataclass(frozen=True)
class RunComparison:
    r"""One run beside the reference.

    Attributes:
        ratios: of "R", "G" and "N": the ratio of means over seeds, to the reference's; the intervals hold together.
        accuracy: the difference of the mean accuracies, the run's less the reference's; None without accuracies.
        verdict: "close" if all three intervals lie in [1/C, C], "not close" if one lies outside, else "undecided".
        seeds: of the run and of the reference.
    """

    ratios: dict[str, Interval]
    accuracy: Interval | None
    verdict: str
    seeds: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Runs beside one reference; `print` it for a table. Plain data: it can be pickled.

    Attributes:
        runs: `RunComparison` by the key of the run.
        reference: the key of the reference.
        C, confidence: what was given.
    """

    runs: dict[Any, RunComparison]
    reference: Any
    C: float
    confidence: float

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as rows of text; the first has the heads."""
        heads = (f"over {_name(self.reference)}", *(f"{k}: {what}" for k, what in MEASURES.items()), "accuracy")
        rows = [(*heads, f"close within {self.C:.3g}")]
        for key, run in self.runs.items():
            cells = [_text(run.ratios[k], "") for k in MEASURES]
            accuracy = "-" if run.accuracy is None else _text(run.accuracy, "+")
            rows.append((_name(key), *cells, accuracy, run.verdict))
        return rows

    def __str__(self) -> str:
        return "\n".join(table(self.rows()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers; None for an end that is not bounded."""
        return {
            "reference": _name(self.reference),
            "C": self.C,
            "confidence": self.confidence,
            "runs": {
                _name(key): {
                    "verdict": run.verdict,
                    "seeds": list(run.seeds),
                    "ratios": {k: ends(x) for k, x in run.ratios.items()},
                    "accuracy": None if run.accuracy is None else ends(run.accuracy),
                }
                for key, run in self.runs.items()
            },
        }


def compare_runs(
    runs: Mapping[Any, Mapping[str, Any]], *, reference: Any = 1, C: float = math.sqrt(2), confidence: float = 0.95
) -> Comparison:
    r"""Return whether runs, such as SVAG at several l, are C-close to a reference, such as SGD, from logged numbers.

    Two runs are C-close if the ratios of their :math:`R = |w|^2`, :math:`G = |\nabla L|^2` and
    :math:`N = \operatorname{tr}\Sigma` at equilibrium lie in :math:`[1/C, C]`. For each the interval of the ratio of
    means over seeds is Fieller's, for two independent samples,

    .. math::
        (\bar x - \rho \bar y)^2 \le t^2 \left(\frac{s_x^2}{m} + \rho^2 \frac{s_y^2}{n}\right)

    with Welch's degrees of freedom. The three hold together with `confidence` (Bonferroni), so a verdict is wrong at
    most that seldom. Accuracy is reported, and has no part in the verdict.

    Args:
        runs: key (for SVAG l) -> "R", "G", "N" and perhaps "accuracy" -> one number per seed: means over the steps at
            equilibrium, of independent runs. G is the unbiased estimate, and may be negative. For runs with different
            lr, N is that per unit of time: lr * tr Sigma.
        reference: the key of the reference; 1 is SVAG's l of SGD.
        C: finite, > 1.
        confidence: in (0, 1).

    Returns:
        `Comparison`, of all runs but the reference.

    Raises:
        ValueError: no such reference, no other run, a missing measure, fewer than 2 seeds, numbers that are not finite,
            C or confidence out of range. TypeError: `runs` is no mapping of mappings, or a measure no array of numbers.

    Reference: Li, Malladi, Arora 2021, arXiv 2102.12470, C-closeness; Fieller 1954, J. R. Stat. Soc. B 16(2).

    >>> sgd = {"R": [4.0, 4.1, 3.9, 4.0], "G": [1.0, 1.1, 0.9, 1.0], "N": [2.0, 2.1, 1.9, 2.0]}
    >>> other = {"R": [8.0, 8.2, 7.9, 8.1], "G": [1.0, 1.1, 0.9, 1.0], "N": [2.0, 2.1, 1.9, 2.0]}
    >>> compared = compare_runs({1: sgd, 2: sgd, 4: other})
    >>> {l: run.verdict for l, run in compared.runs.items()}
    {2: 'close', 4: 'not close'}
    """
    C, confidence = number("compare_runs", "C", C, CLOSENESS), number("compare_runs", "confidence", confidence, SHARE)
    if not isinstance(runs, Mapping) or not all(isinstance(run, Mapping) for run in runs.values()):
        raise TypeError("compare_runs: runs expected a mapping: key -> {'R': array, 'G': array, 'N': array}")
    if reference not in runs or len(runs) < 2:
        raise ValueError(
            f"compare_runs: runs expected the reference {reference!r} and at least one other, got keys {list(runs)}"
        )
    numbers = {key: _numbers(key, run) for key, run in runs.items()}
    base = numbers.pop(reference)
    compared = {}
    for key, run in numbers.items():
        each = 1 - (1 - confidence) / len(MEASURES)
        ratios = {k: _ratio(run[k], base[k]).interval(each) for k in MEASURES}
        both = "accuracy" in run and "accuracy" in base
        accuracy = _difference(run["accuracy"], base["accuracy"], confidence) if both else None
        compared[key] = RunComparison(ratios, accuracy, _verdict(ratios, C), (len(run["R"]), len(base["R"])))
    return Comparison(compared, reference, C, confidence)


def _numbers(key: Any, run: Mapping[str, Any]) -> dict[str, Tensor]:
    lacking = [k for k in MEASURES if k not in run]
    if lacking:
        raise ValueError(
            f"compare_runs: runs[{key!r}] expected the measures {', '.join(MEASURES)}, got {sorted(map(str, run))}"
        )
    found = {}
    for k in (*MEASURES, "accuracy"):
        if k not in run:
            continue
        try:
            values = torch.as_tensor(run[k], dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            values = torch.zeros(())
        if values.ndim != 1:
            raise TypeError(
                f"compare_runs: runs[{key!r}][{k!r}] expected an array with a number for each seed, (seeds,)"
            )
        if len(values) < 2:
            raise ValueError(
                f"compare_runs: runs[{key!r}][{k!r}] expected at least 2 seeds, got {len(values)}: without them there "
                "is no interval"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"compare_runs: runs[{key!r}][{k!r}] expected finite numbers, got {values.tolist()}; leave out the "
                "seeds that diverged, and say so"
            )
        if k in ("R", "N") and bool((values < 0).any()):
            raise ValueError(f"compare_runs: runs[{key!r}][{k!r}] expected numbers >= 0, got {values.tolist()}")
        found[k] = values
    return found


def _ratio(x: Tensor, y: Tensor) -> RatioOfMeans:
    u, v = float(x.var()) / len(x), float(y.var()) / len(y)
    mx, my = float(x.mean()), float(y.mean())
    ratio = mx / my if my else 1.0  # of x - ratio * y, whose variance decides
    return RatioOfMeans(mx, my, u, v, 0.0, _welch(u, len(x), ratio * ratio * v, len(y)), min(len(x), len(y)))


def _welch(u: float, m: int, v: float, n: int) -> int:
    """Return the degrees of freedom of u + v, rounded down."""
    if u + v == 0:
        return min(m, n) - 1
    return max(1, math.floor((u + v) ** 2 / (u * u / (m - 1) + v * v / (n - 1))))


def _difference(x: Tensor, y: Tensor, confidence: float) -> Interval:
    u, v = float(x.var()) / len(x), float(y.var()) / len(y)
    middle = float(x.mean() - y.mean())
    half = two_sided(confidence, _welch(u, len(x), v, len(y))) * math.sqrt(u + v)
    return Interval(middle, middle - half, middle + half)


def _verdict(ratios: Mapping[str, Interval], C: float) -> str:
    if all(x.low >= 1 / C and x.high <= C for x in ratios.values()):
        return CLOSE
    if any(x.high < 1 / C or x.low > C for x in ratios.values()):
        return NOT_CLOSE
    return UNDECIDED


def _name(key: Any) -> str:
    return f"l = {key:g}" if isinstance(key, (int, float)) else str(key)


def _text(x: Interval, sign: str) -> str:
    form = f"{sign}.3g"
    return f"{format(x.estimate, form)} [{format(x.low, form)}, {format(x.high, form)}]"
