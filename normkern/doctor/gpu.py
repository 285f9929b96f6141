"""What the kernels for GPUs write, beside what the CPU's write: the same bits, and sums in another order."""

from __future__ import annotations

import torch

from .. import ops
from . import machine
from .finding import Finding, failed, note, ok, skipped
from .sgd import RULES

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Coordinates of the tensors: within a pack, of a few blocks of threads, rows for warps, rows of several blocks.
_SHAPES = ((7,), (20011,), (70, 129), (3, 9001))
#: Relative to the sizes of what is summed: doubles, in another order.
_SUMS_OFF = 1e-11


def devices() -> Finding:
    """The build has kernels for the devices that torch sees."""
    gpus, built = machine.gpus(), ops.cuda_architectures()
    have = f"kernels for CPUs and compute capability {', '.join(f'{a // 10}.{a % 10}' for a in built)}"
    if not gpus:
        return ok(f"{have if built else 'kernels for CPUs'}; torch sees no GPU")
    if not built:
        return note(
            f"kernels for CPUs only: tensors on {gpus[0]['name']} are stepped by torch's own loop; "
            "NORMKERN_CUDA=ON pip install --no-binary normkern normkern builds those for GPUs"
        )
    seen = [f"{g['name']} ({g['capability']})" for g in gpus]
    return ok(f"{have}; torch sees {', '.join(seen)}")


def same_as_cpu() -> Finding:
    """Every rule on every GPU writes the bits that it writes on the CPU."""
    if not ops.cuda_architectures() or not machine.gpus():
        return skipped("no GPU, or no kernels for one")
    exact = ops.isa() not in ("v2", "portable")  # those have no FMA hardware
    compared = 0
    for index in range(len(machine.gpus())):
        for rule, options in RULES.items():
            for dtype in _DTYPES:
                for stats in ("tensor", "row"):
                    wrong = _difference(f"cuda:{index}", {**options, "stats": stats}, dtype, exact)
                    if wrong:
                        return failed(
                            f"cuda:{index}, {rule}, {str(dtype).removeprefix('torch.')}, stats={stats!r}: {wrong}",
                            "report it with what `python -m normkern info --json` prints",
                        )
                    compared += 1
    what = "the bits of the CPU" if exact else "within rounding of the CPU, which has no FMA hardware"
    return ok(f"{compared} calls on {len(machine.gpus())} GPU(s): {what}, sums to {_SUMS_OFF:g}")


def _difference(device: str, options: dict[str, object], dtype: torch.dtype, exact: bool) -> str:
    options = dict(options)
    first = options.pop("first", False)
    results = []
    for place in ("cpu", device):
        make = torch.Generator().manual_seed(0)
        w, g, v = (
            [torch.randn(s, generator=make, dtype=torch.float64).to(dtype).to(place) for s in _SHAPES] for _ in "wgv"
        )
        buffers = [None] * len(w) if first else v
        sums = ops.sgd_(w, g, buffers, lr=0.1, **options)  # type: ignore[arg-type]
        assert sums is not None
        results.append(([*w, *(b for b in buffers if b is not None)], sums))
    (cpu, cpu_sums), (gpu, gpu_sums) = results
    for a, b in zip(cpu, gpu, strict=True):
        if not (torch.equal(a, b.cpu()) if exact else torch.allclose(a, b.cpu(), rtol=1e-2, atol=1e-3)):
            return f"tensor of shape {tuple(a.shape)} differs by {(a - b.cpu()).abs().max():.3g}"
    size = cpu_sums[:, [0, 1, 0, 3, 0]].abs() + cpu_sums[:, [0, 1, 1, 3, 3]].abs() + 1e-300
    off = ((gpu_sums.cpu() - cpu_sums).abs() / size).max().item()
    return f"sums are off by {off:.3g}" if exact and not off <= _SUMS_OFF else ""
