"""Tensors with a fence of NaN around them, at any alignment."""

import torch

FENCE = 64  # elements on each side, at least


class Fenced:
    """A tensor in the middle of a stretch of NaN, `offset` elements away from alignment."""

    def __init__(self, values: torch.Tensor, offset: int = 0) -> None:
        n = values.numel()
        self.block = torch.full((n + 2 * FENCE + offset,), torch.nan, dtype=values.dtype, device=values.device)
        self.start = FENCE + offset
        self.tensor = self.block[self.start : self.start + n].view(values.shape)
        self.tensor.copy_(values)

    def is_intact(self) -> bool:
        """Nobody wrote outside."""
        outside = torch.cat([self.block[: self.start], self.block[self.start + self.tensor.numel() :]])
        return bool(outside.isnan().all())


class Rooms:
    """Makes a kernel's scratch memory, fenced."""

    def __init__(self) -> None:
        self.made: list[Fenced] = []

    def __call__(self, size: int) -> torch.Tensor:
        # As torch aligns what it allocates.
        self.made.append(Fenced(torch.full((size,), torch.nan, dtype=torch.float64)))
        return self.made[-1].tensor


def here(x: torch.Tensor) -> torch.Tensor:
    """x, from a generator of the CPU's for the same numbers everywhere, where tensors are made by default."""
    return x.to(torch.get_default_device())


def bits(x: torch.Tensor) -> torch.Tensor:
    """The raw bits: NaN equals NaN, and 0 differs from -0."""
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def same_sums(backend: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of a row, in another place in memory: how a device adds a row up depends on where its packs of 16 bytes begin."""
    if backend not in ("simt", "cuda"):
        return same_bits(a, b)
    near = 1e-12 if a.dtype == torch.float64 else 16 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=near, atol=near * max(b.abs().flatten().tolist(), default=0), equal_nan=True)
