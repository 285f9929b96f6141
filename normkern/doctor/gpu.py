"""Checks of the kernels for GPUs: there are some for this GPU, and they write the bits that the CPU writes."""

from __future__ import annotations

import torch

from .. import ops
from ..ops._load import REINSTALL_WITH_CUDA
from . import machine
from .finding import Finding, failed, note, ok, skipped
from .sgd import RULES

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Coordinates of the tensors: within a pack, of a few blocks of threads, rows for warps, rows of several blocks.
_SHAPES = ((7,), (20011,), (70, 129), (3, 9001))
#: The allowed error of sums, relative to the sizes of the terms: the GPU adds doubles in another order.
_SUMS_OFF = 1e-11
#: Substrings of the driver's errors that name the driver as too old for the binary.
_DRIVER_TOO_OLD = ("driver version", "unsupported toolchain", "PTX", "forward compat")
#: What to do where the binary has no kernels for the GPU.
_ANOTHER_ARCHITECTURE = (
    "build the binary on this machine, for the GPU that it has, with the CUDA toolkit (nvcc, 12.8 or newer): "
    f"{REINSTALL_WITH_CUDA.replace('NORMKERN_CUDA=ON', 'NORMKERN_CUDA=AUTO')}"
)
_OLD_DRIVER = (
    "update the NVIDIA driver to one for the CUDA toolkit that built the binary (`nvidia-smi` prints the newest CUDA "
    f"that a driver runs), or build with an older toolkit, 12.8 or newer: {REINSTALL_WITH_CUDA}"
)


def devices() -> Finding:
    """Check that the build has kernels for the devices that torch sees."""
    gpus, built = machine.gpus(), ops.cuda_architectures()
    have = f"kernels for CPUs{' and compute capability ' + _listed(built) if built else ''}"
    if not gpus:
        return ok(f"{have}; {_why_none()}")
    if not built:
        return note(
            f"kernels for CPUs only: torch's own loop steps tensors on {gpus[0]['name']}. To have kernels for GPUs: "
            f"{REINSTALL_WITH_CUDA}"
        )
    for g in gpus:
        if not _may_run(g["capability"], built):
            return failed(f"{have}; torch sees {g['name']}, which has {g['capability']}", _ANOTHER_ARCHITECTURE)
    seen = [f"{g['name']} ({g['capability']})" for g in gpus]
    return ok(f"{have}; torch sees {', '.join(seen)}")


def _why_none() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch sees no GPU (built for CUDA {torch.version.cuda}; `nvidia-smi` prints what the driver runs)"


def _listed(architectures: list[int]) -> str:
    return ", ".join(f"{a // 10}.{a % 10}" for a in architectures)


def _may_run(capability: str, built: list[int]) -> bool:
    """Return whether kernels for one of the architectures may run: older ones do on a GPU of the same generation.

    Those of an older generation run where the build kept their PTX, and that is found by a launch.
    """
    major, minor = map(int, capability.split("."))
    return any(a <= 10 * major + minor for a in built)


def same_as_cpu() -> Finding:
    """Check that every rule on every GPU writes the bits that it writes on the CPU."""
    if not ops.cuda_architectures() or not machine.gpus():
        return skipped("no GPU, or no kernels for one")
    exact = ops.isa() not in ("v2", "portable")  # those have no FMA hardware
    compared = 0
    for index in range(len(machine.gpus())):
        for rule, options in RULES.items():
            for dtype in _DTYPES:
                for stats in ("tensor", "row"):
                    try:
                        wrong = _difference(f"cuda:{index}", {**options, "stats": stats}, dtype, exact)
                    except RuntimeError as error:
                        return not_launched(f"cuda:{index}", error)
                    if wrong:
                        return failed(
                            f"cuda:{index}, {rule}, {str(dtype).removeprefix('torch.')}, stats={stats!r}: {wrong}",
                            "report it with the output of `python -m normkern info --json`",
                        )
                    compared += 1
    what = "the bits of the CPU" if exact else "within rounding of the CPU, which has no FMA hardware"
    return ok(f"{compared} calls on {len(machine.gpus())} GPU(s): {what}, sums to {_SUMS_OFF:g}")


def not_launched(device: str, error: RuntimeError) -> Finding:
    """Report a kernel that does not start, with the cure that the driver's error suggests."""
    text = " ".join(str(error).split())
    if any(words in text for words in _DRIVER_TOO_OLD):
        return failed(text, _OLD_DRIVER)
    if "no kernel image" in text:
        return failed(text, _ANOTHER_ARCHITECTURE)
    return failed(
        f"{device}: {text}",
        "see that `nvidia-smi` and `torch.ones(1, device='cuda') + 1` work; if they do, report it with the output of "
        "`python -m normkern info --json`",
    )


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
