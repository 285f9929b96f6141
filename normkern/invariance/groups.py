"""`param_groups`: a model's parameters by scale invariance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..names import strip_all
from .result import Invariances
from .search import find

NAMES = ("scale_invariant", "norm_and_bias", "rest")
#: Group key: the sets of parameters that are scale-invariant only together, as lists of names.
JOINT = "joint"


def param_groups(
    model: nn.Module,
    found: Invariances | None = None,
    *,
    loss: Any = None,
    batches: Iterable[Any] | None = None,
    scale_invariant: Mapping[str, Any] | None = None,
    norm_and_bias: Mapping[str, Any] | None = None,
    rest: Mapping[str, Any] | None = None,
    include_norms: bool = False,
) -> list[dict[str, Any]]:
    """Return a model's parameters as three param groups: scale-invariant weights, norms and biases, and the rest.

    What is invariant only together stays together: a joint set with a weight in it is in the first group as a whole,
    with its biases. Norm parameters and biases that are invariant without a weight, such as (weight, bias) of a batch
    norm whose output the next normalised layer takes, are in the second; in the first with `include_norms`. Frozen
    parameters are in none.

    Args:
        model: whose parameters.
        found: what `find` returned for this model. None: found here, from `loss` and `batches`.
        scale_invariant, norm_and_bias, rest: options of each group, such as ``{"lr": 0.1, "weight_decay": 0.0}``.

    Returns:
        Three dicts for any optimizer of torch, in this order, also where one has no parameters: ``params`` as (name,
        parameter), ``name`` ("scale_invariant", "norm_and_bias", "rest"), ``scale_invariant`` (True for the first, as
        ``decay="exponential"`` and `InvarianceMonitor` read it), ``joint`` (of the first: its joint sets), the options.

    Raises:
        ValueError: neither `found` nor `loss` and `batches` are given, or both; `found` is of another model; options
            contain one of the keys above.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    >>> batches = [(torch.randn(9, 5), torch.randint(3, (9,)))]
    >>> groups = param_groups(net, loss=nn.functional.cross_entropy, batches=batches, scale_invariant={"lr": 0.3})
    >>> {group["name"]: [name for name, _ in group["params"]] for group in groups}
    {'scale_invariant': ['0.weight', '0.bias'], 'norm_and_bias': ['1.weight', '1.bias', '2.bias'], 'rest': ['2.weight']}
    >>> opt = torch.optim.SGD(groups, lr=0.1)
    """
    if found is None:
        if loss is None or batches is None:
            raise ValueError(
                "param_groups: expected found, which invariance.find returns, or loss and batches to find it with: "
                "modules do not say which layer a norm follows"
            )
        found = find(model, loss, batches, granularity="tensor")
    elif loss is not None or batches is not None:
        raise ValueError("param_groups: expected either found, or loss and batches, got both")
    if not isinstance(found, Invariances):
        raise ValueError(f"param_groups: found expected what invariance.find returns, got {type(found).__name__}")
    full = [name for name, _ in model.named_parameters()]
    short = dict(zip(full, strip_all(full), strict=True))
    params = {short[name]: p for name, p in model.named_parameters()}
    if params.keys() != found.granularity.keys():
        name = next(iter(params.keys() ^ found.granularity.keys()))
        whose = "the model" if name in params else "found"
        raise ValueError(f"param_groups: found expected the parameters of this model, but only {whose} has {name!r}")
    options = {
        name: _options(name, given) for name, given in zip(NAMES, (scale_invariant, norm_and_bias, rest), strict=True)
    }
    minor = {short[name] for name in _norms_and_biases(model)}
    invariant = {n for n in found.scale_invariant if include_norms or n not in minor}
    sets = [list(names) for names in found.joint if include_norms or not minor.issuperset(names)]
    invariant.update(*sets)
    short = dict(zip(params, strip_all(list(params)), strict=True))
    groups: dict[str, dict[str, Any]] = {name: {"params": [], "name": name} for name in NAMES}
    for name, p in params.items():
        if p.requires_grad:
            kind = "scale_invariant" if name in invariant else "norm_and_bias" if name in minor else "rest"
            groups[kind]["params"].append((short[name], p))
    for name, group in groups.items():
        group["scale_invariant"] = name == "scale_invariant"
        if not group["params"]:
            group["param_names"] = []  # torch wants names everywhere or nowhere
    groups["scale_invariant"][JOINT] = [[short[name] for name in names] for names in sets]
    return [group | options[name] for name, group in groups.items()]


def _options(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(given or {})
    for key in ("params", "param_names", "name", "scale_invariant", JOINT):
        if key in options:
            raise ValueError(f"param_groups: {name} expected options without {key!r}, got {options[key]!r}")
    return options


def _norms_and_biases(model: nn.Module) -> set[str]:
    """Return parameters of norms, lengths of weight normalisation, biases, and all with at most one dimension."""
    found = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, p in model.named_parameters():
        owner, _, last = name.rpartition(".")
        length = last == "weight_g" or (last == "original0" and _is_weight_norm(modules[owner]))
        of_norm = "norm" in type(modules[owner]).__name__.lower()
        if p.ndim < 2 or "bias" in last or length or of_norm:
            found.add(name)
    return found


def _is_weight_norm(parametrization: nn.Module) -> bool:
    return any("weightnorm" in type(module).__name__.lower() for module in parametrization.children())
