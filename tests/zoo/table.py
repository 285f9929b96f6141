"""Writes docs/models.md from what was measured."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

_ANSWERS = ("right", "refused", "wrong", "crashed")
_HEAD = """# Models

`GradientNoise` on models that other projects publish, with small configurations and random weights, at B = 3, beside a loop
over samples in float64. *Right*: norms and variances of all parameters agree to 1e-4 of their size (many models compute a
part in float32; 2e-3 where the model runs in float32 alone). *Refused*: an error says why. `make test-zoo` measures them and
writes this page; it is in the table of targets in `CONTRIBUTING.md`.

"""


def write(lines: list[dict[str, Any]], path: Path) -> None:
    """Write the page: counts by library, and a line for each model."""
    lines = sorted((line for line in lines if line["answer"] in _ANSWERS), key=lambda x: (x["library"], x["model"]))
    libraries = list(dict.fromkeys(line["library"] for line in lines))
    text = _HEAD + "| library | " + " | ".join(_ANSWERS) + " |\n|---|" + "--:|" * len(_ANSWERS) + "\n"
    for library in [*libraries, "all"]:
        count = Counter(line["answer"] for line in lines if library in (line["library"], "all"))
        text += f"| {library} | " + " | ".join(str(count[a]) for a in _ANSWERS) + " |\n"
    for library in libraries:
        text += f"\n## {library}\n\n| model | answer |\n|---|---|\n"
        for line in lines:
            if line["library"] == library:
                text += f"| {line['model']} | {_answer(line)} |\n"
    path.write_text(text)


def _answer(line: dict[str, Any]) -> str:
    if "why" not in line:
        return line["answer"] if line["answer"] == "right" else f"{line['answer']} by {line['error']}"
    why = line["why"].partition("GradientNoise: ")[2] or line["why"]
    why = why.partition(". Expected")[0].partition("; expected")[0].partition(". Something besides")[0]
    why = re.sub(r"( \(|; |, )at \S+:\d+, in [^\s;)]+\)?", "", why)  # lines of code are where they were measured
    return f"{line['answer']}: {' '.join(why.replace('|', '/').split())}"
