"""What the server of peak.py imports before it forks. Importing is all that happens: no thread is there to be lost."""

import contextlib
import warnings

from . import nets, noise_peers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in ("backpack", "opacus"):
        with contextlib.suppress(ImportError):
            __import__(module)

__all__ = ["nets", "noise_peers"]
