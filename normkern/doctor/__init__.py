"""`python -m normkern doctor`: checks that normkern works correctly on this machine."""

from .examination import checks, examine, import_modules
from .finding import Check, Finding
from .output import show

__all__ = ["Check", "Finding", "checks", "examine", "import_modules", "show"]
