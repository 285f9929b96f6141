"""The accounts of one measurement: for every parameter what was expected of it, what came, and whether it adds up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .contributions import Outer, Part
from .derived import Through, as_matrix, disjoint
from .random_signs import Contrast
from .sums import Sums, of_matrix, one_by_one, plain_sum, real, sq_norm

if TYPE_CHECKING:
    from .tracer import Capture, Use

Status = Literal["exact", "estimated", "excluded"]
Uncovered = Literal["raise", "estimate", "exclude"]

#: What a sum of contributions may differ by from the gradient that arrived, relative to their norms.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(eq=False, slots=True)
class Record:
    """One trainable parameter: first of the backward that is on its way, then of all."""

    name: str
    module: str  #: its module's name and class
    param: Tensor
    status: Status = "exact"
    #: Of this backward.
    expected: int = 0  #: uses in the forward
    pending: list[Part] = field(default_factory=list)  #: contributions that wait for others to the same parameter
    sums: Sums | None = None
    projections: Tensor | None = None
    incoming: Tensor | None = None  #: what arrived while contributions were still to come
    signed: Tensor | None = None  #: the gradient of a contrast of the samples
    arrived: bool = False
    fresh: bool = False  #: .grad was empty, and is the total now
    sq_now: Tensor | None = None  #: |sum_b c_b|^2
    #: Of all backwards.
    total: Tensor | None = None  #: sum_b c_b, if it cannot be read off .grad
    in_grad: tuple[weakref.ref[Tensor], int] | None = None  #: else the gradient, and its version
    total_sq: Tensor | None = None
    centred: Tensor | None = None  #: sum_b (c_b - mean)^2, times `scaled`
    scaled: float | None = None  #: a result's factor, once its variance is this very memory
    version: int = 0  #: of that memory
    centred_sum: Tensor | None = None  #: of `centred` before it was scaled
    sq_norms: list[Tensor] = field(default_factory=list)
    all_norms: Tensor | None = None  #: their sum, where it goes over more samples than they do
    all_projections: Tensor | None = None

    def read_total(self) -> Tensor | None:
        """sum_b c_b of all backwards; None: no gradient came. RuntimeError: .grad has been changed since."""
        if self.total is not None or self.in_grad is None:
            return self.total
        grad, version = self.in_grad[0](), self.in_grad[1]
        if grad is None or grad._version != version:
            raise RuntimeError(
                f"GradientNoise: the mean of {self.name!r} is read from its .grad, which has been changed or freed "
                "since the backward; call result() and read the mean before the optimizer's step, before zero_grad "
                "and before clipping"
            )
        return grad.detach()

    @property
    def used(self) -> bool:
        """A gradient came."""
        return self.total is not None or self.in_grad is not None

    def square(self) -> Tensor:
        """|sum_b c_b|^2, float64."""
        if self.total_sq is None:
            return torch.zeros((), dtype=torch.float64, device=self.param.device)
        return self.total_sq

    @property
    def about_zero(self) -> bool:
        """Its spread is what sum_b |c_b|^2 has more than the mean's part."""
        return self.centred is None and self.used and self.status == "exact"

    def moment(self) -> Tensor:
        """sum_b |c_b|^2 if that is what is known of it, else sum_b |c_b - mean|^2; float64."""
        if self.centred is not None:
            if self.centred_sum is None:
                self.centred_sum = plain_sum(self.centred)
            return self.centred_sum
        if not self.about_zero:
            return torch.zeros((), dtype=torch.float64, device=self.param.device)
        return torch.cat(self.sq_norms).sum() if self.all_norms is None else self.all_norms

    def variance(self, factor: float) -> Tensor:
        """sum_b (c_b - mean)^2 times a factor, of the parameter's shape: in the memory of the sum, a P less.

        RuntimeError: a result that was given it before has changed it.
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
        """sum_b (c_b - mean)^2, elementwise."""
        if self.centred is None or self.scaled is None:
            return self.centred
        self._check_version(self.centred)
        return self.centred / self.scaled

    def _check_version(self, variance: Tensor) -> None:
        if variance._version != self.version:
            raise RuntimeError(
                f"GradientNoise: the variance of {self.name!r} that an earlier result gave has been changed in place, "
                "and is needed once more; expected a copy of it to be changed"
            )

    def mean(self, factor: float) -> Tensor:
        """sum_b c_b times a factor, of the parameter's shape."""
        total = self.read_total()
        if total is None:
            return torch.zeros(self.param.shape, dtype=real(self.param.dtype), device=self.param.device)
        return total.to(real(total.dtype)).reshape(self.param.shape) * factor

    def drop_backward(self) -> None:
        """Forgets the backward on its way."""
        self.expected, self.pending, self.sums, self.projections = 0, [], None, None
        self.incoming, self.signed, self.arrived, self.fresh, self.sq_now = None, None, False, False, None


