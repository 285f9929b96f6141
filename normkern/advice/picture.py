"""The picture of an `Advice`: three panels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..monitors.equilibrium_report import SETTLED
from .intervals import RatioOfMeans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .answer import Answer
    from .settling import Length

_BLUE, _RED, _GREY, _GREEN = "#2f6fb5", "#d9542b", "#9aa3b0", "#1a9988"


def draw(
    to: Any,
    *,
    noise: Sequence[float],
    signal: Sequence[float],
    batch_size: int,
    confidence: float,
    C: float,
    max_k: Answer,
    equilibrium: Answer,
    lengths: Sequence[Length],
) -> list[Axes]:
    """Draw the three panels; `to` as for `Advice.plot`, the others as in `Advice`."""
    figure = None
    if isinstance(to, (str, os.PathLike)):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 4.4), layout="constrained")
        axes = list(figure.subplots(1, 3))
    else:
        axes = list(to) if isinstance(to, Sequence) or hasattr(to, "flat") else [to]
        if len(axes) != 3 or not all(hasattr(a, "plot") and hasattr(a, "set_xlabel") for a in axes):
            raise TypeError(f"Advice.plot: to expected a path or three Axes, got {to!r}")
    traces, signals = (torch.tensor(x, dtype=torch.float64) for x in (noise, signal))
    _noise_scale(axes[0], traces, signals, batch_size, confidence)
    _scaling(axes[1], max_k, C, confidence)
    _lengths(axes[2], lengths, equilibrium.answer, confidence)
    if figure is not None:
        figure.savefig(to, dpi=120)
    return axes


def _noise_scale(panel: Axes, noise: Tensor, signal: Tensor, batch_size: int, confidence: float) -> None:
    """Draw the noise scale and its interval from the first n measurements, for growing n."""
    counts = sorted({max(2, round(len(noise) ** (i / 24))) for i in range(25)})
    intervals = [RatioOfMeans.of_series(noise[:n], signal[:n]).interval(confidence) for n in counts]
    values = [x for i in intervals for x in i if 0 < x < math.inf] or [1.0]
    floor, ceiling = min([*values, batch_size]) / 2, max([*values, batch_size]) * 2
    low = [max(i.low, floor) for i in intervals]
    high = [min(i.high, ceiling) for i in intervals]
    panel.fill_between(counts, low, high, color=_BLUE, alpha=0.2, linewidth=0, label=f"{confidence:.0%} interval")
    panel.plot(counts, [i.estimate if i.estimate > 0 else math.nan for i in intervals], ".-", color=_BLUE)
    panel.axhline(batch_size, color="k", linestyle="--", linewidth=1, label=f"batch {batch_size}")
    panel.set(xscale="log", yscale="log", ylim=(floor, ceiling), xlim=(2, max(3, len(noise))))
    panel.set(title="Noise scale", xlabel="measurements averaged", ylabel=r"tr $\Sigma_1$ / $|\nabla L|^2$ (samples)")
    if any(i.high > ceiling for i in intervals):
        panel.plot([], [], " ", label="up to the edge: no upper end")
    panel.legend(fontsize="small", loc="best")
    panel.grid(alpha=0.3)


def _scaling(panel: Axes, k: Answer, C: float, confidence: float) -> None:
    """Draw which k must leave the run, which may stay, and what the interval leaves open."""
    panel.set_title("batch x k and lr x k")
    panel.set_yticks([])
    if k.low is None:
        panel.text(0.5, 0.5, _wrapped(k.answer), transform=panel.transAxes, ha="center", va="center")
        panel.set_xticks([])
        return
    end = 2 * (k.high if k.high is not None else max(8 * k.low, 8 * (k.estimate or 0.0)))
    high = k.high if k.high is not None else end
    panel.axvspan(0.5, k.low, color=_GREEN, alpha=0.25, linewidth=0, label="not excluded")
    panel.axvspan(k.low, high, color=_GREY, alpha=0.3, linewidth=0, label=f"open: {confidence:.0%} interval")
    if high < end:
        panel.axvspan(high, end, color=_RED, alpha=0.25, linewidth=0, label=f"cannot stay {C:.3g}-close")
    if k.estimate is not None:
        panel.axvline(k.estimate, color="k", linewidth=1.5, label=f"limit: k = {k.estimate:.3g}")
    panel.axvline(1, color="k", linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set(xlim=(0.5, end), xlabel="k (dotted: this run)")
    from matplotlib.ticker import FuncFormatter

    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.legend(fontsize="small", loc="center")


def _lengths(panel: Axes, lengths: Sequence[Length], answer: str, confidence: float) -> None:
    """Draw each parameter's norm over that at equilibrium, and the band in which it counts as settled."""
    panel.set_title("Norms over equilibrium")
    if not lengths:
        panel.text(0.5, 0.5, _wrapped(answer), transform=panel.transAxes, ha="center", va="center")
        panel.set(xticks=[], yticks=[])
        return
    shown = lengths[:30]
    panel.axvspan((1 - SETTLED) ** 0.25, (1 + SETTLED) ** 0.25, color=_GREEN, alpha=0.25, linewidth=0, label="settled")
    panel.axvline(1, color="k", linestyle="--", linewidth=1)
    for i, length in enumerate(shown):
        x = length.ratio
        if math.isfinite(x.low) and math.isfinite(x.high):
            panel.plot([x.low, x.high], [i, i], color=_BLUE, linewidth=2)
        panel.plot([x.estimate], [i], "o", color=_BLUE, markersize=4)
    panel.plot([], [], color=_BLUE, linewidth=2, label=f"{confidence:.0%} intervals, together")
    panel.set_yticks(range(len(shown)), [x.name for x in shown], fontsize=7)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_xlabel("|w| / |w| at equilibrium")
    panel.legend(fontsize="small")
    panel.grid(alpha=0.3, axis="x")


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 34))
