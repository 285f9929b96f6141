"""Attention with a mask made of parameters, as a table of relative positions."""

from __future__ import annotations

from typing import Any

from .. import sample_layout
from ..operation import Operation
from ..tensor_state import TensorState
from .broadcast import for_each_sample
from .loop import loop_over_samples
from .registry import handles


@handles("scaled_dot_product_attention", takes_complex=True)
def attention(tensors: TensorState, op: Operation) -> Any:
    """The mask is given to every sample; keys or values made of parameters are taken sample by sample."""
    query, mask = op.argument(0, "query"), op.argument(3, "attn_mask")
    batch = tensors.rules.batch
    found = {sample_layout.axis(t.shape, layout.block, batch) for t, layout in op.samples}
    at = found.pop() if len(found) == 1 else None
    if any(q is not mask for q in op.parameters) or at is None or at[0] > query.dim() - 3:
        return loop_over_samples(tensors, op)
    dim, inner = at
    outer = query.shape[dim] // (batch * inner)
    given = for_each_sample(tensors, mask, op.name, query.dim(), dim, outer, inner)
    return tensors.run(lambda: op.run_with(lambda t: given if t is mask else t))
