"""The optimizers, their options, and the sums that a step returns."""

from .sgd import SGD
from .step_stats import StepStats
from .svag import SVAG, svag_combine_

__all__ = ["SGD", "SVAG", "StepStats", "svag_combine_"]
