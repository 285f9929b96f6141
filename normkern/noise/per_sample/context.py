"""`GradientNoise`: per-sample gradient statistics of an ordinary model, from an ordinary forward and backward."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import Self

from ...tracing import force_eager, isinstance_if_imported
from . import distributed as processes
from . import random_signs as signs
from . import sample_layout as rows
from .accumulator import Ledger, Record, Uncovered, spreads
from .model_parameters import Anatomy, batch_norms
from .result import Coverage, GradientNoiseResult, scalars
from .sample_layout import Lost, Rows
from .tracer import Capture

TIERS = ("nsr", "norms", "variance", "projections")
_open = threading.local()
_INSIDE_A_GRAPH = "GradientNoise: entered inside a function that torch.compile compiles; expected the context around it"


class GradientNoise:
    r"""Context around forward and backward: statistics of the gradients of the single samples of a batch.

    .. math::
        L = \sum_b w_b \ell_b, \qquad c_b = \nabla(w_b \ell_b), \qquad \sum_b c_b = \texttt{.grad}, \qquad g_b = u\, c_b

    with u = B for ``reduction="mean"`` and 1 for ``"sum"``. ``.grad`` becomes what it always becomes, to rounding: the
    layers' weight gradients come from the same pass as their statistics. The model is not touched, and hooks are
    removed at the end. Several backwards in one context, of a forward each, are one batch.

    Args:
        model: any module with trainable parameters in float64, float32, bfloat16 or float16.
        stats: of "nsr" (the scalars alone, the cheapest), "norms" (a number for each sample), "variance"
            (elementwise), "projections" (on the mean; one backward in a context).
        reduction: of the loss over samples; ratios do not need it.
        batch_size: B; None: the leading dimension of the first tensor that the model is given.
        uncovered: what becomes of parameters whose use hides the samples: "raise" an error that names them, "estimate"
            them by a further backward with random signs (`signs`), or "exclude" them; `coverage` tells.
        check: whether every layer is compared with autograd in the first context ("first"), always or never. That what
            arrives in ``.grad`` is what was measured is checked always.

    By kernels on the CPU and on CUDA devices, elsewhere by torch. Nothing is synchronised there but by checks. What
    torch.compile has compiled (the model, a part of it, a function around it) runs uncompiled while a context is open.

    Raises:
        TypeError, ValueError: arguments; a batch of less than two samples; a batch_size that is not the model's.
        RuntimeError: batch statistics, operations that mix samples, a scripted model, contexts inside each other or
            inside a compiled function, a backward outside of its context or a second one of one forward, contributions
            that do not add up.
        NotImplementedError: a parameter that is not covered, with ``uncovered="raise"``.

    A loss that couples samples by itself (contrastive, over the batch) cannot be seen.

    Reference: McCandlish et al., arXiv 1812.06162, for the noise scale; Gray et al., arXiv 2411.00999, for norms in the
    pass of the weight gradient.

    >>> import torch, normkern
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> noise = normkern.GradientNoise(model, stats=("nsr", "norms", "variance"))
    >>> with noise:
    ...     loss = model(torch.tensor([[1.0, 0.0], [3.0, 2.0]])).mean()
    ...     loss.backward()
    >>> result = noise.result()
    >>> result.mean["weight"], result.variance["weight"], result.sq_norms
    (tensor([[2., 1.]]), tensor([[2., 2.]]), tensor([ 1., 13.], dtype=torch.float64))
    >>> result.trace_sigma.item(), result.grad_sq_norm.item(), result.nsr_batch.item()
    (4.0, 5.0, 0.4)
    """

    def __init__(
        self,
        model: nn.Module,
        stats: Iterable[str] | str = ("nsr",),
        *,
        reduction: Literal["mean", "sum"] = "mean",
        batch_size: int | None = None,
        uncovered: Uncovered = "raise",
        check: bool | Literal["first"] = "first",
    ) -> None:
        where = "GradientNoise"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{where}: model expected a torch.nn.Module, got {type(model).__name__}")
        tiers = (stats,) if isinstance(stats, str) else tuple(stats)
        if not tiers or not all(isinstance(t, str) and t in TIERS for t in tiers):
            raise ValueError(f"{where}: stats expected some of {', '.join(TIERS)}, got {stats!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{where}: reduction expected "mean" or "sum", got {reduction!r}')
        if uncovered not in ("raise", "estimate", "exclude"):
            raise ValueError(f'{where}: uncovered expected "raise", "estimate" or "exclude", got {uncovered!r}')
        if not (isinstance(check, bool) or check == "first"):
            raise ValueError(f'{where}: check expected True, False or "first", got {check!r}')
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
            raise TypeError(f"{where}: batch_size expected an int or None, got {type(batch_size).__name__}")
        if batch_size is not None and batch_size < 2:
            raise ValueError(f"{where}: batch_size expected at least 2 samples, got {batch_size}")
        self.model = model
        self.stats = tiers
        self.reduction: Literal["mean", "sum"] = reduction
        self.batch_size = batch_size
        self.uncovered: Uncovered = uncovered
        self.check: bool | Literal["first"] = check
        self._checked = False
        self._ledger: Ledger | None = None
        self._capture: Capture | None = None
        self._handles: list[Any] = []
        self._eagerly: AbstractContextManager[None] | None = None
        self._outermost: nn.Module | None = None  # that runs now
        self._depth = 0  # of calls of the outermost module by itself
        self._seen_out: set[nn.Module] = set()

    def __repr__(self) -> str:
        return f"GradientNoise({type(self.model).__name__}, stats={self.stats!r}, reduction={self.reduction!r})"

    # ---- The context

    def __enter__(self) -> Self:
        if is_dynamo_compiling():
            raise RuntimeError(_INSIDE_A_GRAPH)
        if getattr(_open, "noise", None) is not None:
            raise RuntimeError("GradientNoise: this context is inside another one; expected one at a time")
        anatomy = Anatomy.of(self.model)
        records = anatomy.records
        if not records:
            raise ValueError("GradientNoise: model has no parameter that requires a gradient")
        uncompiled = force_eager()
        try:
            uncompiled.__enter__()
        except RuntimeError as error:
            raise RuntimeError(_INSIDE_A_GRAPH) from error
        self._eagerly = uncompiled
        checking = self.check if self.check != "first" else (False if self._checked else "first")
        self._ledger = Ledger(
            records, anatomy.constants, frozenset(self.stats), self.uncovered, checking, _is_ddp(self.model),
            self.batch_size, lambda: batch_norms(self.model),
        )  # fmt: skip
        self._capture = self._ledger.capture = Capture(self._ledger)
        self._outermost = None
        ledger = self._ledger
        for r in records:
            self._handles.append(r.param.register_hook(_unseen(ledger.incoming, r)))
            self._handles.append(r.param.register_post_accumulate_grad_hook(_unseen(ledger.accumulated, r)))
        for module in anatomy.modules:
            self._handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True))
        _open.noise = self
        self._capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._capture is not None
        assert self._ledger is not None
        assert self._eagerly is not None
        self._capture.__exit__(kind, error, trace)
        self._eagerly.__exit__(None, None, None)
        _open.noise = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen_out.clear()
        self._ledger.open = False
        self._capture.forget()
        self._capture = self._ledger.capture = (
            None  # each holds the other, and a ledger's numbers are as large as the model
        )
        if self._ledger.batches:
            self._checked = True

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before every module's forward; the outermost one gets the samples."""
        if self._outermost is not None:
            self._depth += module is self._outermost
            return
        if torch._C._current_graph_task_id() != -1:
            return
        self._outermost, self._depth = module, 1
        if module not in self._seen_out:
            self._seen_out.add(module)
            self._handles.append(module.register_forward_hook(self._returned, with_kwargs=True, always_call=True))
        assert self._ledger is not None
        assert self._capture is not None
        ledger, capture = self._ledger, self._capture
        with torch._C.DisableTorchFunction():
            tensors = [
                t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() and not ledger.knows(t)
            ]
            states = [capture.state(t) for t in tensors]
            new = [not (isinstance(s, Lost) or (isinstance(s, Rows) and s.certain)) for s in states]
            if new and new[0] and module is self.model:
                ledger.batch = self._batch_of(tensors[0])
            ledger.new_call(bool(new and new[0]))
            for i, t in enumerate(tensors):  # the first is the batch; others yield where they do not fit
                if new[i] and ledger.batch is not None and t.shape[0] == ledger.batch and t.numel():
                    capture.mark(t, rows.leading(t.shape, ledger.batch, certain=i == 0))

    def _batch_of(self, x: Tensor) -> int:
        """B, of the first tensor that the model is given."""
        batch = x.shape[0]
        if self.batch_size is not None and batch != self.batch_size:
            raise ValueError(
                f"GradientNoise: batch_size is {self.batch_size}, but the first tensor passed to the model has {batch} "
                f"samples, its shape is {tuple(x.shape)}"
            )
        if batch < 2:
            raise ValueError(
                f"GradientNoise: expected a batch of at least 2 samples, got {batch}: the first tensor passed to the "
                f"model has shape {tuple(x.shape)}"
            )
        return batch

    def _returned(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """After the forward of a module that has been the outermost one."""
        if module is not self._outermost:
            return None
        self._depth -= 1
        if self._depth:
            return None
        self._outermost = None
        if self.uncovered != "estimate":
            return None
        assert self._ledger is not None
        assert self._capture is not None
        capture, ledger = self._capture, self._ledger

        def tapped(x: Any) -> Any:
            state = capture.state(x) if isinstance(x, Tensor) and x.requires_grad else None
            if not isinstance(state, Rows):
                return x
            with torch._C.DisableTorchFunction():
                y = signs.Tap.apply(ledger, state.block, x, [x])
            capture.mark(y, state)
            return y

        return tree_map(tapped, out)

    # ---- What was measured

    def result(self, *, sync: bool = True) -> GradientNoiseResult:
        """Of the context entered last; it can be asked for again until the next entry.

        Args:
            sync: of a `DistributedDataParallel` model, whether the numbers are of all processes' samples, as one
                process would have them of the joint batch: then every process must call this. Each sample counts the
                same, also where processes have different numbers of them. What is per sample (`sq_norms`) stays that
                of its own.

        Raises:
            RuntimeError: nothing was measured, here or in another process, or not what was asked for.
        """
        ledger = self._ledger
        together = sync and _is_ddp(self.model)
        batches: list[int] = []
        if together:
            records = Anatomy.of(self.model).records if ledger is None else ledger.records
            own = 0 if ledger is None else sum(ledger.batches)
            batches = processes.agree(records, own, self.model.process_group)
        if ledger is None or not ledger.batches:
            raise RuntimeError(
                "GradientNoise.result: expected a forward and a backward inside the context before it"
                + ("" if ledger is None else ", but there was no backward")
            )
        if any(r.status == "estimated" for r in ledger.records) and {"norms", "projections"} & set(self.stats):
            raise RuntimeError(
                'GradientNoise.result: stats "norms" and "projections" are of single samples, which estimated '
                'parameters do not have; expected "nsr" or "variance" with uncovered="estimate", or uncovered="exclude"'
            )
        if together and ledger.projects:
            raise RuntimeError(
                'GradientNoise.result: stats "projections" are on the mean of a process\'s own samples; expected '
                "sync=False, or a context without them"
            )
        batch = sum(ledger.batches)
        unit = float(batch) if self.reduction == "mean" else 1.0
        measured: list[Record] = [r for r in ledger.records if r.status != "excluded"]
        if not measured:
            raise RuntimeError("GradientNoise.result: all parameters are excluded; expected one that is covered")
        if together:
            joined = processes.join(measured, batch, unit, batches, ledger.squares, self.model.process_group)
            measured, batch, unit = joined.records, joined.batch, 1.0
        device = measured[0].param.device
        squares = torch.stack([r.square().to(device) for r in measured])
        traces = spreads(measured, squares, batch) * (unit**2 / (batch - 1))
        signals = squares * (unit / batch) ** 2
        whole = scalars(traces.sum(), signals.sum(), batch)
        norms = None
        if "norms" in self.stats:
            norms = {r.name: torch.cat(r.sq_norms) * unit**2 for r in measured}
        projections = None
        if ledger.projects:
            projections = _sum(r.all_projections for r in measured if r.all_projections is not None)
            projections = projections * (unit**2 / batch)
        return GradientNoiseResult(
            **vars(whole),
            batch_size=batch,
            sq_norms=None if norms is None else _sum(n.to(device) for n in norms.values()),
            sq_norms_per_param=norms,
            projections=projections,
            variance={r.name: r.variance(unit**2 / (batch - 1)) for r in measured} if ledger.squares else None,
            _names=[r.name for r in measured],
            _traces=traces,
            _signals=signals,
            _read_mean=lambda: {r.name: r.mean(unit / batch) for r in measured},
            _read_coverage=lambda: _coverage(ledger),
        )


def _unseen(hook: Callable[[Record, Tensor], None], r: Record) -> Callable[[Tensor], None]:
    """A hook of a parameter, whose own operations the mode does not see."""

    def call(t: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            hook(r, t)

    return call


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *rest = list(values)
    for x in rest:
        first = first + x
    return first


def _coverage(ledger: Ledger) -> Coverage:
    words = ("exact", "estimated", "excluded", "unused")
    kinds = {r.name: r.status if r.used or r.status != "exact" else "unused" for r in ledger.records}
    names = {w: tuple(n for n, k in kinds.items() if k == w) for w in words}
    sizes = {r.name: r.param.numel() for r in ledger.records}
    squares = {r.name: float(r.square()) for r in ledger.records}
    count, whole = sum(sizes.values()), math.fsum(squares.values())
    return Coverage(
        **names,
        parameters={w: sum(sizes[n] for n in names[w]) / count for w in words},
        grad_sq={w: (math.fsum(squares[n] for n in names[w]) / whole if whole else 0.0) for w in words},
    )


def _is_ddp(model: nn.Module) -> bool:
    return isinstance_if_imported(model, "torch.nn.parallel.distributed", "DistributedDataParallel")
