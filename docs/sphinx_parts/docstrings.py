"""The docstrings' own headings, in words that napoleon knows."""

import re
from typing import Any

from sphinx.application import Sphinx

#: "Raises, at a step, before anything is written:"; the rest of the line is what is raised first.
_RAISES = re.compile(r"^Raises, (?P<when>[^:]+):$")
_REFERENCE = re.compile(r"^Reference: ")


def reworded(lines: list[str]) -> list[str]:
    """As napoleon and docutils read them; the text stays the same."""
    out: list[str] = []
    for line in lines:
        if found := _RAISES.match(line):
            out += [f"{found['when'].capitalize()}:", "", "Raises:"]
        else:
            out.append(_REFERENCE.sub("*Reference:* ", line))
    return out


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = reworded(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
