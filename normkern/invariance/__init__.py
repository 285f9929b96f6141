"""Scale invariance: detection, param groups, and a monitor."""

from .groups import param_groups
from .monitor import InvarianceMonitor
from .result import Invariances
from .search import find

__all__ = ["InvarianceMonitor", "Invariances", "find", "param_groups"]
