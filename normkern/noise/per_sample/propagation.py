"""Where the samples are after an operation of torch: one rule per kind of operation.

What moves elements is applied to the samples' numbers; what works element by element, with broadcasting, keeps them; a
reduction loses them if it goes over them. Of anything else it is taken that a batch in front stays in front, as
everything in torch.nn.functional has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import sample_layout as rows
from .sample_layout import Lost, Rows, State
from .words import words

#: Reorder, select or repeat elements, and compute nothing. Of the first argument, or of a list of tensors.
MOVES = words(
    """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims t T mT H
    mH adjoint permute movedim moveaxis expand expand_as broadcast_to repeat tile repeat_interleave __getitem__
    select narrow index_select gather take_along_dim flip fliplr flipud rot90 roll chunk split split_with_sizes
    tensor_split unbind hsplit vsplit dsplit cat concat concatenate stack hstack vstack dstack column_stack diagonal
    unfold atleast_1d atleast_2d atleast_3d __iter__ as_strided"""
)
#: With a `dim` that may be the samples'.
REDUCES = words(
    """sum nansum mean nanmean prod max min amax amin median nanmedian mode argmax argmin any all norm std var std_mean
    var_mean logsumexp count_nonzero quantile nanquantile vector_norm kthvalue aminmax cosine_similarity"""
)
#: Mix along a `dim`, the last one unless they say so.
MIXES = words(
    """softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort topk normalize renorm msort
    gumbel_softmax cross layer_norm rms_norm glu index_add index_copy index_fill scatter scatter_add scatter_reduce
    diff fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"""
)
#: Make tensors of a given shape.
MAKES = words("zeros ones full empty rand randn new_zeros new_ones new_full new_empty")
PRODUCTS = words("matmul __matmul__ __rmatmul__ mm bmm mv addmm baddbmm")
#: Element by element, with broadcasting.
POINTWISE = words(
    """abs absolute acos arccos acosh arccosh add addcdiv addcmul alias alpha_dropout angle asin arcsin asinh arcsinh
    atan arctan atan2 arctan2 atanh arctanh bernoulli bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool
    byte bitwise_left_shift bitwise_right_shift cauchy ceil celu char clamp clamp_max clamp_min clip clone conj
    conj_physical contiguous copysign cos cosh cpu cuda data deg2rad detach digamma div divide double dropout
    dropout1d dropout2d dropout3d elu empty_like eq erf erfc erfinv exp exp2 expm1 exponential feature_alpha_dropout
    feature_dropout fill fill_diagonal float float_power floor floor_divide fmax fmin fmod frac full_like gcd ge
    gelu geometric greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 int
    isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp less less_equal lgamma log
    log10 log1p log2 log_normal log_sigmoid logsigmoid logaddexp logaddexp2 logical_and logical_not logical_or
    logical_xor logit long lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative nextafter
    normal not_equal ones_like polygamma positive pow prelu quantize_per_tensor fake_quantize_per_tensor_affine
    rad2deg rand_like randint_like randn_like random real reciprocal relu relu6 remainder resolve_conj resolve_neg
    round rrelu rsqrt rsub selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign
    special_expit special_erf special_entr special_gammaln special_i0 special_i1 special_log_ndtr special_ndtr
    special_ndtri special_xlog1py special_xlogy sqrt square sub subtract tan tanh tanhshrink threshold to to_dense
    to_sparse tril triu true_divide trunc type type_as uniform where xlogy xpu zero zeros_like mse_loss l1_loss
    smooth_l1_loss huber_loss binary_cross_entropy kl_div binary_cross_entropy_with_logits __add__ __radd__ __sub__
    __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__
    __and__ __rand__ __or__ __ror__ __xor__ __rxor__ __invert__ __neg__ __pos__ __abs__ __eq__ __ne__ __lt__ __le__
    __gt__ __ge__ __lshift__ __rshift__ __deepcopy__"""
)
#: Work on so many of the last dimensions, and on everything before them alike.
ON_LAST: dict[str, int] = {
    **{f"conv{n}d": n + 1 for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": n + 1 for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": n for n in (1, 2, 3) for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")},
    **{f"{kind}_pool{n}d_with_indices": n for n in (1, 2, 3) for kind in ("max", "adaptive_max")},
    **{f"fractional_max_pool{n}d": n for n in (2, 3)},
    **dict.fromkeys(("linear", "bilinear", "pairwise_distance"), 1),
    **dict.fromkeys(("scaled_dot_product_attention", "cdist", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2"), 2),
    **dict.fromkeys(("linalg_inv", "linalg_solve", "linalg_cholesky", "linalg_matrix_exp", "linalg_det", "inverse"), 2),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"), 3),
}
#: Of samples in the first dimension.
ON_FIRST = words(
    """group_norm instance_norm batch_norm local_response_norm grid_sample affine_grid fold unfold embedding_bag
    interpolate upsample upsample_nearest upsample_bilinear native_group_norm"""
)
RECURRENT = words("lstm gru rnn_tanh rnn_relu")


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, one list deep."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            for y in x:
                if isinstance(y, Tensor):
                    yield y


def dims_of(args: Sequence[Any], kwargs: dict[str, Any], ndim: int, at: int = 1) -> list[int] | None:
    """The dimensions that an operation was told, counted from the front; None: all."""
    dim = kwargs.get("dim", kwargs.get("axis", args[at] if len(args) > at else None))
    if dim is None or isinstance(dim, (Tensor, str)):
        return None
    given = [dim] if isinstance(dim, int) else list(dim)
    if not given or not all(isinstance(d, int) and not isinstance(d, bool) for d in given):
        return None
    return [d % max(ndim, 1) for d in given]


class Follower:
    """The rules, for batches of one size."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._moves: dict[Any, list[int | None]] = {}

    def after(
        self,
        name: str,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        operands: list[tuple[Tensor, Rows]],
        out: Any,
    ) -> list[State]:
        """The states of the results, whose operands with samples are given; in the order of `tensors_in((out,))`."""
        results = list(tensors_in((out,)))
        if name in MOVES:
            states = self._moved(name, func, args, kwargs, operands, results)
            if states is not None:
                return states
        if name in REDUCES:
            return self._reduced(name, args, kwargs, operands, results)
        if name in PRODUCTS:
            pair = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            return [self._product(name, pair, operands, results[0])]
        if name == "tensordot":
            return [self._tensordot(args, kwargs, operands, results[0])]
        if name == "einsum":
            return [self._einsum(args, operands, results[0])]
        if name in RECURRENT:
            return self._recurrent(operands, results)
        return [self._one(name, args, kwargs, operands, x) for x in results]

    def _one(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], operands: list[tuple[Tensor, Rows]], out: Tensor
    ) -> State:
        """A result of what keeps dimensions where they are."""
        if name == "copy":
            operands = [(t, r) for t, r in operands if t is not args[0]] or operands
            return self._pointwise(name, operands, out)
        if name in POINTWISE:
            return self._pointwise(name, operands, out)
        states: list[State] = []
        for t, r in operands:
            if name in ("embedding", "one_hot"):
                states.append(Rows(r.block * (out.numel() // t.numel()), r.certain))
                continue
            found = rows.axis(t.shape, r.block, self.batch)
            if found is None:
                return Lost(f"{name} of folded samples")
            if name in MIXES:
                fine = not self._mixes(name, args, kwargs, (t, r))
            elif name in ON_LAST:
                fine = found[0] < t.dim() - ON_LAST[name]
            elif name == "pad":
                widths = kwargs.get("pad", args[1] if len(args) > 1 else ())
                fine = not any(widths[2 * (t.dim() - 1 - found[0]) :][:2])
            elif name in ON_FIRST:
                fine = found[0] == 0
            elif name == "multi_head_attention_forward":
                fine = t.dim() == 3 and found[0] == (1 if out.dim() == 3 and out.shape == args[0].shape else found[0])
            else:
                return Lost(f"{name} is not known to treat every sample by itself")
            if not fine or out.dim() <= found[0] or out.shape[found[0]] != t.shape[found[0]]:
                return Lost(f"{name} goes over the samples")
            states.append(Rows(rows.block_on(out.shape, *found), r.certain))
        return _agree(states, name)

    @staticmethod
    def knows(name: str) -> bool:
        """Whether there is a rule."""
        return (
            name in MOVES or name in REDUCES or name in PRODUCTS or name in POINTWISE or name in MIXES
            or name in ON_LAST or name in ON_FIRST or name in RECURRENT
            or name in ("tensordot", "einsum", "copy", "embedding", "one_hot", "pad")
        )  # fmt: skip

    def _moved(
        self,
        name: str,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        operands: list[tuple[Tensor, Rows]],
        results: list[Tensor],
    ) -> list[State] | None:
        """None: it cannot be done to the numbers (torch.nn.functional.unfold, for one)."""
        certain = any(r.certain for _, r in operands)
        x, r = operands[0]
        if len(operands) == 1 and name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"):
            same = len(results) == 1 and results[0].numel() == x.numel()
            if same and not any(isinstance(a, torch.dtype) for a in args):
                return [r]
        of = {id(t): r for t, r in operands}
        rest = [*_values(args[1:]), *kwargs.values()]
        key: Any = None
        if not any(isinstance(a, Tensor) for a in rest):
            key = (name, tuple((tuple(t.shape), r.block) for t, r in operands), _key(args), _key(kwargs))
            if key in self._moves:
                return self._states(self._moves[key], certain, name)
        if name == "as_strided" and not x.is_contiguous():
            return [Lost("as_strided of a tensor that is not contiguous")]

        def as_numbers(t: Tensor) -> Tensor:
            if id(t) in of:
                return rows.numbers(t.shape, of[id(t)].block, self.batch)
            return torch.full(t.shape, -1, dtype=torch.int32)  # of no sample

        moved = args[0] if args else kwargs["tensors"] if "tensors" in kwargs else kwargs["input"]
        if isinstance(moved, Tensor) and id(moved) not in of:
            return [Lost(f"{name} by what is the samples'")] * len(results)
        numbers = as_numbers(moved) if isinstance(moved, Tensor) else [as_numbers(t) for t in moved]
        others = {k: v for k, v in kwargs.items() if k not in ("tensors", "input", "out")}
        try:
            with torch.no_grad():
                out = func(numbers, *args[1:], **others)
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        blocks = [rows.block_of(x, self.batch) for x in tensors_in((out,))]
        if key is not None:
            self._moves[key] = blocks
        return self._states(blocks, certain, name)

    def _states(self, blocks: list[int | None], certain: bool, name: str) -> list[State]:
        return [Lost(f"{name} took samples apart") if b is None else Rows(b, certain) for b in blocks]

    def _reduced(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], operands: list[tuple[Tensor, Rows]],
        results: list[Tensor],
    ) -> list[State]:  # fmt: skip
        second = args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(second, Tensor) and name != "cosine_similarity":  # max(a, b)
            return [self._pointwise(name, operands, y) for y in results]
        x = operands[0][0]
        at = {"norm": 2, "quantile": 2, "nanquantile": 2, "vector_norm": 2, "kthvalue": 2, "cosine_similarity": 2}
        dims = dims_of(args, kwargs, x.dim(), at.get(name, 1))
        if dims is None and name in ("cosine_similarity", "kthvalue"):
            dims = [1 if name == "cosine_similarity" else x.dim() - 1]
        every: list[State] = []
        for y in results:
            states: list[State] = []
            for t, s in operands:
                found = rows.axis(t.shape, s.block, self.batch)
                if dims is None or found is None or found[0] in dims or t.dim() != x.dim():
                    states = [Lost(f"{name} goes over the samples")]
                    break
                dim, inner = found
                place = dim if y.dim() == x.dim() else dim - sum(d < dim for d in dims)
                states.append(Rows(rows.block_on(y.shape, place, inner), s.certain))
            every.append(_agree(states, name) if len(states) > 1 else states[0])
        return every

    def _mixes(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], operand: tuple[Tensor, Rows]) -> bool:
        x, r = operand
        found = rows.axis(x.shape, r.block, self.batch)
        if found is None:
            return True
        if name in ("layer_norm", "rms_norm"):
            shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
            return found[0] >= x.dim() - (1 if isinstance(shape, int) else len(shape))
        fft = name.startswith("fft_")
        at = 2 if fft else {"topk": 2, "gumbel_softmax": 4, "normalize": 2, "renorm": 2, "diff": 2}.get(name, 1)
        default = {"normalize": 1, "msort": 0}
        dims = dims_of(args, kwargs, x.dim(), at)
        if dims is None:
            dims = [default.get(name, x.dim() - 1) % max(x.dim(), 1)]
        return found[0] in dims

    def _product(self, name: str, args: Sequence[Any], operands: list[tuple[Tensor, Rows]], out: Tensor) -> State:
        pair = [args[1], args[0]] if name == "__rmatmul__" else list(args[:2])
        of = {id(t): r for t, r in operands}
        states: list[State] = []
        for i, t in enumerate(pair):
            r = of.get(id(t))
            if r is None:
                continue
            found = rows.axis(t.shape, r.block, self.batch)
            if found is None:
                return Lost(f"{name} of folded samples")
            d, inner = found
            contracted = t.dim() - 1 if i == 0 else max(t.dim() - 2, 0)
            if d == contracted:
                return Lost(f"{name} sums over the samples")
            if t.dim() == 1:
                return Lost(f"{name} of a vector of samples")
            free = t.dim() - 2 if i == 0 else t.dim() - 1
            if d == free:
                other = pair[1 - i]
                if id(other) in of:
                    return Lost(f"{name} of every sample with every other")
                at = out.dim() - (2 if i == 0 and other.dim() > 1 else 1)
            else:
                at = d - t.dim() + max(t.dim(), pair[1 - i].dim())
                if pair[1 - i].dim() == 1:
                    at = d
            states.append(Rows(rows.block_on(out.shape, at, inner), r.certain))
        return _agree(states, name)

    def _tensordot(
        self, args: Sequence[Any], kwargs: dict[str, Any], operands: list[tuple[Tensor, Rows]], out: Tensor
    ) -> State:
        a, b = args[:2]
        dims = kwargs.get("dims", args[2] if len(args) > 2 else 2)
        if isinstance(dims, int):
            dims = (list(range(a.dim() - dims, a.dim())), list(range(dims)))
        over = [[d % t.dim() for d in ds] for t, ds in zip((a, b), dims, strict=True)]
        if len(operands) != 1:
            return Lost("tensordot of every sample with every other")
        (t, r), which = operands[0], 0 if operands[0][0] is a else 1
        found = rows.axis(t.shape, r.block, self.batch)
        if found is None or found[0] in over[which]:
            return Lost("tensordot sums over the samples")
        dim = found[0] - sum(d < found[0] for d in over[which]) + (a.dim() - len(over[0]) if which else 0)
        return Rows(rows.block_on(out.shape, dim, found[1]), r.certain)

    def _recurrent(self, operands: list[tuple[Tensor, Rows]], results: list[Tensor]) -> list[State]:
        """Of what torch.nn.LSTM and its kin call: the outputs lie as the inputs do, the states in dimension 1."""
        x, r = operands[0]
        found = rows.axis(x.shape, r.block, self.batch)
        if found is None or x.dim() != 3 or found[0] == 2:
            return [Lost("a recurrent layer of folded samples")] * len(results)
        first, *states = results
        return [
            Rows(rows.block_on(first.shape, *found), r.certain),
            *(Rows(rows.block_on(y.shape, 1, found[1]), r.certain) for y in states),
        ]

    def _einsum(self, args: Sequence[Any], operands: list[tuple[Tensor, Rows]], out: Tensor) -> State:
        found = einsum_axes(args, {id(t): r for t, r in operands}, self.batch)
        if isinstance(found, str):
            return Lost(found)
        return Rows(rows.block_on(out.shape, *found), any(r.certain for _, r in operands))

    def _pointwise(self, name: str, operands: list[tuple[Tensor, Rows]], out: Tensor) -> State:
        states: list[State] = []
        for t, r in operands:
            block = rows.broadcast(t.shape, r.block, out.shape, self.batch) if t.dim() <= out.dim() else None
            if block is None:
                return Lost(f"{name} changed the shape from {tuple(t.shape)} to {tuple(out.shape)}")
            states.append(Rows(block, r.certain))
        return _agree(states, name)


def letters_of(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """The operands' and the result's dimensions of an einsum, a letter for each, also of those in "..."."""
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


def einsum_axes(args: Sequence[Any], of: dict[int, Rows], batch: int) -> tuple[int, int] | str:
    """The output dimension of the samples, and the entries of one sample in a row; or why there is none."""
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
            at = rows.axis(t.shape, of[id(t)].block, batch)
            if at is None:
                return "einsum of folded samples"
            found.add((term[at[0]], at[1]))
    if len(found) != 1:
        return "einsum of every sample with every other"
    letter, inner = found.pop()
    return (letters[1].index(letter), inner) if letter in letters[1] else "einsum sums over the samples"


def _agree(states: list[State], name: str) -> State:
    """One state of several operands'."""
    blocks = {s.block for s in states if isinstance(s, Rows)}
    if len(blocks) == 1:
        return Rows(blocks.pop(), any(isinstance(s, Rows) and s.certain for s in states))
    return Lost(f"{name} of operands whose samples do not lie side by side")


def _values(args: Sequence[Any]) -> Iterator[Any]:
    """Arguments, with what an index holds."""
    for a in args:
        if isinstance(a, tuple):
            yield from a
        else:
            yield a


def _key(x: Any) -> Any:
    """Arguments of a move, as a key: tensors by position only."""
    if isinstance(x, Tensor):
        return Tensor
    if isinstance(x, (list, tuple)):
        return (type(x).__name__, *(_key(y) for y in x))
    if isinstance(x, dict):
        return tuple((k, _key(v)) for k, v in sorted(x.items()))
    if isinstance(x, slice):
        return ("slice", x.start, x.stop, x.step)
    return x
