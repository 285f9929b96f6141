"""Options of param groups and entries of checkpoints: names, checks, and error sentences."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from ..names import did_you_mean
from .parameter_names import PARAM_NAMES

#: The entry of an optimizer's state that holds a parameter's momentum buffer; torch's name.
BUFFER = "momentum_buffer"
#: The entry that holds its copy in float32.
MASTER = "master_weight"
#: The group key that says which norms stay, and the entry of a parameter's state with them.
NORM, RADIUS = "norm", "radius"
#: Group keys: (scale, z, exponent) of `ops.gauge_step`; True where the loss is known not to see the group's scale; the
#: norms whose running statistics follow the weights.
GAUGE, SCALE_INVARIANT, NORM_BUFFERS = "gauge", "scale_invariant", "norm_buffers"
#: The forms of weight decay of SGD.
SGD_DECAYS = ("coupled", "exponential", "corrected")
#: A group key: one number for each parameter, which the learning rate is multiplied with; None: 1.
LR_MULTIPLIERS = "lr_multipliers"
#: What torch's Adam calls the averages of a parameter's gradients and of their squares, and the count of its steps.
EXP_AVG, EXP_AVG_SQ, STEP = "exp_avg", "exp_avg_sq", "step"
#: Keys of other libraries, and of torch's schedulers, that begin or end as ours do.
_OTHERS = frozenset({"lr_scale", "lr_mult", "initial_lr", "base_momentum", "max_momentum"})


class At(NamedTuple):
    """Where an error sentence of a step is: the optimizer's name, and the position of a param group."""

    who: str
    group: int


def number(x: Any, name: str, where: str | At) -> float:
    """Return a hyperparameter as a float: any number, or a tensor of one element (synchronised).

    `where` begins the error sentence.
    """
    if type(x) is float:
        return x
    if isinstance(x, Tensor):
        if x.numel() != 1 or x.is_complex():
            raise ValueError(f"{place(where)}: {name} expected one number, got a tensor of shape {tuple(x.shape)}")
        return float(x.detach())
    try:
        return float(x.__float__())
    except (AttributeError, TypeError, OverflowError):
        raise ValueError(f"{place(where)}: {name} expected a number, got {x!r}") from None


def place(where: str | At) -> str:
    """Return how an error sentence begins; called only where one is raised."""
    return where if isinstance(where, str) else f"{where.who}.step: param_groups[{where.group}]"


def check_decay(decay: object, known: Sequence[str], where: str | At) -> None:
    """Check that the form of weight decay is one of those known."""
    if decay in known:
        return
    *most, last = (f'"{name}"' for name in known)
    near = did_you_mean(decay, known)
    raise ValueError(f"{place(where)}: decay expected {', '.join(most)} or {last}, got {decay!r}{near}")


def check_options(group: dict[str, Any], numbers: Iterable[str], where: str) -> None:
    """Check the kind of the options of a loaded param group: of those named, which are numbers, and of ours."""
    for name in numbers:
        number(group[name], name, where)
    ops.stats_code(group["stats"], where)
    if group.get(LR_MULTIPLIERS) is not None:
        ops.read_lr_multipliers(group[LR_MULTIPLIERS], len(group["params"]), where)


def check_decay_options(group: dict[str, Any], where: str) -> None:
    """Check what a loaded param group has of decay as an exponential learning rate."""
    check_decay(group["decay"], SGD_DECAYS, where)
    if not (isinstance(group.get(SCALE_INVARIANT), bool) or group.get(SCALE_INVARIANT) is None):
        raise ValueError(f"{where}: scale_invariant expected True, False or None, got {group[SCALE_INVARIANT]!r}")
    if GAUGE in group:
        check_gauge(group[GAUGE], where)


def check_gauge(gauge: Any, where: str) -> None:
    """Check that a gauge is (scale, z, exponent), as `ops.gauge_step` returns them."""
    try:
        scale, z, exponent = gauge
        fits = bool(0.5 < scale < 2) and math.isfinite(z) and type(exponent) is int
    except (TypeError, ValueError, RuntimeError, OverflowError):  # tensors, arrays, 2**2000
        fits = False
    if not fits:
        raise ValueError(f"{where}: gauge expected (scale, z, exponent) as a step leaves them, got {gauge!r}")


#: Options by which optimizers of torch are told from SGD, with a sentence about those that have all of a set.
OPTIONS_OF_OTHERS = {
    ("betas",): "Adam and its variants have",
    ("alpha", "centered"): "RMSprop has",
    ("lr_decay", "initial_accumulator_value"): "Adagrad has",
    ("rho", "eps"): "Adadelta has",
    ("lambd", "t0"): "ASGD has",
    ("etas", "step_sizes"): "Rprop has",
    ("max_iter", "history_size"): "LBFGS has",
    ("beta2_decay",): "Adafactor has",
    ("ns_steps",): "Muon has",
}


