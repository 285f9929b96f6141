"""Per-sample gradients that are never formed: what each sample adds to a layer's weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..tracing import is_traced
from ._binary import binary, describe, device_index, kernel_takes
from .checks import Takes, not_taken, would_take
from .launch import scratch_beside, torch_op, with_dense_rows
from .types import compute_dtype


def outer_moments(a: Tensor, g: Tensor, *, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    r"""Compute a linear layer's weight gradient and its spread over the samples, without forming per-sample gradients.

    .. math::
        c_b = g_b^\top a_b, \quad t = \sum_b c_b, \quad s = \sum_b (c_b - t/B)^2, \quad n_b = |c_b|^2

    Args:
        a: (B, T, I), the layer's input; of a dtype in `DTYPES`, any strides (a copy is made if the last dimension is
            not dense).
        g: (B, T, O) of the same dtype on the same device, the gradient of its output.
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
    shape = binary.outer_shape(a, g)
    total, centred, sq_norms = new_sample_sums(shape, a, squares)
    binary.outer_moments(with_dense_rows(a), with_dense_rows(g), total, centred, sq_norms, scratch_beside(a))
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
    r"""Compute a convolution's weight gradient and its spread over the samples, without forming per-sample gradients.

    .. math::
        c_b[o, i, k] = \sum_h g_b[o, h]\, x_b[i, h \cdot \mathrm{stride} + k \cdot \mathrm{dilation} -
        \mathrm{padding}]

    with i counted within the group of o. The sums of :math:`c_b` are those of `outer_moments`.

    Args:
        x: (B, C, ``*space``), the layer's input, one to three space dimensions; of a dtype in `DTYPES`, any strides (a
            copy is made if the last dimension is not dense).
        g: (B, O, ``*out``) of the same dtype on the same device, the gradient of its output. A transposed convolution
            is the same call with x and g swapped.
        kernel_size, stride, dilation: a number for each space dimension.
        padding: the zeros added on the left of each; those on the right follow from the size of g.
        groups: divides C and O.

    Returns:
        Total and centred (or None), (O, C/groups, ``*kernel_size``), and sq_norms (B,), as in `outer_moments`.

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
    numbers = binary.ConvNumbers(kernel_size, stride, padding, dilation, groups)
    total, centred, sq_norms = new_sample_sums(binary.conv_shape(x, g, numbers), x, squares)
    binary.conv_moments(with_dense_rows(x), with_dense_rows(g), numbers, total, centred, sq_norms, scratch_beside(x))
    return total, centred, sq_norms


def new_sample_sums(shape: Sequence[int], of: Tensor, squares: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return unwritten results of the kernels that form a weight gradient."""
    real = compute_dtype(of.dtype)
    total = torch.empty(shape, dtype=real, device=of.device)
    sq_norms = torch.empty(of.shape[0], dtype=torch.float64, device=of.device)
    return total, torch.empty_like(total) if squares else None, sq_norms


def norm_sums(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    channels: Literal["last", "first"],
) -> tuple[Tensor, Tensor]:
    r"""Compute what each sample adds to the gradients of a normalisation layer's weight and bias, in one pass.

    .. math::
        w_{bd} = \sum_t g_{btd}\,(x_{btd} - m_{bt})\, r_{bt}, \qquad \beta_{bd} = \sum_t g_{btd}
        \qquad \text{(last)}

    .. math::
        w_{bc} = \sum_l g_{bcl}\,(x_{bcl} - m_{bc})\, r_{bc}, \qquad \beta_{bc} = \sum_l g_{bcl}
        \qquad \text{(first)}

    Args:
        g, x: the output's gradient and the input, (B, T, D) or (B, C, L), of one dtype in `DTYPES`
            and on one device. Where the last dimension does not lie side by side, a copy is read.
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
    binary.norm_sums(
        with_dense_rows(g), with_dense_rows(x), None if mean is None else _dense(mean), _dense(rstd),
        channels == "first", of_weight, of_bias,
    )  # fmt: skip
    return of_weight, of_bias


def new_norm_sums(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, channels: str, takes: Takes | None = None
) -> tuple[Tensor, Tensor]:
    """Check the arguments of `norm_sums`, and return its unwritten results."""
    takes = takes or kernel_takes
    if channels not in ("last", "first"):
        raise ValueError(f'norm_sums: channels expected "last" or "first", got {channels!r}')
    of_rows = {"rstd": rstd} if mean is None else {"mean": mean, "rstd": rstd}
    for name, entry in {"g": g, "x": x, **of_rows}.items():
        if not takes(entry):
            raise TypeError(not_taken("norm_sums", name, entry))
    real = compute_dtype(g.dtype)
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
    r"""Compute what the samples add to the gradient of an embedding's table: sum, squared deviations, norms.

    .. math::
        c_b[v] = \sum_{t:\,ids_{bt} = v} g_{bt}, \quad s = \sum_b c_b, \quad
        q = \sum_b (c_b - s/B)^2, \quad n_b = |c_b|^2

    Ids are sorted, and no memory of B tables is used: for each row v the samples that have it are added by Youngs and
    Cramer's update, and the others as zeros. In float64, rounded once.

    Args:
        ids: (B, T) int64 or int32 on g's device, from 0 to num_embeddings - 1.
        g: (B, T, D), the gradient of the layer's output, of a dtype in `DTYPES`. Where the last dimension does not
            lie side by side, a copy is read.
        num_embeddings: V, rows of the table.
        padding_idx: an id that adds nothing, from -V to V - 1, or None.
        squares: without, q is None.

    Returns:
        s and q (V, D), float64 for float64, else float32, and n (B,) float64, on g's device. Nothing is synchronised.

    Raises:
        TypeError: no kernel takes g; ids are no whole numbers on its device. ValueError: shapes do not fit;
            `padding_idx` is not an id of the table; on the CPU, before anything is written, an id is not one. On a
            device ids are not checked, as that would synchronise: such an id is in no row, and leaves NaN in n of its
            sample.

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
    binary.embedding_moments(
        ids, order, begin, with_dense_rows(g), padding, total, centred, row_sq, scratch_beside(g)
    )  # fmt: skip
    return total, centred, row_sq


def new_embedding_moments(
    ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None, squares: bool, takes: Takes | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the arguments of `embedding_moments`, and return its results: zeros on the CPU, where its loops add up."""
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
    real = compute_dtype(g.dtype)
    on_cpu = g.device.type == "cpu" if takes is would_take else device_index(g) == -1
    total = (g.new_zeros if on_cpu else g.new_empty)((num_embeddings, g.shape[2]), dtype=real)
    centred = (torch.zeros_like if on_cpu else torch.empty_like)(total) if squares else None
    return total, centred, g.new_empty(g.shape[0], dtype=torch.float64)


def _by_id(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the positions sorted by id, stably, and where those of each id begin: (rows + 1,)."""
    by_id, order = torch.sort(ids, stable=True)
    return order, torch.searchsorted(by_id, torch.arange(rows + 1, device=ids.device))


def _dense(x: Tensor) -> Tensor:
    """Return `x`, or a contiguous copy."""
    return x.detach().contiguous()
