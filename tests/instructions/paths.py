"""The hot paths, by the public API alone: a commit that moves what is inside is counted by the same file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

import normkern

from .nets import NETS, Task

#: Runs one function; what it costs is counted, what a path does outside of it is not.
Counted: TypeAlias = Callable[[Callable[[], Any]], None]
#: One step of a path.
Step: TypeAlias = Callable[[Counted], None]

SIZES = (20, 161)
#: The name of the path that has nothing of normkern: it differs where the interpreter does.
YARDSTICK = "interpreter alone"


def name_of(kind: str, count: int) -> str:
    """Return the name of one kind of step of so many tensors."""
    return f"{kind}, {count} tensors"


def assign(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def tensors(count: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of 8x8 and a gradient for each."""
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(8, 8).to(dtype)) for _ in range(count)]
    grads = [(0.01 * torch.randn(8, 8)).to(dtype) for _ in range(count)]
    assign(params, grads)
    return params, grads


def sgd(count: int, *, step: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Step:
    params, _ = tensors(count, dtype)
    groups = [{"params": params, "scale_invariant": True}] if options.get("decay") == "exponential" else params
    optimizer = normkern.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=5e-4, **options)
    given = step or {}

    def run(counted: Counted) -> None:
        counted(lambda: optimizer.step(**given))

    return run


def adamw(count: int, **options: Any) -> Step:
    params, _ = tensors(count, torch.float32)
    optimizer = normkern.AdamW(params, lr=1e-3, weight_decay=0.1, **options)
    return lambda counted: counted(optimizer.step)


def svag(count: int) -> Step:
    params, grads = tensors(count, torch.float32)
    others = [g.flip(0).contiguous() for g in grads]
    optimizer = normkern.SVAG(params, lr=1e-3, l=4, momentum=0.9, weight_decay=5e-4)

    def run(counted: Counted) -> None:
        assign(params, grads)
        counted(optimizer.hold)
        assign(params, others)
        counted(optimizer.step)

    return run


def gradient_noise(make: Callable[[], Task]) -> Step:
    """Forward and backward inside the context, and the scalars of its result."""
    model, loss = make()
    noise = normkern.GradientNoise(model)

    def inside() -> None:
        with noise:
            loss().backward()
        noise.result().nsr_batch  # noqa: B018

    def run(counted: Counted) -> None:
        model.zero_grad()
        counted(inside)

    return run


def yardstick() -> Step:
    """Calls, loops, attributes, dicts, lists and numbers, as a step has them."""

    class Point:
        def __init__(self, x: float) -> None:
            self.x = x

    def inside() -> None:
        points = [Point(0.5 * i) for i in range(100)]
        by_place = {i: p for i, p in enumerate(points) if i % 3}
        for i, p in by_place.items():
            p.x += max(i, 1) * len(points)
        if any(p.x < 0 for p in points):
            raise AssertionError

    return lambda counted: counted(inside)


#: Steps of a list of tensors.
KINDS: dict[str, Callable[[int], Step]] = {
    "plain": sgd,
    "tensor": lambda n: sgd(n, stats="tensor"),
    "row": lambda n: sgd(n, stats="row"),
    "svag": svag,
    "exponential": lambda n: sgd(n, decay="exponential"),
    "clipped": lambda n: sgd(n, step={"max_norm": 0.5}),
    "master weights": lambda n: sgd(n, dtype=torch.bfloat16, master_weights=True),
    "AdamW": adamw,
    "AdamW, tensor": lambda n: adamw(n, stats="tensor"),
    "AdamW, row": lambda n: adamw(n, stats="row"),
}


def paths() -> dict[str, Callable[[], Step]]:
    """Return every path by its name; calling one makes its tensors."""
    found: dict[str, Callable[[], Step]] = {
        name_of(kind, n): lambda make=make, n=n: make(n) for kind, make in KINDS.items() for n in SIZES
    }
    found[YARDSTICK] = yardstick
    return found | {f"noise, {name}": lambda make=make: gradient_noise(make) for name, make in NETS.items()}
