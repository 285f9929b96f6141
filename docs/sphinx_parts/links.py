"""Resolve links in the repository's texts that Sphinx does not find."""

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

#: Links that leave docs/ in the repository, and the page of this site to use instead.
PAGES = {"../bench/gpu.md": "gpu_bench.md"}
_CLASS = re.compile(r"[A-Z]\w+")


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    for outside, here in PAGES.items():
        source[0] = source[0].replace(f"]({outside})", f"]({here})")


def _find_class(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.reference | None:
    """Link `Equilibrium`, wherever it is named, to the only class of this name."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not _CLASS.fullmatch(name):
        return None
    objects = env.domains.python_domain.objects
    found = [(x, at) for x, at in objects.items() if x.endswith(f".{name}") and at.objtype == "class"]
    if len(found) != 1:
        return None
    [(full, at)] = found
    return make_refnode(app.builder, node["refdoc"], at.docname, at.node_id, shown, full)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    app.connect("missing-reference", _find_class)
    return {"parallel_read_safe": True}
