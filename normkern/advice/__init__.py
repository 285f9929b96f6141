"""Advice on batch size, scaling rule and equilibrium, from measured noise; and whether runs are close to each other."""

from .advice import Advice
from .advise import advise
from .answer import Answer
from .compare import Comparison, RunComparison, compare_runs
from .intervals import Interval

__all__ = ["Advice", "Answer", "Comparison", "Interval", "RunComparison", "advise", "compare_runs"]
