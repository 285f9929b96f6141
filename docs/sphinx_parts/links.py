"""Links that the repository's texts have and Sphinx alone does not find."""

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

#: They lead out of docs/ in the repository, and to a page of this site here.
PAGES = {"../bench/gpu.md": "gpu_bench.md"}
_CLASS = re.compile(r"[A-Z]\w+")


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    for outside, here in PAGES.items():
        source[0] = source[0].replace(f"]({outside})", f"]({here})")


def _find_class(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.reference | None:
    """`Equilibrium`, from wherever it is named: the one class of this name."""
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
