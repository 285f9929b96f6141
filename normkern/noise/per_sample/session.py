"""`Session`: what one open context has put into torch, and how all of it is taken away again.

A context may be opened in one hook of a training framework and closed in another, and an error in between may lose it.
So nothing here keeps the `GradientNoise` object or its model alive: when the object is gone, its mode does nothing any
more, and the next context of the thread removes it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from .accumulator import Accumulator
from .model_parameters import ModelParameters
from .record import ParameterRecord
from .tracer import Tracer

_of_thread = threading.local()


class Session:
    """One open context of this thread: the mode, the hooks, and torch.compile's stance.

    Attributes:
        owner: a weak reference to the `GradientNoise`.
        modules: ids of the model's modules, while it lives.
        parameters: ids of the parameters that its modules may have.
    """

    def __init__(
        self, owner: Any, parameters: ModelParameters, accumulator: Accumulator, eagerly: AbstractContextManager[None]
    ) -> None:
        """`eagerly` has been entered."""
        self.owner: weakref.ref[Any] = weakref.ref(owner)
        self.accumulator = accumulator
        self.tracer = Tracer(accumulator)
        self.modules = {id(m) for m in parameters.modules}
        self.parameters = parameters.known | parameters.constants
        self._eagerly: AbstractContextManager[None] | None = eagerly
        self._handles: list[Any] = []
        for r in accumulator.records:
            self._handles.append(r.param.register_hook(_unseen(accumulator.incoming, r)))
            self._handles.append(r.param.register_post_accumulate_grad_hook(_unseen(accumulator.accumulated, r)))
        self._lost = weakref.finalize(owner, self.release)
        self._lost.atexit = False
        _of_thread.session = self
        self.tracer.__enter__()

    def before_forward(self, modules: Iterable[nn.Module], hook: Callable[..., Any]) -> None:
        """Call a method of the owner before every forward of modules."""
        call = _weak(hook)
        self._handles += [m.register_forward_pre_hook(call, with_kwargs=True, prepend=True) for m in modules]

    def after_forward(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call a method of the owner after every forward of a module, also after one that failed."""
        self._handles.append(module.register_forward_hook(_weak(hook), with_kwargs=True, always_call=True))

    def release(self) -> None:
        """Remove all but the mode, which does nothing from now on. Any thread may call this, also twice."""
        self.tracer.active = self.accumulator.open = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        eagerly, self._eagerly = self._eagerly, None
        if eagerly is not None:
            eagerly.__exit__(None, None, None)

    def close(self) -> None:
        """Remove everything. In another thread than that of the context the mode stays until the next one there."""
        self._lost.detach()
        self.release()
        self.tracer.tensors.forget()
        if current() is self:
            _remove(self.tracer)
            _of_thread.session = None


def current() -> Session | None:
    """Return the session that was opened last in this thread and not closed in it."""
    return getattr(_of_thread, "session", None)


def forget_lost() -> None:
    """Remove the session of this thread if its owner no longer exists, or closed it in another thread."""
    session = current()
    if session is not None and session.tracer.active:
        gc.collect()  # it may be in a cycle; two contexts of one thread are an error otherwise
    if session is not None and not session.tracer.active:
        session.close()


def _remove(tracer: Tracer) -> None:
    """Take a mode off this thread's stack, from below others that were entered later and not left."""
    if not any(mode is tracer for mode in _get_current_function_mode_stack()):
        return
    above = []
    while (mode := _pop_mode()) is not tracer:
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that calls a method as long as its object exists."""
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = found()
        return None if bound is None else bound(*args)

    return call


def _unseen(hook: Callable[[ParameterRecord, Tensor], None], r: ParameterRecord) -> Callable[[Tensor], None]:
    """Return a hook of a parameter whose own operations the tracer does not see."""

    def call(t: Tensor) -> None:
        with DisableTorchFunction():
            hook(r, t)

    return call
