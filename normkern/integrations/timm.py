"""`register_with_timm`: normkern's optimizers in timm's ``create_optimizer_v2``."""

from __future__ import annotations

import inspect
from typing import Any

from timm.optim._optim_factory import OptimInfo, default_registry

from ..optim.adam import AdamW
from ..optim.sgd import SGD

#: Names of optimizers behind "normkern_".
_NAMES = ("sgd", "momentum", "adamw")


def register_with_timm(**defaults: Any) -> None:
    """Give timm the optimizers "normkern_sgd", "normkern_momentum" and "normkern_adamw".

    timm cuts a name at its last underscore, so that "normkern_sgd" is torch's SGD without this call. After it
    ``create_optimizer_v2(model, opt="normkern_sgd")`` and timm's training script (``--opt normkern_sgd``) use
    `normkern.SGD`, with Nesterov momentum as timm's "sgd"; "normkern_momentum" has plain momentum, "normkern_adamw" is
    `normkern.AdamW`, and "lookahead_normkern_sgd" works too. Then ``optimizer.name_parameters(model)`` gives the
    parameters their names.

    Args:
        defaults: options of `normkern.SGD`, those that it has also of `normkern.AdamW`; ``stats="tensor"`` if not given
            otherwise.
    """
    options = {"stats": "tensor", **defaults}
    for name, nesterov in (("normkernsgd", True), ("normkernmomentum", False)):
        info = OptimInfo(
            name=name,
            opt_class=SGD,
            description="normkern's fused SGD, which measures every step",
            has_eps=False,
            has_momentum=True,
            defaults={"nesterov": nesterov, **options},
        )
        default_registry.register(info)
    of_adamw = inspect.signature(AdamW).parameters
    default_registry.register(
        OptimInfo(
            name="normkernadamw",
            opt_class=AdamW,
            description="normkern's fused AdamW, which measures every step",
            has_betas=True,
            defaults={name: x for name, x in options.items() if name in of_adamw},
        )
    )
    if not hasattr(default_registry.create_optimizer, "before_normkern"):
        default_registry.create_optimizer = _with_names(default_registry.create_optimizer)


def _with_names(create_optimizer: Any) -> Any:
    """Return timm's factory, with names that have an underscore after "normkern"."""

    def create(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Any:
        name = opt.lower()
        known = tuple(f"normkern_{ending}" for ending in _NAMES)
        if "normkern_" in name and not name.endswith(known):
            raise ValueError(f"register_with_timm: expected {', '.join(known[:-1])} or {known[-1]}, got {opt!r}")
        return create_optimizer(model_or_params, name.replace("normkern_", "normkern"), *args, **kwargs)

    create.before_normkern = create_optimizer  # type: ignore[attr-defined]
    return create
