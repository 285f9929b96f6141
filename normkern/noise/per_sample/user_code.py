"""Finds the user's line of code for errors that are raised deep inside torch and this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

import torch

#: Folders whose lines are not the user's, and frames without a file.
_NOT_THE_USERS = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parents[2]) + os.sep, "<frozen")


def line() -> str:
    """Return the innermost line that runs outside of torch and of this package, as "file:line, in function"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
