"""Parameters that are put beside samples: in lists of tensors that are joined, and by ``x[index] = parameter``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import sample_layout
from ..numbered import Numbered, described, table_of
from ..operation import Operation, map_tensors
from ..sample_layout import SampleLayout
from ..tensor_state import TensorState
from .broadcast import for_each_sample
from .registry import handles
from .rows import spread_rows


@handles("cat", "concat", "concatenate", "stack", takes_complex=True)
def joined(tensors: TensorState, op: Operation) -> Any:
    """Tensors made of parameters that have entries for each sample, as the vectors of B ids, join those of samples."""
    listed = op.argument(0, "tensors")
    ndim = op.samples[0][0].dim()
    over = op.argument(1, "dim", op.kwargs.get("axis", 0)) % (ndim + (op.name == "stack"))
    found = {sample_layout.axis(t.shape, layout.block, tensors.rules.batch) for t, layout in op.samples}
    at = found.pop() if len(found) == 1 else None
    is_guess = not any(layout.certain for _, layout in op.samples)
    if at is None or is_guess or not isinstance(listed, (list, tuple)) or (op.name != "stack" and over == at[0]):
        return NotImplemented
    dim, inner = at
    size = op.samples[0][0].shape[dim]
    instead: dict[int, Tensor] = {}
    for q in op.parameters:
        if q.dim() != ndim or q.shape[dim] != size:
            return NotImplemented
    for q in op.parameters:
        if id(q) not in instead:
            outer = size // (tensors.rules.batch * inner)
            instead[id(q)] = for_each_sample(tensors, q, op.name, ndim, dim, outer, inner)
    return tensors.run(lambda: op.run_with(lambda t: instead.get(id(t), t)))


@handles("__setitem__", "index_put", takes_numbered=True)
def written(tensors: TensorState, op: Operation) -> Any:
    """x[index] = parameter: a mask's token comes into the places of several samples."""
    x, index, q = op.args[:3]
    state = tensors.state(x)
    if not isinstance(state, (SampleLayout, Numbered)) or len(op.parameters) > 1 or q is not op.parameters[0]:
        return NotImplemented
    table = table_of(x.shape, state, tensors.rules.batch)
    assert table is not None
    key = tuple(index) if op.name == "index_put" else index
    with torch._C.DisableTorchFunction(), torch.no_grad():
        table = table.expand(x.shape)[map_tensors(key, lambda t: t.cpu())]
    q_ = spread_rows(tensors, op, q, table.shape, table)
    tensors.mark(q_, described(table, table.shape, tensors.rules.batch))
    return tensors.run(op.func, x, index, q_, *op.args[3:], **op.kwargs)
