"""The binary. Arguments are documented where they are used: ops/. Written by `make stubs`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

CHUNK: int

class ConvNumbers:
    def __init__(self, kernel_size: object, stride: object, padding: object, dilation: object, groups: int) -> None: ...

class GaugeStep:
    @property
    def before(self) -> tuple[float, float, int]: ...
    @property
    def buffer_to_weight(self) -> float: ...
    @property
    def drift(self) -> float: ...
    @property
    def grad_to_buffer(self) -> float: ...
    @property
    def grad_to_weight(self) -> float: ...
    @property
    def has_buffer(self) -> bool: ...
    @property
    def keep(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def moved(self) -> float: ...
    @property
    def next(self) -> tuple[float, float, int]: ...
    @property
    def scale(self) -> float: ...
    @property
    def shift(self) -> int: ...
    @property
    def unkeep(self) -> float: ...
    @property
    def weight_to_buffer(self) -> float: ...

class LrMultipliers:
    def __init__(self, given: object, count: int, where: str) -> None: ...
    def only(self, index: int) -> LrMultipliers: ...
    def value(self, index: int) -> float | Tensor: ...

class Hyper:
    def __init__(
        self,
        *,
        lr: float = 0.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        inverse_scale: float = 1.0,
        second_inverse_scale: float = 1.0,
        l: float = 1.0,
        share: float = 0.0,
        beta1: float = 0.0,
        beta2: float = 0.0,
        eps: float = 0.0,
        decoupled: bool = False,
        keeps_norm: bool = False,
        by_row: bool = False,
        gauge: GaugeStep | None = None,
        on_device: tuple[Tensor | None, ...] | None = None,
        rounding: tuple[int, int] | None = None,
        state_dtype: int | None = None,
    ) -> None: ...

class Pass:
    def __init__(self) -> None: ...
    def add(
        self,
        op: str,
        params: list[Any],
        grads: list[Any],
        buffers: list[list[Any]] | None,
        first: list[int] | None,
        hyper: Hyper,
        stats: int = 0,
        group: int = -1,
        slots: list[int] | None = None,
        held: list[Any] | None = None,
        masters: list[Any] | None = None,
        lr_multipliers: LrMultipliers | None = None,
        row: int | None = None,
        first_parameter: int = 0,
        counts: list[Any] | None = None,
        radii: list[Any] | None = None,
    ) -> list[int]: ...
    def add_whole(
        self,
        op: str,
        params: list[Any],
        state: Any,
        keys: tuple[str, ...],
        hyper: Hyper,
        stats: int = 0,
        group: int = -1,
        lr_multipliers: LrMultipliers | None = None,
        first_parameter: int = 0,
        held: list[Any] | None = None,
    ) -> bool: ...
    def begin(self) -> None: ...
    def check(self, last: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]: ...
    def clip(self, coefs: list[Tensor]) -> None: ...
    def run(self, table: Tensor | None, scratch: Tensor | None = None) -> None: ...
    def sq_norms(self, table: Tensor, new_scratch: Callable[[int], Tensor]) -> None: ...
    @property
    def columns(self) -> int: ...
    @property
    def devices(self) -> list[int]: ...
    @property
    def hypers(self) -> dict[int, tuple[Any, Hyper]]: ...
    @property
    def like(self) -> Tensor | None: ...
    @property
    def parameters(self) -> int: ...
    @property
    def places(self) -> list[Tensor]: ...
    @property
    def scratch_rows(self) -> int: ...
    @property
    def slot_offsets(self) -> tuple[int, ...]: ...
    @property
    def slots(self) -> int: ...

def clip_coef(
    sq_norms: Tensor, max_norm: float, norm: Tensor, coef: Tensor, found_inf: Tensor | None = None
) -> None: ...
def connect(
    exchange_api: object, parallel_for: int, tensor: type, parameter: type, shim: dict[str, int], shim_offset: int
) -> None: ...
def conv_moments(
    x: Tensor,
    g: Tensor,
    numbers: ConvNumbers,
    total: Tensor,
    centred: Tensor | None,
    sq_norms: Tensor,
    new_scratch: Callable[[int], Tensor] | None = None,
) -> None: ...
def conv_shape(x: Tensor, g: Tensor, numbers: ConvNumbers) -> list[int]: ...
def cuda_architectures() -> list[int]: ...
def describe(tensor: object) -> str: ...
def device_index(tensor: object) -> int | None: ...
def embedding_moments(
    ids: Tensor,
    order: Tensor | None,
    begin: Tensor | None,
    g: Tensor,
    padding: int,
    total: Tensor,
    centred: Tensor | None,
    row_sq: Tensor,
    new_scratch: Callable[[int], Tensor],
) -> None: ...
def gather(
    params: list[Tensor], state: Any, keys: tuple[str, ...]
) -> tuple[list[Any], tuple[list[Any], ...], list[int]]: ...
def gauge_step(
    gauge: tuple[float, float, int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    buffers: int,
    leave: bool,
) -> GaugeStep | None: ...
def isa() -> str: ...
def kernel_takes(tensor: object) -> bool: ...
def moments(
    samples: list[Tensor],
    means: list[Tensor],
    centred: list[Tensor] | None,
    factor: float,
    row_sq: Tensor,
    totals: Tensor,
    new_scratch: Callable[[int], Tensor],
) -> None: ...
def most_decay(momentum: float) -> float: ...
def norm_sums(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, along_rows: bool, of_weight: Tensor, of_bias: Tensor
) -> None: ...
def outer_moments(
    a: Tensor,
    g: Tensor,
    total: Tensor,
    centred: Tensor | None,
    sq_norms: Tensor,
    new_scratch: Callable[[int], Tensor] | None = None,
) -> None: ...
def outer_shape(a: Tensor, g: Tensor) -> tuple[int, int]: ...
def recentre(raw: Tensor, total: Tensor, share: float, least: float) -> bool: ...
def row_sums(x: Tensor, squares: bool, out: Tensor, new_scratch: Callable[[int], Tensor]) -> None: ...
def select_isa(name: str) -> bool: ...
def shared_pair(group: int, index: int) -> str: ...
def slot_count(param: Tensor, stats: int) -> int: ...
def supported_isas() -> list[str]: ...
