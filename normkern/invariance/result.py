"""`Invariances`: the result of `find`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..names import strip_prefixes

#: Every answer for a parameter.
GRANULARITIES = ("row", "tensor", "joint", "none", "frozen", "unused", "no gradient")


@dataclass(frozen=True)
class Invariances:
    r"""The parameters in which a loss is scale-invariant, up to the eps of norms.

    ================= ==================================================================================================
    ``"row"``         every slice along one dimension (an output channel) has a scale of its own that does not matter
    ``"tensor"``      the scale of the tensor as a whole does not matter
    ``"joint"``       the common scale of several parameters does not matter
    ``"none"``        it matters
    ``"frozen"``      requires no gradient, and was not tried
    ``"unused"``      the loss never used it
    ``"no gradient"`` its gradient is zero but for rounding, such as that of a bias before a batch norm
    ================= ==================================================================================================

    Attributes:
        granularity: name of a parameter -> one of these.
        joint: sets of parameters with a common scale that does not matter, none of which is smaller. No parameter is in
            two of them.
        compensating: other multiplicative symmetries, as powers: with {"a": 1, "b": -1} the loss stays the same when a
            is multiplied by c and b by 1/c.
        blocks: name -> ranges (start, stop) of rows that are invariant together, where that is finer than the tensor,
            or where the tensor is not invariant: the groups of a group norm, the heads of a fused projection.
        dims: name -> the dimension whose slices are the rows; 0 but for transposed convolutions and the like.
        cosine: name -> the largest :math:`|\langle w,g\rangle| / (|w| |g|)` that was met, of a row, the tensor, or the
            joint set (sum over sum), without eps. Rounding where there is invariance. NaN where there is no gradient.
        cosine_as_is: the same of the tensor or the set, at the model's own parameters, with its own eps and dtype.
        aliases: name -> other names of the same tensor.
        shapes: name -> shape.
        notes: what to know besides, in sentences.
        draws: random parameters that were tried.
        dtype: in which it was computed.
    """

    granularity: dict[str, str]
    joint: tuple[tuple[str, ...], ...]
    compensating: tuple[dict[str, float], ...]
    blocks: dict[str, tuple[tuple[int, int], ...]]
    dims: dict[str, int]
    cosine: dict[str, float]
    cosine_as_is: dict[str, float]
    aliases: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    draws: int
    dtype: torch.dtype
    _dots: dict[str, Tensor] = field(repr=False, compare=False)
    _sizes: dict[str, Tensor] = field(repr=False, compare=False)
    _allowed: dict[str, float] = field(repr=False, compare=False)

    def renamed(self, new: Mapping[str, str]) -> Invariances:
        """Return the same result with other names of the parameters."""

        def keys(x: dict[str, Any]) -> dict[str, Any]:
            return {new[name]: value for name, value in x.items()}

        return replace(
            self,
            granularity=keys(self.granularity),
            joint=tuple(tuple(new[name] for name in names) for names in self.joint),
            compensating=tuple(map(keys, self.compensating)),
            blocks=keys(self.blocks),
            dims=keys(self.dims),
            cosine=keys(self.cosine),
            cosine_as_is=keys(self.cosine_as_is),
            aliases={new[name]: tuple(map(strip_prefixes, others)) for name, others in self.aliases.items()},
            shapes=keys(self.shapes),
            _dots=keys(self._dots),
            _sizes=keys(self._sizes),
            _allowed=keys(self._allowed),
        )

    def names(self, *granularities: str) -> list[str]:
        """Return the parameters of which one of these holds, in the model's order.

        Raises:
            ValueError: there is no such granularity.
        """
        for given in granularities:
            if given not in GRANULARITIES:
                raise ValueError(f"Invariances.names: expected one of {', '.join(GRANULARITIES)}, got {given!r}")
        return [name for name, x in self.granularity.items() if x in granularities]

    @property
    def scale_invariant(self) -> frozenset[str]:
        """Parameters that are scale-invariant by themselves: each row, or as a whole."""
        return frozenset(self.names("row", "tensor"))

    @property
    def jointly_invariant(self) -> frozenset[str]:
        """Parameters that are scale-invariant only together with others."""
        return frozenset(self.names("joint"))

    def is_invariant(self, *names: str) -> bool:
        """Return whether the loss is the same when all of these parameters are multiplied by one number.

        Of any set, also one that is no union of those found: from the inner products that were measured.

        Raises:
            ValueError: a name is unknown, or of a parameter without a gradient.
        """
        first = {alias: name for name, others in self.aliases.items() for alias in others}
        members = list(dict.fromkeys(first.get(name, name) for name in names))
        for name in members:
            if name not in self._dots:
                what = f'"{self.granularity[name]}"' if name in self.granularity else "unknown"
                raise ValueError(f"Invariances.is_invariant: {name!r} expected to have a gradient, but it is {what}")
        if not members:
            return True
        total, size = (torch.stack([table[n] for n in members]).sum(0) for table in (self._dots, self._sizes))
        return bool((total.abs() <= max(self._allowed[n] for n in members) * size).all())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain lists, numbers and strings for JSON: None for NaN."""

        def plain(x: float) -> float | None:
            return x if x == x else None

        return {
            "parameters": {
                name: {
                    "granularity": kind,
                    "shape": list(self.shapes[name]),
                    "cosine": plain(self.cosine[name]),
                    "cosine_as_is": plain(self.cosine_as_is[name]),
                    "blocks": [list(block) for block in self.blocks.get(name, ())],
                    "dim": self.dims.get(name, 0),
                    "aliases": list(self.aliases.get(name, ())),
                }
                for name, kind in self.granularity.items()
            },
            "joint": [list(names) for names in self.joint],
            "compensating": [dict(powers) for powers in self.compensating],
            "notes": list(self.notes),
            "draws": self.draws,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def __str__(self) -> str:
        number = {name: f"joint {i}" for i, names in enumerate(self.joint, 1) for name in names}
        rows = [("parameter", "shape", "invariant", "|cos|", "as it is")]
        for name, kind in self.granularity.items():
            label = number.get(name, kind)
            if name in self.blocks:
                label += f", {_told(self.blocks[name])}"
            if self.dims.get(name, 0) and kind == "row":
                label += f" of dim {self.dims[name]}"
            shape = " x ".join(map(str, self.shapes[name])) or "()"
            alias = "".join(f" = {other}" for other in self.aliases.get(name, ()))
            rows.append((name + alias, shape, label, _short(self.cosine[name]), _short(self.cosine_as_is[name])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += _section("Invariant only together:", (" + ".join(names) for names in self.joint), number=True)
        lines += _section("Compensating, as powers of one number:", (_powers(v) for v in self.compensating))
        lines += _section("Notes:", self.notes)
        return "\n".join(lines)


def _section(title: str, entries: Iterable[str], number: bool = False) -> list[str]:
    lines = [f"  {f'joint {i}:' if number else '-'} {entry}" for i, entry in enumerate(entries, 1)]
    return ["", title, *lines] if lines else []


def _powers(v: dict[str, float]) -> str:
    return "  ".join(f"{name}: {power:+.3g}" for name, power in v.items())


def _short(x: float) -> str:
    return f"{x:.0e}" if x == x else "-"


def _told(blocks: tuple[tuple[int, int], ...]) -> str:
    smallest, largest = min(b - a for a, b in blocks), max(b - a for a, b in blocks)
    if largest == 1:
        return "1 row" if len(blocks) == 1 else f"{len(blocks)} rows"
    size = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
    return f"rows by {size}" if len(blocks) == 1 else f"rows by {size} ({len(blocks)} blocks)"
