"""What the formulas of equilibria take, and what no formula does."""

import math

import torch

from normkern import theory

_SGD = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5}
_NESTEROV = {**_SGD, "nesterov": False, "correlation": 0.1}
_NORMS = {"weight_sq": 1, "weight_buffer_dot": 0.1, "buffer_sq": 1, "grad_sq": 1, "buffer_grad_dot": 0.1}
_DROP = {**_SGD, "factor": 2}
GOOD = {
    theory.effective_lr: {"lr": 0.1, "weight_sq": 2},
    theory.intrinsic_lr: {"lr": 0.1, "weight_decay": 0.1, "next_lr": 0.05},
    theory.equilibrium_weight_sq: {**_NESTEROV, "unit_grad_sq": 1},
    theory.equilibrium_residual: {**_NESTEROV, "weight_sq": 1, "grad_sq": 1},
    theory.equilibrium_effective_lr: {"intrinsic_lr": 0.01, "momentum": 0.5, "unit_grad_sq": 1, "nesterov": True, "correlation": 0},
    theory.equilibrium_angle: _NESTEROV,
    theory.equilibrium_grad_ratio: _NESTEROV,
    theory.next_weight_sq: {"weight_sq": 1, "grad_sq": 1, "lr": 0.1, "weight_decay": 0.1, "weight_grad_dot": 0.1},
    theory.next_norms: {**_NORMS, **_SGD, "dampening": 0, "nesterov": True, "weight_grad_dot": 0.1},
    theory.next_effective_lr: {"effective_lr": 0.1, "intrinsic_lr": 0.01, "unit_grad_sq": 1},
    theory.step_angle: {"weight_sq": 1, "grad_sq": 1, "lr": 0.1, "weight_decay": 0.1},
    theory.mean_log_secant: {"first_weight_sq": 1, "last_weight_sq": 2, "steps": 3, "lr": 0.1, "weight_decay": 0.1},
    theory.steps_to_equilibrium: _SGD,
    theory.weight_sq_after: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5, "weight_sq": 1, "steps": 3, "unit_grad_sq": 1, "nesterov": True},
    theory.effective_lr_after: {"effective_lr": 0.1, "steps": 3, "intrinsic_lr": 0.01, "momentum": 0.5, "unit_grad_sq": 1},
    theory.lr_drop_recovery: {**_DROP, "steps": 3},
    theory.steps_after_lr_drop: {**_DROP, "tolerance": 0.1},
    theory.lr_drop_rescaling: {"factor": 2},
    theory.sgdw_equilibrium_weight_sq: {**_SGD, "unit_grad_sq": 1},
    theory.sgdw_equilibrium_angle: _SGD,
    theory.adamw_equilibrium_weight_sq: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9, "size": 10},
    theory.adamw_equilibrium_angle: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9},
    theory.lion_equilibrium_weight_sq: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "size": 10},
    theory.lion_equilibrium_angle: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99},
    theory.unit_grad_sq_from_growth: {"weight_sq": 1, "next_weight_sq": 2, "lr": 0.1},
    theory.least_unit_grad_bound: {"first_weight_sq": 1, "last_weight_sq": 2, "lr_sq_sum": 1},
    theory.power_decay_weight_sq: {"weight_sq": 1, "steps": 3, "lr": 0.1, "exponent": 0.25, "unit_grad_sq": 1},
    theory.power_decay_effective_lr: {"steps": 3, "exponent": 0.25, "unit_grad_sq": 1},
}  # fmt: skip
_SQUARE, _ANY = [-1, math.inf], [math.inf, -math.inf]
WRONG = {
    "lr": [-0.1, math.inf],
    "next_lr": [0, -0.1, math.inf],
    "weight_decay": [-0.1, math.inf],
    "momentum": [1, 1.5, -0.1],
    "dampening": [1, -0.1],
    "nesterov": [0, 1, "yes"],
    "correlation": _ANY,
    "weight_sq": _SQUARE,
    "next_weight_sq": _SQUARE,
    "first_weight_sq": _SQUARE,
    "last_weight_sq": _SQUARE,
    "grad_sq": _SQUARE,
    "buffer_sq": _SQUARE,
    "unit_grad_sq": _SQUARE,
    "lr_sq_sum": [0, -1, math.inf],
    "weight_buffer_dot": _ANY,
    "buffer_grad_dot": _ANY,
    "weight_grad_dot": _ANY,
    "effective_lr": [0, -1, math.inf],
    "intrinsic_lr": _ANY,
    "steps": [-1, 1.0, 2.5, 2**63],
    "size": [0, -1, 1.0, 2**63],
    "factor": [1, 0.5, -2, math.inf],
    "tolerance": [0, 1, -0.1, math.inf],
    "exponent": [-0.1, math.inf],
    "beta1": [1, -0.1],
    "beta2": [1, -0.1],
}
NEVER = [math.nan, True, False, "1", None, 1j, [1], torch.ones(2), 10**400]