class Ledger:
    """Of the trainable parameters of one model, from entering the context to the next entry."""

    def __init__(
        self, records: Sequence[Record], constants: set[int], tiers: frozenset[str], uncovered: Uncovered,
        checking: bool | str, keep_totals: bool, batch_size: int | None, batch_norms: Callable[[], str],
    ) -> None:  # fmt: skip
        self.records = list(records)
        self._by_id = {id(r.param): r for r in records}
        self._constants = constants
        self.squares = "variance" in tiers
        self.projects = "projections" in tiers
        self.uncovered_is = uncovered
        self.checking: bool | str = checking
        self.keep_totals = keep_totals
        self.batch = batch_size
        self._told_batch = batch_size is not None
        self.origin = 0  # how often there were new samples
        self._origin_of_backward: int | None = None
        self.capture: Capture | None = None
        self.open = True
        self.estimating = False
        self.contrast: Contrast | None = None
        self.batches: list[int] = []  # of the backwards
        self._calls = 0
        self._claimed: set[int] = set()  # calls that had their backward
        self._claiming: set[int] = set()
        self._batch_of_backward: int | None = None
        self._batch_norms = batch_norms

    # ---- Who is who

    def knows(self, t: Tensor) -> bool:
        """A trainable parameter of the model."""
        return id(t) in self._by_id

    def constant(self, t: Tensor) -> bool:
        """One of the model's buffers or frozen parameters."""
        return id(t) in self._constants

    def record(self, root: int) -> Record:
        """Of a parameter, by its id."""
        return self._by_id[root]

    def _roots(self, t: Tensor) -> list[Record]:
        assert self.capture is not None
        return [self.record(root) for root, _ in self.capture.roots(t)]

    # ---- Forward

    def new_call(self, new_samples: bool) -> None:
        """The model is called: on new samples, or on what came of those it had."""
        self._calls += 1
        if new_samples:
            self.origin += 1

    def call(self) -> int | None:
        """Which call of the model this is; None: a forward that activation checkpointing does again."""
        return self._calls if torch._C._current_graph_task_id() == -1 else None

    def expect(self, t: Tensor) -> None:
        """A use in the forward."""
        if torch._C._current_graph_task_id() == -1:
            for r in self._roots(t):
                r.expected += 1

    def seen_without_grad(self, t: Tensor) -> None:
        """As in the first forward of a checkpoint."""
        if torch._C._current_graph_task_id() == -1 and self.knows(t):
            self.record(id(t)).expected += 1

    def uncovered(self, records: Sequence[Record], operation: str, why: str | None) -> None:
        """An operation through which no contributions can be measured."""
        for r in records:
            if self.uncovered_is == "raise":
                raise NotImplementedError(
                    f"GradientNoise: {r.name!r} of {r.module} is used by {operation}"
                    + (f" ({why})" if why else "")
                    + ", whose contributions sample by sample are not known; expected a layer that is covered, or "
                    'uncovered="estimate" (an extra backward with random signs) or uncovered="exclude"'
                )
            if r.status == "exact":
                r.status = "estimated" if self.uncovered_is == "estimate" else "excluded"

    def refuse_lost(self, r: Record, operation: str, why: str) -> None:
        """What a layer is given has no samples that could be told apart."""
        raise RuntimeError(
            f"GradientNoise: {operation} uses {r.name!r} of {r.module} on samples that cannot be told apart any more: "
            f"{why}. Expected operations that treat every sample by itself"
        )

    def refuse_unknown_batch(self, r: Record) -> None:
        """Nobody said how many samples there are."""
        raise RuntimeError(
            f"GradientNoise: {r.name!r} of {r.module} is used before the model was called, so that the number of "
            "samples is not known; expected a call of the model itself, or batch_size="
        )

    def refuse_batch_norm(self) -> None:
        """Batch statistics couple the samples."""
        raise RuntimeError(
            f"GradientNoise: {self._batch_norms()} normalises with the statistics of the batch, so that no sample has "
            "a gradient of its own; expected eval mode (model.eval(), or of these layers alone, measures with running "
            "statistics), another normalisation, or normkern.RunningMoments over micro-batches"
        )

    def refuse_guess(self, operation: str, shape: tuple[int, ...]) -> None:
        """A tensor was taken for one with the batch in front, and now it meets one whose batch lies elsewhere."""
        raise RuntimeError(
            f"GradientNoise: {operation} joins a tensor of shape {shape} with samples that lie along another "
            f"dimension; it was taken for {self.batch} samples, for one of its dimensions is as long as the batch"
        )

    # ---- Backward

    def backward_of(self, use: Use) -> None:
        """A use's backward runs."""
        if not self.open:
            raise RuntimeError(
                "GradientNoise: the backward of a forward inside the context runs outside of it; expected forward and "
                "backward in one `with`"
            )
        if self.estimating:
            return
        if use.done or use.call in self._claimed:
            raise RuntimeError(
                f"GradientNoise: {use.name} has its second backward after one forward; expected one backward of the "
                "sum of all losses, or a forward for each"
            )
        use.done = True
        if use.call is not None:
            self._claiming.add(use.call)
        if use.call is not None and not self._told_batch:
            if self._origin_of_backward not in (None, use.origin):
                raise RuntimeError(
                    "GradientNoise: one backward goes through two calls of the model on tensors of their own: on other "
                    "samples, or on the same ones once more? Expected a backward for each, or batch_size=, which says "
                    "that both have the same samples"
                )
            self._origin_of_backward = use.origin
        if self._batch_of_backward is None:
            self._batch_of_backward = use.batch
        elif self._batch_of_backward != use.batch:
            raise RuntimeError(
                f"GradientNoise: one backward of {self._batch_of_backward} and of {use.batch} samples; expected the "
                "same number in all calls of the model that it goes through"
            )

    def measure(self, use: Use, target: Tensor, part: Callable[[], Part]) -> Tensor | None:
        """The gradient of a use's target; its contributions are noted."""
        assert self.capture is not None
        roots = [(self.record(root), d, root) for root, d in self.capture.roots(target)]
        measured = [x for x in roots if x[0].status == "exact"]
        if self.estimating:
            return part().total().to(target.dtype) if len(measured) < len(roots) else None
        of = part()
        if not measured:
            return of.total().to(target.dtype)
        for r, _, _ in measured:
            if r.sums is not None:
                raise RuntimeError(
                    f"GradientNoise: {r.name!r} gets more contributions after its gradient has arrived; expected one "
                    "backward for each forward"
                )
        r, d, _ = measured[0]
        if len(roots) == 1 and d is None and r.expected == 1 and not r.pending:
            self._settle(r, [of])
            assert r.sums is not None
            r.sums.total = r.sums.total.to(target.dtype)
            return r.sums.total
        for r, d, root in measured:
            r.pending.append(of if d is None else Through(of, d, root))
        return of.total().to(target.dtype)

    def _settle(self, r: Record, parts: list[Part]) -> None:
        """Sums all contributions to one parameter."""
        r.sums = combined(parts, self.squares)
        if self.projects:
            r.projections = sum(p.project(r.sums.total.reshape(p.shape)) for p in parts)  # type: ignore[assignment]
        r.pending = []

    def incoming(self, r: Record, grad: Tensor) -> None:
        """A gradient is about to be added to .grad."""
        if not self.open or self.estimating:
            return
        if r.pending and len(r.pending) >= r.expected:
            self._settle(r, r.pending)
        if r.status == "exact" and r.sums is None and not r.pending and self.uncovered_is == "exclude":
            r.status = "excluded"  # it came from where nobody saw it used
        if r.status != "exact" or r.pending or r.incoming is not None:
            # What came is needed later: .grad must not take over its memory.
            r.incoming = grad.clone() if r.incoming is None else r.incoming + grad
        if r.status == "exact" and r.sums is not None:
            came = grad if r.incoming is None else r.incoming
            if came.data_ptr() != r.sums.total.data_ptr():
                self._compare(r, came)
        self._before_adding(r)

    def _before_adding(self, r: Record) -> None:
        """Whether .grad will be the total, so that it needs no memory of its own."""
        if r.total is None and r.in_grad is not None:
            r.total, r.in_grad = r.read_total().clone(), None  # type: ignore[union-attr]
        fresh = r.total is None and r.param.grad is None and not self.keep_totals and not r.arrived
        r.fresh = fresh and not r.pending
        if r.sums is not None:
            r.sq_now = sq_norm(r.sums.total)
            if r.fresh:
                r.sums.total = None  # type: ignore[assignment]

    def first_of(self, target: Tensor) -> Record:
        """The first parameter in a target."""
        return self._roots(target)[0]

    def compare(self, r: Record, name: str, measured: Tensor, plain: Tensor, g: Tensor, x: Tensor) -> None:
        """The sum of a use's contributions against the gradient that autograd has for it, which is overwritten."""

        def size(t: Tensor) -> float:
            return sq_norm(t).sqrt().item()

        kind = min((t.dtype for t in (measured, plain, g)), key=lambda d: torch.finfo(d).bits)
        terms = size(g) * max(size(x) if x.is_floating_point() else 0.0, x.numel() ** 0.5)
        allowed = ROUNDING.get(kind, 1e-4) * (size(plain) + 0.1 * terms)
        difference = size(plain.sub_(measured))
        if difference > allowed:
            raise RuntimeError(
                f"GradientNoise: the contributions to {r.name!r} of {r.module} through {name} do not add up to the "
                f"gradient of autograd: they differ by {difference:.3g}, of norm {size(plain):.3g}; this is a fault of "
                "normkern (please report it)"
            )

    def _compare(self, r: Record, grad: Tensor) -> None:
        """sum_b c_b against the gradient."""
        assert r.sums is not None
        total = r.sums.total.to(real(grad.dtype))
        tolerance = ROUNDING.get(torch.promote_types(r.sums.total.dtype, grad.dtype), 1e-4)
        tolerance = max(tolerance, ROUNDING.get(grad.dtype, tolerance))
        difference = (grad.to(total.dtype) - total).norm().item()
        scale = grad.norm(dtype=torch.float64).item() + r.sums.sq_norms.sum().sqrt().item()
        if difference > tolerance * scale:
            raise RuntimeError(
                f"GradientNoise: the contributions to {r.name!r} of {r.module} do not add up to its gradient: they "
                f"differ by {difference:.3g}, of norm {scale:.3g}. Something besides the model's layers contributes to "
                "it (a penalty on the weights in the loss, a forward outside the context) or a hook changed it; "
                "expected a loss that is a sum over samples"
            )

    def accumulated(self, r: Record, param: Tensor) -> None:
        """.grad has it."""
        if not self.open or self.estimating:
            return
        r.arrived = True
        if r.status == "exact" and r.sums is None and not r.pending:
            self._unexplained(r)
        if r.fresh:
            assert param.grad is not None
            r.in_grad = weakref.ref(param.grad), param.grad._version

    def _unexplained(self, r: Record) -> None:
        if not any(x.expected for x in self.records) and not self.batches:
            raise RuntimeError(
                "GradientNoise: a backward without a forward inside the context; expected both in one `with`"
            )
        raise RuntimeError(
            f"GradientNoise: {r.name!r} of {r.module} has a gradient but no use was seen; expected its forward inside "
            "the context, through functions of torch that can be followed (not through a compiled or scripted part, a "
            'function with a backward of its own, or an operation on a copy of the parameter), or uncovered="exclude"'
        )

    # ---- After it

    def backward_failed(self) -> None:
        """An exception went through it: nothing of it counts."""
        for r in self.records:
            r.drop_backward()
        self._claimed |= self._claiming
        self._claiming, self._batch_of_backward, self.contrast = set(), None, None
        self._origin_of_backward = None

    def backward_ended(self) -> None:
        """The outermost backward is through: its samples join those before."""
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
            r.sq_now = sq_norm(r.sums.total)  # type: ignore[union-attr]
        if self.projects and self.batches:
            self._reset()
            raise RuntimeError(
                'GradientNoise: stats "projections" expected one backward in one context, got a second: the '
                "projections of the first are on another mean"
            )
        for r in self.records:
            self._join(r, batch)
        self.batches.append(batch)
        self._reset()

    def _reset(self) -> None:
        for r in self.records:
            r.drop_backward()
        self._claimed |= self._claiming
        self._claiming, self._batch_of_backward, self.contrast = set(), None, None
        self._origin_of_backward = None
        self.checking = False if self.checking == "first" else self.checking

    def _join(self, r: Record, batch: int) -> None:
        """This backward's sums of a parameter to those of all: Chan's rule for the centred ones."""
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

    def _spread(self, r: Record, batch: int) -> Tensor:
        if self.contrast is None or r.signed is None:
            raise RuntimeError(
                f'GradientNoise: uncovered="estimate" needs the outputs of the model, one for each sample, to sign the '
                f"samples' gradients of {r.name!r}; expected a call of the model that returns them (not the loss), and "
                "the loss outside of it"
            )
        return self.contrast.spread(r.signed.to(real(r.signed.dtype)), batch)

    @staticmethod
    def _set_centred(r: Record, centred: Tensor | None) -> None:
        r.centred, r.scaled, r.centred_sum = centred, None, None

    def _merged(
        self, r: Record, centred: Tensor | None, previous: Tensor | None, before: int, now: Tensor | None, batch: int
    ) -> Tensor | None:
        """sum (c - mean)^2 over the samples of before and of now, which had no contribution where None."""
        like = next((t for t in (centred, r.centred) if t is not None), None)
        if before == 0:
            return centred
        kind = real(r.param.dtype)
        zero = torch.zeros(r.param.shape, dtype=kind, device=r.param.device) if like is None else torch.zeros_like(like)
        mean_before = zero if previous is None else previous.to(kind) / before
        if now is None and r.fresh:
            now = r.read_total()
        mean_now = zero if now is None else now.to(kind) / batch
        shift = (mean_now - mean_before).square_().mul_(before * batch / (before + batch))
        for t in (r.sum_of_squares(), centred):
            if t is not None:
                shift += t
        return shift


