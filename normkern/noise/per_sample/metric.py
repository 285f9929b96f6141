"""The metric of an adaptive optimizer: what Adam and RMSprop divide each coordinate of a step by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...names import parameter_names, strip_all
from . import errors
from .sums import real


class Metric:
    """The denominators of an optimizer's steps, by the names of parameters."""

    def __init__(self, optimizer: Any, model: nn.Module | None, names: Iterable[str], unused: Iterable[str]) -> None:
        """Look up every parameter; `unused` ones may be without state."""
        groups, state = getattr(optimizer, "param_groups", None), getattr(optimizer, "state", None)
        if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping):
            raise errors.no_optimizer(type(optimizer).__name__)
        found = _by_name(groups, model)
        without_state = set(unused)
        self._found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        wanted = list(names)
        for name in wanted:
            if name not in found:
                raise errors.not_in_optimizer(name, list(found))
        for name in wanted:
            p, group = found[name]
            of = state.get(p, {})
            if "betas" not in group and "alpha" not in group:
                raise errors.no_second_moment(name, type(optimizer).__name__)
            if group.get("l", 1) != 1:
                raise errors.moment_of_svag(name, group["l"])
            if not of and name in without_state:
                continue
            if _moment_of(of) is None or ("betas" in group and float(of.get("step", 0)) < 1):
                raise errors.no_second_moment_yet(name, type(optimizer).__name__)
            if p.is_complex():
                raise errors.complex_moment(name)
            self._found[name] = (group, of)

    def denominator(self, name: str, like: Tensor) -> Tensor | None:
        r"""Return :math:`\sqrt{v/(1-\beta_2^t)} + \epsilon` of a parameter as its step computes it; None without state.

        For RMSprop :math:`\sqrt v + \epsilon`. `like`: a tensor of the shape and device that is expected.
        """
        if name not in self._found:
            return None
        group, of = self._found[name]
        v = _moment_of(of)
        assert v is not None
        whole: Tensor = v.full_tensor() if hasattr(v, "full_tensor") else v  # a DTensor
        if whole.shape != like.shape:
            raise errors.other_shape(name, tuple(whole.shape), tuple(like.shape))
        root = whole.detach().to(like.device, real(torch.promote_types(whole.dtype, like.dtype)))
        if (mean := of.get("grad_avg")) is not None:  # RMSprop, centred
            mean = mean.full_tensor() if hasattr(mean, "full_tensor") else mean
            root = root.addcmul(mean.to(root), mean.to(root), value=-1)
        if "betas" in group:
            unbiased = 1 - float(group["betas"][1]) ** float(of["step"])
            return root.sqrt().div_(math.sqrt(unbiased)).add_(float(group["eps"]))
        return root.sqrt().add_(float(group["eps"]))


def _moment_of(state: Mapping[str, Any]) -> Tensor | None:
    """Return the average of squares that the step divides by."""
    for key in ("max_exp_avg_sq", "exp_avg_sq", "square_avg"):  # Adam with amsgrad, Adam, RMSprop
        if isinstance(state.get(key), Tensor):
            return state[key]
    return None


def _by_name(groups: Any, model: nn.Module | None) -> dict[str, tuple[Tensor, Mapping[str, Any]]]:
    """Return parameter and group of every name."""
    params = [(p, group) for group in groups for p in group["params"]]
    if model is not None:
        if not isinstance(model, nn.Module):
            raise errors.no_model(type(model).__name__)
        known = parameter_names(model)
        return {known[p]: (p, group) for p, group in params if p in known}
    names: list[str] = []
    for i, group in enumerate(groups):
        given = group.get("param_names")
        if not given or len(given) != len(group["params"]):
            raise errors.nameless(i)
        names += given
    return dict(zip(strip_all(names), params, strict=True))
