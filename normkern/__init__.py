"""Fused SGD that also returns weight, gradient and update norms, and diagnostics of gradient noise and normalisation.

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
import sys as _sys

__version__ = "0.1.0"

#: The oldest torch that works.
TORCH_FLOOR = (2, 10)

try:
    import torch as _torch

    _found = _re.match(r"(\d+)\.(\d+)", _torch.__version__)
    if _found is None or tuple(map(int, _found.groups())) < TORCH_FLOOR:
        _floor = ".".join(map(str, TORCH_FLOOR))
        raise ImportError(
            f"normkern {__version__} needs torch >= {_floor}, whose DLPack exchange API it is built on; "
            f"found torch {_torch.__version__}. Upgrade it: pip install 'torch>={_floor}'"
        )

    from . import invariance, ops, reference, theory
    from .advice.advice import Advice
    from .advice.advise import advise
    from .advice.compare import compare_runs
    from .invariance import InvarianceMonitor
    from .monitors.auto_rate import AutoRateMonitor
    from .monitors.equilibrium import EquilibriumMonitor
    from .noise.ddp import DDPNoise, DDPNoiseResult
    from .noise.moments import Moments, moments
    from .noise.pairs import Noise, noise_from_pair
    from .noise.per_sample import GradientNoise, GradientNoiseResult
    from .noise.running_moments import RunningMoments
    from .ops import schemas as library
    from .optim.adam import Adam, AdamW
    from .optim.halves import halves
    from .optim.sgd import SGD
    from .optim.step_stats import StepStats
    from .optim.svag import SVAG, svag_combine_
    from .optim.svag_adam import SVAGAdam, SVAGAdamW
    from .optim.updates import apply_updates_
    from .schedules import TEXP, EquivalentExponentialLR, PowerDecayLR, SvagSchedule
except Exception as _error:
    # `python -m normkern` imports the package before its command line can print anything: a sentence is more useful
    # there than a traceback. While Python looks for the module, sys.argv[0] is "-m" and the rest is what follows the
    # module's name.
    if _sys.argv[:1] != ["-m"] or _sys.orig_argv[-len(_sys.argv)] != "normkern":
        raise
    _cure = ""
    if isinstance(_error, ModuleNotFoundError) and (_error.name or "").partition(".")[0] == "torch":
        _cure = f". Install it: pip install 'torch>={'.'.join(map(str, TORCH_FLOOR))}'"
    elif type(_error) is not ImportError:
        _cure = ". Install it anew: `pip install --force-reinstall --no-deps .` in normkern's source folder"
    _sys.exit(f"python -m normkern: {_error}{_cure}")

__all__ = [
    "SGD",
    "SVAG",
    "TEXP",
    "TORCH_FLOOR",
    "Adam",
    "AdamW",
    "Advice",
    "AutoRateMonitor",
    "DDPNoise",
    "DDPNoiseResult",
    "EquilibriumMonitor",
    "EquivalentExponentialLR",
    "GradientNoise",
    "GradientNoiseResult",
    "InvarianceMonitor",
    "Moments",
    "Noise",
    "PowerDecayLR",
    "RunningMoments",
    "SVAGAdam",
    "SVAGAdamW",
    "StepStats",
    "SvagSchedule",
    "__version__",
    "advise",
    "apply_updates_",
    "compare_runs",
    "halves",
    "invariance",
    "library",
    "moments",
    "noise_from_pair",
    "ops",
    "reference",
    "svag_combine_",
    "theory",
]
