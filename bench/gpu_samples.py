"""Sums over samples on a GPU: normkern's kernels beside torch, which has every sample's gradient in memory for them.

    python -m bench.gpu_samples [--json FILE] [--seconds 1]

Times as bench.gpu takes them. Model: multiply-adds over MODEL_FLOPS_PER_SECOND, or the bytes of operands and results,
each once, over MODEL_BYTES_PER_SECOND, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkern
from normkern import ops

from .gpu import MODEL_BYTES_PER_SECOND, captured, median

#: Of an H100's 67e12 in float32 without tensor cores: the share of multiply-adds in what the innermost loop issues, and
#: what is lost around it.
MODEL_FLOPS_PER_SECOND = 54e12

Run = Callable[[], object]
Peers = dict[str, Run]


@dataclass(frozen=True)
class Problem:
    """Operands on the device, the peers that sum over their samples, and the least work for it."""

    name: str
    flops: int
    moved: int
    peers: Peers

    @property
    def model_us(self) -> float:
        return 1e6 * max(self.flops / MODEL_FLOPS_PER_SECOND, self.moved / MODEL_BYTES_PER_SECOND)


def linear(batch: int, steps: int, inputs: int, outputs: int, dtype: torch.dtype, device: str = "cuda") -> Problem:
    a = torch.randn(batch, steps, inputs, device=device).to(dtype)
    g = torch.randn(batch, steps, outputs, device=device).to(dtype)

    def materialised() -> list[Tensor]:
        return moments_of(torch.einsum("bto,bti->boi", g, a))

    peers: Peers = {
        "ops.outer_moments": lambda: ops.outer_moments(a, g, squares=True),
        "ops.outer_moments, no squares": lambda: ops.outer_moments(a, g, squares=False),
        "torch: the weight gradient alone": lambda: g.reshape(-1, outputs).t() @ a.reshape(-1, inputs),
        "torch: every gradient, var and norms": materialised,
    }
    name = f"linear B={batch} T={steps} {inputs}->{outputs}"
    moved = (a.numel() + g.numel()) * a.element_size() + 8 * inputs * outputs
    return Problem(f"{name}, {_short(dtype)}", 2 * batch * steps * inputs * outputs, moved, peers)


def conv(
    batch: int, channels: int, outputs: int, size: int, kernel: int, dtype: torch.dtype, device: str = "cuda"
) -> Problem:
    x = torch.randn(batch, channels, size, size, device=device).to(dtype)
    g = torch.randn(batch, outputs, size, size, device=device).to(dtype)
    each, pad = (kernel, kernel), (kernel // 2, kernel // 2)
    shape = (outputs, channels, *each)

    def ours(squares: bool) -> object:
        return ops.conv_moments(x, g, each, stride=(1, 1), padding=pad, dilation=(1, 1), groups=1, squares=squares)

    def materialised() -> list[Tensor]:
        columns = nn.functional.unfold(x, kernel, padding=pad[0])
        return moments_of(torch.einsum("bol,bkl->bok", g.flatten(2), columns))

    peers: Peers = {
        "ops.conv_moments": lambda: ours(True),
        "ops.conv_moments, no squares": lambda: ours(False),
        "torch: the weight gradient alone": lambda: nn.grad.conv2d_weight(x, shape, g, padding=pad),
        "torch: every gradient, var and norms": materialised,
    }
    coordinates = outputs * channels * kernel**2
    name = f"conv B={batch} {channels}->{outputs} {kernel}x{kernel} at {size}"
    moved = (x.numel() + g.numel()) * x.element_size() + 8 * coordinates
    return Problem(f"{name}, {_short(dtype)}", 2 * batch * size**2 * coordinates, moved, peers)


def matrix(batch: int, columns: int, dtype: torch.dtype, device: str = "cuda") -> Problem:
    x = torch.randn(batch, columns, device=device).to(dtype)
    peers: Peers = {"ops.moments": lambda: ops.moments(x), "torch: var_mean and norms": lambda: moments_of(x)}
    moved = x.numel() * x.element_size() + 8 * columns
    return Problem(f"matrix {batch} x {columns}, {_short(dtype)}", 0, moved, peers)


def moments_of(c: Tensor) -> list[Tensor]:
    return [*torch.var_mean(c, 0), c.flatten(1).norm(dim=1)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problems() -> list[Callable[[], Problem]]:
    """Yield the problems one after another, so that only one is in memory."""
    single, half = torch.float32, torch.bfloat16
    return [
        lambda: linear(32, 128, 1024, 1024, single),
        lambda: linear(32, 128, 1024, 1024, half),
        lambda: linear(32, 128, 512, 2048, single),
        lambda: linear(64, 197, 768, 3072, single),
        lambda: linear(256, 16, 256, 256, single),
        lambda: conv(32, 64, 64, 32, 3, single),
        lambda: conv(32, 128, 128, 16, 3, single),
        lambda: conv(32, 512, 512, 4, 3, single),
        lambda: conv(32, 256, 1024, 14, 1, single),
        lambda: matrix(128, 1 << 20, single),
        lambda: matrix(32, 1 << 22, single),
        lambda: matrix(32, 1 << 22, half),
    ]


def measure(seconds: float) -> dict[str, Any]:
    rows = []
    for make in problems():
        problem = make()
        for name, run in problem.peers.items():
            row: dict[str, Any] = {"problem": problem.name, "peer": name, "model_us": problem.model_us}
            try:
                run()
                row["call_us"] = 1e6 * median(run, seconds, 10)
                row["device_us"] = 1e6 * median(captured(run), seconds, 1) / 10
            except Exception as error:  # the error is the peer's result
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            print(_line(row), flush=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "normkern": normkern.__version__,
        "rows": rows,
    }


def _line(row: dict[str, Any]) -> str:
    begin = f"{row['problem']:36} {row['peer']:38}"
    if "failed" in row:
        return f"{begin} {row['failed']}"
    return begin + " ".join(f"{row[k]:9.1f}" for k in ("device_us", "call_us", "model_us"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--seconds", type=float, default=1.0, help="per time")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as many digits for all
    print(f"{'':75} us: device    call     model")
    result = measure(given.seconds)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
