"""`Accumulator`: for every parameter, which contributions were expected, which came, and whether they add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import errors
from .combine import combined
from .contrast import Contrast
from .contributions import Contribution
from .derived import Through, coarser
from .record import ROUNDING, GradientMark, ParameterRecord, Target, Uncovered
from .sums import parts, sq_norm, wide


class OperationUse(Protocol):
    """An operation of the forward that uses parameters, as its backward needs it here."""

    name: str
    batch: int
    call: int | None
    origin: int
    done: bool


class Accumulator:
    """Accumulates the statistics of one model's trainable parameters, from entering the context to the next entry.

    Args:
        records: of the parameters.
        constants: ids of the model's buffers and frozen parameters.
        tiers: what is measured, as `GradientNoise` is told.
        uncovered: what becomes of parameters that no handler measures.
        checking: whether every layer is compared with autograd; "first": in the first backward.
        keep_totals: whether totals need memory of their own, because `.grad` becomes something else.
        batch_size: B, if the user said it.
        batch_norms: names the layers that use batch statistics, for an error.
        has_batchnorm: whether the model has such layers.
        reduction: of the loss over samples, for a warning.
    """

    def __init__(
        self, records: Sequence[ParameterRecord], constants: set[int], tiers: frozenset[str], uncovered: Uncovered,
        checking: bool | str, keep_totals: bool, batch_size: int | None, batch_norms: Callable[[], str],
        has_batchnorm: bool = False, reduction: str = "mean",
    ) -> None:  # fmt: skip
        self.records = list(records)
        self.parameters = {id(r.param): r for r in records}  # by their ids
        self._constants = constants
        self.squares = "variance" in tiers
        self.projects = "projections" in tiers
        self.uncovered_is = uncovered
        self.checking: bool | str = checking
        self.keep_totals = keep_totals
        self.batch = batch_size
        self._is_batch_told = batch_size is not None
        self.origin = 0  # how often there were new samples
        self._origin_of_backward: int | None = None
        self.open = True
        self.estimating = False  # the signed backward runs
        self.contrast: Contrast | None = None
        self.batches: list[int] = []  # of the backwards
        self._calls = 0
        self.in_model = False  # a forward of the model runs
        self.tainted = False  # the backward came to samples of which it is not known whether they are coupled
        self.warned = False
        self._backward, self._reaches = -1, False  # what `reaches_parameters` has found, and of which backward
        self._claimed: set[int] = set()  # calls that had their backward
        self._claiming: set[int] = set()
        self._batch_of_backward: int | None = None
        self.batch_norms = batch_norms
        self.has_batchnorm = has_batchnorm
        self.reduction = reduction

    # ---- Parameters

    def knows(self, t: Tensor) -> bool:
        """Return whether this is a trainable parameter of the model."""
        return id(t) in self.parameters

    def constant(self, t: Tensor) -> bool:
        """Return whether this is one of the model's buffers or frozen parameters."""
        return id(t) in self._constants

    def record(self, root: int) -> ParameterRecord:
        """Return the record of the parameter with this id."""
        return self.parameters[root]

    @property
    def is_measuring(self) -> bool:
        """Whether a backward that runs is one whose contributions count."""
        return not self.estimating and self.reaches_parameters()

    # ---- Forward

    def new_call(self, new_samples: bool) -> None:
        """Count a call of the model, on new samples or on tensors computed from those it had."""
        self._calls += 1
        if new_samples:
            self.origin += 1

    def call(self) -> int | None:
        """Return the number of this call of the model; None: activation checkpointing runs a forward again."""
        return self._calls if torch._C._current_graph_task_id() == -1 else None

    def expect(self, target: Target) -> None:
        """Expect the contributions of one more use in the forward."""
        if torch._C._current_graph_task_id() == -1:
            for root in target.roots:
                root.record.expected += 1
                root.record.is_seen = True

    def seen_without_grad(self, t: Tensor) -> None:
        """Expect those of a use under no_grad, which the first forward of a checkpoint is."""
        if torch._C._current_graph_task_id() == -1 and self.knows(t):
            self.record(id(t)).expected += 1

    def uncovered(self, records: Sequence[ParameterRecord], operation: str, why: str | None) -> None:
        """Refuse, estimate or exclude parameters whose contributions through an operation cannot be measured."""
        for r in records:
            if self.uncovered_is == "raise":
                raise errors.uncovered(r.described, operation, why)
            if r.status == "exact":
                self._set_aside(r)

    def _set_aside(self, r: ParameterRecord) -> None:
        r.status = "estimated" if self.uncovered_is == "estimate" else "excluded"

    def exclude(self, records: Sequence[ParameterRecord]) -> None:
        """Leave out parameters whose samples may be coupled, unless their contributions are complete."""
        for r in records:
            if r.sums is None and r.status != "excluded":
                r.status, r.pending = "excluded", []

    def taint(self, _: Tensor | None = None) -> None:
        """Leave out all parameters whose gradients come after this one in the backward."""
        self.tainted = self.tainted or self.is_measuring

    # ---- Backward

    def reaches_parameters(self) -> bool:
        """Return whether the backward that runs computes a gradient of a parameter.

        It need not: ``torch.autograd.grad(loss, x)`` and ``loss.backward(inputs=[x])`` of adversarial attacks and
        saliency maps pass through the layers for the gradient of their input alone. Nothing is measured then.
        """
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward, self._reaches = backward, any(_is_reached(r.param) for r in self.records)
        return self._reaches

    def backward_of(self, use: OperationUse) -> None:
        """Check that the backward of a use may run."""
        if not self.open:
            raise errors.backward_outside()
        if not self.is_measuring:
            return
        if use.done or use.call in self._claimed:
            raise errors.second_backward(use.name)
        use.done = True
        if use.call is not None:
            self._claiming.add(use.call)
        if use.call is not None and not self._is_batch_told:
            if self._origin_of_backward not in (None, use.origin):
                raise errors.two_calls()
            self._origin_of_backward = use.origin
        if self._batch_of_backward is None:
            self._batch_of_backward = use.batch
        elif self._batch_of_backward != use.batch:
            raise errors.two_batch_sizes(self._batch_of_backward, use.batch)

    def measure(self, target: Target, contribution: Callable[[], Contribution]) -> Tensor | None:
        """Return the gradient of a target, and take its contributions into account."""
        if not self.reaches_parameters():
            return None
        if self.tainted and not self.estimating:
            self.exclude([root.record for root in target.roots])
        measured = [root for root in target.roots if root.record.status == "exact"]
        if self.estimating:
            return contribution().total().to(target.dtype) if len(measured) < len(target.roots) else None
        of = contribution()
        if not measured:
            return of.total().to(target.dtype)
        for r, _ in measured:
            if r.sums is not None:
                raise errors.late_contribution(r.name)
        for r, d in measured:
            r.coarsest = coarser(r.coarsest, target.dtype.to_real() if d is None else d.coarsest)
        r, d = measured[0]
        if len(target.roots) == 1 and d is None and r.expected == 1 and not r.pending:
            self._settle(r, [of])
            r.settled = []  # what arrives is this very sum
            assert r.sums is not None
            r.sums.total = r.sums.total.to(target.dtype)
            return r.sums.total
        for r, d in measured:
            r.pending.append(of if d is None else Through(of, d, id(r.param)))
        return of.total().to(target.dtype)

    def _settle(self, r: ParameterRecord, contributions: list[Contribution]) -> None:
        """Sum all contributions to one parameter."""
        r.sums = combined(contributions, self.squares)
        if self.projects:
            r.projections = sum(c.project(r.sums.total.reshape(c.shape)) for c in contributions)  # type: ignore[assignment]
        r.pending, r.settled = [], contributions

    def incoming(self, r: ParameterRecord, grad: Tensor) -> None:
        """Compare a gradient that is about to be added to `.grad` with the contributions."""
        if not self.open or self.estimating:
            return
        if r.pending and len(r.pending) >= r.expected:
            self._settle(r, r.pending)
        if r.status == "exact" and r.sums is None and not r.pending and self.uncovered_is != "raise":
            self._set_aside(r)  # its use was not seen
        if r.status != "exact" or r.pending or r.incoming is not None:
            # What came is needed later: .grad must not take over its memory.
            r.incoming = grad.clone() if r.incoming is None else r.incoming + grad
        if r.status == "exact" and r.sums is not None:
            came = grad if r.incoming is None else r.incoming
            if came.data_ptr() != r.sums.total.data_ptr():
                self._compare(r, came)
        r.settled = []
        self._before_adding(r)

    def _before_adding(self, r: ParameterRecord) -> None:
        """Decide whether `.grad` will be the total, so that the total needs no memory of its own."""
        if r.total is None and r.in_grad is not None:
            r.total, r.in_grad = r.read_total().clone(), None  # type: ignore[union-attr]
        fresh = r.total is None and r.param.grad is None and not self.keep_totals and not r.arrived
        r.fresh = fresh and not r.pending
        if r.sums is not None:
            r.sq_now = sq_norm(r.sums.total)
            if r.fresh:
                r.sums.total = None  # type: ignore[assignment]

    def compare(self, target: Target, operation: str, measured: Tensor, plain: Tensor, g: Tensor, x: Tensor) -> None:
        """Compare the sum of a use's contributions with autograd's gradient, which is overwritten.

        The terms of the gradient are of the size of |g| |x|: they bound its rounding.
        """

        def size(t: Tensor) -> float:
            return sq_norm(t).sqrt().item()

        kind = min((t.dtype for t in (measured, plain, g)), key=lambda d: torch.finfo(d).bits)
        terms = size(g) * max(size(x) if x.is_floating_point() else 0.0, x.numel() ** 0.5)
        allowed = ROUNDING.get(kind, 1e-4) * (size(plain) + 0.1 * terms)
        difference = size(plain.sub_(measured))
        if difference > allowed:
            raise errors.wrong_arithmetic(target.roots[0].record.described, operation, difference, size(plain))

    def _compare(self, r: ParameterRecord, grad: Tensor) -> None:
        """Compare sum_b c_b with the gradient: refuse a parameter where they differ, or leave it out.

        Both are sums of the same terms, rounded on the way from the operation to the parameter, to the coarsest dtype
        of the tensors there. So they may differ by so much of the size of the terms.
        """
        assert r.sums is not None
        total = r.sums.total.to(wide(grad.dtype))
        kinds = torch.promote_types(r.sums.total.dtype, grad.dtype).to_real(), grad.dtype.to_real(), r.coarsest
        tolerance = max(ROUNDING.get(kind, 1e-4) for kind in kinds)
        difference = (grad.to(total.dtype) - total).norm().item()
        scale = parts(grad).norm(dtype=torch.float64).item() + r.sums.sq_norms.sum().sqrt().item()
        if difference > tolerance * scale:  # of the terms, where they cancel: a scorer of candidates before a softmax
            scale += sum(c.size() for c in r.settled)
        if difference <= tolerance * scale:
            return
        if self.uncovered_is == "raise":
            raise errors.wrong_sum(r.described, difference, scale)
        r.status, r.sums, r.pending = "excluded", None, []  # no random signs were drawn for it
        r.incoming = grad.clone() if r.incoming is None else r.incoming

    def accumulated(self, r: ParameterRecord, param: Tensor) -> None:
        """Note that `.grad` has the gradient."""
        if not self.open or self.estimating:
            return
        r.arrived = True
        if r.status == "exact" and r.sums is None and not r.pending:
            raise self._unexplained(r)
        if r.fresh:
            assert param.grad is not None
            r.in_grad = GradientMark.of(param.grad)

    def _unexplained(self, r: ParameterRecord) -> RuntimeError:
        if not self._calls and not self.batches:
            return errors.forward_outside()
        return errors.unexplained(r.described)

    def keep_gradients(self) -> None:
        """Hold the gradients that are the totals, before the caller takes them out of `.grad`."""
        for r in self.records:
            if r.in_grad is not None:
                r.total, r.in_grad = r.read_total(), None

    # ---- After the backward

    def forget_backward(self) -> None:
        """Forget the current backward, which has ended or failed; its calls of the model may not have another one."""
        for r in self.records:
            r.drop_backward()
        self._claimed |= self._claiming
        self._claiming, self._batch_of_backward, self.contrast = set(), None, None
        self._origin_of_backward, self.tainted = None, False

    @property
    def measures(self) -> bool:
        """Whether the current backward has measured a use of a parameter."""
        return self._batch_of_backward is not None

    def backward_ended(self) -> None:
        """Merge the sums of the outermost backward, which has ended, with those of the backwards before."""
        batch = self._batch_of_backward
        if batch is None:
            if any(r.arrived for r in self.records):  # of excluded or estimated parameters alone
                batch = self.batch
            if batch is None or not any(r.arrived for r in self.records):
                return
        late = [r for r in self.records if r.pending and r.status == "exact" and r.incoming is not None]
        for r in late:
            self._settle(r, r.pending)
            assert r.incoming is not None
            self._compare(r, r.incoming)
            r.settled = []
            r.sq_now = None if r.sums is None else sq_norm(r.sums.total)
        if self.projects and self.batches:
            self._reset()
            raise errors.second_projection()
        for r in self.records:
            self._join(r, batch)
        self.batches.append(batch)
        self._reset()

    def _reset(self) -> None:
        self.forget_backward()
        self.checking = False if self.checking == "first" else self.checking

    def _join(self, r: ParameterRecord, batch: int) -> None:
        """Add this backward's sums of a parameter to those of all: Chan's rule for the centred ones."""
        before = sum(self.batches)
        now_total: Tensor | None = None
        centred: Tensor | None = None
        if r.status == "exact" and r.sums is not None and r.arrived:
            now_total, centred = r.sums.total, r.sums.centred
            r.sq_norms.append(r.sums.sq_norms)
            r.all_projections = r.projections
            r.total_sq = r.sq_now
        elif r.status == "exact":
            r.sq_norms.append(torch.zeros(batch, dtype=torch.float64, device=r.param.device))
        elif r.arrived:
            now_total = None if r.fresh else r.incoming
            r.total_sq = sq_norm(r.incoming)  # type: ignore[arg-type]
            if r.status == "estimated":
                centred = self._spread(r, batch)
        if r.fresh and r.arrived:
            if self.squares or r.status == "estimated":
                self._set_centred(r, self._merged(r, centred, None, before, None, batch))
            return
        if r.arrived or (before and (r.total is not None or r.in_grad is not None)):
            previous = r.total
            if previous is None and r.in_grad is not None:
                previous = r.read_total()
            if self.squares or r.status == "estimated":
                self._set_centred(r, self._merged(r, centred, previous, before, now_total, batch))
            if now_total is not None:
                r.total = now_total.clone() if r.total is None else r.total + now_total
                r.total_sq = sq_norm(r.total)

    def _spread(self, r: ParameterRecord, batch: int) -> Tensor:
        if self.contrast is None or r.signed is None:
            raise errors.no_outputs(r.name)
        return self.contrast.spread(r.signed.to(wide(r.signed.dtype)), batch)

    @staticmethod
    def _set_centred(r: ParameterRecord, centred: Tensor | None) -> None:
        r.centred, r.scaled, r.centred_sum = centred, None, None

    def _merged(
        self, r: ParameterRecord, centred: Tensor | None, previous: Tensor | None, before: int, now: Tensor | None,
        batch: int,
    ) -> Tensor | None:  # fmt: skip
        """Return sum (c - mean)^2 over the samples before and now; their contributions are 0 where None."""
        like = next((t for t in (centred, r.centred) if t is not None), None)
        if before == 0:
            return centred
        kind = wide(r.param.dtype)
        zero = torch.zeros(r.param.shape, dtype=kind, device=r.param.device) if like is None else torch.zeros_like(like)
        mean_before = zero if previous is None else previous.to(kind) / before
        if now is None and r.fresh:
            now = r.read_total()
        mean_now = zero if now is None else now.to(kind) / batch
        shift = mean_now - mean_before
        shift = (shift.abs() if shift.is_complex() else shift).square_().mul_(before * batch / (before + batch))
        for t in (r.sum_of_squares(), centred):
            if t is not None:
                shift += t
        return shift


def _is_reached(param: Tensor) -> bool:
    """Return whether the backward that runs will add to the gradient of a parameter, or return it."""
    if not param.requires_grad:
        return False
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        view = param.view_as(param)
    assert view.grad_fn is not None
    leaf = view.grad_fn.next_functions[0][0]
    try:
        return leaf is not None and torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch.autograd.grad returns it
        return True
