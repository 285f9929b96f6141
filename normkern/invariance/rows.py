"""The rows of one parameter: slices along a dimension, and ranges of them that are invariant together."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Rows whose |w| |g| is below this share of the tensor's are rounding beside it.
_SHARE = 1e-6
#: Starts of a range that are tried for each stop; with float64 there is hardly ever more than the right one.
_TRIED = 64


class View(NamedTuple):
    """A tensor reshaped to `shape`, of which the dimensions `kept` enumerate the rows."""

    shape: tuple[int, ...]
    kept: tuple[int, ...]

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum of every row, in float64."""
        dims = [d for d in range(len(self.shape)) if d not in self.kept]
        x = x.reshape(self.shape)
        return (x.sum(dims, dtype=torch.float64) if dims else x.double()).flatten()


class Rows:
    """The draws for the rows of one view: <w,g> and |w| |g| of each, in units of the tensor's |w| |g|."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.count = math.prod(view.shape[d] for d in view.kept)
        self._dots: dict[int, Tensor] = {}
        self._sizes: dict[int, Tensor] = {}

    def add(self, draw: int, products: Tensor, w_sq: Tensor, g_sq: Tensor) -> None:
        """Add one draw: w * g, w^2 and g^2 of every entry."""
        total = (w_sq.sum(dtype=torch.float64) * g_sq.sum(dtype=torch.float64)).sqrt()
        if total > 0:
            self._dots[draw] = (self._view.sums(products) / total).cpu()
            self._sizes[draw] = ((self._view.sums(w_sq) * self._view.sums(g_sq)).sqrt() / total).cpu()

    def keep(self, draws: list[int]) -> None:
        """Forget all draws but these."""
        self._dots = {r: x for r, x in self._dots.items() if r in draws}
        self._sizes = {r: x for r, x in self._sizes.items() if r in draws}

    @property
    def worst(self) -> float:
        """Return the largest |cos| of a row."""
        pairs = zip(self._dots.values(), self._sizes.values(), strict=True)
        return max((float((a.abs() / s.clamp(min=_SHARE)).max()) for a, s in pairs), default=math.nan)

    def invariant(self, allowed: float) -> bool:
        """Return whether every row is invariant on its own."""
        return self.worst <= allowed

    def blocks(self, allowed: float) -> tuple[tuple[int, int], ...]:
        """Return the shortest ranges (start, stop) of adjacent rows whose <w,g> cancel in every draw."""
        if not self._dots:
            return ()
        dots, sizes = torch.stack([*self._dots.values()]), torch.stack([*self._sizes.values()])
        zero = dots.new_zeros(len(dots), 1)
        before = torch.cat([zero, dots.cumsum(1)], 1)  # <w,g> of all rows before each
        room = allowed * torch.cat([zero, sizes.cumsum(1)], 1)
        # Ranges that cancel lie between equal columns. One random mixture of the draws sorts those out.
        mixture = torch.rand(len(dots), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        order = (mixture @ before).sort()
        starts_anew = order.values.diff() > float(mixture.sum()) * (allowed + 1e-14)
        kind = torch.zeros(len(order.indices), dtype=torch.long)
        kind[order.indices[1:]] = starts_anew.cumsum(0)
        found: list[tuple[int, int]] = []
        seen: dict[int, list[int]] = {}
        free = 0
        for stop, k in enumerate(kind.tolist()):
            starts = seen.setdefault(k, [])
            for start in starts[: -_TRIED - 1 : -1]:
                if start < free:
                    break
                if ((before[:, stop] - before[:, start]).abs() <= room[:, stop] - room[:, start] + 1e-14).all():
                    free = stop
                    if (sizes[:, start:stop] > _SHARE).any():
                        found.append((start, stop))
                    break
            starts.append(stop)
        return tuple(found)


def views(model: nn.Module, name: str, p: Tensor) -> dict[int, View]:
    """Return ways to cut a parameter into rows, by the dimension that they go along: output channels first.

    No dimension of fewer than two entries, but the output channels'; of kernels not the places.
    """
    if p.ndim < 2 or p.numel() == 0:
        return {}
    owner = _owner(model, name)
    shape = tuple(p.shape)
    found: dict[int, View] = {}
    if isinstance(owner, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and p.ndim > 2:
        if shape[0] == owner.in_channels and shape[0] % owner.groups == 0:
            found[1] = View((owner.groups, shape[0] // owner.groups, *shape[1:]), (0, 2))
    else:
        found[0] = View(shape, (0,))
    for d in range(p.ndim if p.ndim < 4 else 2):
        if shape[d] > 1 and d not in found:
            found[d] = View(shape, (d,))
    return found


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a parameter, perhaps the original of a parametrization, belongs to."""
    parametrized = re.match(r"(?:(.*)\.)?parametrizations\.", name)
    owner = (parametrized[1] or "") if parametrized else name.rpartition(".")[0]
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    return modules[owner]
