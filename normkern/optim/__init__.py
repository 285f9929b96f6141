"""The optimizers, their options, and the sums that a step returns."""

from .adam import Adam, AdamW
from .sgd import SGD
from .step_stats import StepStats
from .svag import SVAG, svag_combine_
from .svag_adam import SVAGAdam, SVAGAdamW

__all__ = ["SGD", "SVAG", "Adam", "AdamW", "SVAGAdam", "SVAGAdamW", "StepStats", "svag_combine_"]
