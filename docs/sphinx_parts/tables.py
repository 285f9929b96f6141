"""Mark tables with six or more columns, so that site.css keeps their cells on one line, and very wide ones."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def _mark(app: Sphinx, tree: nodes.document) -> None:
    for group in tree.findall(nodes.tgroup):
        if group["cols"] >= 6:
            group.parent["classes"].append("numbers")
        if group["cols"] >= 12:
            group.parent["classes"].append("wide")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _mark)
    return {"parallel_read_safe": True}
