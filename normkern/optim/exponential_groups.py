"""Companions of groups with ``decay="exponential"``: copies of weights that follow, and writes from outside.

The step of one such group is in `exponential_decay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..names import strip_prefixes
from .exponential_decay import norm_buffers, rescale_norms, warn_of_lag
from .followers import FOLLOWERS, SLOW_WEIGHTS, Followers
from .group_step import GroupStep
from .options import GAUGE, NORM_BUFFERS
from .parameter_names import PARAM_NAMES, all_names
from .run_state import SgdState
from .written_behind import Versions, warn_of_written

_Groups = Sequence[dict[str, Any]]


def find_followers(run: SgdState, param_groups: _Groups, index: int, where: str) -> Followers | None:
    """Return the followers of a group, found when its option is seen for the first time; None: it has none.

    Raises:
        ValueError: the option is wrong, or copies are not found; `where` begins the sentence.
    """
    group = param_groups[index]
    given = group.get(FOLLOWERS)
    if given is None:
        run.followers.pop(index, None)
        return None
    found = run.followers.get(index)
    if found is None or found.given is not given or found.params is not group["params"]:
        names = None
        if group.get(PARAM_NAMES) or run.names:
            names = all_names([(index, group["params"])], param_groups, run.names)
        norms = norm_buffers(group.get(NORM_BUFFERS) or [], where)
        found = Followers(given, group["params"], names, norms, _norm_names(run, group), where)
        run.followers[index] = found
    return found


def _norm_names(run: SgdState, group: Mapping[str, Any]) -> list[str | None]:
    """Return the name of the module of each of the group's norms; None where it is not known."""
    given = group.get(NORM_BUFFERS) or []
    modules = {} if run.model is None else {id(m): name for name, m in run.model.named_modules()}
    names: list[str | None] = []
    for entry in [given] if isinstance(given, nn.Module) else given:
        if isinstance(entry, nn.Module) and getattr(entry, "running_mean", None) is None:
            continue
        name = modules.get(id(entry))
        weight = getattr(entry, "weight", None)
        if name is None and isinstance(weight, Tensor) and weight in run.names:
            name = run.names[weight].rpartition(".")[0] or None
        names.append(None if name is None else strip_prefixes(f"{name}.x")[:-2])
    return names


def prepare(
    run: SgdState, param_groups: _Groups, groups: Sequence[GroupStep], name_of: Callable[[int, int], str]
) -> str | None:
    """Find the followers before a step, and return the name of a weight that was written since the last; or None.

    Raises:
        ValueError: followers are not found.
    """
    behind = None
    for group in groups:
        if group.gauge is None or group.gauge.step is None:
            continue
        followers = find_followers(run, param_groups, group.index, f"SGD.step: param_groups[{group.index}]")
        # What is mixed with followers is of one scale; but momentum carries decay of the weights that were there.
        is_right = followers is not None and followers.tensors and group.gauge.step.before[1] == 0
        versions = run.versions.get(group.index)
        if versions is not None and not is_right:
            i = versions.find_written(group.params, group.is_whole)
            if i is not None:
                del run.versions[group.index]  # read anew after the step
                behind = behind or name_of(group.index, i)
    return behind


def follow(run: SgdState, param_groups: _Groups, state: Any, group: GroupStep) -> bool:
    """Commit the step of a group's gauge with all that follows; return whether the stored weights were rescaled."""
    gauge, own = group.gauge, param_groups[group.index]
    assert gauge is not None
    rescaled = gauge.commit(own)
    if gauge.step is None:
        return False
    followers = run.followers.get(group.index)
    if followers is not None and (followers.tensors or followers.norms):
        followers.follow(gauge.ratio, gauge.factor)
    first = state.get(group.params[0], {}) if group.params else {}  # every parameter has a gradient: one stands for all
    for key in SLOW_WEIGHTS:
        if key in first:
            with torch.no_grad():
                for p in group.params:
                    if key in state.get(p, {}):
                        state[p][key].mul_(gauge.ratio)
    _expect_versions(run, own, group)
    return rescaled


def _expect_versions(run: SgdState, own: Mapping[str, Any], group: GroupStep) -> None:
    """Note what the next step will find of the parameters, unless something else writes them."""
    if own["decay"] != "exponential":
        run.versions.pop(group.index, None)
        return
    versions = run.versions.get(group.index)
    if versions is not None and group.is_whole and versions.are_of(group.params):
        versions.stepped()
    else:
        run.versions[group.index] = Versions(group.params)


def warn_once(run: SgdState, param_groups: _Groups, rescaled: Sequence[int], behind: str | None) -> None:
    """Warn, once each, of what lags behind rescaled weights and of a weight that something else has written."""
    groups = [param_groups[index] for index in rescaled]
    lags = [
        what
        for what, key in (("norms", NORM_BUFFERS), ("averages", FOLLOWERS))
        if what not in run.warned and any(group.get(key) is None for group in groups)
    ]
    is_written = behind is not None and "written" not in run.warned
    run.warned.update(lags, ["written"] if is_written else ())
    if lags:
        warn_of_lag("norms" in lags, "averages" in lags)
    if is_written and behind is not None:
        warn_of_written(behind)


@contextmanager
@torch.no_grad()
def true_weights(run: SgdState, param_groups: _Groups) -> Iterator[None]:
    """Have the weights of the run with weight decay in the parameters, until the context ends.

    Raises:
        RuntimeError: the context is inside of another.
    """
    if run.true_weights:
        raise RuntimeError("SGD.true_weights: expected no such context around it, but the weights are true already")
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for index, group in enumerate(param_groups):
            scale = group.get(GAUGE, ops.NEW_GAUGE)[0]
            if scale == 1:
                continue
            where = f"SGD.true_weights: param_groups[{index}]"
            followers = find_followers(run, param_groups, index, where)
            weights = [*group["params"], *(followers.tensors if followers else [])]
            norms = [*norm_buffers(group.get(NORM_BUFFERS) or [], where), *(followers.norms if followers else [])]
            saved += [(x, x.detach().clone()) for x in (*weights, *(x for pair in norms for x in pair))]
            for x in weights:
                x.mul_(scale)
            rescale_norms(norms, scale)
        run.true_weights = True
        yield
    finally:
        run.true_weights = False
        for x, before in saved:
            x.copy_(before)
        for index in run.versions:
            if index < len(param_groups):
                run.versions[index] = Versions(param_groups[index]["params"])
