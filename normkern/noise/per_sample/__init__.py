"""Per-sample gradient statistics of a whole model, from one ordinary forward and backward."""

from .context import GradientNoise
from .register import register
from .result import Coverage, GradientNoiseResult, NoiseScalars

__all__ = ["Coverage", "GradientNoise", "GradientNoiseResult", "NoiseScalars", "register"]
