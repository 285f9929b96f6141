"""Typed, documented functions, one per bound op, and what their callers share.

Tensors are of a dtype in ``DTYPES``: float64, float32, bfloat16 or float16.

``_binary`` loads the binary; ``types``, ``checks`` and ``launch`` are what the families of ops share (``sgd``,
``pairs``, ``clipping``, ``gauge``, ``per_sample``, ``sample_moments``); ``schemas`` registers the ops with torch.
"""

from ._binary import (
    CHUNK,
    GaugeStep,
    Hyper,
    LrMultipliers,
    Pass,
    binary,
    cuda_architectures,
    describe,
    device_index,
    gather,
    isa,
    kernel_takes,
    most_decay,
    select_isa,
    shared_pair,
    slot_count,
    supported_isas,
)
from ._torch_library import torch_symbol
from .adam import adamw_
from .checks import check_l, check_pairs, check_storage, kernels_take, would_take
from .clipping import check_max_norm, clip_coef, grad_sq_norms, sq_norm_tables
from .gauge import gauge_step
from .launch import new_scratch, new_table, scratch_beside
from .pairs import pair_sums, svag_combine_, welford_
from .per_sample import conv_moments, embedding_moments, norm_sums, outer_moments
from .sample_moments import check_samples, moments, recentre_, row_sq_norms, row_sums
from .sgd import sgd_
from .sphere import apply_updates_, radii_of
from .step_arguments import check_norm_arguments, if_on_device, read_lr_multipliers, rows_of_vector
from .types import (
    COMPUTE_DTYPES,
    DTYPES,
    LOW_PRECISION,
    NEW_GAUGE,
    NORMS,
    PAIR_SUMS,
    SUMS,
    Buffers,
    Gauge,
    Norm,
    OnDevice,
    Precision,
    Rounding,
    Stats,
    check_lr_on_sphere,
    check_norm,
    column,
    compute_dtype,
    dtype_name,
    one_of,
    precision,
    stats_code,
)

from . import schemas  # isort: skip  # last: it registers the functions above

__all__ = [
    "CHUNK",
    "COMPUTE_DTYPES",
    "DTYPES",
    "LOW_PRECISION",
    "NEW_GAUGE",
    "NORMS",
    "PAIR_SUMS",
    "SUMS",
    "Buffers",
    "Gauge",
    "GaugeStep",
    "Hyper",
    "LrMultipliers",
    "Norm",
    "OnDevice",
    "Pass",
    "Precision",
    "Rounding",
    "Stats",
    "adamw_",
    "apply_updates_",
    "binary",
    "check_l",
    "check_lr_on_sphere",
    "check_max_norm",
    "check_norm",
    "check_norm_arguments",
    "check_pairs",
    "check_samples",
    "check_storage",
    "clip_coef",
    "column",
    "compute_dtype",
    "conv_moments",
    "cuda_architectures",
    "describe",
    "device_index",
    "dtype_name",
    "embedding_moments",
    "gather",
    "gauge_step",
    "grad_sq_norms",
    "if_on_device",
    "isa",
    "kernel_takes",
    "kernels_take",
    "moments",
    "most_decay",
    "new_scratch",
    "new_table",
    "norm_sums",
    "one_of",
    "outer_moments",
    "pair_sums",
    "precision",
    "radii_of",
    "read_lr_multipliers",
    "recentre_",
    "row_sq_norms",
    "row_sums",
    "rows_of_vector",
    "schemas",
    "scratch_beside",
    "select_isa",
    "sgd_",
    "shared_pair",
    "slot_count",
    "sq_norm_tables",
    "stats_code",
    "supported_isas",
    "svag_combine_",
    "torch_symbol",
    "welford_",
    "would_take",
]
