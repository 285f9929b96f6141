"""Every model of the zoo: right, or refused as it was when it was measured last; never a wrong number."""

import json

import pytest

from .measure import answer
from .table import write


def test_models(entry, known_refusals):
    line = answer(entry)
    if line["answer"] == "not made":
        pytest.skip(line["why"])
    why = known_refusals.get((entry.library, entry.name))
    if line["answer"] == "refused" and why is not None:
        assert why in line["why"]
        return
    assert line["answer"] == "right", line


def test_the_page_has_every_model_and_its_answer(tmp_path):
    lines = [
        {"library": "a", "model": "one", "answer": "right", "error": 1e-9},
        {
            "library": "a",
            "model": "two",
            "answer": "refused",
            "why": "RuntimeError: GradientNoise: no | so (at /x/y.py:3, in f); at /x/z.py:12, in <lambda>. Expected x",
        },
        {"library": "b", "model": "three", "answer": "wrong", "error": 0.5},
        {"library": "b", "model": "four", "answer": "not made", "why": "?"},
    ]
    page = tmp_path / "models.md"
    write(json.loads(json.dumps(lines)), page)
    text = page.read_text()
    assert "| a | 1 | 1 | 0 | 0 |" in text
    assert "| all | 1 | 1 | 1 | 0 |" in text
    assert "| two | refused: no / so |" in text
    assert "| three | wrong by 0.5 |" in text
    assert "four" not in text
