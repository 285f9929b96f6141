"""Rules for the place of the samples after an operation of torch; `@propagates` registers one.

What moves elements is applied to the sample numbers. Operations that work element by element, with broadcasting, keep
the layout. A reduction over the samples mixes them. Any other operation with a rule keeps the samples in their
dimension, as everything in torch.nn.functional does; an operation without a rule mixes them.

A rule is a function ``rule(op, results, batch)`` that returns the state of each result:

    @propagates("my_library::last_two_averaged")
    def halves_the_features(op: Operation, results: list[Tensor], batch: int) -> list[State]:
        [(x, layout)] = op.samples
        return [SampleLayout(layout.block // 2, layout.certain)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import errors, sample_layout
from .numbered import numbers_of, order_along, ordered, packed_numbers
from .operation import Operation, Samples, tensors_in
from .recurrent_call import RecurrentCall
from .sample_layout import Mixed, SampleLayout, State

Rule = Callable[[Operation, list[Tensor], int], list[State]]
_Rule = TypeVar("_Rule", bound=Rule)

#: The rule of each operation, by its name.
RULES: dict[str, Rule] = {}

#: Reorder, select or repeat elements of the first argument, or of a list of tensors, and compute nothing.
MOVES = frozenset(
    """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims t T
    mT H mH adjoint permute movedim moveaxis expand expand_as broadcast_to repeat tile repeat_interleave
    __getitem__ select narrow gather take_along_dim flip fliplr flipud rot90 roll chunk split
    split_with_sizes tensor_split unbind hsplit vsplit dsplit cat concat concatenate stack hstack vstack dstack
    column_stack diagonal unfold atleast_1d atleast_2d atleast_3d __iter__ as_strided""".split()
)
#: Reduce a `dim`, which may be the samples'.
REDUCES = frozenset(
    """sum nansum mean nanmean prod max min amax amin median nanmedian mode argmax argmin any all norm std var
    std_mean var_mean logsumexp count_nonzero quantile nanquantile vector_norm linalg_norm linalg_vector_norm
    linalg_matrix_norm kthvalue aminmax cosine_similarity""".split()
)
#: Mix elements along a `dim`; it is the last one unless given.
MIXES = frozenset(
    """softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort topk normalize renorm
    msort gumbel_softmax cross layer_norm rms_norm glu index_add index_copy index_fill scatter scatter_add
    scatter_reduce diff fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2
    fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn""".split()
)
#: Repeat a tensor, perhaps once for every sample.
WIDENS = frozenset("expand expand_as broadcast_to repeat tile".split())
#: Make tensors of a given shape.
MAKES = frozenset("zeros ones full empty rand randn new_zeros new_ones new_full new_empty".split())
PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ mm bmm mv addmm baddbmm".split())
#: Element by element, with broadcasting.
POINTWISE = frozenset(
    """abs absolute acos arccos acosh arccosh add addcdiv addcmul alias alpha_dropout angle asin arcsin asinh
    arcsinh atan arctan atan2 arctan2 atanh arctanh bernoulli bfloat16 bitwise_and bitwise_not bitwise_or
    bitwise_xor bool byte bitwise_left_shift bitwise_right_shift cauchy ceil celu char clamp clamp_max clamp_min
    clip clone conj conj_physical contiguous copysign cos cosh cpu cuda data deg2rad detach digamma div divide
    double dropout dropout1d dropout2d dropout3d elu empty_like eq erf erfc erfinv exp exp2 expm1 exponential
    feature_alpha_dropout feature_dropout fill fill_diagonal float float_power floor floor_divide fmax fmin fmod
    frac full_like gcd ge gelu geometric greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh
    heaviside hypot i0 int isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp
    less less_equal lgamma log log10 log1p log2 log_normal log_sigmoid logsigmoid logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit long lt masked_fill maximum minimum mish mul multiply
    nan_to_num ne neg negative nextafter normal not_equal ones_like polygamma positive pow prelu
    quantize_per_tensor fake_quantize_per_tensor_affine rad2deg rand_like randint_like randn_like random real
    reciprocal relu relu6 remainder resolve_conj resolve_neg round rrelu rsqrt rsub selu sgn short sigmoid sign
    signbit silu sin sinc sinh softplus softshrink softsign special_expit special_erf special_entr
    special_gammaln special_i0 special_i1 special_log_ndtr special_ndtr special_ndtri special_xlog1py
    special_xlogy sqrt square sub subtract tan tanh tanhshrink threshold to to_dense to_sparse tril triu
    true_divide trunc type type_as uniform where xlogy xpu zero zeros_like mse_loss l1_loss smooth_l1_loss
    huber_loss binary_cross_entropy kl_div binary_cross_entropy_with_logits __add__ __radd__ __sub__ __rsub__
    __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__
    __and__ __rand__ __or__ __ror__ __xor__ __rxor__ __invert__ __neg__ __pos__ __abs__ __eq__ __ne__ __lt__
    __le__ __gt__ __ge__ __lshift__ __rshift__ __deepcopy__""".split()
)
#: Work on so many of the last dimensions, and on everything before them alike.
ON_LAST: dict[str, int] = {
    **{f"conv{n}d": n + 1 for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": n + 1 for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": n for n in (1, 2, 3) for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")},
    **{f"{kind}_pool{n}d_with_indices": n for n in (1, 2, 3) for kind in ("max", "adaptive_max")},
    **{f"fractional_max_pool{n}d": n for n in (2, 3)},
    **dict.fromkeys(("linear", "bilinear", "pairwise_distance"), 1),
    "scaled_dot_product_attention": 2,
    **dict.fromkeys(("linalg_inv", "inverse", "linalg_cholesky", "linalg_matrix_exp", "linalg_det"), 2),
    **dict.fromkeys(("linalg_solve", "linalg_solve_triangular"), 2),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"), 3),
}
_CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for n in (1, 2, 3) for kind in ("", "_transpose"))
#: Of these, the ones that broadcast the dimensions before: an operand with fewer has them elsewhere in the result.
BROADCAST_BATCHES = frozenset("scaled_dot_product_attention linalg_solve linalg_solve_triangular".split())
#: Expect the samples in the first dimension.
ON_FIRST = frozenset(
    """group_norm instance_norm batch_norm local_response_norm grid_sample affine_grid fold im2col embedding_bag
    interpolate upsample upsample_nearest upsample_bilinear native_group_norm""".split()
)
#: Return a loss for each sample, in the first dimension, where they do not reduce to a number.
LOSSES = frozenset(
    """cross_entropy_loss nll_loss_nd nll_loss nll_loss2d triplet_margin_loss cosine_embedding_loss margin_ranking_loss
    hinge_embedding_loss soft_margin_loss multi_margin_loss multilabel_margin_loss ctc_loss
    poisson_nll_loss""".split()
)
#: Layers of torch.nn whose outputs lie as their inputs do, and whose states have the samples in dimension 1.
RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())


def propagates(*names: str) -> Callable[[_Rule], _Rule]:
    """Register a rule for the operations of these names."""

    def register(rule: _Rule) -> _Rule:
        for name in names:
            if name in RULES:
                raise errors.already_propagated(name)
            RULES[name] = rule
        return rule

    return register


class LayoutRules:
    """The rules, for one batch size."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    @staticmethod
    def knows(name: str) -> bool:
        """Return whether an operation has a rule."""
        return name in RULES

    def after(self, op: Operation, out: Any) -> list[State]:
        """Return the states of the results of an operation on samples, in the order of `tensors_in((out,))`."""
        return RULES.get(op.name, _unknown)(op, list(tensors_in((out,))), self.batch)

    def created(self, name: str, result: Tensor) -> State:
        """Return the state of a result of an operation whose operands have no samples: perhaps a guess."""
        return _guess(result, self.batch) if name in MAKES or name in WIDENS else None


