"""A copy of a model that can be tried at any parameters: nothing of the model itself changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from ..tracing import force_eager
from .exact_norms import Exact, drop_eps

#: loss(model, batch) -> scalar.
Loss = Callable[[nn.Module, Any], Any]


NO_GRADIENT = (
    "find: loss expected to be computed, with a graph, from the parameters of the model that it is given, which is a "
    "copy of yours; got one that depends on none that requires a gradient"
)


class _NotOneNumber(ValueError):
    """Raised for the value that a loss returned."""


class Trial:
    """The copy, its trainable parameters, and the loss on it. Every evaluation begins with the buffers of the model."""

    def __init__(self, model: nn.Module) -> None:
        """Raises: ValueError if the model can't be copied."""
        # Results of computations, as hooks leave them in modules, are no leaves and refuse to be copied.
        memo: dict[int, Any] = {
            id(x): x.detach().clone()
            for module in model.modules()
            for x in vars(module).values()
            if isinstance(x, Tensor) and x.grad_fn is not None
        }
        for b in model.buffers():
            if isinstance(b, UninitializedBuffer):  # it does not know how
                memo[id(b)] = UninitializedBuffer(device=b.device, dtype=b.dtype)  # type: ignore[call-arg]
        try:
            self.model = copy.deepcopy(model, memo)
        except Exception as error:
            raise ValueError(
                f"find: model expected one that copy.deepcopy can copy, as the copy is what is tried; got {error}"
            ) from error
        self._mode: Exact | None = None
        self._remember()

    def _remember(self) -> None:
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for p in self.model.parameters():
            p.grad = None
        self._buffers = [
            (module, name, b, b.detach().clone())
            for module in self.model.modules()
            for name, b in module._buffers.items()
            if b is not None and not is_lazy(b)
        ]

    def materialise(self, loss: Loss, batch: Any) -> None:
        """Give lazy parameters their shapes."""
        if any(is_lazy(x) for x in (*self.model.parameters(), *self.model.buffers())):
            with torch.no_grad():
                loss(self.model, batch)
            self._remember()

    def make_exact(self, dtype: torch.dtype) -> None:
        """Let the copy compute without eps, and at least in `dtype`, from now on."""
        dtype = torch.promote_types(dtype, self.dtype)
        self._mode = Exact(dtype)
        drop_eps(self.model, self._mode.eps)
        for p in self.model.parameters():
            p.data = raised(p.data, dtype)
        for module, name, b, _ in self._buffers:
            module._buffers[name] = raised(b, dtype)
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()
        self._remember()

    def loss(self, loss: Loss, batch: Any) -> Tensor:
        """Return the scalar, with its graph.

        Raises:
            ValueError: it is none.
        """
        for module, name, b, saved in self._buffers:
            b.copy_(saved)
            module._buffers[name] = b
        with ExitStack() as stack:
            if self._mode is not None:
                stack.enter_context(_default_dtype(self.dtype))
                stack.enter_context(self._mode)
            value = loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise _NotOneNumber(f"find: loss expected to return one real number as a tensor, got {what}")
        return value.reshape(())

    def gradients(self, loss: Loss, batch: Any, names: Sequence[str]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and its gradients with respect to the named parameters.

        Raises:
            ValueError: it depends on none of the model's.
        """
        value = self.loss(loss, batch)
        if not value.requires_grad:
            raise ValueError(NO_GRADIENT)
        grads = torch.autograd.grad(value, [self.params[n] for n in names], allow_unused=True)
        return value.detach(), [None if g is None else g.detach().to_dense() for g in grads]

    @property
    def dtype(self) -> torch.dtype:
        """Return the real dtype of the parameters."""
        dtypes = [_real(p.dtype) for p in self.model.parameters() if p.is_floating_point() or p.is_complex()]
        return functools.reduce(torch.promote_types, dtypes)


def as_loss(loss: Any, trial: Trial, batch: Any) -> tuple[Loss, Tensor]:
    """Return `loss` as a function of model and batch, and its value on this batch; see `find` for the rule.

    Raises:
        ValueError: it is no function, it needs pairs and the batch is none, or it fails either way.
    """
    if not callable(loss):
        raise ValueError(f"find: loss expected a function, got {type(loss).__name__}")

    def of_pair(model: nn.Module, batch: Any) -> Any:
        if not _is_pair(batch):
            raise ValueError(
                "find: batches expected pairs (inputs, targets) for a loss of output and target, got "
                f"{type(batch).__name__}; a loss of (model, batch) takes any, and a single batch goes into a list"
            )
        return loss(model(batch[0]), batch[1])

    inner = loss
    while isinstance(inner, functools.partial):
        inner = inner.func
    if isinstance(inner, nn.Module) or getattr(inner, "__module__", None) == "torch.nn.functional":
        trial.materialise(of_pair, batch)
        return of_pair, trial.loss(of_pair, batch)
    try:
        trial.materialise(loss, batch)
        return loss, trial.loss(loss, batch)
    except _NotOneNumber:
        raise
    except Exception as error:
        if not _is_pair(batch):
            raise
        # What takes an output can do nothing with a module, and what calls a model can't call an output.
        try:
            trial.materialise(of_pair, batch)
            return of_pair, trial.loss(of_pair, batch)
        except Exception as second:
            raise ValueError(
                f"find: loss expected loss(model, batch) or loss(output, target); the first raised "
                f"{type(error).__name__}: {error}; the second {type(second).__name__}: {second}"
            ) from error


class Generators:
    """The states of torch's generators that a model can draw from, to restore them."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        devices = {x.device for x in tensors if x.device.type not in ("cpu", "meta")}
        modules = [(torch.get_device_module(d), d) for d in devices]
        self._states = [(module, d, module.get_rng_state(d)) for module, d in modules]
        self._cpu = torch.get_rng_state()

    def restore(self) -> None:
        """Restore the states."""
        torch.set_rng_state(self._cpu)
        for module, device, state in self._states:
            module.set_rng_state(state, device)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Restore torch's generators and autograd's modes after the context, whatever the code inside draws or sets."""
    generators = Generators(model)
    try:
        with torch.inference_mode(False), torch.enable_grad(), force_eager():
            yield
    finally:
        generators.restore()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def raised(x: Any, dtype: torch.dtype) -> Any:
    """Return floating point tensors, also in tuples, lists and dicts, in at least this dtype."""
    if isinstance(x, Tensor):
        if x.is_complex():
            dtype = dtype.to_complex()
        return x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() or x.is_complex() else x
    if isinstance(x, tuple):
        entries = [raised(y, dtype) for y in x]
        return type(x)(*entries) if hasattr(x, "_fields") else tuple(entries)
    if type(x) in (list, dict):
        return [raised(y, dtype) for y in x] if type(x) is list else {k: raised(y, dtype) for k, y in x.items()}
    return x
