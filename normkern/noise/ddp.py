r"""`DDPNoise`: gradient noise from the gradients that the ranks of a `DistributedDataParallel` model average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nan, nn

from .. import ops
from ..tracing import isinstance_if_imported


@dataclass(frozen=True, eq=False)
class DDPNoiseResult:
    r"""Estimates of :math:`\nabla L` and of the covariance :math:`\Sigma` from local gradients :math:`g_r` of m ranks.

    Means over the steps, float64 tensors of no dimension, and ``slot_*`` of shape (parameters,), the same on every
    rank. Unbiased estimates can be negative, and are not clipped. Ratios are of means, as a mean of ratios is biased.

    Attributes:
        steps: number of measured steps.
        skipped: number of steps left out, as a gradient was infinite or NaN: those that a GradScaler skips.
        ranks: m.
        count: gradients :math:`g_r` in all, steps times m.
        batch_size: samples of one rank in a step, or None.
        trace_sigma: estimate of :math:`\mathrm{tr}\,\Sigma`, the covariance of one rank's gradient.
        grad_sq_norm: :math:`|\bar g|^2`, of the mean over ranks.
        grad_sq_norm_unbiased: estimate of :math:`|\nabla L|^2`.
        nsr: trace_sigma / grad_sq_norm_unbiased, the noise-to-signal ratio of one rank's gradient.
        nsr_batch: nsr / m, that of the batch gradient :math:`\bar g`, which the optimizer gets.
        gns: the gradient noise scale :math:`\mathrm{tr}\,\Sigma_1/|\nabla L|^2` in samples; NaN without `batch_size`.
        names, slots: names of the parameters, and where each one is in ``slot_*``.
        slot_trace_sigma, slot_grad_sq_norm, slot_grad_sq_norm_unbiased, slot_nsr_batch: the same per parameter.
    """

    steps: int
    skipped: int
    ranks: int
    count: int
    batch_size: int | None
    trace_sigma: Tensor
    grad_sq_norm: Tensor
    grad_sq_norm_unbiased: Tensor
    nsr: Tensor
    nsr_batch: Tensor
    gns: Tensor
    names: list[str]
    slots: dict[str, slice]
    slot_trace_sigma: Tensor
    slot_grad_sq_norm: Tensor
    slot_grad_sq_norm_unbiased: Tensor
    slot_nsr_batch: Tensor


class DDPNoise:
    r"""Measures the gradient noise of data-parallel training in a communication hook, without another backward pass.

    Each bucket is measured before the ranks' gradients are averaged, and after:

    .. math::
        S = \sum_r |g_r|^2, \qquad \widehat{\mathrm{tr}\,\Sigma} = \frac{S - m|\bar g|^2}{m-1}, \qquad
        \widehat{|\nabla L|^2} = \frac{m|\bar g|^2 - S/m}{m-1}

    without bias, as `RunningMoments` has them with the ranks for its micro-batches. One small all_reduce per step, of a
    number per parameter, is started with the last bucket and is not waited for. So any rank may call `result` alone.

    Args:
        ddp_model: a `DistributedDataParallel` of at least two ranks, of any process group, without a hook so far.
        inner: the hook that averages, or (state, hook), such as those of
            ``torch.distributed.algorithms.ddp_comm_hooks``; a bare hook has the model's process group for its state.
            None: torch's ``allreduce_hook``, the mean that DDP takes by itself. Its result is used as
            :math:`\bar g`: if it compresses, its rounding is in the estimates.
        batch_size: samples of one rank in a step, for `gns`.
        grad_scale: the factor of the losses, or a function that returns it, such as ``scaler.get_scale``, called in
            each backward. Ratios do not need it while it is constant.

    Every backward that averages gradients is a step: under ``no_sync`` gradients add up, and what was accumulated is
    measured where it is averaged. A parameter that a rank does not use counts as a zero gradient of this rank. Steps
    with an infinite or NaN gradient are left out and counted.

    Raises:
        TypeError: ddp_model is no `DistributedDataParallel`, inner no hook. ValueError: a single rank, a `batch_size`
            below 1. RuntimeError: the model has a hook already.

    Reference: McCandlish et al., arXiv 1812.06162, appendix A.1, with the ranks' batches for the small ones and all of
    them for the big one.
    """

    def __init__(
        self,
        ddp_model: nn.Module,
        inner: Callable[..., Any] | tuple[Any, Callable[..., Any]] | None = None,
        *,
        batch_size: int | None = None,
        grad_scale: float | Callable[[], float] = 1.0,
    ) -> None:
        if not isinstance_if_imported(ddp_model, "torch.nn.parallel.distributed", "DistributedDataParallel"):
            raise TypeError(
                "DDPNoise: ddp_model expected a torch.nn.parallel.DistributedDataParallel, got "
                f"{type(ddp_model).__name__}"
            )
        model: Any = ddp_model
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
            raise TypeError(f"DDPNoise: batch_size expected an int or None, got {type(batch_size).__name__}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"DDPNoise: batch_size expected at least 1 sample, got {batch_size}")
        if not callable(grad_scale) and not (isinstance(grad_scale, (int, float)) and 0 < grad_scale < float("inf")):
            raise ValueError(f"DDPNoise: grad_scale expected a positive number or a function, got {grad_scale!r}")
        self._group: Any = model.process_group
        self.ranks: int = self._group.size()
        if self.ranks < 2:
            raise ValueError(
                "DDPNoise: expected a process group of at least 2 ranks, whose gradients can differ, got 1; "
                "normkern.GradientNoise and normkern.RunningMoments measure in one process"
            )
        self._state, self._inner = self._inner_hook(inner)
        self.batch_size = batch_size
        self._grad_scale = grad_scale
        params = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in params]
        self._slot = {id(p): i for i, (_, p) in enumerate(params)}
        if getattr(model, "_comm_hooks", None):
            raise RuntimeError(self._second_hook(model._comm_hooks[0][0]))

        def measured(state: Any, bucket: Any) -> Any:
            return self._reduce(bucket)

        measured.__annotations__.clear()  # torch compares them with classes, and here they are strings
        try:
            model.register_comm_hook(None, measured)
        except RuntimeError as error:
            raise RuntimeError(self._second_hook(None)) from error
        self.reset()

    def _inner_hook(self, inner: Any) -> tuple[Any, Callable[..., Any]]:
        if inner is None:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            return self._group, allreduce_hook
        state, hook = inner if isinstance(inner, tuple) and len(inner) == 2 else (self._group, inner)
        if not callable(hook):
            raise TypeError(f"DDPNoise: inner expected a hook or a pair (state, hook), got {ops.describe(inner)}")
        return state, hook

    @staticmethod
    def _second_hook(first: Any) -> str:
        which = "" if first is None else f", {getattr(first, '__qualname__', first)}"
        return (
            f"DDPNoise: ddp_model has a communication hook already{which}, and takes one; expected a model without, "
            "and the other hook as inner"
        )

    def reset(self) -> None:
        """Forget all steps."""
        self._step: _Step | None = None  # one that is under way, or not added yet
        self._sums: Tensor | None = None  # (2, parameters): of S and of |mean|^2, over the steps
        self._measured: Tensor | None = None  # steps in them
        self._seen = 0

    def _reduce(self, bucket: Any) -> Any:
        """Measure and average one bucket: the communication hook."""
        buffer = bucket.buffer()
        gradients = [buffer] if buffer.layout != torch.strided else bucket.gradients()  # sparse: one of its own
        if bucket.index() == 0:  # what an error has cut short before is forgotten
            self._add_last()
            self._step = _Step(len(self._names), buffer.device)
        step = self._step
        if step is None:  # reset() in the middle of a backward
            return self._checked(self._inner(self._state, bucket))
        where = torch.tensor([self._slot[id(p)] for p in bucket.parameters()])
        step.local[where] = _sq_norms(gradients).to(step.local.device)
        sizes = [g.numel() for g in gradients]
        step.pending += 1
        future = self._checked(self._inner(self._state, bucket))
        if bucket.is_last():
            scale = self._grad_scale() if callable(self._grad_scale) else self._grad_scale
            step.inverse_square = 1 / float(scale) ** 2
            step.work = dist.all_reduce(step.local, group=self._group, async_op=True)

        def arrived(future: torch.futures.Future[Any]) -> Tensor:
            value = future.value()
            mean: Tensor = value[0] if isinstance(value, (list, tuple)) else value
            parts = [mean] if len(sizes) == 1 else list(torch.split(mean.detach().view(-1), sizes))
            step.mean[where] = _sq_norms(parts).to(step.mean.device)
            step.pending -= 1
            return mean

        return future.then(arrived)

    def _checked(self, future: Any) -> Any:
        if not isinstance(future, torch._C.Future):
            raise TypeError(f"DDPNoise: inner expected to return a torch.futures.Future, got {type(future).__name__}")
        return future

    def _add_last(self) -> None:
        """Add the previous step, if its sums have arrived."""
        step = self._step
        if step is None or step.work is None or step.pending:
            return
        self._step = None
        step.work.wait()
        new = torch.stack([step.local, step.mean]) * step.inverse_square
        finite = new.sum().isfinite()
        new = torch.where(finite, new, 0.0)
        self._sums = new if self._sums is None else self._sums + new
        self._measured = finite.double() if self._measured is None else self._measured + finite
        self._seen += 1

    def result(self) -> DDPNoiseResult:
        """Return the estimates from the steps since the start or the last `reset`; later steps do not change them.

        Synchronises with the device, and with no other rank.

        Raises:
            RuntimeError: no backward has averaged gradients yet; another rank has died.
        """
        self._add_last()
        if self._sums is None or self._measured is None:
            raise RuntimeError(
                "DDPNoise.result: expected a backward that averages gradients before it, but there was none"
            )
        m, b, steps = self.ranks, self.batch_size, int(self._measured)
        local, mean = (self._sums / self._measured).unbind()
        trace, unbiased = (local - m * mean) / (m - 1), (m * mean - local / m) / (m - 1)
        nsr = trace.sum() / unbiased.sum()
        return DDPNoiseResult(
            steps=steps,
            skipped=self._seen - steps,
            ranks=m,
            count=steps * m,
            batch_size=b,
            trace_sigma=trace.sum(),
            grad_sq_norm=mean.sum(),
            grad_sq_norm_unbiased=unbiased.sum(),
            nsr=nsr,
            nsr_batch=nsr / m,
            gns=nsr * (nan if b is None else b),
            names=list(self._names),
            slots={name: slice(i, i + 1) for i, name in enumerate(self._names)},
            slot_trace_sigma=trace,
            slot_grad_sq_norm=mean,
            slot_grad_sq_norm_unbiased=unbiased,
            slot_nsr_batch=trace / unbiased / m,
        )

    def __repr__(self) -> str:
        return f"DDPNoise({len(self._names)} parameters, {self.ranks} ranks, {self._seen} steps)"


class _Step:
    """The sums of one backward: per parameter |local gradient|^2, then its sum over ranks, and |mean|^2."""

    __slots__ = ("inverse_square", "local", "mean", "pending", "work")

    def __init__(self, slots: int, device: torch.device) -> None:
        self.local, self.mean = (torch.zeros(slots, dtype=torch.float64, device=device) for _ in range(2))
        self.pending = 0  # buckets that have not come back
        self.inverse_square = 1.0  # of the gradients' scale
        self.work: Any = None  # the all_reduce of `local`; None: the last bucket has not come


@torch.no_grad()
def _sq_norms(tensors: list[Tensor]) -> Tensor:
    """Return |x|^2 of each tensor, (n,) float64. Nothing is synchronised."""
    flat = [x.detach() for x in tensors]
    if all(x.layout == torch.strided and ops.kernel_takes(x) for x in flat):
        return ops.grad_sq_norms(flat)
    return torch.stack([(x.coalesce().values() if x.is_sparse else x).abs().double().square().sum() for x in flat])
