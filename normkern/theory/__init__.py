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

from .closeness import max_linear_scaling, nsr_condition
from .scaling import AdamScaling, linear_scaling, square_root_scaling
from .svag import (
    SvagCoefficients,
    svag_coefficients,
    svag_effective_steps,
    svag_equilibrium,
    svag_fraction,
    svag_steps,
)

__all__ = [
    "AdamScaling",
    "SvagCoefficients",
    "linear_scaling",
    "max_linear_scaling",
    "nsr_condition",
    "square_root_scaling",
    "svag_coefficients",
    "svag_effective_steps",
    "svag_equilibrium",
    "svag_fraction",
    "svag_steps",
]
