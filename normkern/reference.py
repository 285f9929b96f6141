"""The functions of `ops`, with the same signatures, in eager torch: they define what is correct.

The reference of the tests (give it float64 tensors) and the "eager implementation" of the benchmarks. One statement per
line of the equations; never imported where speed matters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .ops.sphere import radii_of
from .ops.types import (
    LOW_PRECISION,
    NEW_GAUGE,
    PAIR_SUMS,
    SUMS,
    Buffers,
    Gauge,
    GaugeStep,
    Norm,
    Rounding,
    Stats,
)


@torch.no_grad()
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
    norm: Norm = None,
    radii: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    """`ops.sgd_`, one tensor and one operation at a time."""
    if found_inf is not None and found_inf.item() != 0:
        grads = [None] * len(grads)
    table, pairs = [], held is not None and any(h is not None for h in held)
    stats = stats or (None if held is None else "tensor")
    scale, z, _ = NEW_GAUGE if gauge is None else gauge.before
    new_scale, new_z, _ = NEW_GAUGE if gauge is None else gauge.next
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            if stats:
                table.append(_no_sums(p, stats, SUMS + PAIR_SUMS if pairs else SUMS))
            continue
        real = _real_dtype(p)
        w, g = p.to(real), grad.to(real) / (grad_scale if held is None else held_scale)
        master, w = _master_of(p, w, masters, i)
        first = None if held is None else held[i]
        g1 = None if first is None else first.to(real) / held_scale
        if g1 is not None:
            g2 = grad.to(real) / grad_scale
            g = svag_combination(g1, g2, l)
        if gauge is not None:  # up to the stores, the numbers are those of the run with weight decay
            w, g = scale * w, g / scale
        w_before = w.clone() if stats else w
        d = -g if maximize else g
        if clip_coef is not None:
            d = d * clip_coef
        if weight_decay != 0 and norm is None:
            d = d + weight_decay * w
        u, v_new = d, None
        stored = None if momentum_buffers is None else momentum_buffers[i]
        v = None if stored is None else stored.to(real)
        if v is not None and gauge is not None:
            v = v / scale + z * w
        if momentum != 0:
            v_new = d.clone() if v is None else momentum * v + (1 - dampening) * d
            u = d + momentum * v_new if nesterov else v_new
        elif gauge is not None:
            v_new = v  # rests, in other units
        eta = lr if lr_multipliers is None else lr * float(lr_multipliers[i])
        w_new = w - eta * u
        if v_new is not None and momentum_buffers is not None:
            if stored is None:
                stored = momentum_buffers[i] = torch.empty_like(p, dtype=state_dtype or p.dtype, requires_grad=False)
            stored.copy_(v_new if gauge is None else new_scale * (v_new - new_z * w_new))
        if norm is not None:
            if v_new is not None and stored is not None:  # the direction is that of the state as stored
                u = d + momentum * stored.to(real) if nesterov else stored.to(real)
            w_new = on_sphere(w, u, float(eta), norm, None if radii is None else radii[i])
        _store(p, w_new / new_scale, master, rounding, i)
        if stats:
            sums = [step_sums(w_before, g, new_scale * (p if master is None else master).to(real), stats)]
            if pairs:
                sums.append(
                    _no_sums(p, stats, PAIR_SUMS) if g1 is None else gradient_sums(g1 / scale, g2 / scale, stats)
                )
            table.append(torch.cat(sums, dim=1))
    return torch.cat(table) if stats else None


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: list[Tensor | None],
    exp_avg_sqs: list[Tensor | None],
    steps: list[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float | Tensor = 1.0,
    stats: Stats = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
    lr_multipliers: Sequence[float] | Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
    masters: list[Tensor | None] | None = None,
    norm: Norm = None,
    radii: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    """`ops.adamw_`, one tensor and one operation at a time."""
    if found_inf is not None and found_inf.item() != 0:
        grads = [None] * len(grads)
    table = []
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            if stats:
                table.append(_no_sums(p, stats, SUMS))
            continue
        real = _real_dtype(p)
        w, g = p.to(real), grad.to(real) / grad_scale
        master, w = _master_of(p, w, masters, i)
        w_before = w.clone() if stats else w
        d = -g if maximize else g
        if clip_coef is not None:
            d = d * clip_coef
        if weight_decay != 0 and not decoupled and norm is None:
            d = d + weight_decay * w
        eta = float(lr) * (1.0 if lr_multipliers is None else float(lr_multipliers[i]))
        m, v, t = exp_avgs[i], exp_avg_sqs[i], steps[i]
        if m is None:
            m = exp_avgs[i] = torch.zeros_like(p, dtype=state_dtype or p.dtype, requires_grad=False)
        if v is None:
            v = exp_avg_sqs[i] = torch.zeros_like(p, dtype=state_dtype or p.dtype, requires_grad=False)
        if t is None:
            t = steps[i] = torch.zeros((), dtype=torch.float32)
        t += 1
        m_new = beta1 * m.to(real) + (1 - beta1) * d
        v_new = beta2 * v.to(real) + (1 - beta2) * d * d
        unbiased = m_new / (1 - float(beta1) ** t.item())
        root = v_new.sqrt() / math.sqrt(1 - float(beta2) ** t.item())
        w_new = w - eta * unbiased / (root + eps)
        if weight_decay != 0 and decoupled:
            w_new = torch.where(w.isinf(), w_new, w_new - eta * float(weight_decay) * w)
        m.copy_(m_new)
        v.copy_(v_new)
        if norm is not None:
            root = v.to(real).sqrt() / math.sqrt(1 - float(beta2) ** t.item())
            u = torch.where(m == 0, 0, m.to(real) / (root + eps))
            w_new = on_sphere(w, u, eta, norm, None if radii is None else radii[i])
        _store(p, w_new, master, rounding, i)
        if stats:
            table.append(step_sums(w_before, g, (p if master is None else master).to(real), stats))
    return torch.cat(table) if stats else None


def norms(w: Tensor, norm: Norm) -> Tensor:
    """Return the norms that a step keeps, in float64: of no dimension, or (rows,)."""
    dims = None if norm == "keep" else tuple(range(1, w.ndim))
    length: Tensor = torch.linalg.vector_norm(w.detach().double(), dim=dims)
    return length


def on_sphere(w: Tensor, u: Tensor, lr: float, norm: Norm, radius: Tensor | None = None) -> Tensor:
    """Return R N(w - lr R N(u)), N(x) = x/|x|, of the tensor or of each row; R is |w| without a radius; N(0) = 0."""

    def along(x: Tensor) -> Tensor:
        return x if norm == "keep" else x.view(-1, *[1] * (w.ndim - 1))

    r = along(norms(w, norm) if radius is None else radius)
    length = along(norms(u, norm))
    moved = w.double() - torch.where(length == 0, 0, lr * r * u.double() / length)
    return (r * moved / along(norms(moved, norm))).to(w.dtype)


@torch.no_grad()
def apply_updates_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor | None],
    *,
    lr: float,
    norm: Norm = "keep",
    radius: float | Tensor | Sequence[float | Tensor | None] | None = None,
    stats: Stats = None,
) -> Tensor | None:
    """`ops.apply_updates_`."""
    radii = radii_of(radius, params, norm)
    return sgd_(params, updates, lr=lr, stats=stats, norm=norm, radii=radii)


def _master_of(p: Tensor, w: Tensor, masters: list[Tensor | None] | None, i: int) -> tuple[Tensor | None, Tensor]:
    """Return the master copy of a parameter, made if there is none, and the weights that count."""
    if masters is None or p.dtype not in LOW_PRECISION:
        return None, w
    master = masters[i]
    if master is None:
        master = masters[i] = p.float()
    return master, torch.where(master.to(p.dtype) == p, master, w)


def _store(p: Tensor, w_new: Tensor, master: Tensor | None, rounding: Rounding | None, i: int) -> None:
    """Write new weights into a parameter and its master copy."""
    if master is not None:
        w_new = master.copy_(w_new)
    if rounding is not None and p.dtype == torch.bfloat16:
        w_new = round_at_random(w_new, rounding.seed, rounding.first + i, rounding.step)
    p.copy_(w_new)


def grad_sq_norms(
    grads: Sequence[Tensor | None],
    *,
    grad_scale: float = 1.0,
    held: Sequence[Tensor | None] | None = None,
    l: float = 1.0,
    held_scale: float = 1.0,
) -> Tensor:
    """`ops.grad_sq_norms`."""
    sums = []
    for i, grad in enumerate(grads):
        if grad is None:
            sums.append(torch.zeros((), dtype=torch.float64))
            continue
        first = None if held is None else held[i]
        real = grad.to(_real_dtype(grad))
        g = real / (grad_scale if held is None else held_scale)
        if first is not None:
            g = svag_combination(first.to(real.dtype) / held_scale, real / grad_scale, l)
        sums.append(sq_norm(g))
    device = next((g.device for g in grads if g is not None), None)
    return torch.stack([x.to(device) for x in sums]) if sums else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def sq_norm(g: Tensor) -> Tensor:
    """Return |g|^2 in float64; any kind of tensor is taken."""
    return _as_real(g.detach()).double().square().sum()


def clip_coef(sq_norms: Tensor, max_norm: float, *, found_inf: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ops.clip_coef`."""
    norm = sq_norms.sum().sqrt()
    coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm if found_inf is None else torch.where(found_inf.view(()) == 0, norm, torch.nan), coef


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return Philox4x32-7's four words, int64 from 0 to 2^32 - 1, for counters of four words and a key of two.

    Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    (c0, c1, c2, c3), (k0, k1), word = counter, key, 0xFFFFFFFF
    for _ in range(7):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits: the sign is one of them
        c0, c1, c2, c3 = (
            (second >> 32) & word ^ c1 ^ k0,
            second & word,
            (first >> 32) & word ^ c3 ^ k1,
            first & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


def round_at_random(x: Tensor, seed: int, parameter: int, step: int) -> Tensor:
    """Round float32 to bfloat16, up with the probability of its position between the neighbours; see `ops.sgd_`."""
    counters = torch.arange((x.numel() + 7) // 8, device=x.device)
    rest = [torch.full_like(counters, n) for n in (parameter, step % 2**32)]
    words = philox([counters & 0xFFFFFFFF, counters >> 32, *rest], (seed & 0xFFFFFFFF, seed >> 32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    random = halves.flatten()[: x.numel()].view(x.shape)
    bits = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    random = random.masked_fill((bits & 0x7FFF0000) == 0x7F7F0000, 0x8000)  # beyond the largest: to nearest
    upper = ((bits + random) >> 16).masked_fill(x.isnan(), 0x7FC0)
    return ((upper ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)


def gauge_step(
    gauge: Gauge,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
    buffers: Buffers = Buffers.KEPT,
) -> Gauge:
    """Return the next gauge of `ops.gauge_step`: `sgd_` from w = 1 and b = z, with gradient 0."""
    scale, z, exponent = gauge
    w = torch.ones((), dtype=torch.float64)
    b = None if buffers in (Buffers.NONE, Buffers.FIRST) else torch.tensor(z, dtype=torch.float64)
    v = [b]
    sgd_(
        [w], [torch.zeros_like(w)], v, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
        nesterov=nesterov,
    )  # fmt: skip
    shift = round(-math.log2(scale * w.item()))
    z_new = v[0].item() / w.item() if momentum != 0 and v[0] is not None else 0.0
    return scale * w.item() * 2.0**shift, z_new, exponent + shift


def svag_combination(g1: Tensor, g2: Tensor, l: float) -> Tensor:
    """Return (g1 + g2)/2 + sqrt(2l - 1)/2 (g1 - g2); g1 for l = 1."""
    return g1 if l == 1 else (g1 + g2) * 0.5 + (g1 - g2) * (math.sqrt(2 * l - 1) / 2)


@torch.no_grad()
def svag_combine_(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], l: float) -> None:
    """`ops.svag_combine_`."""
    for a, b in zip(grads_a, grads_b, strict=True):
        if a is not None and b is not None:
            real = _real_dtype(a)
            a.copy_(svag_combination(a.to(real), b.to(real), l))


def pair_sums(grads_a: Sequence[Tensor | None], grads_b: Sequence[Tensor | None], stats: Stats = "tensor") -> Tensor:
    """`ops.pair_sums`."""
    table = []
    device = next((a.device for a in grads_a if a is not None), None)
    for a, b in zip(grads_a, grads_b, strict=True):
        if a is None or b is None:
            table.append(torch.full((1, len(PAIR_SUMS)), torch.nan, dtype=torch.float64, device=device))
        else:
            table.append(gradient_sums(a, b, stats))
    return torch.cat(table) if table else torch.empty((0, len(PAIR_SUMS)), dtype=torch.float64)


@torch.no_grad()
def welford_(
    means: Sequence[Tensor], samples: Sequence[Tensor | None], squares: Sequence[Tensor], *, n: int, stats: Stats = None
) -> Tensor | None:
    """`ops.welford_`."""
    table = []
    for m, x, s in zip(means, samples, squares, strict=True):
        if x is None:
            if stats:
                table.append(_no_sums(m, stats, SUMS))
            continue
        real = _real_dtype(m)
        before, sample = m.to(real), x.to(real)
        after = before + (sample - before) / n
        s.copy_(s.to(real) + (sample - before) * (sample - after))
        if stats:
            table.append(step_sums(before, sample, after.to(m.dtype), stats))
        m.copy_(after)
    return torch.cat(table) if stats else None


@torch.no_grad()
def outer_moments(a: Tensor, g: Tensor, *, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """`ops.outer_moments`."""
    real = _real_dtype(a)
    return contribution_sums(torch.einsum("bto,bti->boi", g.to(real), a.to(real)), squares)


@torch.no_grad()
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
    """`ops.conv_moments`, one tap of the kernel at a time."""
    real = _real_dtype(x)
    padded = torch.nn.functional.pad(x.to(real), [0, 1] * len(kernel_size))  # the last of each dimension is "outside"
    batch, channels, *size = g.shape
    outputs = g.to(real).reshape(batch, groups, channels // groups, math.prod(size))
    taps = []
    for tap in itertools.product(*(range(k) for k in kernel_size)):
        seen = padded
        for dim, k in enumerate(tap):
            at = torch.arange(g.shape[dim + 2], device=x.device) * stride[dim] + k * dilation[dim] - padding[dim]
            outside = (at < 0) | (at >= x.shape[dim + 2])
            seen = seen.index_select(dim + 2, at.masked_fill(outside, x.shape[dim + 2]))
        inputs = seen.reshape(batch, groups, x.shape[1] // groups, math.prod(size))
        taps.append(torch.einsum("bgoh,bgih->bgoi", outputs, inputs).flatten(1, 2))
    c = torch.stack(taps, dim=-1)
    return contribution_sums(c.reshape(*c.shape[:-1], *kernel_size), squares)


def contribution_sums(c: Tensor, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return total, sum of squared deviations and squared norms of contributions c (B, ...)."""
    total = c.sum(0)
    centred = (c - total / max(len(c), 1)).square().sum(0) if squares else None
    return total, centred, c.double().flatten(1).square().sum(1)


@torch.no_grad()
def moments(
    x: Tensor | Sequence[Tensor], *, squares: bool = True, factor: float = 1.0, totals: Tensor | None = None
) -> tuple[Any, Any, Tensor]:
    """`ops.moments`."""
    tensors: list[Any] = list(x) if isinstance(x, (list, tuple)) else [x]
    real = [entry.to(_real_dtype(entry)) for entry in tensors]
    means = [entry.mean(0) for entry in real]
    deviations = [(entry - mean).square().sum(0) for entry, mean in zip(real, means, strict=True)]
    row_sq = torch.stack([entry.double().square().unsqueeze(1).flatten(1).sum(1) for entry in real]).sum(0)
    if totals is not None:
        totals[0] = torch.stack([mean.double().square().sum() for mean in means]).sum()
        totals[1] = torch.stack([c.double().sum() for c in deviations]).sum() if squares else torch.nan
    deviations = [c * factor for c in deviations]
    if isinstance(x, (list, tuple)):
        return means, deviations if squares else None, row_sq
    return means[0], deviations[0] if squares else None, row_sq


@torch.no_grad()
def norm_sums(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, *, channels: Literal["last", "first"]
) -> tuple[Tensor, Tensor]:
    """`ops.norm_sums`."""
    real = _real_dtype(g)
    over = 1 if channels == "last" else 2
    normalised = (x.to(real) - (0 if mean is None else mean.unsqueeze(2))) * rstd.unsqueeze(2)
    return (g.to(real) * normalised).sum(over), g.to(real).sum(over)


@torch.no_grad()
def embedding_moments(
    ids: Tensor, g: Tensor, num_embeddings: int, *, padding_idx: int | None = None, squares: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`ops.embedding_moments`, a table per sample."""
    real = _real_dtype(g)
    total = torch.zeros((num_embeddings, g.shape[2]), dtype=real, device=g.device)
    centred, row_sq = torch.zeros_like(total), []
    for n, (row, grad) in enumerate(zip(ids, g.to(real), strict=True), start=1):
        table = torch.zeros_like(total).index_add_(0, row.long(), grad)
        if padding_idx is not None:
            table[padding_idx] = 0
        total += table
        if n > 1:
            centred += (n * table - total).square() / (n * (n - 1))
        row_sq.append(table.double().square().sum())
    return total, centred if squares else None, torch.stack(row_sq) if row_sq else total.new_zeros(0).double()


def recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> bool:
    """`ops.recentre_`."""
    before = raw.clone()
    raw -= total.square() / count
    is_kept = not bool((raw < least * before).any())
    raw.clamp_(min=0)
    return is_kept


def row_sums(x: Tensor) -> Tensor:
    """`ops.row_sums`."""
    return x.detach().double().sum(1)


def row_sq_norms(x: Tensor) -> Tensor:
    """`ops.row_sq_norms`."""
    return x.detach().double().square().sum(1)


def gradient_sums(g1: Tensor, g2: Tensor, stats: Stats) -> Tensor:
    """Return `PAIR_SUMS` over the tensor or each row, (slots, len(PAIR_SUMS)) float64."""
    shape = (_slots(g1, stats), -1) if g1.numel() else (_slots(g1, stats), 0)
    a, b = (_as_real(x.detach()).reshape(shape).double() for x in (g1, g2))
    products = {"pair_dot": (a, b), "pair_difference_sq": (a - b, a - b), "first_sq": (a, a), "second_sq": (b, b)}
    return _sums(products, PAIR_SUMS)


def step_sums(w: Tensor, g: Tensor, w_new: Tensor, stats: Stats) -> Tensor:
    """Return `SUMS` over the tensor or each row, with u = w_new - w: (slots, len(SUMS)) float64."""
    shape = (_slots(w, stats), -1) if w.numel() else (_slots(w, stats), 0)
    w, g, w_new = (_as_real(x.detach()).reshape(shape).double() for x in (w, g, w_new))
    u = w_new - w
    products = {
        "weight_sq": (w, w),
        "grad_sq": (g, g),
        "weight_grad_dot": (w, g),
        "update_sq": (u, u),
        "weight_update_dot": (w, u),
    }
    return _sums(products, SUMS)


def _sums(products: dict[str, tuple[Tensor, Tensor]], columns: Sequence[str]) -> Tensor:
    """Return the inner products of rows, a column for each name."""
    return torch.stack([(a * b).sum(1) for a, b in map(products.__getitem__, columns)], dim=1)


def _real_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def _no_sums(p: Tensor, stats: Stats, columns: Sequence[str]) -> Tensor:
    """Return the rows of a skipped entry."""
    return torch.full((_slots(p, stats), len(columns)), torch.nan, dtype=torch.float64, device=p.device)


def _slots(p: Tensor, stats: Stats) -> int:
    return p.shape[0] if stats == "row" and p.ndim >= 2 else 1


def _as_real(x: Tensor) -> Tensor:
    x = x.to_dense() if x.layout != torch.strided else x
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
