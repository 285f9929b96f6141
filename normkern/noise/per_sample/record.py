"""`ParameterRecord`: what was measured of one trainable parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import errors
from .contributions import Contribution
from .derived import Derived
from .sums import Sums, plain_sum, real, wide

Status = Literal["exact", "estimated", "excluded"]
Uncovered = Literal["raise", "estimate", "exclude"]

#: How much a sum of contributions may differ from the gradient that arrived, relative to their norms.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class GradientMark(NamedTuple):
    """The tensor that `.grad` was, and its version.

    The reference is to the storage: a weak reference to the tensor would forbid torch.utils.swap_tensors.
    """

    storage: StorageWeakRef
    version: int

    @classmethod
    def of(cls, grad: Tensor) -> GradientMark:
        """Mark a gradient."""
        return cls(StorageWeakRef(_storage(grad)), grad._version)

    def fits(self, grad: Tensor | None) -> bool:
        """Return whether a gradient is the marked one, unchanged."""
        # The reference keeps the address of a freed storage from being used again.
        return grad is not None and grad._version == self.version and self.storage.cdata == _storage(grad)._cdata


def _storage(grad: Tensor) -> torch.UntypedStorage:
    return (grad._values() if grad.is_sparse else grad).untyped_storage()


@dataclass(eq=False, slots=True)
class ParameterRecord:
    """One trainable parameter: the sums of the current backward, then of all backwards of the context."""

    name: str
    module: str  #: its module's name and class
    param: Tensor
    status: Status = "exact"
    #: The current backward:
    expected: int = 0  #: uses in the forward
    is_seen: bool = False  #: whether one of them was with gradients
    pending: list[Contribution] = field(default_factory=list)  #: contributions that wait for others
    settled: list[Contribution] = field(default_factory=list)  #: those in `sums`, until they are compared
    sums: Sums | None = None
    projections: Tensor | None = None
    incoming: Tensor | None = None  #: the gradient that arrived while contributions were still to come
    signed: Tensor | None = None  #: the gradient of a contrast of the samples
    arrived: bool = False
    coarsest: torch.dtype = torch.float64  #: of the tensors that contributions went through
    fresh: bool = False  #: .grad was empty, and is the total now
    sq_now: Tensor | None = None  #: |sum_b c_b|^2
    #: All backwards:
    total: Tensor | None = None  #: sum_b c_b, if it cannot be read off .grad
    in_grad: GradientMark | None = None  #: else which gradient it is
    total_sq: Tensor | None = None
    centred: Tensor | None = None  #: sum_b |c_b - mean|^2, times `scaled`
    scaled: float | None = None  #: a result's factor, once its variance is this very memory
    version: int = 0  #: of that memory
    centred_sum: Tensor | None = None  #: of `centred` before it was scaled
    sq_norms: list[Tensor] = field(default_factory=list)
    all_norms: Tensor | None = None  #: their sum, where it goes over more samples than they do
    all_projections: Tensor | None = None

    @property
    def described(self) -> str:
        """The parameter's name and module, for errors."""
        return f"{self.name!r} of {self.module}"

    def read_total(self) -> Tensor | None:
        """Return sum_b c_b of all backwards; None: no gradient came.

        Raises:
            RuntimeError: `.grad`, where the total is, has been changed since.
        """
        if self.total is not None or self.in_grad is None:
            return self.total
        grad = self.param.grad
        if grad is None or not self.in_grad.fits(grad):
            raise errors.changed_gradient(self.name)
        return grad.detach()

    @property
    def used(self) -> bool:
        """Whether a gradient has arrived."""
        return self.total is not None or self.in_grad is not None

    def square(self) -> Tensor:
        """Return |sum_b c_b|^2, float64."""
        if self.total_sq is None:
            return torch.zeros((), dtype=torch.float64, device=self.param.device)
        return self.total_sq

    @property
    def about_zero(self) -> bool:
        """Whether `moment` is about zero: to get the spread, subtract the part of the mean."""
        return self.centred is None and self.used and self.status == "exact"

    def moment(self) -> Tensor:
        """Return sum_b |c_b|^2 if it is `about_zero`, else sum_b |c_b - mean|^2; float64."""
        if self.centred is not None:
            if self.centred_sum is None:
                self.centred_sum = plain_sum(self.centred)
            return self.centred_sum
        if not self.about_zero:
            return torch.zeros((), dtype=torch.float64, device=self.param.device)
        return torch.cat(self.sq_norms).sum() if self.all_norms is None else self.all_norms

    def variance(self, factor: float) -> Tensor:
        """Return sum_b (c_b - mean)^2 times a factor, of the parameter's shape, in the memory of the sum.

        Raises:
            RuntimeError: the user changed an earlier result in place.
        """
        if self.centred is None:
            return torch.zeros(self.param.shape, dtype=real(self.param.dtype), device=self.param.device)
        if self.scaled is None:
            self.centred.mul_(factor)
            self.scaled, self.version = factor, self.centred._version
        self._check_version(self.centred)
        ready = self.centred if self.scaled == factor else self.centred * (factor / self.scaled)
        return ready.reshape(self.param.shape)

    def sum_of_squares(self) -> Tensor | None:
        """Return sum_b (c_b - mean)^2, elementwise."""
        if self.centred is None or self.scaled is None:
            return self.centred
        self._check_version(self.centred)
        return self.centred / self.scaled

    def _check_version(self, variance: Tensor) -> None:
        if variance._version != self.version:
            raise errors.changed_variance(self.name)

    def mean(self, factor: float) -> Tensor:
        """Return sum_b c_b times a factor, of the parameter's shape."""
        total = self.read_total()
        if total is None:
            return torch.zeros(self.param.shape, dtype=wide(self.param.dtype), device=self.param.device)
        return total.to(wide(total.dtype)).reshape(self.param.shape) * factor

    def drop_backward(self) -> None:
        """Forget the current backward."""
        self.expected, self.pending, self.settled, self.sums, self.projections = 0, [], [], None, None
        self.incoming, self.signed, self.arrived, self.fresh, self.sq_now = None, None, False, False, None
        self.coarsest, self.is_seen = torch.float64, False


class Root(NamedTuple):
    """A parameter that a tensor is, or from which it was derived."""

    record: ParameterRecord
    derived: Derived | None  #: None: the tensor is the parameter itself


@dataclass(slots=True)
class Target:
    """A tensor whose gradient an operation contributes to: a parameter, or a tensor derived from parameters."""

    roots: list[Root]
    dtype: torch.dtype


def spreads(records: Sequence[ParameterRecord], squares: Tensor, batch: int) -> Tensor:
    """Return sum_b |c_b - mean|^2 of each parameter, float64; `squares` are their |sum_b c_b|^2."""
    device = squares.device
    if all(r.about_zero and r.all_norms is None and len(r.sq_norms) == 1 for r in records):
        moments = torch.stack([r.sq_norms[0].to(device) for r in records]).sum(1)
    else:
        moments = torch.stack([r.moment().to(device) for r in records])
    if not all(r.about_zero for r in records):
        squares = squares * torch.tensor([float(r.about_zero) for r in records], device=device)
    return moments.sub_(squares, alpha=1 / batch).clamp_(min=0)
