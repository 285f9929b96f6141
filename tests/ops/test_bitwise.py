"""Bit for bit: across ISA levels, thread counts, measuring or not, alone or in a list."""

import pytest
import torch
from support.memory import here, same_bits

from normkern import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
SIZES = (1, 7, 8, 9, 100, 4097, ops.CHUNK, 5 * ops.CHUNK + 3)


def steps(dtype, stats="tensor", nesterov=False, count=3):
    """Three steps of a list of tensors large enough for the thread pool: (tensors, table of sums)."""
    make = torch.Generator().manual_seed(1)
    shapes = [*((n,) for n in SIZES), (300, 77), (3, 2 * ops.CHUNK + 1)]
    params, buffers = ([here(torch.randn(s, generator=make, device="cpu").to(dtype)) for s in shapes] for _ in range(2))
    for _ in range(count):
        grads = [here(torch.randn(s, generator=make, device="cpu").to(dtype)) for s in shapes]
        table = ops.sgd_(
            params,
            grads,
            buffers,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
            nesterov=nesterov,
            grad_scale=3.0,
            stats=stats,
        )
    return [*params, *buffers], table


def assert_same(a, b):
    assert all(same_bits(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert (a[1] is None) == (b[1] is None)
    assert a[1] is None or same_bits(a[1], b[1])


@pytest.mark.skipif(
    len(WITH_FMA) < 2, reason="this machine runs one level with FMA hardware; two are needed to compare"
)
@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_isa_levels_agree(dtype, nesterov, stats):
    chosen = ops.isa()
    try:
        results = []
        for name in WITH_FMA:
            ops.select_isa(name)
            results.append(steps(dtype, stats, nesterov))
    finally:
        ops.select_isa(chosen)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_counts_agree(isa, dtype, stats):
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(steps(dtype, stats))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measuring_changes_nothing(backend, dtype):
    plain, _ = steps(dtype, None)
    for stats in ("tensor", "row"):
        measured, _ = steps(dtype, stats)
        assert all(same_bits(a, b) for a, b in zip(plain, measured, strict=True))


def test_alignment_and_neighbours_change_nothing(backend):
    w, g = torch.randn(1003), torch.randn(1003)
    expected = w.clone()
    sums = ops.sgd_([expected], [g], lr=0.1, stats="tensor")
    for offset in (1, 2, 3, 5, 8, 13):
        room_w, room_g = torch.zeros(1100), torch.zeros(1100)
        shifted_w, shifted_g = room_w[offset : offset + 1003], room_g[2 * offset : 2 * offset + 1003]
        shifted_w.copy_(w)
        shifted_g.copy_(g)
        others = [torch.randn(50), shifted_w, torch.randn(3)]
        table = ops.sgd_(others, [torch.randn(50), shifted_g, torch.randn(3)], lr=0.1, stats="tensor")
        assert same_bits(shifted_w, expected)
        if backend not in ("simt", "cuda"):
            assert same_bits(table[1], sums[0])
        else:  # packs where memory is aligned: another thread adds another coordinate
            torch.testing.assert_close(table[1], sums[0], rtol=1e-14, atol=0)
