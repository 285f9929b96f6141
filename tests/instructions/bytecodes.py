"""Counts the bytecodes that each Python function executes: exact, and the same in every run.

callgrind sees the interpreter, not the functions that it interprets.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any


def count(function: Callable[[], Any], into: Counter[CodeType]) -> None:
    """Run a function and add what every code object below it executes."""
    if hasattr(sys, "monitoring"):
        _with_monitoring(function, into)
    else:
        _with_trace(function, into)


def _with_monitoring(function: Callable[[], Any], into: Counter[CodeType]) -> None:
    monitoring = sys.monitoring  # type: ignore[attr-defined, unused-ignore]  # Python 3.12

    def executed(code: CodeType, _: int) -> None:
        into[code] += 1

    tool = monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, "instructions")
    monitoring.register_callback(tool, monitoring.events.INSTRUCTION, executed)
    monitoring.set_events(tool, monitoring.events.INSTRUCTION)
    try:
        function()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
    for code in (count.__code__, _with_monitoring.__code__):
        into.pop(code, None)


def _with_trace(function: Callable[[], Any], into: Counter[CodeType]) -> None:
    def executed(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            into[frame.f_code] += 1
        return executed

    def called(frame: FrameType, _event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return executed

    before = sys.gettrace()
    sys.settrace(called)
    try:
        function()
    finally:
        sys.settrace(before)


def by_name(counts: Counter[CodeType], *packages: ModuleType) -> dict[str, int]:
    """Return the counts by "file:function", with files named from the folder that Python imports them from.

    `packages` may be installed in place, in a folder that is not on sys.path.
    """
    roots = [*sys.path, *(Path(package.__file__).parent.parent for package in packages if package.__file__)]
    folders = sorted({f"{Path(root).resolve()}/" for root in roots if root}, key=len, reverse=True)
    named: Counter[str] = Counter()
    for code, n in counts.items():
        folder = next((f for f in folders if code.co_filename.startswith(f)), "")
        function = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has only the name
        named[f"{code.co_filename[len(folder) :]}:{function}"] += n
    return dict(named)
