"""One file per layer kind: the handlers of its operations, its arithmetic, and its per-sample contributions.

Importing this package imports every file in it, which registers its handlers (`registry`). A new layer kind is a new
file here.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
