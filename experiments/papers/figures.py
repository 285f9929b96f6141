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
        from matplotlib.ticker import NullFormatter

        with plt.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
            figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4), layout="constrained", squeeze=False)
            yield axes[0]
            for axis in axes[0]:
                if axis.get_xscale() == "log":
                    axis.xaxis.set_minor_formatter(NullFormatter())
            figure.savefig(self.folder / self.file(name), dpi=80)
            plt.close(figure)

    def file(self, name: str) -> str:
        """The name of its file."""
        return f"{self.paper}_{name}.png"


def label(axis: Any, x: str, y: str, title: str = "") -> None:
    """Names both axes, with units, and the panel."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)


def band(axis: Any, x: Sequence[float], of_seeds: Sequence[Sequence[float]], **style: Any) -> None:
    """The mean of the seeds' curves, and where all of them are."""
    import numpy as np

    y = np.asarray(of_seeds, dtype=float)
    (line,) = axis.plot(x, y.mean(0), **style)
    axis.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
