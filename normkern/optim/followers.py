r"""Followers: copies of weights that follow a group with ``decay="exponential"``.

The weights that such a group stores are those of the run with weight decay divided by a scale, which changes at every
step. A copy that something outside of the optimizer mixes with the weights (an average for evaluation, the slow weights
of Lookahead) is of the scale of its time. A follower is multiplied with s/s', the scale before and after each step, so
that scale * copy stays what it is in the run with weight decay: every average is that run's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..names import strip_all

#: The group key: a list of modules or lists of tensors; None: unknown, [] if there are none.
FOLLOWERS = "followers"
#: Entries of the optimizer's state in which wrappers keep slow weights: timm's Lookahead.
SLOW_WEIGHTS = ("lookahead_slow_buff",)

_NormBuffers = list[tuple[Tensor, Tensor]]
_DICT = '{"params": [...], "norm_buffers": [(running_mean, running_var), ...]}'


class Followers:
    """The tensors that follow one param group."""

    __slots__ = ("given", "norms", "params", "tensors")

    def __init__(
        self,
        given: Any,
        params: Sequence[Tensor],
        names: Sequence[str] | None,
        norms: _NormBuffers,
        norm_names: Sequence[str | None],
        where: str,
    ) -> None:
        """Find them.

        Args:
            given: the group's option.
            params, names: of the group; None: it has no names.
            norms, norm_names: the norms whose running statistics follow the group, and the names of their modules.
            where: begins an error.

        Raises:
            ValueError: `given` is something else, or copies of parameters are not found.
        """
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise ValueError(f"{where}: followers expected a list of modules or of lists, got {type(given).__name__}")
        self.given, self.params = given, params
        self.tensors: list[Tensor] = []
        self.norms: _NormBuffers = []
        own = {id(p) for p in params} | {id(x) for pair in norms for x in pair}
        for j, entry in enumerate(given):
            at = f"{where}: followers[{j}]"
            if isinstance(entry, nn.Module):
                tensors = _params_of(entry, params, names, at)
                pairs = _norms_of(entry, norms, norm_names, at) if norms else []
            elif isinstance(entry, Mapping):
                tensors = _listed(entry.get("params"), params, f"{at}['params']")
                pairs = [_pair(x, f"{at}['norm_buffers'][{i}]") for i, x in enumerate(entry.get("norm_buffers", ()))]
            else:
                tensors, pairs = _listed(entry, params, at), []
            for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
                if x is p or _are_one_memory(x, p):
                    raise ValueError(
                        f"{at} expected copies of the parameters, but that of {_name(names, i)} is the parameter itself"
                    )
            self.tensors += tensors
            self.norms += [pair for pair in pairs if id(pair[0]) not in own]

    @torch.no_grad()
    def follow(self, ratio: float, factor: float) -> None:
        """Follow a step that changed the scale by 1/`ratio`, and multiplied what is stored with `factor` besides."""
        if ratio != 1:
            for x in self.tensors:
                x.mul_(ratio)
        if factor != 1:
            for mean, var in self.norms:
                mean.mul_(factor)
                var.mul_(factor * factor)


def _are_one_memory(x: Tensor, p: Tensor) -> bool:
    plain = (Tensor, nn.Parameter)
    if type(x) not in plain or type(p) not in plain or x.is_meta or not x.numel():
        return False
    return x.device == p.device and x.data_ptr() == p.data_ptr()


def _listed(entry: Any, params: Sequence[Tensor], at: str) -> list[Tensor]:
    if not isinstance(entry, (list, tuple, nn.ParameterList)):
        raise ValueError(
            f"{at} expected a module, a list of tensors in the group's order, or a dict {_DICT}, got "
            f"{type(entry).__name__}"
        )
    tensors = list(entry)
    if len(tensors) != len(params):
        raise ValueError(
            f"{at} expected {len(params)} tensors, one for each parameter of the group, got {len(tensors)}"
        )
    for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{at}[{i}] expected a tensor, got {type(x).__name__}")
        if x.shape != p.shape:
            raise ValueError(f"{at}[{i}] expected shape {tuple(p.shape)}, got {tuple(x.shape)}")
    return tensors


def _pair(entry: Any, at: str) -> tuple[Tensor, Tensor]:
    if isinstance(entry, nn.Module):
        entry = (getattr(entry, "running_mean", None), getattr(entry, "running_var", None))
    if isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(x, Tensor) for x in entry):
        return entry[0], entry[1]
    raise ValueError(f"{at} expected a norm or a pair (running_mean, running_var), got {type(entry).__name__}")


def _params_of(module: nn.Module, params: Sequence[Tensor], names: Sequence[str] | None, at: str) -> list[Tensor]:
    """Return the module's copy of each parameter: that of its name, else the one of its shape and value."""
    named = [*module.named_parameters(), *module.named_buffers()]
    of_name = dict(zip(strip_all([name for name, _ in named]), [x for _, x in named], strict=True))
    found: list[Tensor] = []
    taken: set[int] = set()
    for i, p in enumerate(params):
        copy = None if names is None else _by_name(of_name, names[i], p.shape)
        if copy is None:
            same = [x for x in of_name.values() if id(x) not in taken and x.shape == p.shape and _is_equal(x, p)]
            if len(same) != 1:
                raise ValueError(
                    f"{at}, a {type(module).__name__}, expected a copy of {_name(names, i)}, found {len(same)} tensors "
                    "of its shape and value and none of its name; expected a list of the copies in the group's order, "
                    "or opt.name_parameters(model) before it"
                )
            copy = same[0]
        taken.add(id(copy))
        found.append(copy)
    return found