def check_checkpoint(
    loaded: Mapping[str, Any], who: str, others: Mapping[tuple[str, ...], str], identity: Iterable[str]
) -> None:
    """Check the form of a state dict, such that torch's own loading only finds which entries are missing.

    `others`: sets of options that the optimizer `who` does not have, each with a sentence about optimizers that do.
    `identity`: options that only it has; a group with all of them may have some of others too, for code of the user's.
    """

    def refuse(what: str, expected: str, got: object) -> None:
        raise ValueError(f"{who}.load_state_dict: {what} expected {expected}, got {type(got).__name__}")

    state, groups = loaded.get("state", {}), loaded.get("param_groups", [])
    if not isinstance(state, Mapping):
        refuse("state", "a dict", state)
    if not isinstance(groups, (list, tuple)):
        refuse("param_groups", "a list", groups)
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            refuse(f"param_groups[{i}]", "a dict", group)
        for options, whose in others.items():
            if all(option in group for option in options) and not all(name in group for name in identity):
                raise ValueError(
                    f"{who}.load_state_dict: param_groups[{i}] expected the options of {who}, got "
                    f"{' and '.join(options)}, which {whose}: this checkpoint is of another optimizer, so load the "
                    "model's only"
                )
        ids = group.get("params", [])
        if not isinstance(ids, (list, tuple)):
            refuse(f"param_groups[{i}]['params']", "a list", ids)
        for j, key in enumerate(ids):
            if not isinstance(key, Hashable):
                refuse(f"param_groups[{i}]['params'][{j}]", "a number or a name", key)
        names = group.get(PARAM_NAMES)
        if names is not None and not isinstance(names, (list, tuple)):
            refuse(f"param_groups[{i}]['{PARAM_NAMES}']", "a list of names", names)
        for j, name in enumerate(names or ()):
            if not isinstance(name, str):
                refuse(f"param_groups[{i}]['{PARAM_NAMES}'][{j}]", "a name", name)


def check_state(state: Any, groups: list[dict[str, Any]], buffers: Iterable[str], who: str) -> None:
    """Check that every buffer fits its parameter. None, in old checkpoints, means that there is no buffer yet."""
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            entry = state.get(p, {})
            where = f"{who}.load_state_dict: the state of param_groups[{g}]['params'][{i}]"
            if not isinstance(entry, Mapping):
                raise ValueError(f"{where} expected a dict, got {type(entry).__name__}")
            for name in (*buffers, MASTER):
                x = entry.get(name)
                if x is None:
                    continue
                if not isinstance(x, Tensor):
                    raise ValueError(f"{where}: {name} expected a tensor, got {type(x).__name__}")
                if x.shape != p.shape:
                    raise ValueError(f"{where}: {name} expected shape {tuple(p.shape)}, got {tuple(x.shape)}")


def check_count(state: Any, groups: list[dict[str, Any]], buffers: Iterable[str], who: str) -> None:
    """Check that every parameter that has a state has all buffers, and a count of steps."""
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            entry = state.get(p, {})
            where = f"{who}.load_state_dict: the state of param_groups[{g}]['params'][{i}]"
            needed = (*buffers, STEP)
            lacks = [name for name in needed if entry.get(name) is None]
            if lacks and len(entry) > 0:
                raise ValueError(f"{where} expected {', '.join(needed)}, got one without {lacks[0]}")
            if not lacks:
                steps = number(entry[STEP], STEP, where)
                if not (steps >= 0 and steps == int(min(steps, 2.0**63))):
                    raise ValueError(f"{where}: {STEP} expected a whole number of at least 0, got {steps!r}")


def own_tensors(state: Mapping[Any, Any], loaded: Mapping[Any, Any]) -> None:
    """Replace tensors of a new state that are those of a state dict by copies, for torch shares them."""
    given = {id(x) for entry in loaded.values() if isinstance(entry, Mapping) for x in entry.values()}
    for entry in state.values():
        if isinstance(entry, dict):
            for key, x in entry.items():
                if isinstance(x, Tensor) and id(x) in given:
                    entry[key] = x.clone()


def check_key_names(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Check that no key of a new param group is a misspelled option of ours; other keys pass, as in torch.

    Raises:
        ValueError: one is.
    """
    names = {name.replace("_", ""): name for name in known if len(name) > 3}
    for key in keys:
        if not isinstance(key, str) or key in names.values() or key in _OTHERS:
            continue
        near = difflib.get_close_matches(key.lower().replace("_", "").replace("-", ""), names, n=1, cutoff=0.86)
        if near:
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {names[near[0]]!r}?")


def caller_level() -> int:
    """Return the stacklevel with which a warning of the function that asks points at the caller of the step."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("normkern", "torch"):
        level, frame = level + 1, frame.f_back
    return level
