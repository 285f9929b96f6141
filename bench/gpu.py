"""Steps on a GPU: normkern beside torch's fused and foreach steps, with a copy on the device as the roof.

    python -m bench.gpu [--json FILE] [--seconds 1]

Two times of each: of the device alone (the step captured in a CUDA graph and replayed), and of `step()` as a loop calls
it, where small lists wait for Python. Model: the bytes that a step must move, over MODEL_BYTES_PER_SECOND.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkern
from normkern import ops

from .cases import CASES, Case

#: Bytes that a copy on an H100 reads and writes per second: for modelled times.
MODEL_BYTES_PER_SECOND = 3.0e12
LR, MOMENTUM, DECAY = 1e-3, 0.9, 1e-4

#: name -> (streams of the size of the parameters that it must move, maker of a step).
Maker = Callable[[list[nn.Parameter]], Callable[[], object]]


def _ours(**options: Any) -> Maker:
    def make(params: list[nn.Parameter]) -> Callable[[], object]:
        return normkern.SGD(params, lr=LR, weight_decay=DECAY, **{"momentum": MOMENTUM, **options}).step

    return make


def _torchs(norms: bool = False, **options: Any) -> Maker:
    def make(params: list[nn.Parameter]) -> Callable[[], object]:
        step = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **options).step
        grads = [p.grad for p in params]

        def measured() -> None:  # |w| and |g| alone: the other three sums would need the old weights, and a copy
            torch._foreach_norm(params)
            torch._foreach_norm(grads)
            step()

        return measured if norms else step

    return make


def _pairs(op: Callable[[list[Tensor], list[Tensor]], object]) -> Maker:
    def make(params: list[nn.Parameter]) -> Callable[[], object]:
        a, b = [p.detach() for p in params], [p.grad for p in params]
        return lambda: op(a, b)

    return make


def _welford(params: list[nn.Parameter]) -> Callable[[], object]:
    means, samples = [p.detach() for p in params], [p.grad for p in params]
    squares = [torch.zeros_like(m) for m in means]
    return lambda: ops.welford_(means, samples, squares, n=7)


STEPS: dict[str, tuple[int, Maker]] = {
    "normkern.SGD": (5, _ours()),
    "torch fused": (5, _torchs(fused=True)),
    "torch foreach": (5, _torchs(foreach=True)),
    'normkern.SGD, stats="tensor"': (5, _ours(stats="tensor")),
    'normkern.SGD, stats="row"': (5, _ours(stats="row")),
    "torch fused + norms of w and g": (5, _torchs(norms=True, fused=True)),
    "normkern.SGD, no momentum": (3, _ours(momentum=0)),
    "ops.svag_combine_": (3, _pairs(lambda a, b: ops.svag_combine_(a, b, 4.0))),
    "ops.pair_sums": (2, _pairs(ops.pair_sums)),
    "ops.welford_": (5, _welford),
}


def tensors(case: Case) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(s, dtype=case.dtype, device="cuda")) for s in case.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def median(run: Callable[[], object], seconds: float, at_a_time: int) -> float:
    """Return the seconds per run, by the device's clock."""
    times: list[float] = []
    while sum(times) * at_a_time < seconds or len(times) < 5:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(at_a_time):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / at_a_time)
    return statistics.median(times)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Return the step as a CUDA graph of ten steps, so that launching the graph costs little."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            step()
    return graph.replay


def roof(seconds: float) -> float:
    """Return the bytes per second that a copy of 2 GB reads and writes."""
    a = torch.randint(255, (1 << 31,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / median(lambda: b.copy_(a), seconds, 5)


def measure(seconds: float) -> dict[str, Any]:
    top = roof(seconds)
    rows: list[dict[str, Any]] = []
    for case in CASES.values():
        for name, (streams, make) in STEPS.items():
            moved = streams * case.array_bytes
            row: dict[str, Any] = {"case": case.key, "step": name, "bytes": moved}
            row["model_us"] = 1e6 * moved / MODEL_BYTES_PER_SECOND
            try:
                step = make(tensors(case))
                step()
                row["step_us"] = 1e6 * median(step, seconds, 10)
                row["device_us"] = 1e6 * median(captured(step), seconds, 1) / 10
                row["of_roof"] = moved / row["device_us"] * 1e6 / top
            except Exception as error:  # the error is the peer's result
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            print(_line(row), flush=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "normkern": normkern.__version__,
        "roof_bytes_per_second": top,
        "rows": rows,
    }


def _line(row: dict[str, Any]) -> str:
    begin = f"{row['case']:24} {row['step']:32}"
    if "failed" in row:
        return f"{begin} {row['failed']}"
    times = " ".join(f"{row[k]:9.1f}" for k in ("device_us", "step_us", "model_us"))
    return f"{begin} {times} {100 * row['of_roof']:5.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--seconds", type=float, default=1.0, help="per time")
    given = parser.parse_args()
    print(f"{'':57} us: device    step()     model   of a copy's bandwidth")
    result = measure(given.seconds)
    print(f"a copy on {result['gpu']}: {result['roof_bytes_per_second'] / 1e12:.2f} TB/s")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
