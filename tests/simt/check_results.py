"""What is asked of a kernel in the emulator. Each function raises AssertionError, or what the emulator has to say."""

import torch
from support.memory import same_bits

from normkern import ops

from . import byte_model
from .calls import random_lists

DTYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
# Packs and what is left of them, warps, rows that one warp takes and rows that a block takes, blocks and their parts.
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (33,), (257,), (2049,), (8191,), (8192,), (8193,), (20001,), (40, 51),
          (3, 2047), (3, 2048), (2, 8195), (700, 3), (161, 51), (9, 2047), (2, 4096), (2, 4097),
          (12, 5, 7), (12, 5, 8)]  # fmt: skip
OUT_OF_ALIGNMENT = {257: 1, 2049: 3}  # the tensors of so many coordinates, by so many elements
COORDINATES = 65536


def lay_out(x, name):
    """Some out of alignment, some strided, one of them as its momentum buffer is not."""
    if x.numel() in OUT_OF_ALIGNMENT:
        room = torch.full((x.numel() + 8,), torch.nan, dtype=x.dtype)
        at = OUT_OF_ALIGNMENT[x.numel()]
        return room[at : at + x.numel()].copy_(x)
    if x.shape == (12, 5, 7):
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    if x.shape == (12, 5, 8) and name != "v":
        room = torch.full((12, 5, 11), torch.nan, dtype=x.dtype)
        return room[..., 2:10].copy_(x)
    return x


def same_as_cpu(backend, call, dtype, seeds):
    """The CPU's bits in every tensor, the same sums for every schedule, close to the CPU's."""
    expected = random_lists(SHAPES, dtype, lay_out=lay_out)
    sums = call(*expected)
    first = None
    with backend.in_place():
        for seed in seeds:
            backend.seed(seed)
            backend.forget()
            got = random_lists(SHAPES, dtype, lay_out=lay_out)
            if call.first:
                for v in got[2]:
                    v.fill_(torch.nan)
            table = call(*got, blank=backend.blank)
            for name, ours, theirs in zip("wgvh", got, expected, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert same_bits(a, b), f"seed {seed}: {name} of shape {tuple(a.shape)} differs from the CPU's"
            if table is None:
                continue
            first = table if first is None else first
            assert same_bits(table, first), f"seed {seed}: sums depend on the order"
            error = (table - sums).abs() / (sums.abs() + 1e-3 * sums.abs().amax(0))
            assert error.max() < 1e-12, "sums are not the CPU's"


def special_as_cpu(backend, case, dtype):
    """The CPU's bits, of sums something near."""
    expected = case(dtype, on_device=False)
    with backend.in_place():
        got = case(dtype, on_device=True)
    for a, b in zip(got, expected, strict=True):
        if a.dtype == torch.float64 and a.ndim == 2:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        else:
            assert same_bits(a, b)


def counting_threads(call, coordinates):
    """How many threads read the count of steps of a tensor, or write it."""
    return 256 * -(-coordinates // 8192) + 2 if byte_model.rules()[call.rule].counts else 0


def moves_what_it_must(backend, call, dtype):
    """All in 16-byte packs that fill their sectors: the bytes of the formula, and some for sums that come in parts."""
    read, wrote = (COORDINATES * n for n in byte_model.bytes_per_coordinate(call.rule, call.measure, DTYPES[dtype]))
    with backend.in_place():
        call(*random_lists([(COORDINATES,)], dtype))
        got_read, got_written, sectors, accesses, wide = backend.traffic()
    more = 0 if call.measure == "nothing" else 2 * 8 * len(ops.SUMS + ops.PAIR_SUMS) * (COORDINATES / 8192 + 1)
    threads = counting_threads(call, COORDINATES)  # and one that raises the count
    more, accesses = more + 8 * threads, accesses - threads
    assert read <= got_read <= read + more, f"{got_read} bytes read, the formula reads {read}"
    assert wrote <= got_written <= wrote + more, f"{got_written} bytes written, the formula writes {wrote}"
    assert 32 * sectors <= 1.01 * (got_read + got_written) + 32 * threads, (
        "the accesses of a warp do not fill their sectors"
    )
    assert wide >= 0.99 * accesses, "not all accesses are of 16 bytes"


def moves_what_it_must_of_strided(backend, call, dtype):
    """Each coordinate once, whatever the strides."""
    shape = (60, 70)
    read, wrote = (4200 * n for n in byte_model.bytes_per_coordinate(call.rule, call.measure, DTYPES[dtype]))
    with backend.in_place():
        call(*random_lists([shape], dtype, lay_out=lambda x, _: torch.stack([x, x], -1)[..., 0]))
        got_read, got_written, *_ = backend.traffic()
    more = 200 + 8 * counting_threads(call, 4200)
    assert read <= got_read <= read + more, f"{got_read} bytes read, the formula reads {read}"
    assert wrote <= got_written <= wrote + 300, f"{got_written} bytes written, the formula writes {wrote}"
