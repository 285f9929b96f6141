"""What operations made of samples before, so that it is found once: not again in each layer, step and context.

Where the samples of an operation's results are depends on the operation, its arguments that are no tensors, and the
shapes and layouts of its tensors. Of the operations in `FOLLOWS` it depends on nothing else, neither on the numbers in
a tensor nor on the model. `key_of` puts these into a key, for each call anew. So a model that takes another way, or
another shape, has other keys, and what is not known is found by the rules. There is no key where a tensor is a
parameter or was made of some, has samples by a guess, in any order or mixed, or says by its numbers which entries are
moved.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layers.registry import CHECKS
from .operation import is_in_place, name_of, tensors_in
from .propagation import MIXES, MOVES, ON_LAST, POINTWISE, PRODUCTS, REDUCES
from .sample_layout import SampleLayout
from .tensor_state import TensorState

#: Read something of a tensor, or change what it is; make no tensor that has samples.
READS = frozenset(
    """size dim numel nelement ndimension is_floating_point is_complex element_size stride storage_offset
    is_contiguous data_ptr item tolist __len__ __repr__ __str__ __format__ __hash__ __bool__ __int__ __float__
    __index__ is_same_size requires_grad_ retain_grad register_hook is_set_to is_nonzero equal allclose
    __contains__ __set__ __delete__ set_ _set_grad_enabled set_grad_enabled get_device is_tensor is_storage
    result_type can_cast promote_types finfo iinfo is_inference is_neg is_conj has_names _is_view
    untyped_storage type_as_dtype __dlpack__ __dlpack_device__ numpy broadcast_shapes manual_seed""".split()
)
#: Take from their second argument its shape or dtype alone.
LIKE_ANOTHER = frozenset("type_as to view_as reshape_as".split())
#: Their numbers may be of any size: they are no part of a key.
_ARITHMETIC = frozenset(
    """add sub subtract mul multiply div divide true_divide rsub __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__
    __truediv__ __rtruediv__ __pow__ __rpow__ pow""".split()
)
_LOSSES = frozenset(name for name in POINTWISE if name.endswith("_loss") or name.startswith(("binary_", "kl_")))
_PICKS = frozenset("gather take_along_dim as_strided __iter__".split())
FOLLOWS = (
    (POINTWISE | REDUCES | MIXES | MOVES | PRODUCTS | set(ON_LAST) | {"pad", "einsum"})
    - _LOSSES - _PICKS
)  # fmt: skip

READ, MOVE, ARITHMETIC, OTHER, UNKNOWN = range(5)
_kinds: dict[Any, int] = {}
_NUMBERS = frozenset((int, float, bool))
_PLAIN = frozenset(
    (str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size)
)

#: The shapes and layouts of results.
Results = list[tuple[torch.Size, SampleLayout | None]]
_known: dict[Any, Results] = {}
_MOST = 1 << 15


def kind_of(func: Any) -> int:
    """Return what kind of operation a function is: READ, one whose results can be recalled, or UNKNOWN."""
    kind = _kinds.get(func)
    if kind is None:
        kind = _kinds[func] = _kind_of(func)
    return kind


def _kind_of(func: Any) -> int:
    name = name_of(func)
    if name in READS:
        return READ
    is_own = isinstance(func, types.FunctionType) and not func.__module__.startswith("torch.")
    if name not in FOLLOWS or name in CHECKS or is_in_place(func) or is_own or hasattr(func, "original"):
        return UNKNOWN
    return MOVE if name in MOVES | LIKE_ANOTHER else ARITHMETIC if name in _ARITHMETIC else OTHER


def key_of(tensors: TensorState, func: Any, kind: int, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the key of a call of an operation of a kind that can be recalled; None: it has none."""
    parts: list[Any] = [func, tensors.accumulator.batch]
    is_move, is_first = kind == MOVE, True
    for a in args:
        if a.__class__ is Tensor:
            block = None if is_move and not is_first else tensors.plain_block(a)
            if block is None:
                return None
            parts += (a.shape, block)
        elif not _add(tensors, kind, parts, a, is_first):
            return None
        is_first = False
    for name, a in kwargs.items():
        parts.append(name)
        if not _add(tensors, kind, parts, a, name in ("input", "tensors")):
            return None
    return tuple(parts)


def _add(tensors: TensorState, kind: int, parts: list[Any], a: Any, is_moved: bool) -> bool:
    """Add one argument to a key, with its class, for True == 1 == 1.0; return whether it has a place there."""
    cls = a.__class__
    if cls in _NUMBERS:
        if kind != ARITHMETIC:
            parts += (cls, a)
    elif cls is slice:
        ends = (a.start, a.stop, a.step)
        for x in ends:
            if x is not None and x.__class__ is not int:
                return False
        parts += (cls, ends)
    elif cls in _PLAIN:
        parts += (cls, a)
    elif cls is tuple or cls is list:
        parts += (cls, len(a))
        for x in a:
            if not _add(tensors, kind, parts, x, is_moved):
                return False
    elif cls is Tensor:
        block = tensors.plain_block(a) if is_moved or kind != MOVE else None
        if block is None:
            return False
        parts += (a.shape, block)
    else:
        return False
    return True


def known(key: Any) -> Results | None:
    """Return what the operation of this key made of samples; None: that is not known."""
    return _known.get(key)


def mark(tensors: TensorState, results: Results, out: Any) -> bool:
    """Record where the samples of results are; return whether these are the results that are known, by their shapes."""
    if out.__class__ is Tensor:
        if len(results) != 1 or results[0][0] != out.shape:
            return False
        tensors.mark(out, results[0][1])
        return True
    made = list(tensors_in((out,)))
    if [x.shape for x in made] != [shape for shape, _ in results]:
        return False
    for x, (_, state) in zip(made, results, strict=True):
        tensors.mark(x, state)
    return True


def remember(tensors: TensorState, key: Any, operands: Sequence[Tensor], out: Any) -> None:
    """Keep where the samples of the results of an operation are, unless they are mixed, lost or that is a guess."""
    found: Results = []
    has_samples = any(tensors.layout(t) is not None for t in operands)
    for x in tensors_in((out,)):
        state = tensors.state(x)
        if not (isinstance(state, SampleLayout) and state.certain if has_samples else state is None):
            return
        found.append((x.shape, state if isinstance(state, SampleLayout) else None))
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = found
