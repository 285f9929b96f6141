"""One self-contained HTML page and a Markdown summary, from the JSON and the figures in a folder."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

#: In the order in which the papers build on each other.
ORDER = ("auto_rate", "exponential", "intrinsic", "svag")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2433 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 3rem; border-top: 2px solid #d8dde6; padding-top: 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
td, th { border-bottom: 1px solid #d8dde6; padding: .4rem .6rem; text-align: left; vertical-align: top }
img { max-width: 100% } .wide { overflow-x: auto } .PASS { color: #1a7f4b; font-weight: 700 }
.FAIL { color: #b3261e; font-weight: 700 } pre { white-space: pre-wrap; background: #f4f6f9; padding: 1rem }
details { margin: .3rem 0 1.2rem } summary { cursor: pointer } .quick { background: #fff3cd; padding: .6rem 1rem }
"""

QUICK = "QUICK run: too short and with too few networks. Its verdicts mean nothing; it shows that the programs run."


def write(folder: Path) -> list[Path]:
    """Write ``report.html`` and ``summary.md`` for all papers whose JSON is there; both begin with all verdicts."""
    documents = {}
    for name in ORDER:
        path = folder / f"{name}.json"
        if path.exists():
            documents[name] = json.loads(path.read_text())
    page, summary = folder / "report.html", folder / "summary.md"
    page.write_text(_page(documents, folder), encoding="utf-8")
    summary.write_text(_summary(documents), encoding="utf-8")
    return [page, summary]


def _headline(documents: dict[str, Any]) -> str:
    claims = [claim for document in documents.values() for claim in document["claims"]]
    passed = sum(claim["passed"] for claim in claims)
    return f"{passed} of {len(claims)} claims of {len(documents)} papers pass"


def _circumstances(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {what}" for name, what in document["versions"].items())
    time = _time(document["compute_seconds"])
    return f"Data: {document['data']}. {document['runs']} runs, {time} of computing. {versions}."


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _verdicts(documents: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return one row per claim: paper, its address on the page, number, claim, verdict."""
    return [
        (document["authors"], f"{name}-{claim['number']}", str(claim["number"]), claim["paper"], claim["verdict"])
        for name, document in documents.items()
        for claim in document["claims"]
    ]


def _page(documents: dict[str, Any], folder: Path) -> str:
    text = html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Four papers, "
        f"reproduced</title><style>{_STYLE}</style>",
        f"<h1>Four papers, reproduced</h1><p>{_headline(documents)}.</p>",
    ]
    if any(document["quick"] for document in documents.values()):
        parts.append(f"<p class=quick>{QUICK}</p>")
    parts.append("<table><tr><th>Paper<th>Claim<th>What the paper says<th>Verdict here")
    for paper, place, number, claimed, verdict in _verdicts(documents):
        parts.append(
            f'<tr><td>{text(paper)}<td><a href="#{place}">{number}</a><td>{text(claimed)}<td class={verdict}>{verdict}'
        )
    parts.append("</table>")
    for name, document in documents.items():
        arxiv = document["arxiv"]
        parts.append(f"<h2>{text(document['title'])}</h2><p>{text(document['authors'])}, ")
        parts.append(f"arXiv {arxiv}. {text(_circumstances(document))}</p>")
        parts.append(
            f"<details><summary>The claims as the paper has them</summary><pre>{text(document['doc'])}</pre></details>"
        )
        shown: set[str] = set()
        for claim in document["claims"]:
            verdict = claim["verdict"]
            parts.append(
                f"<h3 id={name}-{claim['number']}>{claim['number']}. <span class={verdict}>{verdict}</span> "
                f"{text(claim['paper'])}</h3><table>"
            )
            rows = ("In the paper", claim["where"]), ("Here", claim["here"]), ("Passes if", claim["criterion"]), (
                "Networks per number", str(claim["seeds"])), ("What differs", claim["differs"])  # fmt: skip
            parts += [f"<tr><th>{text(head)}<td>{text(what)}" for head, what in rows]
            parts.append("</table><details><summary>All numbers</summary><table>")
            parts += [f"<tr><td>{text(number)}<td>{text(what)}" for number, what in _flat(claim["numbers"])]
            parts.append("</table></details>")
            for figure in claim["figures"]:
                if figure in shown:
                    parts.append(f"<p>Figure {text(figure)}: above.</p>")
                    continue
                shown.add(figure)
                data = base64.b64encode((folder / figure).read_bytes()).decode()
                parts.append(f'<p><img alt="{text(figure)}" src="data:image/png;base64,{data}"></p>')
        for table in document.get("tables", []):
            parts.append(f"<h3>{text(table['title'])}</h3><p>{text(table['note'])}</p><div class=wide><table>")
            heads, *rows = table["rows"]
            parts.append("<tr>" + "".join(f"<th>{text(cell)}" for cell in heads))
            parts += ["<tr>" + "".join(f"<td>{text(cell)}" for cell in row) for row in rows]
            parts.append("</table></div>")
    return "\n".join(parts) + "\n"


def _summary(documents: dict[str, Any]) -> str:
    lines = ["# Four papers, reproduced", "", f"{_headline(documents)}.", ""]
    if any(document["quick"] for document in documents.values()):
        lines += [f"**{QUICK}**", ""]
    lines += ["| paper | claim | what the paper says | verdict here |", "|---|--:|---|---|"]
    for paper, _, number, claimed, verdict in _verdicts(documents):
        cells = (paper, number, claimed.replace("|", "\\|"), f"**{verdict}**")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for document in documents.values():
        lines += [f"## {document['title']}", "", f"{document['authors']}, [arXiv {document['arxiv']}]"
                  f"(https://arxiv.org/abs/{document['arxiv']}). {_circumstances(document)}", ""]  # fmt: skip
        lines += ["| | paper | here | verdict | networks |", "|--:|---|---|---|--:|"]
        for claim in document["claims"]:
            cells = [
                str(claim["number"]),
                claim["paper"],
                claim["here"],
                f"**{claim['verdict']}**",
                str(claim["seeds"]),
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
        for claim in document["claims"]:
            lines.append(f"{claim['number']}. {claim['where']}. Passes if: {claim['criterion']}. {claim['differs']}")
        lines += ["", "Intervals are of 95 %.", ""]
        for table in document.get("tables", []):
            heads, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table["rows"])
            lines += [f"### {table['title']}", "", table["note"], ""]
            lines += ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
            lines.append("")
        figures = dict.fromkeys(name for claim in document["claims"] for name in claim["figures"])
        lines += [*(f"![{name}]({name})" for name in figures), ""]
    return "\n".join(lines)


def _flat(x: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested numbers as rows: name, value."""
    if isinstance(x, dict) and set(x) == {"estimate", "low", "high"}:
        return [(name, f"{x['estimate']:.6g} [{x['low']:.6g}, {x['high']:.6g}]")]
    if isinstance(x, dict):
        return [row for key, value in x.items() for row in _flat(value, f"{name}: {key}" if name else str(key))]
    if isinstance(x, (list, tuple)):
        return [(name, ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in x))]
    return [(name, f"{x:.6g}" if isinstance(x, float) else str(x))]
