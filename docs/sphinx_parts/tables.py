"""Tables of six columns and more are of numbers: site.css keeps their cells on one line."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def _mark(app: Sphinx, tree: nodes.document) -> None:
    for group in tree.findall(nodes.tgroup):
        if group["cols"] >= 6:
            group.parent["classes"].append("numbers")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _mark)
    return {"parallel_read_safe": True}
