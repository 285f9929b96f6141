"""Checks of the ops that sum over samples, in every dtype, against `normkern.reference` in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import gpu, machine
from .finding import Check, Finding, failed, ok

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The allowed error relative to the largest entry, for results in float64 and in float32.
_OFF = {torch.float64: 1e-11, torch.float32: 1e-4}

Make = Callable[..., Tensor]
Run = Callable[[Any, Make], tuple[Tensor | None, ...]]


def _moments(of: Any, make: Make) -> tuple[Tensor | None, ...]:
    mean, centred, row_sq = of.moments(make(19, 1030), squares=True)
    return mean, centred, row_sq


def _row_sums(of: Any, make: Make) -> tuple[Tensor | None, ...]:
    x = make(5, 40009)
    return of.row_sums(x), of.row_sq_norms(x)


def _outer(of: Any, make: Make) -> tuple[Tensor | None, ...]:
    return of.outer_moments(make(5, 9, 130), make(5, 9, 67), squares=True)  # type: ignore[no-any-return]


def _conv(of: Any, make: Make) -> tuple[Tensor | None, ...]:
    sizes: dict[str, Any] = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "groups": 2}
    out: tuple[Tensor | None, ...] = of.conv_moments(
        make(5, 6, 9, 9), make(5, 8, 5, 7), (3, 3), squares=True, **sizes
    )  # fmt: skip
    return out


def _norms(of: Any, make: Make) -> tuple[Tensor | None, ...]:
    kind = torch.float64 if make(1).dtype == torch.float64 else torch.float32
    mean, rstd = make(3, 17).to(kind), make(3, 17).to(kind).abs()
    g, x = make(3, 17, 70), make(3, 17, 70)
    found: list[Tensor | None] = []
    for channels in ("last", "first"):
        found += of.norm_sums(g, x, mean, rstd, channels=channels)
    return tuple(found)


def _embedding(of: Any, make: Make) -> tuple[Tensor | None, ...]:
    g = make(4, 9, 33)
    ids = (torch.arange(36).reshape(4, 9) * 7 % 11).to(g.device)
    return of.embedding_moments(ids, g, 12, padding_idx=3, squares=True)  # type: ignore[no-any-return]


#: The ops, and how each is run.
RUNS: dict[str, Run] = {
    "moments": _moments,
    "row_sums": _row_sums,
    "outer_moments": _outer,
    "conv_moments": _conv,
    "norm_sums": _norms,
    "embedding_moments": _embedding,
}


def _results(run: Run, of: ModuleType, dtype: torch.dtype, device: str, kind: torch.dtype) -> list[Tensor]:
    """Return the results, in float64 on the CPU, for the same numbers rounded to `dtype` and passed as `kind`."""
    numbers = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype).to(kind).to(device)

    return [x.detach().double().cpu() for x in run(of, make) if x is not None]


def off(run: Run, dtype: torch.dtype, device: str) -> float:
    """Return the largest error of an op, relative to the largest entry of the result that has it."""
    from .. import reference

    got = _results(run, ops, dtype, device, dtype)
    with machine.threads(1):  # on a busy machine threads that wait for each other are slower
        exact = _results(run, reference, dtype, "cpu", torch.float64)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True))


def _places() -> Iterator[tuple[str, str]]:
    """Yield a name and a device for every level of the CPU, which it selects, and every GPU with kernels."""
    for isa in ops.supported_isas():
        ops.select_isa(isa)
        yield isa, "cpu"
    if ops.cuda_architectures():
        for index in range(len(machine.gpus())):
            yield f"cuda:{index}", f"cuda:{index}"


def against_reference(name: str) -> Finding:
    """Check one op, on every level and GPU, in every dtype."""
    worst: dict[str, float] = {}
    for place, device in _places():
        for dtype in DTYPES:
            allowed = _OFF[torch.float64 if dtype == torch.float64 else torch.float32]
            try:
                found = off(RUNS[name], dtype, device)
            except RuntimeError as error:
                if device == "cpu":
                    raise
                return gpu.not_launched(device, error)
            if not found <= allowed:
                return failed(
                    f"{place} {str(dtype).removeprefix('torch.')}: off by {found:.3g} of the largest entry",
                    "measure with normkern.reference, which is torch's own operations, and report it",
                )
            worst[place] = max(worst.get(place, 0.0), found)
    return ok("; ".join(f"{place}: within {found:.1g}" for place, found in worst.items()))


def checks() -> list[Check]:
    """Return the checks of the sums over samples."""
    return [Check(name, partial(against_reference, name), "numbers") for name in RUNS]
