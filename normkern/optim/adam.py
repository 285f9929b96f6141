"""`Adam` and `AdamW`: torch's optimizers in one pass over memory, with the norms of the step from the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import ops
from .adam_group import AdamGroupStep, AdamWGroupStep, check_betas
from .clip_options import ClipOptions
from .corrected_decay import CORRECTED, MAX_LR, with_decay_of_step
from .fused import FusedOptimizer
from .group_step import Scaler
from .low_precision import PRECISION
from .options import EXP_AVG, EXP_AVG_SQ, NORM, OPTIONS_OF_OTHERS, check_count, check_decay, number

_Betas = tuple[float | Tensor, float | Tensor]
#: The forms of weight decay of AdamW.
_DECAYS = ("decoupled", CORRECTED)


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Drop-in for `torch.optim.Adam`: same arguments, same state, same numbers, one pass over memory.

    .. math::
        d = \pm g + \lambda w, \quad m' = \beta_1 m + (1-\beta_1) d, \quad v' = \beta_2 v + (1-\beta_2) d^2, \quad
        w' = w - \frac{\eta}{1-\beta_1^t} \, \frac{m'}{\sqrt{v'}/\sqrt{1-\beta_2^t} + \epsilon}

    With ``decoupled_weight_decay=True`` it is `AdamW`, whose documentation has all else: the options that torch's
    optimizer does not have, what falls back to torch, errors.

    Reference: Kingma and Ba, arXiv 1412.6980; `torch.optim.Adam`.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> opt = Adam([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -4.0])
    >>> opt.step()
    >>> w.detach()
    tensor([0.9000, 2.1000])
    """

    _who = "Adam"
    _numbers = ("lr", "eps", "weight_decay")
    _identity = ("betas",)
    _buffers = (EXP_AVG, EXP_AVG_SQ)
    _options_of_others = {
        **{options: whose for options, whose in OPTIONS_OF_OTHERS.items() if options != ("betas",)},
        ("momentum",): "SGD and its variants have",
    }
    _is_adaptive = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: _Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        stats: ops.Stats = None,
        norm: ops.Norm = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        master_weights: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        group: Any = None,
    ) -> None:
        self._construct(
            {"stats": stats, NORM: norm},
            (state_dtype, stochastic_rounding, rounding_seed, master_weights),
            ClipOptions(max_norm, norm_type, error_if_nonfinite, group),
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _construct(
        self,
        own_defaults: dict[str, Any],
        stored: tuple[Any, ...],
        clip_options: ClipOptions,
        params: Any,
        **torchs: Any,
    ) -> None:
        """Construct as `torch.optim.Adam` with the arguments `torchs`; the others are those of `_begin`."""
        check_betas(torchs["betas"], self._who)
        numbers = {name: torchs[name] for name in self._numbers}
        self._begin(own_defaults, stored, clip_options, params, **numbers)
        torch.optim.Adam.__init__(self, params, **torchs)

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[AdamGroupStep]:
        plan, state = self._run.plan, self.state
        return [
            AdamGroupStep(plan, state, at, group, inverse_scale, scaler)
            for at, group in zip(self._places(), self.param_groups, strict=True)
        ]

    def _kernel_may_skip(self, found_inf: Tensor) -> bool:
        # The kernel then counts the steps too.
        counts_there = all(group["fused"] or group["capturable"] for group in self.param_groups)
        return counts_there and super()._kernel_may_skip(found_inf)

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        super()._check_group(group, where)
        for i, beta in enumerate(check_betas(group["betas"], where)):
            number(beta, f"betas[{i}]", where)

    def _check_state(self, state: Any, groups: list[dict[str, Any]]) -> None:
        super()._check_state(state, groups)
        check_count(state, groups, self._buffers, self._who)


class AdamW(Adam, torch.optim.AdamW):
    r"""Drop-in for `torch.optim.AdamW`: same arguments, same state, same numbers, one pass over memory.

    .. math::
        m' = \beta_1 m + (1-\beta_1) (\pm g), \quad v' = \beta_2 v + (1-\beta_2) g^2, \quad
        w' = w - \eta\lambda w - \frac{\eta}{1-\beta_1^t} \, \frac{m'}{\sqrt{v'}/\sqrt{1-\beta_2^t} + \epsilon}

    float64, float32, bfloat16 and float16 parameters; arithmetic in float32 (float64 for float64) with one rounding
    when a value is stored, and numbers such as :math:`\eta\lambda` and :math:`\eta/(1-\beta_1^t)` computed in float64
    before. torch's loops round :math:`1-\eta\lambda` to the dtype, which at :math:`\eta\lambda = 10^{-6}` makes weight
    decay wrong by 1 per cent in float32. A float32 tensor lr or beta is taken as its exact value.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`; every one may change between steps.
        amsgrad, differentiable: take torch's own path.
        foreach: accepted, changes nothing.
        capturable: keeps ``state[p]["step"]`` on the parameter's device, so that a step can be captured in a graph.
        fused: the same, and adds the GradScaler protocol (a skipped step leaves no trace and needs no second pass over
            the gradients; they are unscaled inside the step and never written) and torch's errors for unsupported
            tensors.
        stats: None, "tensor" or "row": which norms `stats()` returns after a step. Also a group key, as are the next
            six.
        decay: "decoupled"; or "corrected", lr / max_lr times weight_decay, for scale-invariant weights whose learning
            rate falls (AdamC). See `SGD`; the ratio that stays is here that of the preconditioned gradient,
            :math:`|g/(\sqrt v + \epsilon)|/|w|`.
        norm: as in `SGD`, with :math:`u = m'/(\sqrt{v'}/\sqrt{1-\beta_2^t} + \epsilon)`, zero where m' is. Weight decay
            is not applied, whatever its default. Not with ``decay="corrected"`` or `amsgrad`.
        state_dtype: dtype of ``exp_avg`` and ``exp_avg_sq``, torch.float32 or torch.bfloat16, for parameters of 32 and
            16 bits. None: that of their parameters. With :math:`\beta_2 = 0.999` a bfloat16 ``exp_avg_sq`` moves only
            where :math:`g^2` is several times larger: prefer float32.
        stochastic_rounding, rounding_seed, master_weights: as in `SGD`.
        max_norm, norm_type, error_if_nonfinite, group: as in `SGD`.

    A group may have the key ``lr_multipliers``, as in `SGD`. Weight decay is multiplied too: a step decays by lr times
    the multiplier times it.

    State and checkpoints are torch's: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` with amsgrad, in
    both directions.

    Complex tensors, tensor subclasses, gradients of another dtype than their parameter, devices without kernels,
    dispatch modes and torch.func transforms fall back to torch's own loop; logger "normkern" reports it at level DEBUG.
    DTensors, several threads and CUDA devices: as in `SGD`. On CUDA devices no step synchronises; lr and weight_decay
    may be CUDA tensors of one number, which the kernel reads, and with `capturable` or `fused` both betas.

    Raises, at a step, before anything is written:
        RuntimeError: a parameter is of an integer dtype; a gradient is sparse, as in torch.
        ValueError: shapes differ; a parameter is expanded, or overlaps another partially; betas are not in [0, 1);
            `stats` is no known choice; options of storage or `norm` do not fit, as in `SGD`.

    Reference: Loshchilov and Hutter, arXiv 1711.05101; `torch.optim.AdamW`; corrected decay: Defazio, arXiv 2506.02285.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> opt = AdamW([w], lr=0.1, weight_decay=0.5, stats="tensor")
    >>> w.grad = torch.tensor([3.0, -4.0])
    >>> opt.step()
    >>> w.detach()
    tensor([0.8500, 2.0000])
    >>> opt.stats().grad_norm
    tensor([5.], dtype=torch.float64)
    """

    _who = "AdamW"
    _own_options = ("stats", "decay", NORM, *PRECISION)
    _group_keys = (MAX_LR, *FusedOptimizer._group_keys)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: _Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stats: ops.Stats = None,
        decay: str = "decoupled",
        norm: ops.Norm = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        master_weights: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        group: Any = None,
    ) -> None:
        check_decay(decay, _DECAYS, "AdamW")
        self._construct(
            {"stats": stats, "decay": decay, NORM: norm},
            (state_dtype, stochastic_rounding, rounding_seed, master_weights),
            ClipOptions(max_norm, norm_type, error_if_nonfinite, group),
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def _groups(self, inverse_scale: float, scaler: Scaler | None) -> list[AdamGroupStep]:
        plan, state = self._run.plan, self.state
        groups: list[AdamGroupStep] = []
        for at, group in zip(self._places(), self.param_groups, strict=True):
            check_decay(group["decay"], _DECAYS, at)
            options = with_decay_of_step(group, "decoupled", at)
            groups.append(AdamWGroupStep(plan, state, at, options, inverse_scale, scaler))
        return groups

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        super()._check_group(group, where)
        check_decay(group["decay"], _DECAYS, where)
