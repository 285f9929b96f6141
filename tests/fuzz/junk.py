"""What nobody should give to anything, and memory that shows who wrote where."""

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn, torch.int32)
NUMBERS = (
    0.1, 1.0, 0.0, -0.0, 0.5, -1.0, 1e-45, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
    0, 1, 2, -1, 2**31, 2**63 - 1, -(2**63), 2**64, 2**2000, True,
)  # fmt: skip
NO_NUMBERS = (None, "fast", b"\x00", 1j, (), [1.0], {}, object(), float, "\ud800")
SIZES = (3, 0, 1, 2, 5, 17, 40)
HUGE = (2**52, 2**62, 2**63 - 1)  # no memory is that large


class Subclass(torch.Tensor):
    """A tensor that no kernel takes."""


class Memory:
    """Two blocks that tensors lie in, so that they may overlap, and what they held before."""

    SIZE = 2048  # bytes

    def __init__(self) -> None:
        numbers = torch.linspace(-2, 2, 3 * self.SIZE // 8, dtype=torch.float64).view(torch.uint8)
        self.blocks = [numbers.clone()[: self.SIZE] for _ in range(2)]
        self.given = []

    def tensor(self, choices, shape=None, dtype=None):
        """A tensor, usually a decent one."""
        kind = choices.below(24)
        dtype = choices.of(DTYPES) if dtype is None or choices.rarely(16) else dtype
        if shape is None or choices.rarely(16):
            shape = tuple(choices.of(SIZES) for _ in range(choices.below(4)))
        if kind == 23:
            return strange(choices, shape, dtype)
        size = dtype.itemsize
        strides, step = [], choices.of((1, 1, 1, 2, 0)) if kind > 18 else 1
        for n in reversed(shape):
            strides.insert(0, step if kind != 22 else choices.below(4))
            step *= max(n, 1)
        if kind == 21 and len(shape) > 1:
            shape, strides = shape[::-1], strides[::-1]
        room = self.SIZE // size
        needs = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        if needs > room:
            return self.keep(torch.full(shape, 0.5, dtype=dtype))
        block = choices.below(3)
        if block == 2:
            return self.keep(torch.full(shape, 0.25, dtype=dtype))
        offset = min(choices.below(256), room - needs)
        return self.keep(self.blocks[block].view(dtype).as_strided(shape, strides, offset))

    def keep(self, x):
        self.given.append((x, x.clone()))
        return x

    def was_written(self):
        """Whether any block or tensor differs from what it was, to the bit."""
        fresh = Memory.__new__(Memory)
        Memory.__init__(fresh)
        same = all(torch.equal(a, b) for a, b in zip(self.blocks, fresh.blocks, strict=True))
        return not same or not all(same_bytes(x, before) for x, before in self.given)

    def outside_was_written(self, written):
        """Whether a byte of a block was changed that belongs to none of these tensors."""
        fresh = Memory()
        for block, before in zip(self.blocks, fresh.blocks, strict=True):
            allowed = torch.zeros(self.SIZE, dtype=torch.bool)
            for x in written:
                if x.untyped_storage().data_ptr() == block.untyped_storage().data_ptr() and x.numel():
                    size = x.element_size()
                    cells = allowed.view(-1, size)
                    cells.as_strided(
                        (*x.shape, size), (*(s * size for s in x.stride()), 1), x.storage_offset() * size
                    ).fill_(True)
            if not torch.equal(block[~allowed], before[~allowed]):
                return True
        return False


def same_bytes(a, b):
    a, b = (x.detach().clone(memory_format=torch.contiguous_format).reshape(-1) for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def strange(choices, shape, dtype):
    """No tensor that a kernel takes, or an odd one."""
    kind = choices.below(12)
    if kind == 0:
        return torch.zeros(shape, dtype=choices.of(OTHER_DTYPES))
    if kind == 1:
        return torch.zeros(shape, dtype=dtype).to_sparse()
    if kind == 2:
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == 3:
        return torch.ones(shape).as_subclass(Subclass)
    if kind == 4:
        return torch.zeros(shape, dtype=torch.complex64).conj().imag  # with its negative bit set
    if kind == 5:
        return torch.ones(1, dtype=dtype).expand(*shape)
    if kind == 6:
        return torch.empty((0, choices.of(HUGE)), dtype=dtype)
    if kind == 7:
        return torch.empty((choices.of(HUGE), 0), dtype=dtype)
    if kind == 8:
        return torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    if kind == 9:
        return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.quint8)
    if kind == 10:
        return torch.zeros(shape, dtype=dtype)[None].expand(2, *shape)
    return choices.of(NO_NUMBERS)
