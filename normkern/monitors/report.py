"""`Report`: the results of a monitor for param groups, parameters and slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from .step_reader import RowIndex


class _Entry(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


Entry = TypeVar("Entry", bound=_Entry)


@dataclass(frozen=True)
class Report(Generic[Entry]):
    """The results of a monitor; `print` it for a table.

    Attributes:
        steps: number of steps that the monitor has read.
        groups: param groups by position, each as one vector, for tensors that are invariant only together.
        parameters: by name, each as one vector.
        slots: by name, the slots of ``opt.stats()``: with ``stats="row"`` one per row, else the parameter itself.
    """

    steps: int
    groups: dict[int, Entry]
    parameters: dict[str, Entry]
    slots: dict[str, list[Entry]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for a logger: ``{"steps", "groups", "parameters", "rows"}``.

        "groups" and "parameters" are name -> quantity -> number; "rows", of parameters with several slots, is name ->
        quantity -> list.
        """
        rows = {}
        for name, slots in self.slots.items():
            if len(slots) > 1:
                entries = [slot.to_dict() for slot in slots]
                rows[name] = {quantity: [entry[quantity] for entry in entries] for quantity in entries[0]}
        return {
            "steps": self.steps,
            "groups": {str(i): group.to_dict() for i, group in self.groups.items()},
            "parameters": {name: parameter.to_dict() for name, parameter in self.parameters.items()},
            "rows": rows,
        }


@dataclass(frozen=True)
class ReportEntry:
    """One entry of a report."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for a logger."""
        return asdict(self)


def arrange(
    row_index: RowIndex, names: Sequence[str], rows: Sequence[Entry]
) -> tuple[dict[int, Entry], dict[str, Entry], dict[str, list[Entry]]]:
    """Arrange `rows`, one for each of `row_index`, as a report has them: groups, parameters, slots."""
    parameters = rows[row_index.first_parameter : row_index.first_group]
    return (
        dict(zip(row_index.indices, rows[row_index.first_group :], strict=True)),
        dict(zip(names, parameters, strict=True)),
        {name: list(rows[s]) for name, s in zip(names, row_index.slices, strict=True)},
    )


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align lines of cells: the first column to the left, the others to the right, remarks last."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = []
    for first, *cells, remark in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        out.append("  ".join([first.ljust(widths[0]), *right, remark]).rstrip())
    return out
