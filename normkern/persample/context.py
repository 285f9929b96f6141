"""`GradientNoise`: per-sample gradient statistics of an ordinary model, from an ordinary forward and backward."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import Self

from ..kinds import is_a
from . import rows, signs
from .capture import Capture
from .ledger import Ledger, Record, Uncovered
from .result import Coverage, GradientNoiseResult, NoiseScalars, scalars
from .rows import Rows
from .sums import plain_sum, real

TIERS = ("nsr", "norms", "variance", "projections")
_open = threading.local()


class GradientNoise:
    r"""Context around forward and backward: statistics of the gradients of the single samples of a batch.

    .. math::
        L = \sum_b w_b \ell_b, \qquad c_b = \nabla(w_b \ell_b), \qquad \sum_b c_b = \texttt{.grad}, \qquad g_b = u\, c_b

    with u = B for ``reduction="mean"`` and 1 for ``"sum"``.

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
        self._depth = 0

    def __repr__(self) -> str:
        return f"GradientNoise({type(self.model).__name__}, stats={self.stats!r}, reduction={self.reduction!r})"

    # ---- The context

    def __enter__(self) -> Self:
        if getattr(_open, "noise", None) is not None:
            raise RuntimeError("GradientNoise: this context is inside another one; expected one at a time")
        _refuse_compiled(self.model)
        records = _records(self.model)
        if not records:
            raise ValueError("GradientNoise: model has no parameter that requires a gradient")
        trained = {id(r.param) for r in records}
        constants = {id(t) for t in (*self.model.buffers(), *self.model.parameters()) if id(t) not in trained}
        checking = self.check if self.check != "first" else (False if self._checked else "first")
        self._ledger = Ledger(
            records, constants, frozenset(self.stats), self.uncovered, checking, _is_ddp(self.model), self.batch_size,
            lambda: _batch_norms(self.model),
        )  # fmt: skip
        self._capture = self._ledger.capture = Capture(self._ledger)
        self._depth = 0
        ledger = self._ledger
        for r in records:
            self._handles.append(r.param.register_hook(lambda g, r=r: ledger.incoming(r, g)))
            self._handles.append(r.param.register_post_accumulate_grad_hook(lambda p, r=r: ledger.accumulated(r)))
        for module in self.model.modules():
            self._handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._returned, with_kwargs=True, always_call=True))
        _open.noise = self
        self._capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._capture is not None and self._ledger is not None
        self._capture.__exit__(kind, error, trace)
        _open.noise = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ledger.open = False
        self._capture.forget()
        if self._ledger.batches:
            self._checked = True

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before every module's forward; the outermost one gets the samples."""
        self._depth += 1
        if self._depth > 1 or torch._C._current_graph_task_id() != -1:
            return
        assert self._ledger is not None and self._capture is not None
        ledger, capture = self._ledger, self._capture
        with torch._C.DisableTorchFunction():
            tensors = [
                t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() and not ledger.knows(t)
            ]
            new = [t for t in tensors if not capture.known(t)]
            if new and (module is self.model or ledger.batch is None):
                batch = new[0].shape[0]
                if self.batch_size is not None and batch != self.batch_size:
                    raise ValueError(
                        f"GradientNoise: batch_size is {self.batch_size}, but the first tensor passed to the model has "
                        f"{batch} samples, its shape is {tuple(new[0].shape)}"
                    )
                if batch < 2:
                    raise ValueError(
                        f"GradientNoise: expected a batch of at least 2 samples, got {batch}: the first tensor passed "
                        f"to the model has shape {tuple(new[0].shape)}"
                    )
                ledger.batch = batch
            ledger.new_call()
            for i, t in enumerate(new):  # the first is the batch; others yield where they do not fit
                if ledger.batch is not None and t.shape[0] == ledger.batch and t.numel():
                    capture.mark(t, rows.leading(t.shape, ledger.batch, certain=i == 0))

    def _returned(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """After every module's forward."""
        self._depth = max(self._depth - 1, 0)
        if self._depth or self.uncovered != "estimate" or torch._C._current_graph_task_id() != -1:
            return None
        assert self._ledger is not None and self._capture is not None
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
        """Of the context entered last."""
        ledger = self._ledger
        if ledger is None or not ledger.batches:
            raise RuntimeError(
                "GradientNoise.result: expected a forward and a backward inside the context before it"
                + ("" if ledger is None else ", but there was no backward")
            )
        batch = sum(ledger.batches)
        unit = float(batch) if self.reduction == "mean" else 1.0
        norms: dict[str, Tensor] = {}
        variance: dict[str, Tensor] = {}
        per_param: dict[str, NoiseScalars] = {}
        kinds: dict[str, str] = {}
        squares: dict[str, Tensor] = {}
        for r in ledger.records:
            used = r.total is not None or r.in_grad is not None
            zero = torch.zeros((), dtype=torch.float64, device=r.param.device)
            total_sq = zero if r.total_sq is None else r.total_sq.to(torch.float64)
            kinds[r.name] = r.status if used or r.status != "exact" else "unused"
            squares[r.name] = total_sq
            if r.status == "excluded":
                continue
            spread = zero
            if r.centred is not None:
                spread = plain_sum(r.centred)
            elif r.status == "exact" and used:
                spread = (torch.cat(r.sq_norms).sum() - total_sq / batch).clamp(min=0)
            trace = spread / (batch - 1) * unit**2
            per_param[r.name] = scalars(trace, total_sq * (unit / batch) ** 2, batch)
            if r.status == "exact":
                norms[r.name] = torch.cat(r.sq_norms) * unit**2
            if ledger.squares:
                variance[r.name] = (
                    torch.zeros(r.param.shape, dtype=real(r.param.dtype), device=r.param.device)
                    if r.centred is None
                    else r.centred.reshape(r.param.shape) * (unit**2 / (batch - 1))
                )
        whole = scalars(
            _sum(s.trace_sigma for s in per_param.values()), _sum(s.grad_sq_norm for s in per_param.values()), batch
        )
        if any(r.status == "estimated" for r in ledger.records) and {"norms", "projections"} & set(self.stats):
            raise RuntimeError(
                'GradientNoise.result: stats "norms" and "projections" are of single samples, which estimated parameters '
                'do not have; expected "nsr" or "variance" with uncovered="estimate", or uncovered="exclude"'
            )
        projections = None
        if "projections" in self.stats:
            projections = _sum(r.all_projections for r in ledger.records if r.all_projections is not None)
            projections = projections * (unit * unit / batch)
        wants_norms = "norms" in self.stats
        return GradientNoiseResult(
            **{k: getattr(whole, k) for k in NoiseScalars.__dataclass_fields__},
            batch_size=batch,
            sq_norms=_sum(norms.values()) if wants_norms else None,
            sq_norms_per_param=norms if wants_norms else None,
            projections=projections,
            variance=variance if ledger.squares else None,
            per_param=per_param,
            coverage=_coverage(ledger, kinds, squares),
            _read_mean=lambda: _means(ledger, unit / batch),
        )


def _means(ledger: Ledger, factor: float) -> dict[str, Tensor]:
    out = {}
    for r in ledger.records:
        if r.status == "excluded":
            continue
        total = r.read_total()
        if total is None:
            out[r.name] = torch.zeros(r.param.shape, dtype=real(r.param.dtype), device=r.param.device)
        else:
            out[r.name] = total.to(real(total.dtype)).reshape(r.param.shape) * factor
    return out


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *rest = list(values)
    for x in rest:
        first = first + x
    return first


def _coverage(ledger: Ledger, kinds: dict[str, str], squares: dict[str, Tensor]) -> Coverage:
    words = ("exact", "estimated", "excluded", "unused")
    names = {w: tuple(n for n, k in kinds.items() if k == w) for w in words}
    sizes = {r.name: r.param.numel() for r in ledger.records}
    count = sum(sizes.values())
    whole = sum(float(x) for x in squares.values())
    return Coverage(
        **names,
        parameters={w: sum(sizes[n] for n in names[w]) / count for w in words},
        grad_sq={w: (math.fsum(float(squares[n]) for n in names[w]) / whole if whole else 0.0) for w in words},
    )


def _records(model: nn.Module) -> list[Record]:
    modules = dict(model.named_modules())
    out = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            path = name.rpartition(".")[0]
            module = modules.get(path, model)
            out.append(Record(name, f"{path or 'the model'} ({type(module).__name__})", p))
    return out


def _is_ddp(model: nn.Module) -> bool:
    return is_a(model, "torch.nn.parallel.distributed", "DistributedDataParallel")


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or is_a(module, "torch._dynamo.eval_frame", "OptimizedModule"):
            raise RuntimeError(
                f"GradientNoise: {name or 'the model'} is compiled (torch.compile), so that its operations cannot be "
                "seen; expected the model as it was before, which shares its parameters (compiled._orig_mod)"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(
                f"GradientNoise: {name or 'the model'} is scripted or traced (torch.jit), so that its operations cannot "
                "be seen; expected the module that it was made of"
            )


def _batch_norms(model: nn.Module) -> str:
    """The layers that use batch statistics now, for an error."""
    kind = nn.modules.batchnorm._BatchNorm
    found = [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, kind) and (m.training or m.running_mean is None)
    ]
    return ", ".join(found) or "batch_norm(training=True)"
