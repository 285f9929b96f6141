"""Typed, documented functions, one per bound op. The only importer of the binary."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from .kinds import is_a, is_traced

try:
    import normkern._C as _C
except ImportError as error:
    raise ImportError(
        f"normkern's binary could not be loaded ({error}). Build it for this interpreter "
        f"(Python {sys.version_info.major}.{sys.version_info.minor}): pip install --force-reinstall --no-deps normkern"
    ) from error

Stats: TypeAlias = Literal["tensor", "row"] | None
#: What kernels read and write.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Columns of the table of sums, in order.
SUMS = ("weight_sq", "grad_sq", "weight_grad_dot", "update_sq", "weight_update_dot")
#: What a pair of gradients adds to them: <g1,g2>, |g1-g2|^2, |g1|^2, |g2|^2.
PAIR_SUMS = ("pair_dot", "pair_difference_sq", "first_sq", "second_sq")
#: Coordinates per chunk: the unit of work and of summation.
CHUNK: int = _C.CHUNK
#: The binary itself, for those who examine it.
binary = _C
_STATS_CODE = {None: 0, "tensor": 1, "row": 2}

Pass = _C.Pass
GaugeStep = _C.GaugeStep
LrMultipliers = _C.LrMultipliers
most_decay = _C.most_decay
gather = _C.gather
describe = _C.describe
shared_pair = _C.shared_pair
kernel_takes = _C.kernel_takes
#: The compute capabilities that the binary has kernels for, 80 for 8.0; none: it was built for CPUs only.
cuda_architectures = _C.cuda_architectures
slot_count = _C.slot_count
isa = _C.isa
supported_isas = _C.supported_isas


def _torch_op(name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls ``torch.ops.normkern``: what a tracer can keep of an op, whose kernel writes where no tracer looks."""
    op: Any = torch.ops.normkern
    for part in name.split("."):
        op = getattr(op, part)
    return op(*args, **kwargs)


def select_isa(name: str) -> None:
    """Run the CPU loops of one instruction-set level from now on: one of `supported_isas()`.

    The environment variable ``NORMKERN_ISA`` does the same at import.

    Raises:
        ValueError: this binary does not have the level, or this machine cannot run it.
    """
    if not _C.select_isa(name):
        raise ValueError(f"select_isa: expected one of {', '.join(supported_isas())} on this machine, got {name!r}")


