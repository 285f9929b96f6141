"""Draw the pictures of the guides by running normkern on scikit-learn's digits: python docs/figures [NAME ...]"""

import sys
from pathlib import Path

import auto_rate
import equilibrium
import exponential
import invariance
import matplotlib
import noise
import stats
import svag

DRAWN = {
    module.__name__: module.draw for module in (stats, svag, noise, exponential, invariance, equilibrium, auto_rate)
}


def main() -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    names = sys.argv[1:] or list(DRAWN)
    for name in names:
        if name not in DRAWN:
            sys.exit(f"docs/figures: expected some of {', '.join(DRAWN)}, got {name!r}")
    for name in names:
        figure = DRAWN[name]()
        to = Path(__file__).with_name(f"{name}.png")
        figure.savefig(to, dpi=110)
        print(f"{to.name}: {to.stat().st_size // 1024} kB", flush=True)


if __name__ == "__main__":
    main()
