"""``norm=``: steps that keep the norm of each weight, or of each of its rows; see `GroupSphere`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tracing import is_materialized
from .dtensor import is_dtensor
from .options import GAUGE, NORM, RADIUS, At, number, place


class GroupSphere:
    """The norms that one param group keeps, during one step; nothing is written before the step."""

    __slots__ = ("at", "norm")

    def __init__(self, options: dict[str, Any], at: At, multipliers: ops.LrMultipliers | None) -> None:
        """Check the options of a group with ``norm=``.

        Raises:
            ValueError: the choice is unknown, does not go with another option or a parameter, or lr is out of range.
        """
        self.at, self.norm = at, options[NORM]
        where = place(at)
        ops.check_norm(self.norm, where)
        if options.get("decay") == "exponential" or GAUGE in options:
            raise ValueError(
                f'{where}: norm expected None with decay="exponential", and in the step that leaves it, whose weights '
                f"grow, got {self.norm!r}"
            )
        for name in ("differentiable", "amsgrad"):
            if options.get(name):
                raise ValueError(f"{where}: {name} expected False with norm={self.norm!r}, which no loop of torch has")
        lr = number(options["lr"], "lr", at)
        ops.check_lr_on_sphere(lr, where)
        for i, p in enumerate(options["params"]):
            if p.grad is None:
                continue
            if is_dtensor(p):
                raise ValueError(
                    f"{where}: params[{i}] is a DTensor; norm={self.norm!r} expected whole parameters, as a rank has "
                    "the norm of its shard alone; use norm=None for it"
                )
            if p.is_complex():
                raise ValueError(f"{where}: norm={self.norm!r} expected real parameters, got params[{i}] of {p.dtype}")
            if self.norm == "keep_rows" and p.ndim < 2:
                raise ValueError(ops.rows_of_vector(f"{where}: params[{i}]", p))
            if multipliers is not None:
                ops.check_lr_on_sphere(
                    lr * float(multipliers.value(i)), f"{where}: params[{i}], with its lr_multipliers"
                )

    def radii(
        self, params: list[Any], grads: list[Any], masters: list[Any] | None, state: Any
    ) -> tuple[list[Any], list[int]]:
        """Return the radius of every parameter that has a gradient, and which of them are new.

        Raises:
            ValueError: a weight has no norm to keep; the radius in the state is another group's.
        """
        radii: list[Any] = [None] * len(params)
        new = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is None:
                continue
            radius = state.get(p, {}).get(RADIUS)
            if radius is None:
                radius = self._new_radius(p, i, None if masters is None else masters[i])
                new.append(i)
            elif radius.numel() != (1 if self.norm == "keep" else p.shape[0]):
                raise ValueError(
                    f"{place(self.at)}: the radius of params[{i}] expected a number for each norm of "
                    f"norm={self.norm!r}, got shape {tuple(radius.shape)}; to keep the norms of now, delete "
                    f"{RADIUS!r} from its state"
                )
            radii[i] = radius
        return radii, new

    @torch.no_grad()
    def _new_radius(self, p: Tensor, i: int, master: Tensor | None) -> Tensor:
        w = p.detach()
        if master is not None:  # entries that differ have been written by other code, and count
            w = torch.where(master.to(p.dtype) == p, master, w.float())
        if is_materialized(w) and ops.kernel_takes(w):  # the same bits for any number of threads
            rows = w.reshape(w.shape[0], -1) if self.norm == "keep_rows" else None
            radius = (ops.grad_sq_norms([w])[0] if rows is None else ops.row_sq_norms(rows)).sqrt()
        else:
            from ..reference import norms

            radius = norms(w, self.norm)
        if is_materialized(radius) and w.numel():
            bad = ~((radius > 0) & radius.isfinite()).view(-1)
            if bool(bad.any()):
                at = int(bad.nonzero()[0])
                which = f"params[{i}]" if self.norm == "keep" else f"row {at} of params[{i}]"
                raise ValueError(
                    f"{place(self.at)}: {which} has norm {radius.view(-1)[at].item()}; norm={self.norm!r} expected a "
                    "finite norm above 0 to keep"
                )
        return radius


def group_sphere(options: dict[str, Any], at: At, multipliers: ops.LrMultipliers | None) -> GroupSphere | None:
    """Return the norms that a group keeps; None where it keeps none."""
    return None if options.get(NORM) is None else GroupSphere(options, at, multipliers)


def check_radii(state: Any, groups: list[dict[str, Any]], who: str) -> None:
    """Check the radii of a loaded state.

    Raises:
        ValueError: one is no tensor of positive numbers, or of another shape than a parameter's norms.
    """
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            radius = state.get(p, {}).get(RADIUS)
            if radius is None:
                continue
            where = f"{who}.load_state_dict: the state of param_groups[{g}]['params'][{i}]: {RADIUS}"
            if not isinstance(radius, Tensor):
                raise ValueError(f"{where} expected a tensor, got {type(radius).__name__}")
            if tuple(radius.shape) not in ((), tuple(p.shape[:1])):
                raise ValueError(f"{where} expected shape () or {tuple(p.shape[:1])}, got {tuple(radius.shape)}")
            if p.numel() and not bool(((radius > 0) & radius.isfinite()).all()):
                raise ValueError(f"{where} expected finite numbers above 0, got others")
