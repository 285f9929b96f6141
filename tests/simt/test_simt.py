"""The CUDA kernels in the emulator: the bits of the CPU back end, in any order of blocks and threads, with every access
examined, and not a byte more than the formula needs."""

import dataclasses

import pytest
import torch
from memory import same_bits

from normkern import ops

from . import build, byte_model
from .backend import Backend
from .calls import Call, every_call, random_lists
from .needs import need

SEEDS = (0, 1, 2, 3, 4, 5)
DTYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
# Packs and what is left of them, warps, rows that one warp takes and rows that a block takes, blocks and their parts.
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (33,), (257,), (2049,), (8191,), (8192,), (8193,), (20001,), (40, 51),
          (3, 2047), (3, 2048), (2, 8195), (700, 3), (12, 5, 7), (12, 5, 8)]  # fmt: skip
OUT_OF_ALIGNMENT = {257: 1, 2049: 3}  # the tensors of so many coordinates, by so many elements


@pytest.fixture(scope="module")
def checked():
    need(build.missing())
    return Backend(checked=True)


def lay_out(x, i):
    """Some out of alignment, some strided."""
    if x.numel() in OUT_OF_ALIGNMENT:
        room = torch.full((x.numel() + 8,), torch.nan, dtype=x.dtype)
        at = OUT_OF_ALIGNMENT[x.numel()]
        return room[at : at + x.numel()].copy_(x)
    if x.shape == (12, 5, 7):
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    if x.shape == (12, 5, 8):
        room = torch.full((12, 5, 11), torch.nan, dtype=x.dtype)
        return room[..., 2:10].copy_(x)
    return x


def calls():
    every = every_call()
    return every + [dataclasses.replace(call, stats="row") for call in every if call.measure != "nothing"]


def written(call, lists):
    w, _, v, _ = lists
    return [*w, *v] if call.rule not in ("SvagCombine", "Sgd", "Gauged", "Difference") else w


@pytest.mark.parametrize("call", calls(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu_in_any_order_with_nothing_to_object(checked, call, dtype):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("without FMA hardware the CPU back end is outside the bitwise promise")
    expected = random_lists(SHAPES, dtype, lay_out=lay_out)
    sums = call(*expected)
    first = None
    with checked.in_place():
        for seed in SEEDS if call.stats == "tensor" else SEEDS[:2]:
            checked.seed(seed)
            checked.forget()
            got = random_lists(SHAPES, dtype, lay_out=lay_out)
            if call.first:
                for v in got[2]:
                    v.fill_(torch.nan)
            table = call(*got, blank=checked.blank)
            for a, b in zip(written(call, got), written(call, expected), strict=True):
                assert same_bits(a, b), f"seed {seed}, shape {tuple(a.shape)}"
            for a, b in zip(got[1] + got[3], expected[1] + expected[3], strict=True):
                assert same_bits(a, b), "a gradient was written"
            if table is None:
                continue
            first = table if first is None else first
            assert same_bits(table, first), f"seed {seed}: sums depend on the order"
            size = sums.abs().amax(0)
            assert ((table - sums).abs() / (sums.abs() + 1e-3 * size)).max() < 1e-12


COORDINATES = 65536


@pytest.mark.parametrize("call", every_call(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_the_formula_and_no_more(checked, call, dtype):
    shapes = [(COORDINATES,)]
    read, wrote = (COORDINATES * n for n in byte_model.bytes_per_coordinate(call.rule, call.measure, DTYPES[dtype]))
    with checked.in_place():
        call(*random_lists(shapes, dtype))
        got_read, got_written, sectors, accesses, wide = checked.traffic()
    # Sums come in parts, one for each block: a few bytes more.
    more = 0 if call.measure == "nothing" else 2 * 9 * 8 * (COORDINATES / 8192 + 1)
    assert read <= got_read <= read + more
    assert wrote <= got_written <= wrote + more
    assert 32 * sectors <= 1.01 * (got_read + got_written), "a warp's accesses do not fill their sectors"
    assert wide >= 0.99 * accesses, "not all accesses are of 16 bytes"


@pytest.mark.parametrize("call", [c for c in every_call() if c.measure != "step"], ids=str)
def test_strided_tensors_move_no_more_bytes(checked, call):
    read, wrote = (60 * 70 * n for n in byte_model.bytes_per_coordinate(call.rule, call.measure, "float"))
    with checked.in_place():
        call(*random_lists([(60, 70)], torch.float32, lay_out=lambda x, i: x.t().contiguous().t() if i else x[:, :]))
        dense_read, dense_written, *_ = checked.traffic()
        call(*random_lists([(60, 70)], torch.float32, lay_out=lambda x, i: torch.stack([x, x], -1)[..., 0]))
        got_read, got_written, *_ = checked.traffic()
    assert read <= dense_read <= read + 200
    assert read <= got_read <= read + 200
    assert wrote <= dense_written <= wrote + 300
    assert wrote <= got_written <= wrote + 300
