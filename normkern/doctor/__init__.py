"""Whether normkern works correctly on this machine: `python -m normkern doctor`."""

from .examination import checks, examine, import_modules
from .finding import Check, Finding
from .output import show

__all__ = ["Check", "Finding", "checks", "examine", "import_modules", "show"]
