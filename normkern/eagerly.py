"""`eagerly`: inside, whatever torch.compile has compiled runs as Python wrote it, so that it can be followed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def eagerly() -> Iterator[None]:
    """torch.compile's stance "force_eager", which is the process's: from when the first thread is inside to the last.

    Raises:
        RuntimeError: the caller is compiled itself.
    """
    if "torch._dynamo" not in sys.modules:  # without it nothing is compiled
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _stance
    with _lock:
        if _inside == 0:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        _inside += 1


def _leave() -> None:
    global _inside, _stance
    with _lock:
        _inside -= 1
        if _inside == 0:
            _stance.__exit__(None, None, None)
            _stance = None
