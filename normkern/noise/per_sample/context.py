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
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import Self

from ...tracing import force_eager, isinstance_if_imported
from . import distributed, errors, sample_layout
from .accumulator import Accumulator
from .model_parameters import ModelParameters, batch_norms
from .numbered import state_of_packed
from .random_signs import SignedBackward
from .record import ParameterRecord, Uncovered, spreads
from .result import Coverage, GradientNoiseResult, scalars
from .sample_layout import Mixed, SampleLayout
from .tracer import Tracer

TIERS = ("nsr", "norms", "variance", "projections")
_open = threading.local()


class GradientNoise:
    r"""Context manager around forward and backward: statistics of the per-sample gradients of a batch.

    .. math::
        L = \sum_b w_b \ell_b, \qquad c_b = \nabla(w_b \ell_b), \qquad \sum_b c_b = \texttt{.grad}, \qquad g_b = u\, c_b

    with u = B for ``reduction="mean"`` and 1 for ``"sum"``. ``.grad`` gets the same values as without the context, to
    rounding: the layers' weight gradients come from the same pass as their statistics. The model is not touched, and
    hooks are removed at the end. Several backwards in one context, of a forward each, are one batch.

    Args:
        model: any module with trainable parameters in float64, float32, bfloat16 or float16.
        stats: of "nsr" (the scalars alone, the cheapest), "norms" (a number for each sample), "variance"
            (elementwise), "projections" (on the mean; one backward in a context).
        reduction: of the loss over samples; ratios do not need it.
        batch_size: B; None: the leading dimension of the first tensor that the model is given.
        uncovered: what to do with parameters whose per-sample contributions cannot be measured: "raise" an error that
            names them, "estimate" them by a further backward with random signs (`random_signs`), or "exclude" them;
            `coverage` lists them.
        check: whether every layer is compared with autograd in the first context ("first"), always or never. That
            ``.grad`` gets the sum of what was measured is always checked.

    Kernels compute the sums on the CPU and on CUDA devices, torch elsewhere. Only checks synchronise a device. What
    torch.compile has compiled (the model, a part of it, a function around it) runs uncompiled while a context is open.

    Raises:
        TypeError, ValueError: arguments; a batch of less than two samples; a batch_size that is not the model's.
        RuntimeError: batch statistics, operations that mix samples, a scripted model, contexts inside each other or
            inside a compiled function, a backward outside of its context or a second one of one forward, contributions
            that do not add up.
        NotImplementedError: a parameter that is not covered, with ``uncovered="raise"``.

    A loss that couples samples by itself (contrastive, over the batch) cannot be detected.

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
        self._accumulator: Accumulator | None = None
        self._tracer: Tracer | None = None
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
            raise RuntimeError(errors.INSIDE_A_GRAPH)
        if getattr(_open, "noise", None) is not None:
            raise errors.nested()
        parameters = ModelParameters.of(self.model)
        records = parameters.records
        if not records:
            raise errors.no_parameters()
        uncompiled = force_eager()
        try:
            uncompiled.__enter__()
        except RuntimeError as error:
            raise RuntimeError(errors.INSIDE_A_GRAPH) from error
        self._eagerly = uncompiled
        checking = self.check if self.check != "first" else (False if self._checked else "first")
        self._accumulator = Accumulator(
            records, parameters.constants, frozenset(self.stats), self.uncovered, checking, _is_ddp(self.model),
            self.batch_size, lambda: batch_norms(self.model),
        )  # fmt: skip
        self._tracer = Tracer(self._accumulator)
        self._outermost = None
        accumulator = self._accumulator
        for r in records:
            self._handles.append(r.param.register_hook(_unseen(accumulator.incoming, r)))
            self._handles.append(r.param.register_post_accumulate_grad_hook(_unseen(accumulator.accumulated, r)))
        for module in parameters.modules:
            self._handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True))
        _open.noise = self
        self._tracer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._tracer is not None
        assert self._accumulator is not None
        assert self._eagerly is not None
        self._tracer.__exit__(kind, error, trace)
        self._eagerly.__exit__(None, None, None)
        _open.noise = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen_out.clear()
        self._accumulator.open = False
        self._tracer.tensors.forget()
        self._tracer = None
        if self._accumulator.batches:
            self._checked = True

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record, before every module's forward, the samples that the outermost module gets."""
        if self._outermost is not None:
            self._depth += module is self._outermost
            return
        if torch._C._current_graph_task_id() != -1:
            return
        self._outermost, self._depth = module, 1
        if module not in self._seen_out:
            self._seen_out.add(module)
            self._handles.append(module.register_forward_hook(self._returned, with_kwargs=True, always_call=True))
        assert self._accumulator is not None
        assert self._tracer is not None
        accumulator, tensors = self._accumulator, self._tracer.tensors
        with torch._C.DisableTorchFunction():
            leaves = tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))
            given = [
                x
                for x in leaves
                if isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.dim() and not accumulator.knows(x))
            ]
            states = [tensors.state(x.data if isinstance(x, PackedSequence) else x) for x in given]
            new = [not (isinstance(s, Mixed) or (isinstance(s, SampleLayout) and s.certain)) for s in states]
            if new and new[0] and module is self.model:
                accumulator.batch = self._batch_of(given[0])
            accumulator.new_call(bool(new and new[0]))
            for i, x in enumerate(given):  # the first is the batch; others yield where they do not fit
                if new[i] and accumulator.batch is not None and _samples_in(x) == accumulator.batch:
                    if isinstance(x, PackedSequence):
                        tensors.mark(x.data, state_of_packed(x, accumulator.batch))
                    elif x.numel():
                        tensors.mark(x, sample_layout.leading(x.shape, accumulator.batch, certain=x is given[0]))

    def _batch_of(self, x: Tensor | PackedSequence) -> int:
        """Return B, the leading dimension of the first tensor that the model is given, or the number of sequences."""
        batch = _samples_in(x)
        x = x.data if isinstance(x, PackedSequence) else x
        if self.batch_size is not None and batch != self.batch_size:
            raise errors.wrong_batch_size(self.batch_size, batch, tuple(x.shape))
        if batch < 2:
            raise errors.small_batch(batch, tuple(x.shape))
        return batch

    def _returned(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Prepare the signed backward, after the forward of the outermost module, if estimates are wanted."""
        if module is not self._outermost:
            return None
        self._depth -= 1
        if self._depth:
            return None
        self._outermost = None
        if self.uncovered != "estimate":
            return None
        assert self._accumulator is not None
        assert self._tracer is not None
        accumulator, tensors = self._accumulator, self._tracer.tensors

        def signed(x: Any) -> Any:
            layout = tensors.layout(x) if isinstance(x, Tensor) and x.requires_grad else None
            if layout is None:
                return x
            with torch._C.DisableTorchFunction():
                y = SignedBackward.apply(accumulator, layout.block, x, [x])
            tensors.mark(y, layout)
            return y

        return tree_map(signed, out)

    # ---- The result

    def result(self, *, sync: bool = True) -> GradientNoiseResult:
        """Return the statistics of the context entered last; it can be called again until the next entry.

        Args:
            sync: for a `DistributedDataParallel` model, whether the numbers are of all processes' samples, as one
                process would have them of the joint batch: then every process must call this. Each sample counts the
                same, also where processes have different numbers of them. Numbers per sample (`sq_norms`) stay those
                of the process's own samples.

        Raises:
            RuntimeError: nothing was measured, here or in another process, or a statistic cannot be given.
        """
        accumulator = self._accumulator
        together = sync and _is_ddp(self.model)
        batches: list[int] = []
        if together:
            records = ModelParameters.of(self.model).records if accumulator is None else accumulator.records
            own = 0 if accumulator is None else sum(accumulator.batches)
            batches = distributed.agree(records, own, self.model.process_group)
        if accumulator is None or not accumulator.batches:
            raise errors.nothing_measured(entered=accumulator is not None)
        if any(r.status == "estimated" for r in accumulator.records) and {"norms", "projections"} & set(self.stats):
            raise errors.estimated_samples()
        if together and accumulator.projects:
            raise errors.joint_projections()
        batch = sum(accumulator.batches)
        unit = float(batch) if self.reduction == "mean" else 1.0
        measured: list[ParameterRecord] = [r for r in accumulator.records if r.status != "excluded"]
        if not measured:
            raise errors.all_excluded()
        if together:
            joined = distributed.join(measured, batch, unit, batches, accumulator.squares, self.model.process_group)
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
        if accumulator.projects:
            projections = _sum(r.all_projections for r in measured if r.all_projections is not None)
            projections = projections * (unit**2 / batch)
        return GradientNoiseResult(
            **vars(whole),
            batch_size=batch,
            sq_norms=None if norms is None else _sum(n.to(device) for n in norms.values()),
            sq_norms_per_param=norms,
            projections=projections,
            variance={r.name: r.variance(unit**2 / (batch - 1)) for r in measured} if accumulator.squares else None,
            _names=[r.name for r in measured],
            _traces=traces,
            _signals=signals,
            _read_mean=lambda: {r.name: r.mean(unit / batch) for r in measured},
            _read_coverage=lambda: _coverage(accumulator),
        )


def _samples_in(x: Tensor | PackedSequence) -> int:
    """Return the number of samples of an argument of the model."""
    return int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else x.shape[0]


def _unseen(hook: Callable[[ParameterRecord, Tensor], None], r: ParameterRecord) -> Callable[[Tensor], None]:
    """Return a hook of a parameter whose own operations the tracer does not see."""

    def call(t: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            hook(r, t)

    return call


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *rest = list(values)
    for x in rest:
        first = first + x
    return first


def _coverage(accumulator: Accumulator) -> Coverage:
    words = ("exact", "estimated", "excluded", "unused")
    kinds = {r.name: r.status if r.used or r.status != "exact" else "unused" for r in accumulator.records}
    names = {w: tuple(n for n, k in kinds.items() if k == w) for w in words}
    sizes = {r.name: r.param.numel() for r in accumulator.records}
    squares = {r.name: float(r.square()) for r in accumulator.records}
    count, whole = sum(sizes.values()), math.fsum(squares.values())
    return Coverage(
        **names,
        parameters={w: sum(sizes[n] for n in names[w]) / count for w in words},
        grad_sq={w: (math.fsum(squares[n] for n in names[w]) / whole if whole else 0.0) for w in words},
    )


def _is_ddp(model: nn.Module) -> bool:
    return isinstance_if_imported(model, "torch.nn.parallel.distributed", "DistributedDataParallel")
