"""The other files are scripts: nothing in them is to be collected, doctests neither."""

from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
