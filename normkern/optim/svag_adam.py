"""`SVAGAdam` and `SVAGAdamW`: Adam from two gradients, whose noise is scaled towards the SDE of Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import ops
from ..theory import svag_adam, svag_adam_fraction
from .adam import Adam, AdamW
from .adam_group import AdamGroupStep, AdamWGroupStep, check_betas
from .clip_options import ClipOptions
from .corrected_decay import CORRECTED, with_decay_of_step
from .dtensor import is_dtensor
from .group_step import Scaler, share_memory
from .low_precision import PRECISION
from .options import NORM, check_decay, number
from .pair import Pair
from .pair_steps import Pairs, PairSteps, check_norm_is_free
from .run_state import RunState


class SvagAdamState(RunState):
    """The mutable state of an `SVAGAdam`."""

    __slots__ = ("of_groups", "pairs")

    def __init__(self, optimizer: Any, clip_options: ClipOptions, part_of: str | None) -> None:
        super().__init__(optimizer, clip_options, part_of)
        self.pairs = Pairs()
        #: The two gradients of each group, while a step runs.
        self.of_groups: dict[int, _Two] = {}


class _Two:
    """The first and the second gradients of a group, both times 1/`inverse_scale`.

    A parameter without a first gradient has its only one as the second.
    """

    __slots__ = ("first", "inverse_scale", "second", "which")

    def __init__(self, first: list[Any], second: list[Any], first_inverse_scale: float, inverse_scale: float) -> None:
        self.which = [i for i, a in enumerate(first) if a is not None]
        if first_inverse_scale != inverse_scale:  # scaler.unscale_ has written the second ones
            scales = [first_inverse_scale if a is None else inverse_scale for a in first]
            first = [None if a is None else a * first_inverse_scale for a in first]
            second = [None if b is None else b * s for b, s in zip(second, scales, strict=True)]
            inverse_scale = 1.0
        self.first, self.second, self.inverse_scale = first, second, inverse_scale

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.first[i] for i in self.which], [self.second[i] for i in self.which]

    def combined(self, l: float) -> list[Any]:
        """Return what to step with: the combinations, in new memory; at l = 1 the first gradients."""
        a, b = self._pairs()
        square = float(svag_adam_fraction(l))
        if l == 1:
            c = a
        elif ops.kernels_take((*a, *b)):
            c = [x.clone() for x in a]
            ops.svag_combine_(c, b, square)
        else:
            from ..reference import svag_combination

            c = [svag_combination(x, y, square) for x, y in zip(a, b, strict=True)]
        result = list(self.second)
        for i, x in zip(self.which, c, strict=True):
            result[i] = x
        return result

    def sums(self, stats: ops.Stats) -> list[Tensor]:
        """Return `ops.PAIR_SUMS` of the slots of every parameter that has a pair."""
        a, b = self._pairs()
        if ops.kernels_take((*a, *b)):
            code = ops.stats_code(stats, "SVAGAdam")
            tables = list(torch.split(ops.pair_sums(a, b, stats), [ops.slot_count(x, code) for x in a]))
        else:
            from ..reference import gradient_sums

            tables = [gradient_sums(x, y, stats) for x, y in zip(a, b, strict=True)]
        return [table * self.inverse_scale**2 for table in tables]  # products of two gradients


class SVAGAdam(PairSteps, Adam):
    r"""Stochastic Variance Amplified Gradient for Adam: its noise and step are scaled towards the stochastic
    differential equation of Adam. :class:`normkern.Adam` in all else; `SVAGAdamW` is the same for AdamW.

    .. math::
        g = \tfrac12 (g_1 + g_2) + \tfrac12\sqrt{2l^2-1}\,(g_1 - g_2), \qquad \eta \to \eta/l, \quad
        1-\beta_i \to (1-\beta_i)/l^2, \quad \epsilon \to l\,\epsilon

    with the gradients :math:`g_1, g_2` of two independent batches of one size: the mean of either and l^2 times its
    covariance. Take l^2 times as many steps to cover the same training time (l times for SGD): as l grows the run
    approaches the SDE with error O(1/l^2). `SvagSchedule` does so.

    A step is ``loss_a.backward(); opt.hold(); loss_b.backward(); opt.step()``, and everything else about pairs is as in
    `SVAG`: closures, GradScaler, clipping by `max_norm`, and `noise`, which is of the batch gradient whatever l is. At
    l = 1 the step is Adam's to the bit.

    Args:
        params, lr: as in `Adam`. The options of the groups stay the user's; `normkern.theory.svag_adam` makes the
            kernel's of them.
        l: real, at least sqrt(1/2), where the square root rule's step with both batches as one is taken; 1 is Adam.
            Also a group key; may change between steps. The second moment is then not rescaled: it needs some
            :math:`l^2/(1-\beta_2)` steps.
        noise_decay: decay per step of the averages that `noise` returns.
        options: the other options of `Adam`, by keyword, but amsgrad and differentiable.

    Coupled weight decay is part of the gradient and is not scaled. The combination is formed in memory of the step's
    own, in two more passes than `Adam` takes, and in the dtype of the gradients: one more rounding in bfloat16.
    `stats()` is of the combined gradient and of lr as the kernel has it. torch's RMSprop has no class here:
    `svag_combine_` with ``l=l**2``, and the hyperparameters of `normkern.theory.svag_adam`.

    Raises, at a step, before anything is written:
        RuntimeError: l is not 1 and nothing is held; `hold` was called twice; a parameter has only one of its two
            gradients; both share memory.
        ValueError: l < sqrt(1/2); l < 1 makes a beta negative; amsgrad or differentiable; a parameter is a DTensor, or
            is float16, where l times a gradient may be infinite; as `Adam`.

    Reference: Malladi, Lyu, Panigrahi and Arora 2022, arXiv 2205.10287, the SVAG operators of RMSprop and Adam.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> opt = SVAGAdam([w], lr=0.4, l=2, eps=0.0)
    >>> w.grad = torch.tensor([1.0])
    >>> opt.hold()
    >>> w.grad = torch.tensor([3.0])
    >>> opt.step()  # g = 2 + sqrt(7)/2 (1 - 3) = -0.65: the first step is lr/l
    >>> w.detach()
    tensor([1.2000])
    >>> opt.noise().trace_sigma.item()
    2.0
    """

    _called = "SVAGAdam"
    _run: SvagAdamState
    _run_state = SvagAdamState
    _own_options = ("stats", NORM, *PRECISION, "l")
    _options_of_svag_names = ("l",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        l: float = 1.0,
        *,
        noise_decay: float = 0.99,
        **options: Any,
    ) -> None:
        self._check_own({"l": l, **options}, self._called)
        self._check_decay_of_noise(noise_decay)
        self._options_of_svag = {"l": l}
        super().__init__(params, lr, **options)
        self._begin_pairs(noise_decay)

    @property
    def _pairs(self) -> Pairs:
        return self._run.pairs

    def _check_own(self, group: dict[str, Any], where: str) -> None:
        try:
            svag_adam_fraction(group["l"])
        except ValueError as error:
            raise ValueError(str(error).replace("svag_adam_fraction", where, 1)) from None
        for option in ("amsgrad", "differentiable"):
            if group.get(option):
                raise ValueError(f"{where}: {option} expected False with SVAG, got {group[option]!r}")
        check_norm_is_free(group, where)

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[AdamGroupStep]:
        self._run.of_groups.clear()
        return [self._group_step(i, group, inverse_scale) for i, group in enumerate(self.param_groups)]

    def _group_step(self, index: int, group: dict[str, Any], inverse_scale: float) -> AdamGroupStep:
        run, at, where = self._run, self._places()[index], self._place(index)
        self._check_own(group, where)
        options = self._kernel_options(index, group)
        kind = AdamWGroupStep if group["decoupled_weight_decay"] else AdamGroupStep
        gradients = self._two_gradients(index, group)
        if gradients is None:
            return kind(run.plan, self.state, at, options, inverse_scale)
        first, second, _ = gradients
        self._check_pairs_of(group, first, second, where)
        two = _Two(first, second, self._inverse_scale_of_first(inverse_scale), inverse_scale)
        run.of_groups[index] = two
        nothing: list[Any] = [None] * len(first)
        pair = Pair(nothing, two.combined(group["l"]), False, 1.0, two.inverse_scale, two.inverse_scale)
        return kind(run.plan, self.state, at, options, two.inverse_scale, pair=pair)

    def _kernel_options(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        where = self._place(index)
        betas = check_betas(group["betas"], where)
        numbers: dict[str, Any] = {name: number(group[name], name, where) for name in ("lr", "eps", "weight_decay")}
        numbers["betas"] = tuple(number(beta, f"betas[{i}]", where) for i, beta in enumerate(betas))
        if group["l"] != 1:
            try:
                decoupled = bool(group["decoupled_weight_decay"])
                numbers = svag_adam(**numbers, l=group["l"], decoupled=decoupled)._asdict()
            except ValueError as error:
                raise ValueError(str(error).replace("svag_adam", where, 1)) from None
        return {**group, **numbers, "stats": group["stats"] or "tensor"}

    def _check_pairs_of(self, group: dict[str, Any], first: list[Any], second: list[Any], where: str) -> None:
        """Check what the combination would read."""
        for i, (p, a, b) in enumerate(zip(group["params"], first, second, strict=True)):
            if a is None or b is None:
                continue
            if is_dtensor(p):
                raise ValueError(
                    f"{where}: params[{i}] expected a plain tensor, got a DTensor; normkern.SVAG takes them"
                )
            for name, x in (("held", a), ("grads", b)):
                ops.check_storage(x, f"{where}: {name}[{i}]")
                if x.layout != torch.strided:
                    raise RuntimeError(f"{where}: Adam does not support sparse gradients, got {name}[{i}], sparse")
                if x.shape != p.shape:
                    raise ValueError(
                        f"{where}: {name}[{i}] has shape {tuple(x.shape)} but params[{i}] has shape {tuple(p.shape)}"
                    )
                if x.dtype == torch.float16 and group["l"] != 1:
                    raise ValueError(
                        f"{where}: {name}[{i}] expected float32, bfloat16 or float64 at l = {group['l']!r}, as the "
                        "combination of two gradients may leave the range of float16, got float16"
                    )
            if share_memory(a, b):
                raise RuntimeError(
                    f"{where}: the held gradient of params[{i}] and the new one share memory, so the second backward "
                    "has overwritten the first; expected hold(copy=True)"
                )

    def _measure(self, table: Tensor, groups: list[Any], clip_coef: Tensor | None) -> Tensor:
        """Complete the table with the sums of pairs."""
        of_groups, offsets = self._run.of_groups, iter(self._run.plan.slot_offsets)
        if any(two.which for two in of_groups.values()):
            of_pairs = table.new_full((len(table), len(ops.PAIR_SUMS)), torch.nan)
            for group in groups:
                begins = [next(offsets) for _ in group.params]
                if (two := of_groups.get(group.index)) is not None and two.which:
                    for i, sums in zip(two.which, two.sums(group.stats), strict=True):
                        of_pairs[begins[i] : begins[i] + len(sums)] = sums
            table = torch.cat([table, of_pairs], dim=1)
        of_groups.clear()
        return super()._measure(table, groups, clip_coef)


class SVAGAdamW(SVAGAdam, AdamW):
    r"""SVAG for AdamW: `SVAGAdam` with decoupled weight decay, :math:`\lambda \to \lambda/l`.

    So a step decays by :math:`\eta\lambda/l^2`, and the decay per training time stays. Options are those of `AdamW`,
    also ``decay="corrected"``; everything else is as in `SVAGAdam`.

    Reference: Malladi, Lyu, Panigrahi and Arora 2022, arXiv 2205.10287; the weight decay is ours.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> opt = SVAGAdamW([w], lr=0.4, l=2, eps=0.0, weight_decay=0.5)
    >>> w.grad = torch.tensor([1.0])
    >>> opt.hold()
    >>> w.grad = torch.tensor([3.0])
    >>> opt.step()  # 1 + 0.2 - 0.2 * 0.25
    >>> w.detach()
    tensor([1.1500])
    """

    _called = "SVAGAdamW"
    _own_options = ("stats", "decay", NORM, *PRECISION, "l")

    def _kernel_options(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        where = self._place(index)
        check_decay(group["decay"], ("decoupled", CORRECTED), where)
        return super()._kernel_options(index, with_decay_of_step(group, "decoupled", where))
