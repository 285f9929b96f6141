"""What is asked of the kernels that own dW in the emulator; see judgement.py."""

import torch
from support.memory import same_bits

from .product_calls import Conv, parts, tiles
from .sample_calls import blank_memory

SIZE = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def real_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_as_cpu(backend, call, dtype, seeds):
    """The CPU's bits where the samples are one part, else near; the same for every schedule; nothing read that nobody
    has written."""
    tensors, first = call.tensors(dtype), None
    expected = call(*tensors)
    is_one_part = parts(call, len(tensors[0]), dtype) == 1
    near = 1e-12 if dtype == torch.float64 else 1e-5
    for seed in seeds:
        with backend.in_place(seed), blank_memory(backend.blank):
            got = call(*tensors)
        first = got if first is None else first
        for name, a, b, once in zip(("total", "centred", "sq_norms"), got, expected, first, strict=True):
            if a is None:
                continue
            assert same_bits(a, once), f"{call}, seed {seed}: {name} depends on the order"
            if is_one_part and name != "sq_norms":
                assert same_bits(a, b), f"{call}, seed {seed}: {name} differs from the CPU's"
            size = b.abs().amax().item() if b.numel() else 0
            assert torch.allclose(a, b, rtol=near, atol=near * size), (
                f"{call}, seed {seed}: {name} is not near the CPU's"
            )


def moves_what_it_must(backend, call, dtype):
    """Each operand once for each tile across, each result once, and what parts and tiles leave each other."""
    tensors = call.tensors(dtype)
    batch, (groups, rows, cols), (down, across) = len(tensors[0]), call.output, tiles(call, dtype)
    size, real, each = SIZE[dtype], SIZE[real_of(dtype)], groups * rows * cols
    of_g = batch * call.steps * groups * rows * across
    of_x = batch * call.steps * groups * cols * down
    if isinstance(call, Conv):  # without what lies outside of x
        ones = [torch.ones_like(t, dtype=torch.float64) for t in tensors]
        per_output = call(*ones)[0].view(groups, rows, cols)[:, 0].sum().item()
        of_x = int(per_output) * down
    results, many = each * real * (1 + call.squares), parts(call, batch, dtype)
    left = batch * groups * down * across * 8 + (results * many if many > 1 else 0)
    with backend.in_place():
        call(*tensors)
        read, written, _, _, wide = backend.traffic()
    assert read == (of_g + of_x) * size + left, (
        f"{call}: {read} bytes read, {(of_g + of_x) * size} of operands, {left} left"
    )
    assert written == results + left + batch * 8, f"{call}: {written} bytes written, {results} of results, {left} left"
    return read, written, 16 * wide


def moves_in_packs(backend, call, dtype):
    """Of operands and results that are whole packs."""
    read, written, in_packs = moves_what_it_must(backend, call, dtype)
    batch, (groups, _, _), (down, across) = call.shape[0], call.output, tiles(call, dtype)
    singles = 2 * 8 * batch * groups * down * across + 8 * batch
    assert in_packs == read + written - singles, (
        f"{call}: {in_packs} of {read + written - singles} bytes in packs of 16"
    )
