"""Gradient noise: from pairs of batches, running moments, data-parallel ranks, and per-sample gradients."""

from .ddp import DDPNoise, DDPNoiseResult
from .moments import Moments
from .pairs import Noise, noise_from_pair
from .per_sample import GradientNoise, GradientNoiseResult, register
from .running_moments import RunningMoments

__all__ = [
    "DDPNoise",
    "DDPNoiseResult",
    "GradientNoise",
    "GradientNoiseResult",
    "Moments",
    "Noise",
    "RunningMoments",
    "noise_from_pair",
    "register",
]