def spreads(records: Sequence[Record], squares: Tensor, batch: int) -> Tensor:
    """sum_b |c_b - mean|^2 of each parameter, float64; `squares` are their |sum_b c_b|^2."""
    device = squares.device
    if all(r.about_zero and r.all_norms is None and len(r.sq_norms) == 1 for r in records):
        moments = torch.stack([r.sq_norms[0].to(device) for r in records]).sum(1)
    else:
        moments = torch.stack([r.moment().to(device) for r in records])
    if not all(r.about_zero for r in records):
        squares = squares * torch.tensor([float(r.about_zero) for r in records], device=device)
    return moments.sub_(squares, alpha=1 / batch).clamp_(min=0)


def combined(parts: list[Part], squares: bool) -> Sums:
    """Of the contributions of several uses of one parameter: those of a sample are added before squaring."""
    first, *others = parts
    if not others:
        return first.sums(squares)
    if all(type(p) is Outer and p.shape == first.shape and _alike(p, first) for p in parts):
        assert isinstance(first, Outer)
        return first.beside([p for p in others if isinstance(p, Outer)]).sums(squares)
    matrices = [as_matrix(p) for p in parts]
    if all(m is not None for m in matrices):
        rows = sum(m.rows.to(real(m.rows.dtype)) for m in matrices if m is not None)
        assert isinstance(rows, Tensor)
        return of_matrix(rows, squares).reshape(first.shape)
    if disjoint(parts):
        every = [p.sums(squares) for p in parts]
        total, sq_norms = sum(s.total for s in every), sum(s.sq_norms for s in every)
        centred = sum(s.centred for s in every if s.centred is not None) if squares else None
        return Sums(total, centred, sq_norms)  # type: ignore[arg-type]
    return one_by_one(first.batch, lambda b: sum(p.sample(b).reshape(first.shape) for p in parts), squares)  # type: ignore[arg-type, return-value]


def _alike(p: Part, q: Part) -> bool:
    assert isinstance(p, Outer)
    assert isinstance(q, Outer)
    return (
        p.a.shape[2] == q.a.shape[2]
        and p.g.shape[2] == q.g.shape[2]
        and p.a.dtype == q.a.dtype == p.g.dtype == q.g.dtype
    )
