"""The table of cases: which tensors, of which dtype, for which jobs. A new case is one line of `CASES`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

#: Sets of jobs: from one gradient; the same and clipped; the same and from pairs; on per-sample gradients.
SGD = ("step", "step + statistics")
CLIPPED = (*SGD, "clipped step")
SVAG = (*SGD, "SVAG step")
EVERY_STEP = (*CLIPPED, "SVAG step")
ADAMW = ("AdamW step",)
MOMENTS = ("moments",)


@dataclass(frozen=True)
class Case:
    """One list of tensors.

    tags: "quick", also in `make bench QUICK=1`; "plot", a panel of the plot.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32
    tags: frozenset[str] = frozenset()
    jobs: tuple[str, ...] = SGD

    @property
    def key(self) -> str:
        return f"{self.name}, {dtype_name(self.dtype)}"

    @property
    def coordinates(self) -> int:
        return sum(math.prod(s) for s in self.shapes)

    @property
    def array_bytes(self) -> int:
        """The bytes of one array of the job, such as the gradients."""
        return self.coordinates * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resnet50() -> dict[str, Shape]:
    """The parameters of ResNet-50: 161 tensors, 25,557,032 coordinates."""
    shapes: dict[str, Shape] = {}

    def convolution(name: str, norm: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (out,)

    convolution("conv1", "bn1", 64, 3, 7)
    channels = 64
    for layer, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            at = f"layer{layer}.{block}"
            convolution(f"{at}.conv1", f"{at}.bn1", width, channels, 1)
            convolution(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            convolution(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


def transformer(layers: int = 12, width: int = 768, words: int = 50257, context: int = 1024) -> dict[str, Shape]:
    """The parameters of a language model of GPT-2's smallest size: 148 tensors, 124,439,808 coordinates."""
    shapes: dict[str, Shape] = {"wte.weight": (words, width), "wpe.weight": (context, width)}
    for i in range(layers):
        for name, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc", 4, 1), ("mlp.proj", 1, 4)):
            shapes[f"h.{i}.{name}.weight"] = (out * width, into * width)
            shapes[f"h.{i}.{name}.bias"] = (out * width,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (width,)
    return {**shapes, "ln_f.weight": (width,), "ln_f.bias": (width,)}


ROWS = ((128, 1 << 20),)
RESNET50, TRANSFORMER = tuple(resnet50().values()), tuple(transformer().values())
ONE = ((64 << 20,),)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
QUICK, PLOT = frozenset({"quick"}), frozenset({"plot"})

CASES: dict[str, Case] = {
    case.key: case
    for case in (
        Case("ResNet-50", RESNET50, F32, QUICK | PLOT, EVERY_STEP + ADAMW),
        Case("ResNet-50", RESNET50, BF16, QUICK, CLIPPED),
        Case("ResNet-50", RESNET50, F16),
        Case("ResNet-50", RESNET50, F64),
        Case("transformer", TRANSFORMER, F32, PLOT),
        Case("transformer", TRANSFORMER, BF16),
        Case("one of 64M", ONE, F32, PLOT, SVAG + ADAMW),
        Case("one of 64M", ONE, BF16, PLOT, SVAG),
        Case("one of 64M", ONE, F16),
        Case("161 of 8x8", ((8, 8),) * 161, F32, QUICK | PLOT, EVERY_STEP + ADAMW),
        Case("161 of 32x32", ((32, 32),) * 161, F32),
        Case("20 of 8x8", ((8, 8),) * 20, F32, PLOT, CLIPPED),
        Case("128 rows of 1M", ROWS, F32, jobs=MOMENTS),
        Case("128 rows of 1M", ROWS, BF16, jobs=MOMENTS),
        Case("32 rows of 64", ((32, 64),), F32, QUICK, MOMENTS),
    )
}
