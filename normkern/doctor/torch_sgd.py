"""Checks the fused SGD of the installed torch on this CPU, in the cases that torch 2.13 computes wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .finding import Check, Finding, note, ok

_LR = 0.5


def _optimizer(params: list[torch.nn.Parameter], **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=_LR, fused=True, **options)


def _plain_step(gradient: Tensor) -> bool:
    p = torch.nn.Parameter(torch.ones(gradient.shape, dtype=gradient.dtype))
    p.grad = gradient
    _optimizer([p]).step()
    return torch.equal(p, 1 - _LR * gradient)


def _gradient_in_another_layout() -> bool:
    return _plain_step(torch.arange(12.0).view(4, 3).t())


def _expanded_gradient() -> bool:
    # Of one number in a larger block, so that a step that reads past the number stays within the block.
    return _plain_step(torch.arange(64.0)[1:2].expand(12))


def _late_gradient() -> bool:
    a, b = (torch.nn.Parameter(torch.zeros(4)) for _ in "ab")
    optimizer = _optimizer([a, b], momentum=0.5)
    a.grad = torch.ones(4)
    optimizer.step()
    b.grad = torch.ones(4)
    optimizer.step()
    return torch.equal(a, torch.full((4,), -_LR * 2.5)) and torch.equal(b, torch.full((4,), -_LR))


def _skipped_first_step() -> bool:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer: Any = _optimizer([p], momentum=0.5, dampening=0.5)  # a first step is without dampening
    optimizer.grad_scale = torch.ones(())
    for found_inf in (1.0, 0.0):  # as torch.amp.GradScaler does
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    return torch.equal(p, torch.full((4,), -_LR))


def _version_counter() -> bool:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    before = p._version
    _optimizer([p]).step()
    return p._version > before


_CASES: dict[str, Callable[[], bool]] = {
    "bfloat16": lambda: _plain_step(torch.ones(1003, dtype=torch.bfloat16)),
    "float16": lambda: _plain_step(torch.ones(1003, dtype=torch.float16)),
    "gradient in another memory layout": _gradient_in_another_layout,
    "expanded gradient": _expanded_gradient,
    "first gradient that comes late": _late_gradient,
    "first step that GradScaler skips": _skipped_first_step,
    "version counter": _version_counter,
}


def checks() -> list[Check]:
    """Return the check of torch's fused SGD, the last: torch imports its compiler for the first optimizer."""
    return [Check("torch's fused SGD", torchs_own)]


def torchs_own() -> Finding:
    """Report in which cases torch's fused SGD is wrong here. It is no failure of normkern, but a reason to know."""
    wrong = [name for name, is_right in _CASES.items() if not _is_true(is_right)]
    if wrong:
        return note(
            f"SGD(fused=True) of torch {torch.__version__} is wrong in {len(wrong)} of {len(_CASES)} cases "
            f"({', '.join(wrong)}); normkern's is not affected"
        )
    return ok(f"SGD(fused=True) of torch {torch.__version__} is right in all {len(_CASES)} cases that 2.13 has wrong")


def _is_true(is_right: Callable[[], bool]) -> bool:
    """Return whether the case is right; a step that raises is not."""
    try:
        return is_right()
    except Exception:
        return False
