"""What is asked of the kernels over samples in the emulator; see judgement.py."""

import torch
from support.memory import same_bits

from normkern import ops

from . import sample_calls
from .sample_calls import Near

SIZE = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def same_as_cpu(backend, name, dtype, seeds):
    """The CPU's bits, sums near the CPU's and the same for every schedule, nothing read that is not written."""
    expected, first = sample_calls.run(name, dtype), None
    for seed in seeds:
        with backend.in_place(seed), sample_calls.blank_memory(backend.blank):
            got = sample_calls.run(name, dtype, before=lambda _: backend.forget())
        first = got if first is None else first
        assert len(got) == len(expected)
        for i, (a, b, once) in enumerate(zip(got, expected, first, strict=True)):
            if isinstance(a, Near):
                assert same_bits(a.tensor, once.tensor), f"seed {seed}: sum {i} depends on the order"
                eps = 64 * torch.finfo(a.tensor.dtype).eps
                eps = max(eps, 1e-6) if dtype != torch.float64 else 1e-12
                near = eps * b.tensor.abs().amax().item() if b.tensor.numel() else 0
                assert torch.allclose(a.tensor, b.tensor, rtol=eps, atol=near), f"seed {seed}: sum {i} is not the CPU's"
            else:
                assert same_bits(a, b), f"seed {seed}: result {i}, of shape {tuple(a.shape)}, differs from the CPU's"


def _moved(backend, call):
    with backend.in_place():
        call()
        read, written, _, _, wide = backend.traffic()
    return read, written, 16 * wide


def moves_what_it_must(backend, name, dtype):
    """Each gradient once and in 16-byte packs, each result once, and little beside."""
    size, real = SIZE[dtype], SIZE[sample_calls.real_of(dtype)]
    if name.startswith("moments"):
        rows, columns = 136, 1024
        squares = "no" not in name
        x = torch.randn(rows, columns).to(dtype)
        read, written, wide = _moved(backend, lambda: ops.moments(x, squares=squares))
        packs, results = rows * columns * size, columns * real * (1 + squares)
        lines = columns // (32 * 16 // size) * (rows + 2) * 8  # of a number for each row and tile
        beside = lines + (rows + 2) * 8
    elif name.startswith("norm_sums"):
        batch, rows, columns = (2, 64, 512) if name.endswith("last") else (2, 8, 4096)
        g, x = (torch.ones(batch, rows, columns, dtype=dtype) for _ in range(2))
        mean, rstd = (torch.ones(batch, rows, dtype=sample_calls.real_of(dtype)) for _ in range(2))
        channels = name.rpartition(" ")[2]
        read, written, wide = _moved(backend, lambda: ops.norm_sums(g, x, mean, rstd, channels=channels))
        packs, results = 2 * g.numel() * size, 2 * batch * (columns if channels == "last" else rows) * real
        # Of each row mean and rstd, by every lane of whoever has a tile of it, or all of it.
        beside = 2 * batch * rows * real * 32 * (columns // (32 * 16 // size) if channels == "last" else 8)
    elif name.startswith("row_"):
        rows, columns = 3, 65536
        x = torch.ones(rows, columns, dtype=dtype)
        read, written, wide = _moved(backend, lambda: getattr(ops, name)(x))
        packs, results, beside = x.numel() * size, rows * 8, 2 * rows * 8
    else:
        batch, steps, columns, table = 4, 30, 512, 7
        ids = torch.arange(batch * steps).view(batch, steps) % table
        g = torch.ones(batch, steps, columns, dtype=dtype)
        squares = "no" not in name
        read, written, wide = _moved(backend, lambda: ops.embedding_moments(ids, g, table, squares=squares))
        packs, results = g.numel() * size, table * columns * real * (1 + squares)
        stretches = columns // (32 * 16 // size)
        beside = stretches * (ids.numel() * (8 * 32 + 8) + table * 2 * 8 * 32) + ids.numel() * 8 + batch * 8
    assert wide == packs, f"{wide} bytes in packs of 16, of {packs}"
    assert packs <= read <= packs + beside, f"{read} bytes read, {packs} in packs and at most {beside} beside"
    assert results <= written <= results + beside, f"{written} bytes written, {results} of results"
