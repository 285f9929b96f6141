r"""Closed formulas of normalised networks: plain numbers in, plain numbers out, Python's `math` and nothing else.

Words and units. ``lr``, ``weight_decay``, ``momentum`` as in `torch.optim.SGD`. Squared norms are of whole parameter
vectors: ``grad_sq_norm`` is :math:`|\nabla L|^2`, the square of the *mean* gradient; ``trace_sigma`` is
:math:`\operatorname{tr}\Sigma`, the trace of the covariance of the gradient of one *batch* (not of one sample);
``nsr_batch`` is their ratio :math:`\operatorname{tr}\Sigma / |\nabla L|^2`. ``l`` is SVAG's parameter: 1 is SGD,
infinity the stochastic differential equation (SDE). Functions with one subject take it by position too; all others take
keywords.

Where a step count or :math:`1-\beta` is made from a float, the float stands for the simplest fraction that rounds to
it: 1.1 is 11/10, not 11/10 + 2e-16.

Every function raises ValueError for what is no number (booleans and text are none) or outside the range it names.
"""

from .auto_rate import least_unit_grad_bound, power_decay_effective_lr, power_decay_weight_sq, unit_grad_sq_from_growth
from .closeness import max_linear_scaling, nsr_condition
from .decoupled import (
    adamw_equilibrium_angle,
    adamw_equilibrium_weight_sq,
    lion_equilibrium_angle,
    lion_equilibrium_weight_sq,
    sgdw_equilibrium_angle,
    sgdw_equilibrium_weight_sq,
)
from .equilibrium import (
    effective_lr,
    equilibrium_angle,
    equilibrium_effective_lr,
    equilibrium_grad_ratio,
    equilibrium_residual,
    equilibrium_weight_sq,
    intrinsic_lr,
)
from .exponential import exponential_decay, exponential_factor
from .recurrences import Norms, mean_log_secant, next_effective_lr, next_norms, next_weight_sq, step_angle
from .relaxation import (
    effective_lr_after,
    lr_drop_recovery,
    lr_drop_rescaling,
    steps_after_lr_drop,
    steps_to_equilibrium,
    weight_sq_after,
)
from .scaling import (
    AdamScaling,
    beta_by_samples,
    decay_timescale,
    linear_scaling,
    square_root_scaling,
    square_root_weight_decay,
)
from .svag import SvagCoefficients, svag_coefficients, svag_effective_steps, svag_equilibrium, svag_fraction, svag_steps
from .svag_adam import SvagAdam, svag_adam, svag_adam_fraction

__all__ = [
    "AdamScaling",
    "Norms",
    "SvagAdam",
    "SvagCoefficients",
    "adamw_equilibrium_angle",
    "adamw_equilibrium_weight_sq",
    "beta_by_samples",
    "decay_timescale",
    "effective_lr",
    "effective_lr_after",
    "equilibrium_angle",
    "equilibrium_effective_lr",
    "equilibrium_grad_ratio",
    "equilibrium_residual",
    "equilibrium_weight_sq",
    "exponential_decay",
    "exponential_factor",
    "intrinsic_lr",
    "least_unit_grad_bound",
    "linear_scaling",
    "lion_equilibrium_angle",
    "lion_equilibrium_weight_sq",
    "lr_drop_recovery",
    "lr_drop_rescaling",
    "max_linear_scaling",
    "mean_log_secant",
    "next_effective_lr",
    "next_norms",
    "next_weight_sq",
    "nsr_condition",
    "power_decay_effective_lr",
    "power_decay_weight_sq",
    "sgdw_equilibrium_angle",
    "sgdw_equilibrium_weight_sq",
    "square_root_scaling",
    "square_root_weight_decay",
    "step_angle",
    "steps_after_lr_drop",
    "steps_to_equilibrium",
    "svag_adam",
    "svag_adam_fraction",
    "svag_coefficients",
    "svag_effective_steps",
    "svag_equilibrium",
    "svag_fraction",
    "svag_steps",
    "unit_grad_sq_from_growth",
    "weight_sq_after",
]
