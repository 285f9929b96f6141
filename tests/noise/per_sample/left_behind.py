"""What a model is made of, to see that a context leaves nothing in it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that an instrument might change, comparable with ==; objects by identity."""
    told: list[Any] = [list(model.state_dict()), [name for name, _ in model.named_parameters()]]
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in module._parameters.items()}
        kinds = {key: type(value) for key, value in module._parameters.items()}
        buffers = {key: id(value) for key, value in module._buffers.items()}
        hooks = {hook: len(getattr(module, hook)) for hook in _HOOKS}
        plain = sorted(key for key in vars(module) if key not in _HOOKS)
        flat = [id(w) for w in getattr(module, "_flat_weights", ())]
        told.append((name, type(module), own, kinds, buffers, hooks, plain, flat, module.training))
    for name, p in model.named_parameters():
        hooks = (bool(p._backward_hooks), bool(getattr(p, "_post_accumulate_grad_hooks", None)))
        told.append((name, id(p), type(p), p.requires_grad, p.is_leaf, hooks, sorted(vars(p))))
    return told


def assert_nothing_left(model: nn.Module, before: list[Any]) -> None:
    for was, now in zip(before, snapshot(model), strict=True):
        assert now == was
    twin = copy.deepcopy(model)
    if not any(map(parametrize.is_parametrized, model.modules())):  # torch refuses to pickle those
        twin = pickle.loads(pickle.dumps(twin))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert type(q) is type(p)
