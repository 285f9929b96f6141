"""Names of parameters, without the prefixes that wrappers of a model put into them.

`DistributedDataParallel`, `torch.compile`, FSDP and Lightning's Fabric wrap a model in a module of their own, which
adds a part to the name of every parameter: ``module.0.weight``, ``_orig_mod.0.weight``. normkern uses the names of the
model that the user wrote, so that the numbers of an optimizer, of `GradientNoise` and of a monitor can be joined.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from torch import Tensor, nn

#: The attributes in which wrappers keep the model.
WRAPPERS = frozenset(
    {
        "module",  # DistributedDataParallel, DataParallel, AveragedModel
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",  # FullyShardedDataParallel
        "_checkpoint_wrapped_module",  # activation checkpointing of torch.distributed
        "_forward_module",  # Lightning's Fabric
    }
)


def did_you_mean(words: object, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the first unknown word that is nearly a known one, else an empty string.

    >>> did_you_mean(["norm"], ["nsr", "norms"])
    "; did you mean 'norms'?"
    """
    names = list(known)
    for word in [words] if isinstance(words, str) else words if isinstance(words, (list, tuple, set)) else ():
        if isinstance(word, str) and word not in names and (near := get_close_matches(word, names, 1)):
            return f"; did you mean {near[0]!r}?"
    return ""


def strip_prefixes(name: str) -> str:
    """Return a parameter's name without the parts that wrappers add, at the beginning and inside.

    >>> strip_prefixes("module._orig_mod.layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    parts = name.split(".")
    if WRAPPERS.isdisjoint(parts[:-1]):
        return name
    return ".".join([part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:])


def strip_all(names: list[str]) -> list[str]:
    """Return names without the parts that wrappers add; names that would become equal keep theirs.

    >>> strip_all(["module.0.weight", "module.1.weight"])
    ['0.weight', '1.weight']
    >>> strip_all(["module.weight", "weight"])
    ['module.weight', 'weight']
    """
    stripped = [strip_prefixes(name) for name in names]
    if stripped == names or len(set(stripped)) == len(set(names)):
        return stripped
    given: dict[str, set[str]] = {}
    for name, short in zip(names, stripped, strict=True):
        given.setdefault(short, set()).add(name)
    return [short if len(given[short]) == 1 else name for name, short in zip(names, stripped, strict=True)]


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the name of every parameter of a model, as `strip_all` shortens them; a shared one has its first name.

    The keys are the parameters themselves: a look-up compares them by identity.

    >>> import torch
    >>> net = torch.nn.Linear(2, 2)
    >>> list(parameter_names(torch.nn.ModuleDict({"module": net})).values())
    ['weight', 'bias']
    """
    named = list(model.named_parameters())
    return dict(zip([p for _, p in named], strip_all([name for name, _ in named]), strict=True))
