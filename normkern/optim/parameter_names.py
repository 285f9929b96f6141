"""The names of an optimizer's parameters: the same for its statistics, its noise and its monitors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..names import parameter_names, strip_all

#: The key of a param group that holds its names; torch's.
PARAM_NAMES = "param_names"


def group_names(
    index: int, group: Mapping[str, Any], params: Sequence[Tensor], known: Mapping[Tensor, str]
) -> list[str]:
    """Return the names of the parameters of one group, as they were given; without names their positions.

    Args:
        index, group: the group, and its position in the optimizer.
        params: its parameters; those of the last step, where the group was changed since.
        known: names by parameter, which follow a parameter wherever it goes.

    Raises:
        ValueError: the group has another number of names than of parameters, and a parameter is not known.
    """
    try:
        return [known[p] for p in params] if known else _positions(index, group, params)
    except KeyError:
        return _positions(index, group, params)


def _positions(index: int, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[str]:
    given = group.get(PARAM_NAMES)
    if not given:
        return [f"{index}.{i}" for i in range(len(params))]
    if len(given) != len(params):
        raise ValueError(
            f"param_groups[{index}] has {len(params)} params but {len(given)} {PARAM_NAMES}; "
            "opt.name_parameters(model) names them anew"
        )
    return list(given)


def all_names(
    groups: Iterable[tuple[int, Sequence[Tensor]]], param_groups: Any, known: Mapping[Tensor, str]
) -> list[str]:
    """Return the names of the parameters of several groups, without prefixes of wrappers, each name once.

    Args:
        groups: position and parameters of each.
        param_groups: of the optimizer.
        known: see `group_names`.
    """
    names: list[str] = []
    for index, params in groups:
        names += group_names(index, param_groups[index], params, known)
    names = strip_all(names)
    if len(set(names)) == len(names):
        return names
    count: dict[str, int] = {}
    for i, name in enumerate(names):  # of two models, say: both have a "0.weight"
        count[name] = count.get(name, 0) + 1
        if count[name] > 1:
            names[i] = f"{name}#{count[name]}"
    return names


def optimizer_names(optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters of every group of an optimizer, which may be any."""
    groups = optimizer.param_groups
    run = getattr(optimizer, "_run", None)
    names = iter(all_names(((i, g["params"]) for i, g in enumerate(groups)), groups, {} if run is None else run.names))
    return [[next(names) for _ in group["params"]] for group in groups]


def remember_names(known: dict[Tensor, str], param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Add the names of groups to `known`, so that they follow the parameters; forget parameters that are gone."""
    groups = list(param_groups)
    for group in groups:
        given = group.get(PARAM_NAMES)
        if given and len(given) == len(group["params"]):
            known.update(zip(group["params"], given, strict=True))
    if len(known) > sum(len(group["params"]) for group in groups):
        present = {p for group in groups for p in group["params"]}
        for p in [p for p in known if p not in present]:
            del known[p]


def names_from_model(model: Any, param_groups: Sequence[Mapping[str, Any]], who: str) -> list[list[str]]:
    """Return a name from the model for every parameter of every group.

    Raises:
        TypeError: it is no module. ValueError: a parameter is none of the model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}.name_parameters: model expected a torch.nn.Module, got {type(model).__name__}")
    known = parameter_names(model)
    for index, group in enumerate(param_groups):
        for i, p in enumerate(group["params"]):
            if p not in known:
                raise ValueError(
                    f"{who}.name_parameters: model expected one that has all parameters of the optimizer, but "
                    f"{type(model).__name__} lacks param_groups[{index}]['params'][{i}] of shape {tuple(p.shape)}"
                )
    return [[known[p] for p in group["params"]] for group in param_groups]
