"""Monitors that read the norms of each step: equilibrium and auto rate tuning."""

from .auto_rate import AutoRateMonitor
from .equilibrium import EquilibriumMonitor

__all__ = ["AutoRateMonitor", "EquilibriumMonitor"]
