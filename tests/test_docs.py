"""The code that README and guides show runs: every block of a page, one after another, but those for torchrun."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page(path, capsys):
    torch.manual_seed(0)
    names = {}
    found = blocks(path)
    assert found
    for block in (b for b in found if "init_process_group" not in b):
        exec(compile(block, str(path), "exec"), names)


def test_every_picture_has_its_code():
    pictures = {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    code = {path.stem for path in (ROOT / "docs" / "figures").glob("*.py")} - {"__main__", "digits"}
    assert pictures == code
