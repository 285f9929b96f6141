"""Learning rate schedules: at the pace of SVAG, in place of weight decay, and as a power of the step."""

from .exponential import EquivalentExponentialLR
from .power import PowerDecayLR
from .svag import SvagSchedule
from .texp import TEXP

__all__ = ["TEXP", "EquivalentExponentialLR", "PowerDecayLR", "SvagSchedule"]
