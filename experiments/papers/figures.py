"""Figures of one look: named axes, light grids, readable at half their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Dark to light, for quantities that are ordered.
COLOURS = ("#1b3a6b", "#2f6fb5", "#1a9988", "#7fb03a", "#e0a117", "#d9542b", "#8a2c5d")

_STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


#: What `band` draws; it is written under each figure that has a band.
BAND = "line: mean over the networks; band: from the lowest to the highest"


class Figures:
    """Where a paper's figures go, and the names of those that it has."""

    def __init__(self, folder: Path, paper: str) -> None:
        self.folder, self.paper = folder, paper

    @contextmanager
    def draw(self, name: str, panels: int) -> Iterator[Any]:
        """The panels of a figure, side by side; saved as ``<paper>_<name>.png``."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from cycler import cycler
        from matplotlib.collections import PolyCollection

        with plt.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
            figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4), layout="constrained", squeeze=False)
            yield axes[0]
            for axis in axes[0]:
                for one, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
                    if one.get_scale() == "log":
                        _ticks(one, high / low)
            if any(isinstance(drawn, PolyCollection) for axis in axes[0] for drawn in axis.collections):
                figure.supxlabel(BAND, fontsize=9, color="#5b6472")
            figure.savefig(self.folder / self.file(name), dpi=80)
            plt.close(figure)

    def file(self, name: str) -> str:
        """The name of its file."""
        return f"{self.paper}_{name}.png"


def _ticks(axis: Any, span: float) -> None:
    """Label a logarithmic axis at powers of ten only; at 1, 2 and 5 too if it has fewer than two of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if span < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def label(axis: Any, x: str, y: str, title: str = "") -> None:
    """Names both axes, with units, and the panel."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)


def band(axis: Any, x: Sequence[float], of_seeds: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw the mean of the networks' curves, and a band from the lowest to the highest of them."""
    import numpy as np

    y = np.asarray(of_seeds, dtype=float)
    (line,) = axis.plot(x, y.mean(0), **style)
    axis.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