def torch_symbol(name: str) -> int:
    """The address of one of torch's C functions, from the library that torch itself has loaded."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    file = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    library = ctypes.CDLL(os.path.join(folder, file))
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


_C.connect(
    torch.Tensor.__dlpack_c_exchange_api__,
    torch_symbol("torch_parallel_for"),
    torch.Tensor,
    torch.nn.Parameter,
)
if "NORMKERN_ISA" in os.environ:
    try:
        select_isa(os.environ["NORMKERN_ISA"])
    except ValueError as error:
        raise ImportError(f"NORMKERN_ISA: {error}") from None


def stats_code(stats: Stats, where: str) -> int:
    """How the binary spells a choice of statistics."""
    try:
        return _STATS_CODE[stats]
    except (KeyError, TypeError):
        raise ValueError(f'{where}: stats expected None, "tensor" or "row", got {stats!r}') from None


def new_table(slots: int, columns: int = len(SUMS), like: Tensor | None = None) -> Tensor:
    """An unwritten table of sums, (slots, columns) float64 on the device of `like`, or the CPU."""
    return torch.empty((slots, columns), dtype=torch.float64, device="cpu" if like is None else like.device)


def new_scratch(step: Pass) -> Tensor | None:
    """Where a `Pass` puts sums that come in parts; None where it needs no such place."""
    return new_table(step.scratch_rows, step.columns, step.like) if step.like is not None else None


def device_index(x: object) -> int | None:
    """The index of the CUDA device whose kernels reach x, -1 for the CPU, None where no kernel takes x."""
    return _C.device_index(x)


def _scratch_beside(x: Tensor) -> Callable[[int], Tensor]:
    """Makes unwritten float64 memory on x's device, for what a kernel's blocks leave each other."""
    return lambda size: torch.empty(size, dtype=torch.float64, device=x.device)


#: What decides whether a kernel takes a tensor: `kernel_takes` (None), or `would_take` where tensors have no values.
Takes: TypeAlias = Callable[[Any], bool]


def would_take(x: Any) -> bool:
    """Whether a kernel takes tensors such as x, which may be a stand-in of no values: a FakeTensor, a meta tensor."""
    plain = type(x) in (Tensor, torch.nn.Parameter) or is_a(x, "torch._subclasses.fake_tensor", "FakeTensor")
    is_here = plain and (x.device.type in ("cpu", "meta") or (x.device.type == "cuda" and bool(cuda_architectures())))
    return is_here and x.layout == torch.strided and x.dtype in DTYPES


def kernels_take(tensors: Iterable[Any]) -> bool:
    """Whether one call of an op takes them all: plain tensors of real dtypes, on one device. None is no tensor."""
    if is_traced():
        given = [x for x in tensors if x is not None]
        return all(would_take(x) and not x.is_meta and x.device == given[0].device for x in given)
    devices = {device_index(x) for x in tensors if x is not None}
    return None not in devices and len(devices) <= 1


#: lr, weight_decay, grad_scale and found_inf where they lie on a device, else None.
OnDevice: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Rounding(NamedTuple):
    """Of bfloat16 weights at random: Philox4x32-7 with the seed as key; see csrc/formulas.h for its counter."""

    seed: int
    step: int  #: how many there have been
    first: int = 0  #: the first parameter's index in the optimizer


#: How the binary takes it: the buffers' dtype, (seed, step), the index of the first parameter.
Precision: TypeAlias = tuple[int | None, tuple[int, int] | None, int]
_DTYPE_CODE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def precision(state_dtype: torch.dtype | None, rounding: Rounding | None, first: int) -> Precision:
    """How the binary spells how a group is stored."""
    numbers = None if rounding is None else (rounding.seed, rounding.step % 2**32)
    return None if state_dtype is None else _DTYPE_CODE[state_dtype], numbers, first


def if_on_device(x: object) -> Tensor | None:
    """x, if it is one number in the memory of a CUDA device, which a kernel can read by itself."""
    if not isinstance(x, Tensor) or x.numel() != 1 or x.dtype not in (torch.float32, torch.float64):
        return None
    return x if device_index(x) not in (None, -1) else None


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | Tensor = 1.0,
    stats: Stats = None,
    held: Sequence[Tensor | None] | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
    gauge: GaugeStep | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    lr_multipliers: Sequence[float] | Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
    masters: list[Tensor | None] | None = None,
) -> Tensor | None:
    r"""One step of SGD on a list of tensors, in one pass over memory; of SVAG, if there are pairs of gradients.

    .. math::
        d = \pm g/\mathrm{grad\_scale} + \lambda w, \quad v' = \mu v + (1-\tau) d, \quad w' = w - \eta v'

    with :math:`v' = d` where there is no buffer yet, and :math:`w' = w - \eta (d + \mu v')` for nesterov. Arithmetic in
    float32 (float64 for float64 tensors), one rounding at the store. Of a pair, :math:`g_1` held and :math:`g_2` in
    `grads`, each divided by its scale, the gradient is (l = 1: :math:`g_1`, to the bit)

    .. math::
        g = \tfrac12 (g_1 + g_2) + \tfrac12 \sqrt{2l-1}\,(g_1 - g_2)

    Args:
        params: tensors of float64, float32, bfloat16 or float16 on a CPU or a CUDA device, any shapes and strides;
            updated in place. With `stats` all are on one device.
        grads: same shapes, dtypes and devices; None skips the parameter. Read only.
        momentum_buffers: one per parameter, updated in place; None entries are created and put into the list.
            Needed if `momentum` is not 0. Of their parameter's dtype or, unless that is float64, float32 or bfloat16.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`. lr and weight_decay may be
            CUDA tensors of one float32 or float64 number beside the parameters: read when the kernel runs.
        grad_scale: what the gradients were multiplied with; a CUDA tensor of one float32 number is read then too, but
            for pairs.
        stats: "tensor" sums over each parameter, "row" over each index of its first dimension (ndim >= 2).
        held: the first gradients of pairs; None entries are no pairs. Pairs are always measured: None is "tensor" then.
        l: SVAG's, at least 1/2. The learning rate is taken as it is.
        held_scale: what the held gradients were multiplied with.
        gauge: `gauge_step` of the same lr, momentum, dampening, weight_decay and nesterov. Then `params` and
            `momentum_buffers` are what it says they are, before and after the step; the sums are of the true weights.
        found_inf: of a GradScaler, a CUDA tensor of one float32 number: if it is not 0 when the kernel runs nothing is
            written, the sums are NaN and new momentum buffers zeros.
        clip_coef: one float64 number on the device of all tensors, read when the kernel runs: the second of what
            `clip_coef` returns. The unscaled gradient is multiplied with it; sums are of the gradient before that.
        lr_multipliers: one finite number of at least 0 for each parameter, which lr is multiplied with. A CUDA tensor
            is read when the kernel runs, and its numbers are not looked at.
        state_dtype: of those momentum buffers that are created; None: of their parameters.
        rounding: bfloat16 parameters are rounded at random: up with the probability that is the position between the
            two neighbours, by a number that depends on seed, step, the parameter's index and the coordinate's in
            row-major order. NaN and infinities stay, what lies beyond the largest number is rounded to nearest.
        masters: float32 copies of parameters of 16 bits, updated in place: the step is theirs, and the parameter what
            they are rounded to. Where a parameter is not what its copy is rounded to, somebody has written it, and
            it takes the copy's place. None entries are created for parameters of 16 bits, and put into the list.

    Returns:
        None, or with `stats` a float64 tensor (slots, 5) on their device: `SUMS` of every slot, parameter after
        parameter; NaN for a skipped one. With pairs (slots, 9): `PAIR_SUMS` too, after unscaling. Nothing is
        synchronised.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes on a device that the binary has kernels for; dtypes or
            devices differ.
        ValueError: lengths or shapes differ, a tensor overlaps itself or part of another in memory, `lr_multipliers` or
            `clip_coef` are something else, a scale is 0. Nothing is written.
        RuntimeError: the device refuses the kernel.

    Reference: the update of `torch.optim.SGD`; sums as in Li and Arora, arXiv 1910.07454, section 2; pairs as in Li,
    Malladi and Arora, arXiv 2102.12470, section 4.

    >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    >>> sgd_([w], [g], lr=0.1, weight_decay=0.5, stats="tensor")
    tensor([[25.0000,  5.0000, 11.0000,  0.2225, -2.3500]], dtype=torch.float64)
    >>> w
    tensor([2.7500, 3.6000])
    """
    if is_traced():
        from .library import traced_sgd_

        return traced_sgd_(
            params, grads, momentum_buffers, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize, grad_scale=grad_scale, stats=stats, held=held, l=l,
            held_scale=held_scale, gauge=gauge, found_inf=found_inf, clip_coef=clip_coef, lr_multipliers=lr_multipliers,
            stored=(state_dtype, rounding, masters),
        )  # fmt: skip
    params, grads = list(params), list(grads)
    buffers: list[Tensor | None] | None = None
    first: list[int] = []
    if (momentum != 0 if gauge is None else gauge.has_buffer) and momentum_buffers is not None:
        buffers = list(momentum_buffers)
        for i, (p, g, v) in enumerate(zip(params, grads, buffers, strict=False)):
            if v is None and g is not None and isinstance(p, Tensor):
                new = torch.empty_like if found_inf is None else torch.zeros_like
                buffers[i] = new(p, dtype=state_dtype or p.dtype, requires_grad=False)
                first.append(i)
    copies: list[Tensor | None] | None = None
    if masters is not None:
        copies = list(masters)
        for i, (p, g, m) in enumerate(zip(params, grads, copies, strict=False)):
            if m is None and g is not None and isinstance(p, Tensor) and p.dtype in (torch.bfloat16, torch.float16):
                copies[i] = p.detach().float()
    firsts = None if held is None else list(held)
    check_l(l, "sgd_")
    if firsts is not None and stats is None:
        stats = "tensor"
    step = Pass()
    step.begin()
    code = stats_code(stats, "sgd_")
    on_device: OnDevice | None = None
    given: Any = (lr, weight_decay, grad_scale)
    if found_inf is not None or any(isinstance(x, Tensor) for x in given):
        scale_there = if_on_device(grad_scale) if held is None else None
        on_device = (if_on_device(lr), if_on_device(weight_decay), scale_there, found_inf)
        given = tuple(
            _as_float("sgd_", name, x) if there is None else 1.0
            for name, x, there in zip(("lr", "weight_decay", "grad_scale"), given, on_device[:3], strict=True)
        )
    eta, decay, scale = given
    of_first, of_second = _inverses("sgd_", scale, None if firsts is None else held_scale)
    multipliers = None if lr_multipliers is None else read_lr_multipliers(lr_multipliers, len(params), "sgd_")
    refused = step.add(
        params, grads, buffers, first, eta, momentum, dampening, decay, nesterov, maximize, of_first, code, -1, None,
        firsts, of_second, l, gauge, on_device, multipliers, None,
        precision(None, rounding, 0 if rounding is None else rounding.first), copies,
    )  # fmt: skip
    if refused:
        lists = {"params": params, "grads": grads, "momentum_buffers": buffers, "held": firsts}
        if copies is not None:
            _check_masters(refused[0], params, copies)
        raise TypeError(why_refused("sgd_", refused[0], lists))
    if clip_coef is not None:
        step.clip([clip_coef])
    table = _run(step, measured=stats is not None, may_skip=found_inf is not None)
    if momentum_buffers is not None and buffers is not None:
        for i in first:
            momentum_buffers[i] = buffers[i]
    if masters is not None and copies is not None:
        masters[:] = copies
    return table


def read_lr_multipliers(given: object, count: int, where: str) -> LrMultipliers:
    """What `sgd_` and param groups take as `lr_multipliers`; `where` begins the sentence for what is none.

    Raises:
        ValueError: it is no sequence or vector of `count` finite numbers of at least 0.
    """
    if isinstance(given, Tensor) and device_index(given) not in (None, -1):
        given = given.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return LrMultipliers(given, count, where)


def grad_sq_norms(
    grads: Sequence[Tensor | None],
    *,
    grad_scale: float = 1.0,
    held: Sequence[Tensor | None] | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
) -> Tensor:
    r""":math:`|g|^2` of every gradient in double precision, the first pass of a step that clips.

    Args:
        grads: tensors of float64, float32, bfloat16 or float16 on one device, any shapes and strides; None counts as
            zero. Read only.
        grad_scale, held, l, held_scale: as in `sgd_`; of a pair the norm is that of the combination.

    Returns:
        (len(grads),) float64 on their device, the same bits for any number of threads. Nothing is synchronised.

    Raises:
        TypeError: an entry is none of these, dtypes of a pair or devices differ. ValueError: lengths or shapes differ,
            a scale is 0.

    >>> grad_sq_norms([torch.tensor([3.0, 4.0]), None])
    tensor([25.,  0.], dtype=torch.float64)
    """
    given, firsts = list(grads), None if held is None else list(held)
    if is_traced():
        return _torch_op("grad_sq_norms", given, grad_scale=grad_scale, held=firsts, l=l, held_scale=held_scale)
    check_l(l, "grad_sq_norms")
    step = Pass()
    step.begin()
    of_first, of_second = _inverses("grad_sq_norms", grad_scale, None if firsts is None else held_scale)
    refused = step.add_gradients(given, firsts, of_first, of_second, l)
    if refused:
        raise TypeError(why_refused("grad_sq_norms", refused[0], {"grads": given, "held": firsts}))
    tables = sq_norm_tables(step)
    if len(tables) > 1:
        raise TypeError(f"grad_sq_norms: grads are on {len(tables)} devices; expected one")
    return tables[0] if tables else torch.zeros(len(given), dtype=torch.float64, device="cpu")


def sq_norm_tables(step: Pass) -> list[Tensor]:
    """|g|^2 of the parameters of a pass, (parameters,) float64 on each device, with 0 for those elsewhere."""
    tables = []
    for like in step.places:
        tables.append(torch.zeros(step.parameters, dtype=torch.float64, device=like.device))
        step.sq_norms(tables[-1], _scratch_beside(like))
    return tables


def clip_coef(sq_norms: Tensor, max_norm: float, *, found_inf: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The global norm, and what clipping by it multiplies every gradient with.

    .. math::
        n = \sqrt{\sum_i s_i}, \qquad c = \min\Bigl(1, \frac{\mathrm{max\_norm}}{n + 10^{-6}}\Bigr)

    NaN stays NaN, and an infinite norm makes 0.

    Args:
        sq_norms: (parameters,) float64, contiguous: squares of the norms of all of them, as `grad_sq_norms` returns.
        max_norm: a number of at least 0.
        found_inf: of a GradScaler, a CUDA tensor of one float32 number: if it is not 0 the norm is NaN.

    Returns:
        n and c, float64 of no dimension on their device. Nothing is synchronised.

    Raises:
        TypeError: `max_norm` is no number, `sq_norms` no tensor that a kernel takes. ValueError: `max_norm` is
            negative; a tensor is something else.

    Reference: `torch.nn.utils.clip_grad_norm_` with norm_type=2 and error_if_nonfinite=False.

    >>> clip_coef(torch.tensor([9.0, 16.0], dtype=torch.float64), 2.5)
    (tensor(5., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    if is_traced():
        return _torch_op("clip_coef", sq_norms, max_norm, found_inf=found_inf)
    limit = check_max_norm(max_norm, "clip_coef")
    if not kernel_takes(sq_norms):
        raise TypeError(not_taken("clip_coef", "sq_norms", sq_norms))
    norm, coef = (torch.empty((), dtype=torch.float64, device=sq_norms.device) for _ in range(2))
    _C.clip_coef(sq_norms, limit, norm, coef, found_inf)
    return norm, coef


def check_max_norm(max_norm: Any, where: str) -> float:
    """A number of at least 0, infinity being one. A tensor of one number is read, which synchronises."""
    try:
        limit = None if isinstance(max_norm, (bool, str)) else float(max_norm)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        limit = None
    if limit is None:
        raise TypeError(f"{where}: max_norm expected a number of at least 0, got {max_norm!r}")
    if not limit >= 0:
        raise ValueError(f"{where}: max_norm expected a number of at least 0, got {max_norm!r}")
    return limit


def _check_masters(i: int, params: list[Any], masters: list[Any]) -> None:
    """Whether it is a master copy that no kernel takes."""
    p, m = params[i], masters[i]
    if m is None or not isinstance(p, Tensor) or not kernel_takes(p):
        return
    if p.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"sgd_: masters[{i}] expected None beside params[{i}], {describe(p)}, got {describe(m)}")
    if not kernel_takes(m) or m.dtype != torch.float32 or m.device != p.device:
        raise TypeError(f"sgd_: masters[{i}] expected float32 beside params[{i}], {describe(p)}, got {describe(m)}")


class Buffers(IntEnum):
    """What a param group has of momentum buffers when a step begins."""

    NONE = 0  #: none, and momentum is 0
    FIRST = 1  #: none yet: the step makes them
    KEPT = 2
    RESTING = 3  #: those of earlier steps, but momentum is 0


#: (scale, z, exponent): how weights without decay stand for those of the run with it. See `gauge_step`.
Gauge: TypeAlias = tuple[float, float, int]
NEW_GAUGE: Gauge = (1.0, 0.0, 0)


def gauge_step(
    gauge: Gauge,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
    buffers: Buffers = Buffers.KEPT,
    leave: bool = False,
) -> GaugeStep | None:
    r"""One step of the gauge: how a step without weight decay follows one with it, on scale-invariant weights.

    What is stored, :math:`(w_s, b_s)`, stands for weights w and momentum buffer b of the run with weight decay:

    .. math::
        w = f w_s, \quad b = b_s/f + z w, \quad f = a\,2^e \in [2^{-1/2}, 2^{1/2})

    and the gradient at :math:`w_s` is f times that at w. a, all the decay so far, and z follow the optimizer's own
    recurrence on one number with zero gradient, for any schedule of everything:

    .. math::
        z' = \frac{\mu z + (1-\tau)\lambda}{q}, \quad q = \frac{a'}{a} = 1 - \eta(\mu z + (1-\tau)\lambda), \quad
        w_s' = 2^{-k}\Bigl(w_s - \frac{\eta}{f^2 q} b_s'\Bigr)

    with :math:`e' = e + k` such that f' stays in its range. Nesterov has its own:
    :math:`q = 1 - \eta(\lambda + \mu q z')`, and :math:`\mu(1-\eta\lambda)` for its buffer.

    Args:
        gauge: (f, z, e); `NEW_GAUGE` where nothing has decayed yet.
        lr, momentum, dampening, weight_decay, nesterov: of the run with weight decay, at this step.
        buffers: what there is of momentum buffers.
        leave: the step that returns to coupled weight decay, after which :math:`w_s = w, b_s = b`.

    Returns:
        What `sgd_` takes as `gauge`; its ``next`` is the gauge of the next step. None if lr * weight_decay is more than
        `most_decay(momentum)` = :math:`(1-\sqrt\mu)^2`, where a would change its sign, or no number.

    Reference: Li and Arora, arXiv 1910.07454, for constant hyperparameters; for any schedule, and nesterov, ours.

    >>> step = gauge_step(NEW_GAUGE, 0.5, 0.0, 0.0, 0.8, buffers=Buffers.NONE)  # w' = w - 0.5 (g + 0.8 w)
    >>> step.keep, step.grad_to_weight  # ws' = (w - g 0.5/0.6) / 2, which stands for 1.2 ws'
    (0.5, 0.4166666666666667)
    >>> step.next
    (1.2, 0.0, 1)
    """
    return _C.gauge_step(gauge, lr, momentum, dampening, weight_decay, nesterov, buffers, leave)


def svag_combine_(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], l: float) -> None:
    r"""SVAG's combination of two gradients, in one pass: :math:`a' = \tfrac12 (a+b) + \tfrac12 \sqrt{2l-1}\,(a-b)`.

    Args:
        grads_a: tensors of float64, float32, bfloat16 or float16 on one device, any shapes and strides; updated in
            place.
        grads_b: same shapes and dtypes; read only. An entry may be None if its partner is.
        l: at least 1/2; 1 leaves `grads_a` as they are, to the bit.

    Raises:
        TypeError: an entry is not a plain tensor of these dtypes, dtypes or devices differ, or only one of two is None.
        ValueError: lengths or shapes differ, l < 1/2, memory overlaps. Nothing is written.

    Reference: Li, Malladi and Arora, arXiv 2102.12470, section 4. Nothing is synchronised.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    >>> svag_combine_([a], [b], l=5)
    >>> a
    tensor([-1.,  2.])
    """
    if is_traced():
        return _traced_svag_combine_(list(grads_a), list(grads_b), l)
    check_l(l, "svag_combine_")
    a, b = _both("svag_combine_", grads_a, grads_b)
    step = Pass()
    step.begin()
    refused = step.add_svag_combine(a, b, l)
    if refused:
        raise TypeError(why_refused("svag_combine_", refused[0], {"grads_a": a, "grads_b": b}))
    _run(step, measured=False)


def _traced_svag_combine_(a: list[Any], b: list[Any], l: float) -> None:
    """`torch.ops.normkern.svag_combine_`, which takes no None."""
    check_pairs("svag_combine_", a, b)
    there = [i for i, x in enumerate(a) if x is not None]
    _torch_op("svag_combine_", [a[i] for i in there], [b[i] for i in there], l)


def pair_sums(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], stats: Stats = "tensor") -> Tensor:
    r"""What two gradients have in common, in one pass: `PAIR_SUMS` of every slot.

    Args:
        grads_a, grads_b: tensors of float64, float32, bfloat16 or float16 on one device, pairs of equal shape and
            dtype. An entry may be None if its partner is: NaN.
        stats: "tensor" or "row".

    Returns:
        (slots, 4) float64 on their device: :math:`\langle a,b\rangle, |a-b|^2, |a|^2, |b|^2`. Nothing is synchronised.

    Raises:
        TypeError, ValueError: as `svag_combine_`.

    >>> pair_sums([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])])
    tensor([[ 7.,  4.,  5., 13.]], dtype=torch.float64)
    """
    if is_traced():
        return _torch_op("pair_sums", list(grads_a), list(grads_b), stats)
    a, b = _both("pair_sums", grads_a, grads_b)
    step = Pass()
    step.begin()
    refused = step.add_difference(a, b, stats_code(stats, "pair_sums"))
    if refused:
        raise TypeError(why_refused("pair_sums", refused[0], {"grads_a": a, "grads_b": b}))
    table = _run(step, measured=True)
    assert table is not None
    return torch.cat([table[:, 2:4], table[:, :2]], dim=1)


def welford_(
    means: Sequence[Tensor], samples: Sequence[Tensor | None], squares: Sequence[Tensor], *, n: int, stats: Stats = None
) -> Tensor | None:
    r"""Welford's update of running means and sums of squared deviations by the n-th sample, in one pass.

    .. math::
        m' = m + (x - m)/n, \quad s' = s + (x - m)(x - m')

    Args:
        means, squares: tensors of float64, float32, bfloat16 or float16 on one device; updated in place. Zeros before
            n = 1.
        samples: same shapes and dtypes; read only; None skips the entry.
        n: of this sample, from 1.
        stats: None, "tensor" or "row".

    Returns:
        None, or with `stats` float64 (slots, 5) on their device: `SUMS` with m for the weights and x for the gradient.

    Raises:
        TypeError, ValueError: as `sgd_`.

    Reference: Welford 1962, Technometrics 4(3).

    >>> m, s = torch.zeros(2), torch.zeros(2)
    >>> for n, x in enumerate([[1.0, 5.0], [3.0, 5.0]], start=1):
    ...     welford_([m], [torch.tensor(x)], [s], n=n)
    >>> m, s
    (tensor([2., 5.]), tensor([2., 0.]))
    """
    if is_traced():
        table = _torch_op("welford_", list(means), list(samples), list(squares), n=n, stats=stats)
        return None if stats is None else table
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"welford_: n expected a whole number from 1, got {n!r}")
    m, x, s = list(means), list(samples), list(squares)
    step = Pass()
    step.begin()
    refused = step.add_welford(m, x, s, 1 / n, stats_code(stats, "welford_"))
    if refused:
        raise TypeError(why_refused("welford_", refused[0], {"means": m, "samples": x, "squares": s}))
    return _run(step, measured=stats is not None)


def outer_moments(a: Tensor, g: Tensor, *, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    r"""A linear layer's weight gradient and its spread over the samples, without any sample's gradient in memory.

    .. math::
        c_b = g_b^\top a_b, \quad t = \sum_b c_b, \quad s = \sum_b (c_b - t/B)^2, \quad n_b = |c_b|^2

    Args:
        a: (B, T, I), what went into the layer; float64, float32, bfloat16 or float16, any strides (a copy is made if
            the last dimension is not dense).
        g: (B, T, O) of the same dtype on the same device, the gradient of what came out.
        squares: whether s is wanted.

    Returns:
        t and s (or None), (O, I) in float64 for float64 and else float32; n, (B,) float64; on a's device. Formed in
        that type, an element of a sample as one chain of multiply-adds; s by Youngs and Cramer's update, and where it
        is below the smallest normal float32 it is lost; n is right wherever float64 can hold it. The same to the bit on
        all levels with FMA hardware, for any number of threads; the same on all GPUs, where t and s have the CPU's bits
        unless the output is so small that the samples are summed in parts. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes a tensor; dtypes or devices differ.
        ValueError: shapes do not fit.

    Reference: Youngs and Cramer 1971, Technometrics 13(3).

    >>> a, g = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[[1.0]], [[2.0]]])
    >>> outer_moments(a, g, squares=True)  # contributions [[1, 2]] and [[6, 8]]
    (tensor([[ 7., 10.]]), tensor([[12.5000, 18.0000]]), tensor([  5., 100.], dtype=torch.float64))
    """
    if is_traced():
        return _torch_op("outer_moments", a, g, squares=squares)
    shape = _C.outer_shape(a, g)
    total, centred, sq_norms = new_sample_sums(shape, a, squares)
    _C.outer_moments(_dense_last(a), _dense_last(g), total, centred, sq_norms, _scratch_beside(a))
    return total, centred, sq_norms


def conv_moments(
    x: Tensor,
    g: Tensor,
    kernel_size: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    squares: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    r"""A convolution's weight gradient and its spread over the samples, without any sample's gradient in memory.

    .. math::
        c_b[o, i, k] = \sum_h g_b[o, h]\, x_b[i, h \cdot \mathrm{stride} + k \cdot \mathrm{dilation} -
        \mathrm{padding}]

    with i counted within the group of o, and of :math:`c_b` what `outer_moments` returns.

    Args:
        x: (B, C, *space), what went into the layer, one to three space dimensions; float64, float32, bfloat16 or
            float16, any strides (a copy is made if the last dimension is not dense).
        g: (B, O, *out) of the same dtype on the same device, the gradient of what came out. A transposed convolution is
            the same call with x and g swapped.
        kernel_size, stride, dilation: a number for each space dimension.
        padding: what was added on the left of each; zero is read outside x. The right follows from the size of g.
        groups: divides C and O.

    Returns:
        Total and centred (or None), (O, C/groups, *kernel_size), and sq_norms (B,), as `outer_moments` has them.

    Raises:
        TypeError: no kernel takes a tensor; dtypes or devices differ.
        ValueError: shapes do not fit, or numbers of space dimensions.

    >>> x, g = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0]]])
    >>> conv_moments(x, g, (2,), stride=(1,), padding=(0,), dilation=(1,), groups=1, squares=False)
    (tensor([[[21., 32.]]]), None, tensor([1465.], dtype=torch.float64))
    """
    if is_traced():
        of_space: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return _torch_op("conv_moments", x, g, kernel_size, **of_space, squares=squares)
    numbers = _C.ConvNumbers(kernel_size, stride, padding, dilation, groups)
    total, centred, sq_norms = new_sample_sums(_C.conv_shape(x, g, numbers), x, squares)
    _C.conv_moments(_dense_last(x), _dense_last(g), numbers, total, centred, sq_norms, _scratch_beside(x))
    return total, centred, sq_norms


def new_sample_sums(shape: Sequence[int], of: Tensor, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Unwritten results of the kernels that own dW."""
    real = torch.float64 if of.dtype == torch.float64 else torch.float32
    total = torch.empty(shape, dtype=real, device=of.device)
    sq_norms = torch.empty(of.shape[0], dtype=torch.float64, device=of.device)
    return total, torch.empty_like(total) if squares else None, sq_norms


def _dense_last(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.detach().contiguous()


@overload
def moments(
    x: Tensor, *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]: ...
@overload
def moments(
    x: Sequence[Tensor], *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor] | None, Tensor]: ...
def moments(
    x: Tensor | Sequence[Tensor], *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[Any, Any, Tensor]:
    r"""Means and squared deviations down the first dimension, and the norms of the samples, in one pass over memory.

    .. math::
        m = \frac1B \sum_b x_b, \qquad c = \sum_b (x_b - m)^2, \qquad n_b = |x_b|^2

    elementwise but for the norms. Deviations are from a shift near the mean and in float32 (float64 for float64) for
    128 rows at a time, and joined in float64: a large mean drowns nothing but what its own rounding has.

    Args:
        x: (B, P) of float64, float32, bfloat16 or float16, any strides; or several of (B, \*shape), of one dtype and
            device, as one problem. Read only.
        squares: without, c is None.
        factor: what c is multiplied with before it is rounded; 1/(B-1) makes it the variance.
        totals: float64 (2,) on x's device, contiguous; becomes :math:`|m|^2` and the sum of all c, before `factor`
            and rounding (NaN without `squares`).

    Returns:
        m, c and (B,) float64 norms on x's device; m and c of shape (P,), or lists of \*shape; float64 for float64, else
        float32. NaN and infinities flow through. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes them; more than one dtype or device; `totals` is of another dtype or device.
            ValueError: no tensors or no samples; tensors that differ in B; `totals` is of another shape or layout.

    Reference: groups of rows are joined as in Chan, Golub and LeVeque 1983, Am. Stat. 37(3).

    >>> moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    (tensor([2., 5.]), tensor([2., 0.]), tensor([26., 34.], dtype=torch.float64))
    """
    if is_traced():
        return _traced_moments(x, squares, factor, totals)
    tensors: list[Any] = list(x) if isinstance(x, (list, tuple)) else [x]
    names = [f"x[{i}]" for i in range(len(tensors))] if isinstance(x, (list, tuple)) else ["x"]
    means, centred, row_sq = new_moments(tensors, names, squares)
    like = tensors[0]
    if totals is None:
        totals = _new_totals(like)
    elif not kernel_takes(totals) or totals.dtype != torch.float64 or totals.device != like.device:
        raise TypeError(f"moments: totals is {describe(totals)}; expected a torch.Tensor of float64 on {like.device}")
    elif totals.shape != (2,) or not totals.is_contiguous():
        raise ValueError(
            f"moments: totals has shape {tuple(totals.shape)} and strides {totals.stride()}; expected (2,), contiguous"
        )
    _C.moments(tensors, means, centred, factor, row_sq, totals, _scratch_beside(like))
    if isinstance(x, (list, tuple)):
        return means, centred, row_sq
    return means[0], None if centred is None else centred[0], row_sq


def new_moments(
    tensors: list[Any], names: list[str], squares: bool, takes: Takes | None = None
) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
    """Unwritten results of `moments`, of checked arguments."""
    takes = takes or kernel_takes
    rows = check_samples("moments", tensors, names)
    for name, entry in zip(names, tensors, strict=True):
        if not takes(entry):
            raise TypeError(not_taken("moments", name, entry))
    real = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    with torch.no_grad():
        means = [torch.empty_like(entry[0], dtype=real) for entry in tensors]
        centred = [torch.empty_like(mean) for mean in means] if squares else None
    return means, centred, torch.empty(rows, dtype=torch.float64, device=tensors[0].device)


def _traced_moments(x: Any, squares: bool, factor: float, totals: Tensor | None) -> tuple[Any, Any, Tensor]:
    """`torch.ops.normkern.moments`, which returns the totals."""
    overload = "moments.list" if isinstance(x, (list, tuple)) else "moments"
    means, centred, row_sq, new_totals = _torch_op(overload, x, squares=squares, factor=factor)
    if totals is not None:
        totals.copy_(new_totals)
    return means, centred, row_sq


def row_sq_norms(x: Tensor) -> Tensor:
    """|x_b|^2 of every row of a matrix, summed in double precision.

    Args:
        x: (B, P) of float64, float32, bfloat16 or float16, its rows of any stride. Read only. Where a row's numbers do
            not lie side by side, a copy is read.

    Returns:
        (B,) float64 on x's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes it. ValueError: it is no matrix.

    >>> row_sq_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([25.,  4.], dtype=torch.float64)
    """
    if is_traced():
        return _torch_op("row_sq_norms", x)
    return _row_sums("row_sq_norms", x, squares=True)


def row_sums(x: Tensor) -> Tensor:
    """The sum of every row of a matrix in double precision, without the float64 copy of ``x.sum(1, dtype=)``.

    Args:
        x: (B, P), as `row_sq_norms` takes it. Read only.

    Returns:
        (B,) float64 on x's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes it. ValueError: it is no matrix.

    >>> row_sums(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    tensor([ 7., -2.], dtype=torch.float64)
    """
    if is_traced():
        return _torch_op("row_sums", x)
    return _row_sums("row_sums", x, squares=False)


def new_row_sums(op: str, x: Tensor, takes: Takes | None = None) -> Tensor:
    """Unwritten result of `row_sums` and `row_sq_norms`, of a checked argument."""
    takes = takes or kernel_takes
    if not takes(x):
        raise TypeError(not_taken(op, "x", x))
    if x.ndim != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (B, P)")
    return torch.empty(x.shape[0], dtype=torch.float64, device=x.device)


def _row_sums(op: str, x: Tensor, *, squares: bool) -> Tensor:
    out = new_row_sums(op, x)
    _C.row_sums(_side_by_side(x), squares, out, _scratch_beside(x))
    return out


def recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> bool:
    r"""Raw second moments become central ones, in place: :math:`\sum_b c_b^2 - (\sum_b c_b)^2 / B`, at least 0.

    Args:
        raw, total: :math:`\sum_b c_b^2` and :math:`\sum_b c_b`, dense tensors of one shape and layout, both float64 or
            both float32. raw is written. On a CUDA device torch does it in several passes, and waits for the answer.
        count: B.
        least: a share of raw.

    Returns:
        Whether everywhere at least this share was left; where it is not, the subtraction cost digits.

    Raises:
        TypeError: no kernel takes them. ValueError: shapes or layouts do not fit, or count is not positive.

    >>> raw = torch.tensor([5.0, 8.0])
    >>> recentre_(raw, torch.tensor([3.0, 4.0]), 2, 0.01), raw
    (False, tensor([0.5000, 0.0000]))
    """
    if is_traced():
        return bool(_torch_op("recentre_", raw, total, count, least))
    check_recentre(raw, total, count)
    if device_index(raw) != -1:
        from . import reference

        return reference.recentre_(raw, total, count, least)
    return _C.recentre(raw, total, 1 / count, least)


def check_recentre(raw: Tensor, total: Tensor, count: int, takes: Takes | None = None) -> None:
    """Arguments of `recentre_`."""
    takes = takes or kernel_takes
    for name, entry in {"raw": raw, "total": total}.items():
        if not takes(entry) or entry.dtype not in (torch.float64, torch.float32):
            raise TypeError(
                f"recentre_: {name} is {describe(entry)}; expected a torch.Tensor of float64 or float32 on "
                f"{_where_kernels_run(entry)}"
            )
    if raw.dtype != total.dtype or raw.device != total.device:
        what = "dtype" if raw.dtype != total.dtype else "device"
        raise TypeError(f"recentre_: raw is {describe(raw)} but total is {describe(total)}; expected one {what}")
    if raw.shape != total.shape or raw.stride() != total.stride() or not _is_dense(raw):
        raise ValueError(
            f"recentre_: raw has shape {tuple(raw.shape)} and strides {raw.stride()}, total {tuple(total.shape)} and "
            f"{total.stride()}; expected one dense layout"
        )
    if count < 1:
        raise ValueError(f"recentre_: count expected at least 1, got {count}")


def _is_dense(x: Tensor) -> bool:
    """Its numbers fill one stretch of memory, in any order of dimensions."""
    return x.is_contiguous() or x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _new_totals(like: Tensor) -> Tensor:
    """Unwritten `totals` for `moments`."""
    return torch.empty(2, dtype=torch.float64, device=like.device)


def norm_sums(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    channels: Literal["last", "first"],
) -> tuple[Tensor, Tensor]:
    r"""What each sample adds to the gradients of a normalisation layer's weight and bias, in one pass over g and x.

    .. math::
        w_{bd} = \sum_t g_{btd}\,(x_{btd} - m_{bt})\, r_{bt}, \qquad \beta_{bd} = \sum_t g_{btd}
        \qquad \text{(last)}

    .. math::
        w_{bc} = \sum_l g_{bcl}\,(x_{bcl} - m_{bc})\, r_{bc}, \qquad \beta_{bc} = \sum_l g_{bcl}
        \qquad \text{(first)}

    Args:
        g, x: the output's gradient and the input, (B, T, D) or (B, C, L), of one dtype: float64, float32, bfloat16 or
            float16, and on one device. Where the last dimension does not lie side by side, a copy is read.
        mean, rstd: (B, T) or (B, C), float64 for float64, else float32. Without mean (RMSNorm) it is 0.
        channels: "last" (LayerNorm, RMSNorm) or "first" (GroupNorm, InstanceNorm, BatchNorm).

    Returns:
        w and beta, (B, D) or (B, C), float64 for float64, else float32, on g's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes them, or not all on one device. ValueError: shapes do not fit, or `channels` is
            neither.

    >>> g, x = torch.ones(1, 2, 2), torch.tensor([[[1.0, 2.0], [5.0, 3.0]]])
    >>> norm_sums(g, x, torch.ones(1, 2), torch.full((1, 2), 0.5), channels="last")
    (tensor([[2.0000, 1.5000]]), tensor([[2., 2.]]))
    """
    if is_traced():
        return _torch_op("norm_sums", g, x, mean, rstd, channels=channels)
    of_weight, of_bias = new_norm_sums(g, x, mean, rstd, channels)
    _C.norm_sums(
        _side_by_side(g), _side_by_side(x), None if mean is None else _dense(mean), _dense(rstd), channels == "first",
        of_weight, of_bias,
    )  # fmt: skip
    return of_weight, of_bias


def new_norm_sums(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, channels: str, takes: Takes | None = None
) -> tuple[Tensor, Tensor]:
    """Unwritten results of `norm_sums`, of checked arguments."""
    takes = takes or kernel_takes
    if channels not in ("last", "first"):
        raise ValueError(f'norm_sums: channels expected "last" or "first", got {channels!r}')
    of_rows = {"rstd": rstd} if mean is None else {"mean": mean, "rstd": rstd}
    for name, entry in {"g": g, "x": x, **of_rows}.items():
        if not takes(entry):
            raise TypeError(not_taken("norm_sums", name, entry))
    real = torch.float64 if g.dtype == torch.float64 else torch.float32
    if g.ndim != 3:
        raise ValueError(f"norm_sums: g has shape {tuple(g.shape)}; expected three dimensions")
    fits = {"x": (x, g.dtype, g.shape)} | {name: (entry, real, g.shape[:2]) for name, entry in of_rows.items()}
    for name, (entry, dtype, shape) in fits.items():
        if entry.dtype != dtype:
            raise TypeError(f"norm_sums: {name} is {describe(entry)} but g is {describe(g)}; expected {dtype}")
        if entry.device != g.device:
            raise TypeError(f"norm_sums: {name} is {describe(entry)} but g is {describe(g)}; expected one device")
        if entry.shape != shape:
            raise ValueError(
                f"norm_sums: {name} has shape {tuple(entry.shape)} but g {tuple(g.shape)}; expected {tuple(shape)}"
            )
    size = (g.shape[0], g.shape[1 if channels == "first" else 2])
    return g.new_empty(size, dtype=real), g.new_empty(size, dtype=real)


def embedding_moments(
    ids: Tensor, g: Tensor, num_embeddings: int, *, padding_idx: int | None = None, squares: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    r"""What the samples add to the gradient of an embedding's table: sum, squared deviations, norms; by sorting.

    .. math::
        c_b[v] = \sum_{t:\,ids_{bt} = v} g_{bt}, \quad s = \sum_b c_b, \quad
        q = \sum_b (c_b - s/B)^2, \quad n_b = |c_b|^2

    Nothing of the size of B tables is made: for each row v the samples that have it are added by Youngs and Cramer's
    update, and the others as zeros. In float64, rounded once.

    Args:
        ids: (B, T) int64 or int32 on g's device, from 0 to num_embeddings - 1.
        g: (B, T, D), the gradient of what the table gave, of float64, float32, bfloat16 or float16. Where the last
            dimension does not lie side by side, a copy is read.
        num_embeddings: V, rows of the table.
        padding_idx: an id that adds nothing, from -V to V - 1, or None.
        squares: without, q is None.

    Returns:
        s and q (V, D), float64 for float64, else float32, and n (B,) float64, on g's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes g; ids are no whole numbers on its device. ValueError: shapes do not fit;
            `padding_idx` is none of the table's, or, on the CPU and before anything is written, an id is none. Nobody
            waits for a device to look: there such an id is in no row, and leaves NaN in n of its sample.

    Reference: Youngs and Cramer 1971, Technometrics 13(3); zeros are joined as in Chan, Golub and LeVeque 1983.

    >>> embedding_moments(torch.tensor([[0, 0], [2, 0]]), torch.ones(2, 2, 1), 3, squares=True)
    (tensor([[3.], [0.], [1.]]), tensor([[0.5000], [0.0000], [0.5000]]), tensor([4., 2.], dtype=torch.float64))
    """
    if is_traced():
        more: Any = {"padding_idx": padding_idx, "squares": squares}
        return _torch_op("embedding_moments", ids, g, num_embeddings, **more)
    total, centred, row_sq = new_embedding_moments(ids, g, num_embeddings, padding_idx, squares)
    ids = ids.to(torch.int64).contiguous()
    on_cpu = device_index(g) == -1
    order, begin = (None, None) if on_cpu else _by_id(ids.flatten(), num_embeddings)
    padding = -1 if padding_idx is None else padding_idx % num_embeddings
    _C.embedding_moments(
        ids, order, begin, _side_by_side(g), padding, total, centred, row_sq, _scratch_beside(g)
    )  # fmt: skip
    return total, centred, row_sq


def new_embedding_moments(
    ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None, squares: bool, takes: Takes | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Unwritten results of `embedding_moments`, of checked arguments: zeros on the CPU, which adds to them."""
    takes = takes or kernel_takes
    op = "embedding_moments"
    if isinstance(num_embeddings, bool) or not isinstance(num_embeddings, int) or num_embeddings < 1:
        raise ValueError(f"{op}: num_embeddings expected a whole number from 1, got {num_embeddings!r}")
    if not takes(g):
        raise TypeError(not_taken(op, "g", g))
    plain = (
        (type(ids) is Tensor or takes is not kernel_takes) and ids.device == g.device and ids.layout == torch.strided
    )
    if not plain or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids is {describe(ids)}; expected a torch.Tensor of int64 or int32 on {g.device}")
    if ids.ndim != 2 or g.ndim != 3 or g.shape[:2] != ids.shape:
        raise ValueError(
            f"{op}: ids has shape {tuple(ids.shape)} and g {tuple(g.shape)}; expected (B, T) and (B, T, D)"
        )
    if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"{op}: padding_idx expected None or {-num_embeddings} to {num_embeddings - 1}, got {padding_idx!r}"
        )
    real = torch.float64 if g.dtype == torch.float64 else torch.float32
    on_cpu = g.device.type == "cpu" if takes is would_take else device_index(g) == -1
    total = (g.new_zeros if on_cpu else g.new_empty)((num_embeddings, g.shape[2]), dtype=real)
    centred = (torch.zeros_like if on_cpu else torch.empty_like)(total) if squares else None
    return total, centred, g.new_empty(g.shape[0], dtype=torch.float64)


def _by_id(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Positions sorted by their id, in their order within one, and where each id's begin: (rows + 1,)."""
    by_id, order = torch.sort(ids, stable=True)
    return order, torch.searchsorted(by_id, torch.arange(rows + 1, device=ids.device))


def _side_by_side(x: Tensor) -> Tensor:
    """`x`, or a copy in which the last dimension lies side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.detach().contiguous()


def _dense(x: Tensor) -> Tensor:
    return x.detach().contiguous()


def check_samples(op: str, tensors: Sequence[Tensor], names: Sequence[str]) -> int:
    """B, if `tensors` are of one dtype and device and have one, not zero."""
    if not tensors:
        raise ValueError(f"{op}: x is an empty list; expected at least one tensor")
    first, of_first = tensors[0], names[0]
    for name, entry in zip(names, tensors, strict=True):
        if not isinstance(entry, Tensor):
            raise TypeError(f"{op}: {name} is {describe(entry)}; expected a torch.Tensor (B, *shape)")
        if entry.ndim == 0 or entry.shape[0] == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(entry.shape)}; expected (B, *shape) with B > 0")
        if entry.dtype != first.dtype or entry.device != first.device:
            raise TypeError(
                f"{op}: {name} is {describe(entry)} but {of_first} is {describe(first)}; "
                "expected one dtype and one device"
            )
        if entry.shape[0] != first.shape[0]:
            raise ValueError(f"{op}: {name} has {entry.shape[0]} samples but {of_first} has {first.shape[0]}")
    return first.shape[0]


def check_l(l: object, where: str) -> float:
    """SVAG's l, a number of at least 1/2."""
    if isinstance(l, bool) or not isinstance(l, (int, float)) or not 0.5 <= l <= sys.float_info.max:
        raise ValueError(f"{where}: l expected a number of at least 1/2, got {l!r}")
    return float(l)


def _as_float(op: str, name: str, x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{op}: {name} expected one number, got {x!r}") from None


def _inverses(op: str, grad_scale: Any, held_scale: Any) -> tuple[float, float]:
    """What the first and the second gradients of pairs are multiplied with; without `held_scale` there is one."""

    def inverse(name: str, scale: Any) -> float:
        try:
            return 1 / float(scale)
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            raise ValueError(f"{op}: {name} expected a number that is not 0, got {scale!r}") from None

    of_grads = inverse("grad_scale", grad_scale)
    return (of_grads, 1.0) if held_scale is None else (inverse("held_scale", held_scale), of_grads)


def _run(step: Pass, measured: bool, may_skip: bool = False) -> Tensor | None:
    written = step.check(None)
    table = new_table(step.slots, step.columns, step.like) if measured else None
    if table is not None and may_skip:
        table.fill_(torch.nan)
    step.run(table, new_scratch(step) if measured else None)
    torch.autograd.graph.increment_version(written)
    return table


def check_pairs(op: str, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
    """Every entry has a partner of its shape and dtype."""
    if len(a) != len(b):
        raise ValueError(f"{op}: grads_b has {len(b)} entries but grads_a has {len(a)}")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        for name, entry in (("grads_a", x), ("grads_b", y)):
            if entry is not None and not isinstance(entry, Tensor):
                raise TypeError(f"{op}: {name}[{i}] is {describe(entry)}; expected a torch.Tensor or None")
        if (x is None) != (y is None):
            name = "grads_a" if x is None else "grads_b"
            raise TypeError(f"{op}: {name}[{i}] is None but its partner is not; expected both or neither")
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape:
                raise ValueError(f"{op}: grads_b[{i}] has shape {tuple(y.shape)} but grads_a[{i}] has {tuple(x.shape)}")
            if x.dtype != y.dtype:
                raise TypeError(
                    f"{op}: grads_b[{i}] is {describe(y)} but grads_a[{i}] is {describe(x)}; expected one dtype"
                )


def _both(op: str, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    a, b = list(a), list(b)
    check_pairs(op, a, b)
    return a, b


def why_refused(op: str, i: int, lists: dict[str, Any], takes: Takes | None = None) -> str:
    """The sentence for position `i`, which no kernel takes. The first list is the one that the others must match."""
    takes = takes or kernel_takes
    named = {name: x[i] for name, x in lists.items() if x is not None and x[i] is not None}
    for name, tensor in named.items():
        if not takes(tensor):
            return not_taken(op, f"{name}[{i}]", tensor)
    (first, model), *others = named.items()
    for name, tensor in others:
        if tensor.dtype != model.dtype or tensor.device != model.device:
            what = "dtype" if tensor.dtype != model.dtype else "device"
            return f"{op}: {name}[{i}] is {describe(tensor)} but {first}[{i}] is {describe(model)}; expected one {what}"
    return f"{op}: {first}[{i}] is {describe(model)} but others, or numbers of the call, are not; expected one device"


def not_taken(op: str, name: str, x: object) -> str:
    """The sentence for what no kernel takes."""
    if peek_interpreter_stack() is not None:
        return f"{op}: {name} is inside a torch.func transform, where no kernel sees it; torch.ops.normkern.{op} may"
    return (
        f"{op}: {name} is {describe(x)}; expected a torch.Tensor of float64, float32, bfloat16 or float16 on "
        f"{_where_kernels_run(x)}"
    )


def _where_kernels_run(tensor: Any) -> str:
    if cuda_architectures():
        return "cpu or cuda"
    if getattr(getattr(tensor, "device", None), "type", None) != "cuda":
        return "cpu"
    return "cpu: this binary was built without CUDA (NORMKERN_CUDA=ON pip install --no-binary normkern normkern)"
