"""Prepare docstrings for napoleon and docutils: the text stays, the markup is made explicit."""

import re
from dataclasses import is_dataclass
from typing import Any

from sphinx.application import Sphinx

#: "Raises, at a step, before anything is written:"
_RAISES = re.compile(r"^Raises, (?P<when>[^:]+):$")
_REFERENCE = re.compile(r"^Reference: ")
#: "RuntimeError: this. ValueError: that", two entries on one line.
_NEXT_ENTRY = re.compile(r"(?<=\.) (?=[A-Z]\w+(?:Error|Warning): )")
#: Text that docutils does not change: ``code``, `names`, :math:`formulas`.
_QUOTED = re.compile(r"(``.*?``|:math:`.*?`|`.*?`)")
#: "`Moments`: what it is", beside "NaN flows through: a column has it in its mean".
_TYPED = re.compile(r"^\s+`[\w.]+`: ")
#: Replaces a colon while napoleon runs.
_COLON = "\N{SYMBOL FOR NULL}"


def headings(lines: list[str]) -> list[str]:
    """Use section heads that napoleon knows, with one entry of "Raises:" per line and the types in "Returns:"."""
    out: list[str] = []
    raises = False
    for line in lines:
        if out and out[-1] == "Returns:" and not _TYPED.match(line):
            line = line.replace(":", _COLON)
        if found := _RAISES.match(line):
            out += [f"{found['when'].capitalize()}:", "", "Raises:"]
            raises = True
        elif line == "Attributes:":
            out.append("Fields:")  # entries of several names are no attributes to napoleon
        elif raises and line.startswith("    "):
            first, *more = _NEXT_ENTRY.split(line)
            out += [first, *(f"    {entry}" for entry in more)]
        else:
            out.append(_REFERENCE.sub("*Reference:* ", line))
        if line and not line.startswith(" "):
            raises = line.startswith("Raises")
    return out


def bars(lines: list[str]) -> list[str]:
    """Escape the bars of |w| in running text, which reStructuredText takes for a substitution."""
    out: list[str] = []
    formula = None  # the indent of a math directive
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() == ".. math::":
            formula = indent
        elif formula is not None and line.strip() and indent <= formula:
            formula = None
        if formula is None and not line.lstrip().startswith((">>>", "...")):
            parts = _QUOTED.split(line)
            line = "".join(p if i % 2 else p.replace("|", "\\|") for i, p in enumerate(parts))
        out.append(line)
    return out


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = bars(headings(lines))
    if what == "property":  # napoleon would read "The angle: in radians" as a type and its text
        lines[:] = [line.replace(":", _COLON) for line in lines]


def _restore(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: object, signature: str, result: str
) -> tuple[str, str] | None:
    """Hide the signature of classes that only the library constructs."""
    return ("", "") if what == "class" and (is_dataclass(obj) or obj.__name__ == "StepStats") else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", _restore, priority=900)  # and after it
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}
