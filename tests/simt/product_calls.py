"""The kernels that own dW as calls: shapes at every edge of a tile, of a stretch of steps, of the samples of a part."""

import torch
from ops.test_conv_moments import CASES, case
from ops.test_outer_moments import operands

from normkern import ops

#: (B, T, I, O): whole tiles and what is left of them, stretches of 16 steps with one sample or many, more samples than a
#: warp has lanes, parts.
SHAPES = [
    (1, 1, 1, 1),
    (2, 16, 64, 64),
    (3, 5, 33, 65),
    (35, 3, 9, 12),
    (2, 17, 70, 128),
    (5, 80, 65, 7),
    (70, 7, 20, 65),
]
CONVOLUTIONS = [
    "3x3, stride 2", "stride 4, dilation 6", "1x1", "groups", "depthwise", "depthwise, multiplier 2, stride 2", "long",
    "3d, strided", "cropped", "outside altogether", "many rows",
]  # fmt: skip
assert set(CONVOLUTIONS) <= set(CASES)


def out_of_alignment(x):
    room = torch.full((x.numel() + 8,), torch.nan, dtype=x.dtype)
    return room[1 : 1 + x.numel()].copy_(x.flatten()).view(x.shape)


def wide(x):
    """In the middle of longer rows, whose strides are no multiples of 16 bytes."""
    return torch.nn.functional.pad(x, (3, 4), value=torch.nan)[..., 3:-4]


def padded(x):
    """Rows that begin at multiples of 16 bytes, and end elsewhere."""
    return torch.nn.functional.pad(x, (0, 8 - x.shape[-1] % 8), value=torch.nan)[..., : x.shape[-1]]


def rows_apart(x):
    """Samples begin at multiples of 16 bytes, their steps do not."""
    batch, steps, n = x.shape
    room = torch.full((batch, -(-steps * (n + 1) // 8) * 8), torch.nan, dtype=x.dtype)
    return room[:, : steps * (n + 1)].view(batch, steps, n + 1)[..., :n].copy_(x)


def name(call, text):
    return text + (f", {call.place.__name__}" if call.place else "") + ("" if call.squares else ", no squares")


def placed(call, x):
    return call.place(x) if call.place else x


class Outer:
    def __init__(self, shape, place=None, squares=True):
        self.shape, self.place, self.squares = shape, place, squares

    def __str__(self):
        return name(self, f"outer {self.shape}")

    @property
    def steps(self):
        return self.shape[1]

    @property
    def output(self):
        """Groups, and rows and columns of one."""
        return 1, self.shape[3], self.shape[2]

    def tensors(self, dtype):
        return [placed(self, x) for x in operands(*self.shape, dtype)]

    def __call__(self, a, g):
        return ops.outer_moments(a, g, squares=self.squares)


class Conv:
    def __init__(self, name, place=None, squares=True):
        self.name, self.place, self.squares = name, place, squares
        _, self.channels, self.size, self.kernel, _ = CASES[name]
        _, _, _, self.options = case(name, torch.float32)

    def __str__(self):
        return name(self, f"conv {self.name}")

    @property
    def steps(self):
        return torch.Size(self.size).numel()

    @property
    def output(self):
        groups = self.options["groups"]
        inputs = CASES[self.name][0][1] // groups
        return groups, self.channels // groups, inputs * torch.Size(self.kernel).numel()

    def tensors(self, dtype):
        x, g, *_ = case(self.name, dtype)
        return [placed(self, x), placed(self, g)]

    def __call__(self, x, g):
        return ops.conv_moments(x, g, self.kernel, **self.options, squares=self.squares)


def every_call():
    places = [Outer(SHAPES[2], place) for place in (out_of_alignment, wide, padded, rows_apart)]
    places += [Conv("groups", place) for place in (out_of_alignment, wide)]
    without = [Outer(SHAPES[4], squares=False), Conv("long", squares=False), Conv("3d, strided", squares=False)]
    return [Outer(shape) for shape in SHAPES] + [Conv(name) for name in CONVOLUTIONS] + places + without


def few_calls():
    """One of each kind."""
    several = [Outer(shape) for shape in SHAPES[2:]] + [
        Outer(SHAPES[2], wide),
        Outer(SHAPES[2], padded),
        Outer((7, 9, 68, 6), rows_apart),
    ]
    return several + [Conv(name) for name in ("3x3, stride 2", "groups", "long", "3d, strided")]


# ---- How a call is cut: csrc/cuda/product.h ----------------------------------------------------------------------------


def tiles(call, dtype):
    """Down and across a group."""
    _, rows, cols = call.output
    return -(-rows // 64), -(-cols // (32 if dtype == torch.float64 else 64))


def parts(call, batch, dtype):
    down, across = tiles(call, dtype)
    return max(1, min(396 // (call.output[0] * down * across), batch, batch * call.steps // 128))
