"""The CUDA kernels in the emulator: the bits of the CPU back end, in any order of blocks and threads, with every access
examined, and not a byte more than the formula needs."""

import dataclasses

import pytest
import torch

from normkern import ops

from . import check_results as judgement
from .calls import every_call
from .check_results import DTYPES


def calls():
    every = every_call()
    return every + [dataclasses.replace(call, stats="row") for call in every if call.measure != "nothing"]


@pytest.mark.parametrize("call", calls(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu_in_any_order_with_nothing_to_object(checked, call, dtype):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("without FMA hardware the CPU back end is outside the bitwise promise")
    judgement.same_as_cpu(checked, call, dtype, seeds=(0, 1, 2, 3, 4, 5) if call.stats == "tensor" else (0, 1))


@pytest.mark.parametrize("call", every_call(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_the_formula_and_no_more(checked, call, dtype):
    judgement.moves_what_it_must(checked, call, dtype)


@pytest.mark.parametrize("call", [c for c in every_call() if c.measure != "step"], ids=str)
def test_strided_tensors_move_no_more_bytes(checked, call):
    judgement.moves_what_it_must_of_strided(checked, call, torch.float32)
