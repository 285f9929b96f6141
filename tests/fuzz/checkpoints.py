"""A spoiled checkpoint, from bytes: it is loaded, or refused with a sentence and nothing has happened."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

import normkern

from .junk import DTYPES, NO_NUMBERS, NUMBERS, Memory, same_bytes
from .reading import Choices

OPTIMIZERS = (
    lambda params: normkern.SGD(params, lr=0.1, momentum=0.9),
    lambda params: normkern.SGD(params, lr=0.1, momentum=0.9, nesterov=True, stats="row"),
    lambda params: normkern.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, master_weights=True),
    lambda params: normkern.SGD(params, lr=0.1, momentum=0.9, state_dtype=torch.float32, stochastic_rounding=True),
    lambda params: normkern.SGD(
        [{**group, "scale_invariant": True, "norm_buffers": [], "followers": []} for group in params],
        lr=0.1, momentum=0.5, weight_decay=0.1, decay="exponential",
    ),
    lambda params: normkern.SVAG(params, lr=0.1, momentum=0.9, l=1),
    lambda params: normkern.AdamW(params, lr=0.1, stats="tensor", master_weights=True),
    lambda params: normkern.SGD(params, lr=0.1, momentum=0.9, norm="keep", stats="tensor"),
)  # fmt: skip
KEYS = (
    "state", "param_groups", "params", "momentum_buffer", "master_weight", "lr", "momentum", "dampening",
    "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused", "stats", "decay", "gauge",
    "scale_invariant", "norm_buffers", "lr_multipliers", "state_dtype", "stochastic_rounding", "rounding_seed",
    "rounding_step", "master_weights", "l", "momentum_scaling", "param_names", "norm", "radius", "exp_avg", "betas",
)  # fmt: skip
WORDS = (
    "tensor",
    "row",
    "coupled",
    "exponential",
    "fixed",
    "continuous",
    "keep",
    "keep_rows",
    True,
    False,
    torch.float32,
    torch.bfloat16,
)


def trained(make):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(5).bfloat16())]
    opt = make([{"params": params[:2]}, {"params": params[2:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return params, opt


def value(c, of):
    kind = c.below(8)
    if kind == 0:
        return c.of(NUMBERS)
    if kind == 1:
        return c.of(NO_NUMBERS)
    if kind == 2:
        return c.of(WORDS)
    if kind == 3:
        return Memory().tensor(c)
    if kind == 4:
        return [c.of(NUMBERS) for _ in range(c.below(4))]
    if kind == 5:
        return (c.of((1.0, 0.8, *NUMBERS)), c.of((0.0, *NUMBERS)), c.of((0, *NUMBERS)))
    if kind == 6 and isinstance(of, torch.Tensor):
        return of.to(c.of(DTYPES)) if c.below(2) else of.t().contiguous().t() if of.ndim == 2 else of[None]
    return copy.copy(of) if kind == 6 else {c.of(KEYS): c.of(NUMBERS)}


def spoil(c, saved):
    """One change somewhere inside."""
    at = saved
    while True:
        inner = list(at if isinstance(at, Mapping) else range(len(at)))
        if not inner:
            return
        key = c.of(inner[:200])
        if isinstance(at[key], (dict, list)) and not c.rarely(6):
            at = at[key]
            continue
        way = c.below(4)
        if way == 0 and isinstance(at, dict):
            at[c.of((*KEYS, 0, 1, 2, 7, -1))] = value(c, at[key])
        elif way == 1:
            del at[key]
        elif way == 2 and isinstance(at, list):
            at.append(value(c, at[key]))
        else:
            at[key] = value(c, at[key])
        return


def picture(params, opt):
    """Everything that a refusal must leave: the tensors themselves, their bits, and the options."""
    state = [
        (p, k, x, x.clone()) for p in params for k, x in opt.state.get(p, {}).items() if isinstance(x, torch.Tensor)
    ]
    return (
        [p.detach().clone() for p in params],
        state,
        copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]),
    )


def is_as_before(params, opt, before):
    weights, state, groups = before
    after = picture(params, opt)
    return (
        all(same_bytes(a, b) for a, b in zip(weights, after[0], strict=True))
        and len(state) == len(after[1])
        and all(a[1] == b[1] and a[2] is b[2] and same_bytes(a[3], b[3]) for a, b in zip(state, after[1], strict=True))
        and repr(groups) == repr(after[2])  # NaN differs from itself
    )


def load(data: bytes) -> str:
    """What became of a checkpoint: "done", or the refusal.

    Raises:
        AssertionError: a refusal left something behind. Whatever else is raised, that should not be.
    """
    c = Choices(data)
    params, opt = trained(c.of(OPTIMIZERS))
    saved = copy.deepcopy((trained(c.of(OPTIMIZERS))[1] if c.rarely(4) else opt).state_dict())
    for _ in range(1 + c.below(3)):
        try:
            spoil(c, saved)
        except (RuntimeError, TypeError, ValueError) as no_value:
            return f"no checkpoint: {no_value}"
    if c.rarely(32):
        saved = value(c, saved)
    before = picture(params, opt)
    try:
        opt.load_state_dict(saved)
    except (ValueError, RuntimeError) as refusal:
        if not is_as_before(params, opt, before):
            raise AssertionError(f"load_state_dict has changed something, and then refused: {refusal}") from refusal
        return f"refused: {refusal}"
    opt.state_dict()
    if any(group["differentiable"] is not False for group in opt.param_groups):
        return "done"  # torch's own loop, which writes a buffer and then refuses the leaf
    before = picture(params, opt)
    try:
        opt.step()
    except (ValueError, RuntimeError, TypeError) as refusal:
        if not is_as_before(params, opt, before):
            raise AssertionError(f"step has changed something, and then refused: {refusal}") from refusal
        return f"no step: {refusal}"
    return "done"