def _by_name(of_name: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor | None:
    """Return the tensor of a name, where one of both may be of a part of the other's model; None: there is no one."""
    copy = of_name.get(name)
    if copy is None:
        ends = [x for n, x in of_name.items() if n.endswith("." + name) or name.endswith("." + n)]
        copy = ends[0] if len(ends) == 1 else None
    return copy if copy is not None and copy.shape == shape else None


def _is_equal(x: Tensor, p: Tensor) -> bool:
    return x.dtype == p.dtype and x.device == p.device and bool(torch.equal(x.detach(), p.detach()))


def _norms_of(module: nn.Module, norms: _NormBuffers, names: Sequence[str | None], at: str) -> _NormBuffers:
    """Return the module's copies of running statistics: by the names of norms, else by their order."""
    found = list(_norms_in(module))
    of_name = dict(zip(strip_all([f"{name}.x" for name, _ in found]), [pair for _, pair in found], strict=True))
    pairs: list[tuple[Tensor, Tensor] | None] = [None] * len(norms)
    for i, name in enumerate(names):
        if name is not None:
            ends = [x for n, x in of_name.items() if n == f"{name}.x" or n.endswith(f".{name}.x")]
            pairs[i] = ends[0] if len(ends) == 1 else None
    in_order = [pair for _, pair in found]
    if None in pairs and len(in_order) == len(norms):
        pairs = list(in_order)
    matched = [pair for pair in pairs if pair is not None]
    shapes_fit = all(a[0].shape == b[0].shape for a, b in zip(matched, norms, strict=False))
    if found and (len(matched) != len(norms) or not shapes_fit):
        raise ValueError(
            f"{at}, a {type(module).__name__}, expected the norms of norm_buffers in it, and which they are is not "
            f"known; expected opt.name_parameters(model) before it, or a dict {_DICT}"
        )
    return matched


def _norms_in(module: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name, m in module.named_modules():
        mean, var = getattr(m, "running_mean", None), getattr(m, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            yield name, (mean, var)


def _name(names: Sequence[str] | None, i: int) -> str:
    return f"params[{i}]" if names is None else f"params[{i}] ({names[i]!r})"
