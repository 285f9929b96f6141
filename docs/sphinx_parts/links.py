"""Links that lead out of docs/ in the repository, and to a page of this site here."""

from typing import Any

from sphinx.application import Sphinx

PAGES = {"../bench/gpu.md": "gpu_bench.md"}


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    for outside, here in PAGES.items():
        source[0] = source[0].replace(f"]({outside})", f"]({here})")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
