"""Sums over the samples of a batch: of their gradients, and of those that a layer would give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..tracing import is_traced
from . import _binary as loaded
from ._binary import (
    Takes,
    describe,
    device_index,
    kernel_takes,
    not_taken,
    scratch_beside,
    torch_op,
    where_kernels_run,
    would_take,
)


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
        return torch_op("outer_moments", a, g, squares=squares)
    shape = loaded.binary.outer_shape(a, g)
    total, centred, sq_norms = new_sample_sums(shape, a, squares)
    loaded.binary.outer_moments(_dense_last(a), _dense_last(g), total, centred, sq_norms, scratch_beside(a))
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
        x: (B, C, ``*space``), what went into the layer, one to three space dimensions; float64, float32, bfloat16 or
            float16, any strides (a copy is made if the last dimension is not dense).
        g: (B, O, ``*out``) of the same dtype on the same device, the gradient of what came out. A transposed
            convolution is the same call with x and g swapped.
        kernel_size, stride, dilation: a number for each space dimension.
        padding: what was added on the left of each; zero is read outside x. The right follows from the size of g.
        groups: divides C and O.

    Returns:
        Total and centred (or None), (O, C/groups, ``*kernel_size``), and sq_norms (B,), as `outer_moments` has them.

    Raises:
        TypeError: no kernel takes a tensor; dtypes or devices differ.
        ValueError: shapes do not fit, or numbers of space dimensions.

    >>> x, g = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0]]])
    >>> conv_moments(x, g, (2,), stride=(1,), padding=(0,), dilation=(1,), groups=1, squares=False)
    (tensor([[[21., 32.]]]), None, tensor([1465.], dtype=torch.float64))
    """
    if is_traced():
        of_space: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return torch_op("conv_moments", x, g, kernel_size, **of_space, squares=squares)
    numbers = loaded.binary.ConvNumbers(kernel_size, stride, padding, dilation, groups)
    total, centred, sq_norms = new_sample_sums(loaded.binary.conv_shape(x, g, numbers), x, squares)
    loaded.binary.conv_moments(_dense_last(x), _dense_last(g), numbers, total, centred, sq_norms, scratch_beside(x))
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
    loaded.binary.moments(tensors, means, centred, factor, row_sq, totals, scratch_beside(like))
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
    means, centred, row_sq, new_totals = torch_op(overload, x, squares=squares, factor=factor)
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
        return torch_op("row_sq_norms", x)
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
        return torch_op("row_sums", x)
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
    loaded.binary.row_sums(_side_by_side(x), squares, out, scratch_beside(x))
    return out


def recentre_(raw: Tensor, total: Tensor, count: int, least: float) -> bool:
    r"""Raw second moments become central ones, in place: :math:`\sum_b c_b^2 - (\sum_b c_b)^2 / B`, at least 0.

    Args:
        raw, total: :math:`\sum_b c_b^2` and :math:`\sum_b c_b`, dense tensors of one shape and layout, both float64 or
            both float32. raw is written. On a CUDA device torch does it in several passes, and waits for the answer.
        count: B, the samples.
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
        return bool(torch_op("recentre_", raw, total, count, least))
    check_recentre(raw, total, count)
    if device_index(raw) != -1:
        from .. import reference

        return reference.recentre_(raw, total, count, least)
    return loaded.binary.recentre(raw, total, 1 / count, least)


def check_recentre(raw: Tensor, total: Tensor, count: int, takes: Takes | None = None) -> None:
    """Arguments of `recentre_`."""
    takes = takes or kernel_takes
    for name, entry in {"raw": raw, "total": total}.items():
        if not takes(entry) or entry.dtype not in (torch.float64, torch.float32):
            raise TypeError(
                f"recentre_: {name} is {describe(entry)}; expected a torch.Tensor of float64 or float32 on "
                f"{where_kernels_run(entry)}"
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
        return torch_op("norm_sums", g, x, mean, rstd, channels=channels)
    of_weight, of_bias = new_norm_sums(g, x, mean, rstd, channels)
    loaded.binary.norm_sums(
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
        return torch_op("embedding_moments", ids, g, num_embeddings, **more)
    total, centred, row_sq = new_embedding_moments(ids, g, num_embeddings, padding_idx, squares)
    ids = ids.to(torch.int64).contiguous()
    on_cpu = device_index(g) == -1
    order, begin = (None, None) if on_cpu else _by_id(ids.flatten(), num_embeddings)
    padding = -1 if padding_idx is None else padding_idx % num_embeddings
    loaded.binary.embedding_moments(
        ids, order, begin, _side_by_side(g), padding, total, centred, row_sq, scratch_beside(g)
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
