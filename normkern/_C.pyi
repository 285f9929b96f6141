"""The binary. Arguments are documented where they are used: ops.py."""

from typing import Any

from torch import Tensor

CHUNK: int

def connect(exchange_api: object, parallel_for: int, tensor: type, parameter: type) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def select_isa(name: str) -> bool: ...
def describe(tensor: object) -> str: ...
def kernel_takes(tensor: object) -> bool: ...
def slot_count(param: Tensor, stats: int) -> int: ...
def gather(params: list[Tensor], state: Any, key: str) -> tuple[list[Any], list[Any], list[int]]: ...

class Pass:
    def __init__(self) -> None: ...
    def begin(self) -> None: ...
    def add(
        self,
        params: list[Any],
        grads: list[Any],
        momentum_buffers: list[Any] | None,
        first: list[int] | None,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        inverse_scale: float,
        stats: int,
        group: int,
        slots: list[int] | None,
        held: list[Any] | None = None,
        second_inverse_scale: float = 1.0,
        l: float = 1.0,
    ) -> list[int]: ...
    def add_svag_combine(self, grads_a: list[Any], grads_b: list[Any], l: float) -> list[int]: ...
    def add_difference(self, grads_a: list[Any], grads_b: list[Any], stats: int) -> list[int]: ...
    def add_welford(
        self, means: list[Any], samples: list[Any], squares: list[Any], share: float, stats: int
    ) -> list[int]: ...
    def add_whole(
        self,
        params: list[Any],
        state: Any,
        key: str,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        inverse_scale: float,
        stats: int,
        group: int,
    ) -> bool: ...
    def check(self, last: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]: ...
    def run(self, table: Tensor | None) -> None: ...
    @property
    def slots(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def slot_offsets(self) -> tuple[int, ...]: ...