def _guess(made: Tensor, batch: int) -> State:
    """Return the state of a tensor that was made: perhaps an entry of its first dimension is for each sample."""
    is_likely = made.dim() > 1 and made.shape[0] == batch
    return sample_layout.leading(made.shape, batch, certain=False) if is_likely else None


@propagates(*(name for name in MAKES if name.startswith("new_")))
def makes(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Make a tensor of numbers, with the dtype of one that has samples."""
    return [_guess(y, batch) for y in results]


def dims_of(op: Operation, ndim: int, at: int = 1) -> list[int] | None:
    """Return the dimensions that an operation was given, counted from the front; None: all."""
    dim = op.kwargs.get("dim", op.kwargs.get("axis", op.args[at] if len(op.args) > at else None))
    if dim is None or isinstance(dim, (Tensor, str)):
        return None
    given = [dim] if isinstance(dim, int) else list(dim)
    if not given or not all(isinstance(d, int) and not isinstance(d, bool) for d in given):
        return None
    return [d % max(ndim, 1) for d in given]


# ---- Element by element ---------------------------------------------------------------------------------------------


@propagates(*POINTWISE)
def pointwise(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Keep the layout, with broadcasting."""
    return [_broadcast(op.name, op.samples, y, batch) for y in results]


@propagates("copy")
def copy(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Take the layout of what is copied, not of what it overwrites."""
    source = [(t, layout) for t, layout in op.samples if t is not op.args[0]] or op.samples
    return [_broadcast(op.name, source, y, batch) for y in results]


@propagates("masked_scatter")
def masked_scatter(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Write the elements of a source, in order, where a mask says so: each must come to its own sample."""
    x, mask, source = op.bind("input mask source")
    of = {id(t): layout for t, layout in op.samples}
    if id(x) not in of:
        return [Mixed("masked_scatter into a tensor without samples")]
    if id(source) in of:
        at = mask.expand(x.shape).cpu()
        places = sample_layout.numbers(x.shape, of[id(x)].block, batch)[at]
        written = sample_layout.numbers(source.shape, of[id(source)].block, batch).reshape(-1)[: len(places)]
        if not torch.equal(places, written):
            return [Mixed("masked_scatter writes elements of one sample into another")]
    return [of[id(x)]]


def _broadcast(name: str, samples: Samples, out: Tensor, batch: int) -> State:
    states: list[State] = []
    for t, layout in samples:
        block = sample_layout.broadcast(t.shape, layout.block, out.shape, batch) if t.dim() <= out.dim() else None
        if block is None:
            return Mixed(f"{name} changed the shape from {tuple(t.shape)} to {tuple(out.shape)}")
        states.append(SampleLayout(block, layout.certain))
    return _agree(states, name)


# ---- In their dimension ---------------------------------------------------------------------------------------------

#: Of an operation, an operand, the dimension of its samples and a result: whether it treats each sample by itself.
Allows = Callable[[Operation, Tensor, int, Tensor], bool]


def stays(*names: str, where: Allows) -> None:
    """Register operations that keep the samples in their dimension, where they treat each sample by itself."""

    @propagates(*names)
    def rule(op: Operation, results: list[Tensor], batch: int) -> list[State]:
        return [_stay(op, where, y, batch) for y in results]


def _stay(op: Operation, where: Allows | None, out: Tensor, batch: int) -> State:
    states: list[State] = []
    for t, layout in op.samples:
        found = sample_layout.axis(t.shape, layout.block, batch)
        if found is None:
            return Mixed(f"{op.name} of folded samples")
        if where is None:
            return Mixed(f"{op.name} is not known to treat every sample by itself")
        dim = found[0]
        if not where(op, t, dim, out) or out.dim() <= dim or out.shape[dim] != t.shape[dim]:
            return Mixed(f"{op.name} goes over the samples")
        states.append(SampleLayout(sample_layout.block_on(out.shape, *found), layout.certain))
    return _agree(states, op.name)


def _unknown(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    known = _is_loss_of_each if op.name in LOSSES else None
    return [_stay(op, known if y.dim() else None, y, batch) for y in results]


def _is_loss_of_each(op: Operation, x: Tensor, dim: int, out: Tensor) -> bool:
    return dim == 0 and not has_weights_of_samples(op, [x])


def is_not_mixed(op: Operation, x: Tensor, dim: int, out: Tensor) -> bool:
    """Return whether an operation of `MIXES`, or a norm, treats the entries along a dimension by themselves."""
    if op.name in ("layer_norm", "rms_norm"):
        shape = op.kwargs.get("normalized_shape", op.args[1] if len(op.args) > 1 else ())
        return dim < x.dim() - (1 if isinstance(shape, int) else len(shape))
    if op.name == "renorm":  # changes each entry of its dimension by itself
        return dims_of(op, x.dim(), 2) == [dim]
    fft = op.name.startswith("fft_")
    at = 2 if fft else {"topk": 2, "gumbel_softmax": 4, "normalize": 2, "diff": 2}.get(op.name, 1)
    dims = dims_of(op, x.dim(), at)
    if dims is None and fft and op.name[-1] in "2n":
        dims = _dims_of_fft(op, x.dim())
    if dims is None:
        default = {"normalize": 1, "msort": 0}
        dims = [default.get(op.name, x.dim() - 1) % max(x.dim(), 1)]
    return dim not in dims


def _dims_of_fft(op: Operation, ndim: int) -> list[int]:
    """Return the dimensions of a transform of several that was not given them."""
    sizes = op.argument(1, "s")
    count = 2 if op.name[-1] == "2" else ndim if sizes is None else len(sizes)
    return list(range(ndim - count, ndim))


#: Of these, the ones whose first operands alone may have samples: weights that have some couple them.
_INPUTS = {
    **dict.fromkeys(
        ("linear", "group_norm", "instance_norm", "batch_norm", "native_group_norm", *_CONVOLUTIONS), ("input",)
    ),
    **dict.fromkeys(("cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d"), ("input", "target")),
    "bilinear": ("input1", "input2"),
}


def has_weights_of_samples(op: Operation, samples: Sequence[Tensor]) -> bool:
    """Return whether weights of an operation have samples, which are then multiplied with those of others."""
    if op.name in ("embedding", "embedding_bag"):
        table = op.argument(0 if op.func in (torch.embedding, torch.embedding_bag) else 1, "weight")
        return any(t is table for t in samples)
    names = _INPUTS.get(op.name)
    inputs = [] if names is None else [op.argument(at, name) for at, name in enumerate(names)]
    return names is not None and any(all(t is not x for x in inputs) for t in samples)


def _is_before_last(op: Operation, x: Tensor, dim: int, out: Tensor) -> bool:
    if has_weights_of_samples(op, [x]):
        return False
    aligned = op.name not in BROADCAST_BATCHES or out.dim() == x.dim()
    return aligned and dim < x.dim() - ON_LAST[op.name]


def _is_not_padded(op: Operation, x: Tensor, dim: int, out: Tensor) -> bool:
    widths = op.kwargs.get("pad", op.args[1] if len(op.args) > 1 else ())
    return not any(widths[2 * (x.dim() - 1 - dim) :][:2])


stays(*MIXES, where=is_not_mixed)
stays(*(name for name in ON_LAST if name not in _CONVOLUTIONS), where=_is_before_last)
stays(*ON_FIRST, where=lambda op, x, dim, out: dim == 0 and not has_weights_of_samples(op, [x]))
stays("pad", where=_is_not_padded)


@propagates(*_CONVOLUTIONS)
def convolution(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Keep the samples before the channels, or along them where each group of channels is of one sample."""
    x, weight = op.argument(0, "input"), op.argument(1, "weight")
    groups = op.argument(6, "groups", 1)
    of = {id(t): sample_layout.axis(t.shape, layout.block, batch) for t, layout in op.samples}
    along = of.get(id(x)) == (1, x.shape[1] // batch) and of.get(id(weight)) == (0, len(weight) // batch)
    rest = [t for t, _ in op.samples if t is not x and t is not weight]
    if along and groups and groups % batch == 0 and not rest and len(x.shape) == ON_LAST[op.name] + 1:
        block = sample_layout.block_on(results[0].shape, 1, results[0].shape[1] // batch)
        return [SampleLayout(block, any(layout.certain for _, layout in op.samples))]
    return [_stay(op, _is_before_last, y, batch) for y in results]


@propagates("embedding", "one_hot", "view_as_complex", "view_as_real")
def lookup(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Replace each number by a row, or a row by a number."""
    if has_weights_of_samples(op, [t for t, _ in op.samples]):
        return [Mixed(f"{op.name} in a table of samples")]
    return [_resized(op, y) for y in results]


def _resized(op: Operation, out: Tensor) -> State:
    states: list[State] = []
    for t, layout in op.samples:
        block, rest = divmod(layout.block * out.numel(), max(t.numel(), 1))
        if rest or not block:
            return Mixed(f"{op.name} goes over the samples")
        states.append(SampleLayout(block, layout.certain))
    return _agree(states, op.name)


@propagates(*RECURRENT)
def recurrent(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Return outputs that lie as the inputs do, and states with the samples in dimension 1."""
    call, of = RecurrentCall.of(op), states_of(op)
    order = call.order({id(t): of.get(id(t)) for t in (call.x, *call.states)}, batch)
    if isinstance(order, str):
        return [Mixed(order)] * len(results)
    return call.after(results, order, batch)


# ---- In any order ---------------------------------------------------------------------------------------------------

#: Know operands whose samples lie in any order.
TAKES_NUMBERED = frozenset({"_pack_padded_sequence", "_pad_packed_sequence", *RECURRENT})


def states_of(op: Operation) -> dict[int, State]:
    """Return the states of the operands that have samples, by their ids."""
    states: list[tuple[Tensor, State]] = [*op.samples, *op.numbered]
    return {id(t): state for t, state in states}


@propagates("_pack_padded_sequence")
def packs(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Pack sequences: the rows of all steps, one step after the other. Batch sizes have no samples."""
    x, _, batch_first = op.bind("input lengths batch_first")
    dim = 0 if batch_first else 1
    order = order_along(x.shape, states_of(op).get(id(x)), dim, batch)
    if order is None:
        return [Mixed(f"packing expects them along dimension {dim}, with batch_first={batch_first}"), None]
    rows = packed_numbers(numbers_of(order, x.shape[dim], batch), results[1].tolist())
    return [ordered(results[0].shape, 0, rows, batch), None]


@propagates("_pad_packed_sequence")
def pads(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Undo `packs`."""
    x, sizes, batch_first = op.bind("data batch_sizes batch_first padding_value total_length")[:3]
    order = order_along(x.shape, states_of(op).get(id(x)), 0, batch)
    if order is None:
        return [Mixed("padding expects rows of samples")] * len(results)
    columns = numbers_of(order, len(x), batch)[: int(sizes[0])]
    return [ordered(y.shape, dim, columns, batch) for y, dim in zip(results, (0 if batch_first else 1, 0), strict=True)]


@propagates("index_select")
def selects(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Pick entries along a dimension, which may be the samples'."""
    x, dim, index = op.bind("input dim index")
    state = states_of(op).get(id(x))
    dim %= max(x.dim(), 1)
    order = order_along(x.shape, state, dim, batch)
    if order is not None:
        return [ordered(results[0].shape, dim, numbers_of(order, x.shape[dim], batch)[index.cpu()], batch)]
    return moves(op, results, batch)


# ---- Moves ----------------------------------------------------------------------------------------------------------

#: The blocks after moves that were computed before, by the operation, its arguments and the layouts of its operands.
_moved: dict[Any, list[int | None]] = {}
_MOST_MOVES = 1 << 14
_RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze ravel".split())


@propagates(*MOVES)
def moves(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Apply the operation to the sample numbers."""
    name, args, kwargs = op.name, op.args, op.kwargs
    certain = any(layout.certain for _, layout in op.samples)
    x, layout = op.samples[0]
    if len(op.samples) == 1 and name in _RESHAPES:
        same = len(results) == 1 and results[0].numel() == x.numel()
        if same and not any(isinstance(a, torch.dtype) for a in args):
            return [layout]
    of = {id(t): layout.block for t, layout in op.samples}
    key: Any = None
    if not any(isinstance(a, Tensor) for a in (*_values(args[1:]), *kwargs.values())):
        key = (name, batch, tuple((tuple(t.shape), r.block) for t, r in op.samples), _key(args), _key(kwargs))
        if name == "as_strided":
            key = (*key, x.stride(), x.storage_offset())
        known = _moved.get(key)
        if known is not None:
            return _states(known, certain, name)

    def numbers_of(t: Tensor) -> Tensor:
        if id(t) in of:
            return sample_layout.numbers(t.shape, of[id(t)], batch)
        return torch.full(t.shape, -1, dtype=torch.int32)  # without samples

    moved = args[0] if args else kwargs["tensors"] if "tensors" in kwargs else kwargs["input"]
    if isinstance(moved, Tensor) and id(moved) not in of:
        return [Mixed(f"{name} by indices that have samples")] * len(results)
    numbers = numbers_of(moved) if isinstance(moved, Tensor) else [numbers_of(t) for t in moved]
    others = {k: v for k, v in kwargs.items() if k not in ("tensors", "input", "out")}
    try:
        with torch.no_grad():
            if name == "as_strided" and isinstance(numbers, Tensor):
                numbers = in_memory_of(x, numbers)
            out = op.func(numbers, *args[1:], **others)
    except (RuntimeError, TypeError, NotImplementedError):  # torch.nn.functional.unfold, for one
        return RULES["im2col"](op, results, batch) if name == "unfold" else _unknown(op, results, batch)
    blocks = [sample_layout.block_of(y, batch) if y.numel() else 0 for y in tensors_in((out,))]
    if key is not None:
        if len(_moved) >= _MOST_MOVES:
            _moved.clear()
        _moved[key] = blocks
    return _states(blocks, certain, name)


def in_memory_of(x: Tensor, numbers: Tensor) -> Tensor:
    """Return sample numbers that lie in memory as the entries of x do, as `as_strided` reads them; elsewhere -1."""
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.full((size,), -1, dtype=numbers.dtype)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(numbers)


def _states(blocks: list[int | None], certain: bool, name: str) -> list[State]:
    """Return the states of blocks; a tensor without elements, of block 0, has no samples."""
    apart = Mixed(f"{name} took samples apart")
    return [apart if b is None else SampleLayout(b, certain) if b else None for b in blocks]


def _values(args: Sequence[Any]) -> Iterator[Any]:
    """Yield the arguments, and those in a tuple, as an index is."""
    for a in args:
        if isinstance(a, tuple):
            yield from a
        else:
            yield a


def _key(x: Any) -> Any:
    """Return the arguments of a move as a key, without tensors."""
    if isinstance(x, Tensor):
        return Tensor
    if isinstance(x, (list, tuple)):
        return (type(x).__name__, *(_key(y) for y in x))
    if isinstance(x, dict):
        return tuple((k, _key(v)) for k, v in sorted(x.items()))
    if isinstance(x, slice):
        return ("slice", x.start, x.stop, x.step)
    return ("bool", x) if isinstance(x, bool) else x


# ---- Reductions -----------------------------------------------------------------------------------------------------

#: The position of `dim` where it is not 1.
_DIM_AT = dict.fromkeys(
    "norm quantile nanquantile vector_norm linalg_norm linalg_vector_norm linalg_matrix_norm kthvalue "
    "cosine_similarity".split(), 2,
)  # fmt: skip
_DEFAULT_DIMS = {"cosine_similarity": (1,), "kthvalue": (-1,), "linalg_matrix_norm": (-2, -1)}


def reduced_dims(op: Operation, ndim: int) -> list[int] | None:
    """Return the dimensions that an operation of `REDUCES` goes over; None: all."""
    dims = dims_of(op, ndim, _DIM_AT.get(op.name, 1))
    if dims is None and op.name in _DEFAULT_DIMS:
        return [d % max(ndim, 1) for d in _DEFAULT_DIMS[op.name]]
    return dims


@propagates(*REDUCES)
def reduces(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Drop or shrink dimensions, which may not be the samples'."""
    second = op.args[1] if len(op.args) > 1 else op.kwargs.get("other")
    if isinstance(second, Tensor) and op.name != "cosine_similarity":  # max(a, b)
        return pointwise(op, results, batch)
    x = op.samples[0][0]
    dims = reduced_dims(op, x.dim())
    return [_reduced(op, dims, x.dim(), y, batch) for y in results]


def _reduced(op: Operation, dims: list[int] | None, ndim: int, out: Tensor, batch: int) -> State:
    states: list[State] = []
    for t, layout in op.samples:
        found = sample_layout.axis(t.shape, layout.block, batch)
        if dims is None or found is None or found[0] in dims or t.dim() != ndim:
            return Mixed(f"{op.name} goes over the samples")
        dim, inner = found
        place = dim if out.dim() == ndim else dim - sum(d < dim for d in dims)
        states.append(SampleLayout(sample_layout.block_on(out.shape, place, inner), layout.certain))
    return _agree(states, op.name) if len(states) > 1 else states[0]


# ---- Products -------------------------------------------------------------------------------------------------------


#: The names of their first arguments: what is added, and what is multiplied.
ADDS = {"addmm": ("input", "mat1", "mat2"), "baddbmm": ("input", "batch1", "batch2")}


@propagates(*PRODUCTS)
def product(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Multiply matrices, which may not sum over the samples."""
    y = results[0]
    if op.name in ADDS:
        added, *pair = (op.argument(at, name) for at, name in enumerate(ADDS[op.name]))
        samples = [(t, layout) for t, layout in op.samples if any(t is p for p in pair)]
        states = [_product(op.name, pair, samples, y, batch)] if samples else []
        if len(samples) < len(op.samples) or any(added is p for p in pair):
            states.append(_broadcast(op.name, [(t, r) for t, r in op.samples if t is added], y, batch))
        return [next((s for s in states if isinstance(s, Mixed)), None) or _agree(states, op.name)]
    pair = [op.argument(0, "input"), op.argument(1, "other", op.kwargs.get("mat2", op.kwargs.get("vec")))]
    if op.name == "__rmatmul__":
        pair.reverse()
    return [_product(op.name, pair, op.samples, y, batch)]


def _product(name: str, pair: list[Tensor], samples: Samples, out: Tensor, batch: int) -> State:
    of = {id(t): layout for t, layout in samples}
    states: list[State] = []
    for i, t in enumerate(pair):
        layout = of.get(id(t))
        if layout is None:
            continue
        found = sample_layout.axis(t.shape, layout.block, batch)
        if found is None:
            return Mixed(f"{name} of folded samples")
        d, inner = found
        contracted = t.dim() - 1 if i == 0 else max(t.dim() - 2, 0)
        if d == contracted:
            return Mixed(f"{name} sums over the samples")
        if t.dim() == 1:
            return Mixed(f"{name} of a vector of samples")
        free = t.dim() - 2 if i == 0 else t.dim() - 1
        other = pair[1 - i]
        if d == free:
            if id(other) in of:
                return Mixed(f"{name} of every sample with every other")
            at = out.dim() - (2 if i == 0 and other.dim() > 1 else 1)
        else:
            at = d if other.dim() == 1 else d - t.dim() + max(t.dim(), other.dim())
        states.append(SampleLayout(sample_layout.block_on(out.shape, at, inner), layout.certain))
    return _agree(states, name)


@propagates("cdist")
def distances(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Return the distances of the rows of two tensors, which may not both be of samples."""
    pair = [op.argument(0, "x1"), op.argument(1, "x2")]
    of, out = {id(t): layout for t, layout in op.samples}, results[0]
    states: list[State] = []
    for i, t in enumerate(pair):
        if id(t) not in of:
            continue
        found = sample_layout.axis(t.shape, of[id(t)].block, batch)
        from_last = 0 if found is None else t.dim() - 1 - found[0]
        if found is None or not from_last:
            return [Mixed("cdist goes over the samples")]
        if from_last == 1 and id(pair[1 - i]) in of:
            return [Mixed("cdist of every sample with every other")]
        at = out.dim() - 1 - (1 - i if from_last == 1 else from_last)
        states.append(SampleLayout(sample_layout.block_on(out.shape, at, found[1]), of[id(t)].certain))
    return [_agree(states, op.name)]


@propagates("tensordot")
def tensordot(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Contract dimensions, which may not be the samples'."""
    a, b = op.args[:2]
    dims = op.argument(2, "dims", 2)
    if isinstance(dims, int):
        dims = (list(range(a.dim() - dims, a.dim())), list(range(dims)))
    over = [[d % t.dim() for d in ds] for t, ds in zip((a, b), dims, strict=True)]
    if len(op.samples) != 1:
        return [Mixed("tensordot of every sample with every other")]
    (t, layout), which = op.samples[0], 0 if op.samples[0][0] is a else 1
    found = sample_layout.axis(t.shape, layout.block, batch)
    if found is None or found[0] in over[which]:
        return [Mixed("tensordot sums over the samples")]
    dim = found[0] - sum(d < found[0] for d in over[which]) + (a.dim() - len(over[0]) if which else 0)
    return [SampleLayout(sample_layout.block_on(results[0].shape, dim, found[1]), layout.certain)]


@propagates("einsum")
def einsum(op: Operation, results: list[Tensor], batch: int) -> list[State]:
    """Contract letters, which may not be the samples'."""
    found = einsum_axes(op.args, {id(t): layout for t, layout in op.samples}, batch)
    if isinstance(found, str):
        return [Mixed(found)]
    certain = any(layout.certain for _, layout in op.samples)
    return [SampleLayout(sample_layout.block_on(results[0].shape, *found), certain)]


def letters_of(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """Return the dimensions of the operands and the result of an einsum, a letter for each, also for those in "..."."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    terms = []
    longest = 0
    for term, t in zip(left.split(","), operands, strict=True):
        count = t.dim() - len(term.replace("...", ""))
        longest = max(longest, count)
        if count > len(spare):
            return None
        terms.append(term.replace("...", "".join(spare[:count][::-1])))
    dots = "".join(spare[:longest][::-1])
    if arrow:
        return terms, right.replace("...", dots)
    every = "".join(terms)
    return terms, dots + "".join(sorted(c for c in set(every) if every.count(c) == 1 and c not in dots))


def einsum_axes(args: Sequence[Any], of: dict[int, SampleLayout], batch: int) -> tuple[int, int] | str:
    """Return the output dimension of the samples and the consecutive entries of one; or why there is none."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        return "einsum without an equation"
    letters = letters_of(equation, operands)
    if letters is None:
        return "einsum of too many dimensions"
    found: set[tuple[str, int]] = set()
    for term, t in zip(letters[0], operands, strict=True):
        if id(t) in of:
            at = sample_layout.axis(t.shape, of[id(t)].block, batch)
            if at is None:
                return "einsum of folded samples"
            found.add((term[at[0]], at[1]))
    if len(found) != 1:
        return "einsum of every sample with every other"
    letter, inner = found.pop()
    return (letters[1].index(letter), inner) if letter in letters[1] else "einsum sums over the samples"


def _agree(states: list[State], name: str) -> State:
    """Return the one state of a result, from those that its operands give."""
    blocks = {s.block for s in states if isinstance(s, SampleLayout)}
    if len(blocks) == 1:
        return SampleLayout(blocks.pop(), any(isinstance(s, SampleLayout) and s.certain for s in states))
    return Mixed(f"{name} of operands whose samples do not lie side by side")
