"""Fused, measured optimizers and the tools of normalised networks for PyTorch.

>>> import torch, normkern
>>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
>>> opt = normkern.SGD([w], lr=0.5, stats="tensor")
>>> w.grad = torch.tensor([4.0, -3.0])
>>> opt.step()
>>> w.detach()
tensor([1.0000, 5.5000])
>>> opt.stats().weight_norm
tensor([5.], dtype=torch.float64)
"""

import re as _re

import torch as _torch

__version__ = "0.1.0"

_FLOOR = (2, 10)
_found = _re.match(r"(\d+)\.(\d+)", _torch.__version__)
if _found is None or tuple(map(int, _found.groups())) < _FLOOR:
    raise ImportError(
        f"normkern {__version__} needs torch >= {_FLOOR[0]}.{_FLOOR[1]}, whose DLPack exchange API it is built on; "
        f"found torch {_torch.__version__}. Upgrade it: pip install 'torch>={_FLOOR[0]}.{_FLOOR[1]}'"
    )

from . import ops, reference  # noqa: E402
from .optim import SGD  # noqa: E402
from .stats import StepStats  # noqa: E402

__all__ = ["SGD", "StepStats", "__version__", "ops", "reference"]
