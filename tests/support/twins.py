"""The same parameters twice, the same gradients for both, and how closely two optimizers must agree on them."""

import torch
from torch import nn

from .memory import here

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (0,), (1,), (33,), (16, 3), (8, 4, 3, 3), (40000,)]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(here(torch.randn(s, generator=make, dtype=torch.float64, device="cpu").to(dtype))) for s in shapes
    ]


def give_gradients(*lists, seed, skip=()):
    make = torch.Generator().manual_seed(seed)
    for i, twins in enumerate(zip(*lists, strict=True)):
        g = here(torch.randn(twins[0].shape, generator=make, dtype=torch.float64, device="cpu"))
        for p in twins:
            p.grad = None if i in skip else g.to(p.dtype)


def assert_follow(ours, theirs, dtype=torch.float32, steps=1):
    """Within rounding of each other; `theirs` may be more precise."""
    eps = torch.finfo(dtype).eps
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a.detach().double(),
            b.detach().double(),
            rtol=4 * steps * eps,
            atol=8 * steps * eps,
            msg=lambda m, i=i: f"[{i}] {m}",
        )
