"""Measures the zoo: a line of JSON per model, and the table in docs/models.md."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines that were measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Measure what the file does not have yet."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "build/zoo.jsonl", help="one line per model")
    parser.add_argument("--only", default="", help="models whose library or name contains this")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--docs", action="store_true", help="write the table in docs/models.md, and measure nothing")
    options = parser.parse_args()
    if options.docs:
        from .table import write

        write(read(options.json), ROOT / "docs/models.md")
        return
    import torch

    torch.set_num_threads(1)
    from .measure import answer, entries

    known = {(line["library"], line["model"]) for line in read(options.json)}
    part, parts = map(int, options.part.split("/"))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    count: Counter[str] = Counter()
    for entry in entries()[part::parts]:
        if (entry.library, entry.name) in known or options.only not in f"{entry.library} {entry.name}":
            continue
        line = answer(entry)
        count[line["answer"]] += 1
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line["library"], line["model"], line["answer"], line.get("why", "")[:150].replace("\n", " "), flush=True)
    print(dict(count))


if __name__ == "__main__":
    main()
