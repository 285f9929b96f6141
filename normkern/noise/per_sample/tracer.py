"""`Tracer`: a mode that sees every operation of torch while the context is open, and which parameters it uses.

An operation that joins a parameter with samples is computed by its handler (`layers`), which hands the parameter's
contributions over in the backward. One on parameters alone is remembered (`derived`). Every other operation runs as it
is, and the layout of its samples is propagated to its results (`propagation`). The model itself is not touched.
"""

from __future__ import annotations

import gc
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode

from . import coupling, errors, recall, row_rules, sample_layout, user_code
from .accumulator import Accumulator
from .derived import RANDOM, derive
from .layers import rows
from .layers.registry import CHECKS, Check, find
from .numbered import Numbered, filled
from .operation import Operation, Samples, is_in_place, name_of, tensors_in
from .propagation import POINTWISE, REDUCES, TAKES_NUMBERED, LayoutRules
from .random_signs import SignedBackward
from .sample_layout import Mixed, SampleLayout, State, without_guesses
from .tensor_state import TensorState

_bodies: dict[Any, Callable[..., Any]] = {}


def body(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Python function of torch without the lines that hand the call over to a mode or a subclass."""
    found = _bodies.get(func)
    if found is None:
        names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        found = _bodies[func] = _rebuilt(func, {name: lambda *_: False for name in names})
    return found


def _rebuilt(func: Any, names: dict[str, Any]) -> Callable[..., Any]:
    out = types.FunctionType(
        func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__, func.__closure__
    )
    out.__kwdefaults__ = func.__kwdefaults__
    return out


def _is_composite(func: Any) -> bool:
    """Return whether a function is one of torch.nn.functional's that are written in Python."""
    return isinstance(func, types.FunctionType) and func.__module__ == F.__name__


_GUESSED = "they meet a tensor of which it is a guess that its first dimension is of samples"


def _usable(samples: Samples) -> Samples:
    """Drop the guesses of tensors that no gradient reaches."""
    return [(t, layout) for t, layout in samples if layout.certain or t.requires_grad]


def _has_guesses(op: Operation) -> bool:
    """Return whether a guess would decide where samples are; element by element it must fit the others."""
    return op.name not in POINTWISE and any(not layout.certain for _, layout in op.samples)


def _is_consistent(samples: Samples) -> bool:
    """Return whether no guess meets samples that are certain; guesses alone count where a gradient reaches them."""
    certain = {layout.certain for _, layout in samples}
    return certain == {True} or (certain == {False} and all(t.requires_grad for t, _ in samples))


def _is_empty(t: Tensor) -> bool:
    return t.numel() == 0 and t.is_floating_point()


class Tracer(TorchFunctionMode):
    """The mode of one context."""

    def __init__(self, accumulator: Accumulator) -> None:
        super().__init__()
        self.accumulator = accumulator
        self.tensors = TensorState(accumulator, self)
        self.active = True  #: False: the context was lost or closed in another thread, and the mode waits for its end
        self._entered = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = recall.kind_of(func)
        if kind == recall.READ or not self.active or peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        tensors, key = self.tensors, None
        if kind != recall.UNKNOWN and self.accumulator.batch is not None:
            key = recall.key_of(tensors, func, kind, args, kwargs)
            known = None if key is None else recall.known(key)
            if known is not None:
                out = func(*args, **kwargs)
                if not recall.mark(tensors, known, out):
                    op = Operation(name_of(func), func, args, kwargs, [])
                    self._follow(op, list(op.tensors()), out)
                return out
        name = name_of(func)
        if name == "backward" or func is torch.autograd.grad:
            return self._backward(func, args, kwargs)
        operands = list(tensors_in((*args, *kwargs.values())))
        if name in recall.LIKE_ANOTHER and len(operands) > 1:
            operands = operands[:1]
        if hasattr(func, "original") and isinstance(args[0], nn.Module):
            operands += args[0].parameters()
        op = Operation(name, func, args, kwargs, [], [t for t in operands if tensors.is_parameter(t)])
        if op.parameters:
            if torch.is_grad_enabled():
                return self._join(op, operands)
            for t in op.parameters:
                self.accumulator.seen_without_grad(t)
        if name in CHECKS:
            self._check(CHECKS[name], op)
            if not self.active:
                return func(*args, **kwargs)
        if name == "__setitem__":
            return self._assign(op)
        if hasattr(func, "original") and not op.parameters:
            out = self._run_rule(op, operands)
            if out is not NotImplemented:
                return out
        if self._can_enter(op) and not (op.parameters or LayoutRules.knows(name)):
            return self._enter(op)
        view = op.written() if is_in_place(func) else None
        if view is not None and not view._is_view():
            view = None
        before = None if view is None else tensors.state(view)
        out = func(*args, **kwargs)
        self._follow(op, operands, out)
        if key is not None:
            recall.remember(tensors, key, operands, out)
        if view is not None and self.accumulator.batch is not None:
            tensors.write_through(view, before)
        accumulator = self.accumulator
        if accumulator.in_model and accumulator.uncovered_is == "estimate" and isinstance(out, Tensor):
            return self._signed(op, operands, out)
        return out

    def _signed(self, op: Operation, operands: list[Tensor], out: Tensor) -> Tensor:
        """Run a loss of the model once more, on samples that the signed backward reaches."""
        tensors = self.tensors
        state = tensors.state(out)
        if not (isinstance(state, Mixed) and state.kind == "summed" and out.requires_grad) or op.written() is not None:
            return out
        instead: dict[int, Tensor] = {}
        for t in operands:
            layout = tensors.layout(t)
            if layout is not None and t.requires_grad:
                with torch._C.DisableTorchFunction():
                    instead[id(t)] = SignedBackward.apply(self.accumulator, layout.block, t, [t])
                tensors.mark(instead[id(t)], layout)
        if not instead:
            return out
        out = op.run_with(lambda t: instead.get(id(t), t))
        tensors.mark(out, state)
        return out

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a backward with the mode on, because activation checkpointing runs the forward again inside it."""
        outermost = self._entered == 0 and torch._C._current_graph_task_id() == -1
        outermost = outermost and func is not torch.autograd.grad
        self._entered += 1
        try:
            with self:
                out = body(func)(*args, **kwargs)
        except BaseException as error:
            if outermost:
                self.accumulator.forget_backward()
            if isinstance(error, RuntimeError) and "once_differentiable" in str(error):
                raise errors.double_backward() from error
            raise
        finally:
            self._entered -= 1
        if outermost:
            if self.accumulator.reduction == "mean" and self.accumulator.measures:
                self._warn_of_sums(tensors_in((*args, *kwargs.values())))
            self.accumulator.backward_ended()
            self.tensors.sweep()
        return out

    def _warn_of_sums(self, losses: Iterator[Tensor]) -> None:
        """Warn, once in a context, if a loss is seen to be a sum over samples."""
        states = [self.tensors.state(t) for t in losses]
        if not self.accumulator.warned and any(
            isinstance(s, Mixed) and s.kind == "summed" and s.is_sum for s in states
        ):
            self.accumulator.warned = True
            warnings.warn(errors.loss_is_a_sum(), stacklevel=6)

    def _enter(self, op: Operation) -> Any:
        """Run the body of a composite function with the mode on."""
        with self:
            out = (getattr(op.func, "original", None) or body(op.func))(*op.args, **op.kwargs)
        if coupling.is_sum(op) and isinstance(out, Tensor):
            state = self.tensors.state(out)
            if isinstance(state, Mixed) and state.kind == "summed":
                self.tensors.mark(out, replace(state, is_sum=True))
        return out

    def _run_rule(self, op: Operation, operands: list[Tensor]) -> Any:
        """Run a registered operation without parameters by its rule, so that its samples are followed."""
        registration = find(op.name)
        op.samples = [(t, layout) for t in operands if (layout := self.tensors.layout(t)) is not None]
        return NotImplemented if registration is None or not op.samples else registration.handler(self.tensors, op)

    @staticmethod
    def _can_enter(op: Operation) -> bool:
        """Return whether an operation is made of others that can be seen, as a composite function and a module are."""
        return _is_composite(op.func) or (hasattr(op.func, "original") and isinstance(op.args[0], nn.Module))

    def _check(self, check: Check, op: Operation) -> None:
        """Refuse an operation that couples samples, unless it turns out that the context was lost."""
        try:
            check(self.tensors, op)
        except RuntimeError:
            gc.collect()  # the lost `GradientNoise` may be in a cycle
            if self.active:
                raise

    # ---- Operations without parameters

    def _assign(self, op: Operation) -> Any:
        """Run ``x[index] = y``: x gets the samples of y, where it has none yet or those of a guess."""
        x, index, y = op.args
        before = self.tensors.state(x)
        out = op.func(*op.args, **op.kwargs)
        state = self.tensors.state(y) if isinstance(y, Tensor) else None
        if self.accumulator.batch is not None and isinstance(state, (SampleLayout, Numbered)):
            self.tensors.write(x, index, y, before, state)
        elif isinstance(state, Mixed) and y.requires_grad:
            are_losses = y.numel() == 1 and (before is None or (isinstance(before, Mixed) and before.are_losses))
            self.tensors.mark(x, replace(state, are_losses=state.kind == "summed" and are_losses))
        return out

    def _follow(self, op: Operation, operands: list[Tensor], out: Any) -> None:
        """Record where the samples of the results of an operation are."""
        results = list(tensors_in((out,)))
        if not results or self.accumulator.batch is None:
            return
        tensors, rules = self.tensors, self.tensors.rules
        states_of: list[tuple[Tensor, State]] = []
        samples: Samples = []
        lists: list[tuple[Tensor, Numbered]] = []
        mixed: Mixed | None = None
        for t in operands:
            state = tensors.state(t)
            states_of.append((t, state))
            if isinstance(state, SampleLayout):
                samples.append((t, state))
            elif isinstance(state, Numbered):
                lists.append((t, state))
            elif isinstance(state, Mixed) and t.requires_grad:
                mixed = mixed or state
        if lists and mixed is None:
            self._follow_numbered(op, samples, lists, results)
            return
        if mixed is not None:
            states_of = [(t, Mixed(s.why, kind="moved") if isinstance(s, Numbered) else s) for t, s in states_of]
            for x in results:
                self._mark_mixed(x, coupling.after(op, x, states_of), coupling.may_couple(op, x, states_of))
            return
        if len(samples) == 1 and op.name in POINTWISE:
            t, layout = samples[0]
            if all(x.shape == t.shape for x in results):
                for x in results:
                    tensors.mark(x, layout)
                return
        if not samples:
            for x in results:
                tensors.mark(x, rules.created(op.name, x))
            return
        with torch._C.DisableTorchFunction():
            states = rules.after(op.of(samples), out)
            sure = without_guesses(samples)
            if any(type(s) is Mixed for s in states) and 0 < len(sure) < len(samples):
                samples = sure
                states = rules.after(op.of(samples), out)
            if any(type(s) is Mixed for s in states) and _is_consistent(sure):
                found = row_rules.after(op.of(sure), results, rules.batch)
                states = [b if type(a) is Mixed else a for a, b in zip(states, found, strict=True)]
        if len(samples) > 1 and any(type(s) is Mixed for s in states) and op.name not in REDUCES:
            self._check_guesses(op, samples, results)
        self._mark_all(op, results, states)

    def _mark_all(self, op: Operation, results: list[Tensor], states: Sequence[State]) -> None:
        """Record the state of each result of an operation on samples."""
        for x, state in zip(results, states, strict=True):
            if not isinstance(state, Mixed) or isinstance(state, Numbered):
                self.tensors.mark(x, state)
            elif x.dim() == 0 and not x.requires_grad:
                self.tensors.mark(x, None)
            else:
                state = coupling.made(op, x, state)
                where = f" (at {user_code.line()})" if self.accumulator.in_model else ""
                self._mark_mixed(x, replace(state, why=state.why + where))

    def _mark_mixed(self, x: Tensor, state: Mixed, may_couple: bool = True) -> None:
        """Record that an operation has mixed samples; where it may have coupled them, the parameters before are out."""
        accumulator = self.accumulator
        is_unknown = state.kind == "unknown" and may_couple and x.requires_grad
        if is_unknown and accumulator.in_model and accumulator.uncovered_is != "raise":
            with torch._C.DisableTorchFunction():
                x.register_hook(accumulator.taint)
        self.tensors.mark(x, state)

    def _check_guesses(self, op: Operation, samples: Samples, results: list[Tensor]) -> None:
        """Refuse an operation that mixes samples of a guess with others, but for a loss that takes them in parallel."""
        batch = self.tensors.rules.batch
        axes = {sample_layout.axis(t.shape, layout.block, batch) for t, layout in samples}
        if len(axes) == 1 and None not in axes and all(x.dim() == 0 for x in results):
            return
        for t, layout in samples:
            if not layout.certain and t.requires_grad and self.tensors.known(t):
                raise errors.wrong_guess(op.name, tuple(t.shape), batch)

    def _follow_numbered(
        self, op: Operation, samples: Samples, lists: list[tuple[Tensor, Numbered]], results: list[Tensor]
    ) -> None:
        """Record the samples of the results of an operation on samples in any order."""
        rules = self.tensors.rules
        op = replace(op, samples=_usable(samples), numbered=lists)
        if _has_guesses(op):
            for x in results:
                self.tensors.mark(x, Mixed(_GUESSED))
            return
        with torch._C.DisableTorchFunction():
            states = (
                rules.after(op, results) if op.name in TAKES_NUMBERED else row_rules.after(op, results, rules.batch)
            )
            states = [
                filled(state, x.shape, self.tensors.declared, rules.batch)
                for x, state in zip(results, states, strict=True)
            ]
        self._mark_all(op, results, states)

    # ---- Operations with parameters

    def _join(self, op: Operation, operands: list[Tensor]) -> Any:
        """Run an operation on parameters, by its handler if it has samples."""
        tensors, parameters = self.tensors, op.parameters
        registration = find(op.name)
        needs_batch = registration is not None and registration.needs_batch and len(parameters) < len(operands)
        if needs_batch and self.accumulator.batch is None:
            raise errors.unknown_batch(tensors.records(parameters)[0].described)
        own = {id(p) for p in parameters}
        for t in operands:
            if id(t) in own:
                continue
            state = tensors.state(t)
            if isinstance(state, SampleLayout):
                op.samples.append((t, state))
            elif isinstance(state, Numbered):
                op.numbered.append((t, state))
            elif isinstance(state, Mixed) and t.requires_grad:
                is_penalty = coupling.is_linear(op, state)
                has_way_out = state.kind in ("moved", "unknown")
                if not (has_way_out or is_penalty) or self.accumulator.uncovered_is == "raise":
                    described = tensors.records(parameters)[0].described
                    raise errors.mixed(described, op.name, state.why, has_way_out, is_penalty)
                if is_penalty and not coupling.adds(op):  # random signs reach it through the outputs alone
                    self.accumulator.exclude(tensors.records(parameters))
                return self._leave_out(op, operands, state.why)
        if op.numbered and not (registration is not None and registration.takes_numbered):
            return self._join_by_rows(op, operands)
        if not (op.samples or op.numbered) and any(
            _is_empty(t) for t in operands if not any(t is p for p in parameters)
        ):
            return rows.join_empty(tensors, op) if tensors.may_measure(parameters) else self._derive(op)
        if not (op.samples or op.numbered):
            makes_samples = None if registration is None else registration.without_samples
            if makes_samples is None or not makes_samples(tensors, op):
                is_module = not _is_composite(op.func) and self._can_enter(op)
                return self._enter(op) if is_module else self._derive(op)
        for t in parameters:
            hidden = tensors.opaque(t)
            if hidden is not None:
                return self._leave_out(op, operands, f"made by {hidden[1]}")
        if registration is not None and not registration.takes_complex and any(t.is_complex() for t in operands):
            registration, op.why = None, "of complex numbers"
            if self._can_enter(op) and not LayoutRules.knows(op.name):
                return self._enter(op)
        elif registration is None and _is_composite(op.func):
            return self._enter(op)
        if registration is not None:
            out = registration.handler(tensors, op)
            if out is NotImplemented and 0 < len(sure := without_guesses(op.samples)) < len(op.samples):
                out = registration.handler(tensors, op.of(sure))
            if out is not NotImplemented:
                return out
            if self._can_enter(op) and not _is_composite(op.func):
                return self._enter(op)
        return self._leave_out(op, operands, op.why)

    def _join_by_rows(self, op: Operation, operands: list[Tensor]) -> Any:
        """Run an operation with parameters on samples in any order."""
        op.samples = _usable(op.samples)
        if any(self.tensors.opaque(t) is not None for t in op.parameters):
            return self._leave_out(op, operands, None)
        if _is_composite(op.func) and find(op.name) is None and not row_rules.knows(op.name):
            return self._enter(op)
        out = NotImplemented if _has_guesses(op) else rows.join(self.tensors, op)
        if out is not NotImplemented:
            return out
        state = op.numbered[0][1]
        has_way_out = not LayoutRules.knows(op.name)  # whether samples meet is not known
        must_raise = self.accumulator.uncovered_is == "raise" or not has_way_out
        if must_raise and any(t.requires_grad for t, _ in op.numbered):
            described = self.tensors.records(op.parameters)[0].described
            raise errors.mixed(described, op.name, op.why or state.why, has_way_out)
        return self._leave_out(op, operands, op.why or state.why)

    def _derive(self, op: Operation) -> Any:
        """Run an operation on parameters alone, and remember the way back to them."""
        tensors = self.tensors
        written = op.written()
        before = None if written is None or tensors.is_parameter(written) else written.detach().clone()
        out = op.func(*op.args, **op.kwargs)
        every = list(tensors_in((out,))) if written is None else [written]
        results = [x for x in every if x.requires_grad]
        if written is not None:
            tensors.forget_aliases(written, tensors.records(op.parameters), op.name)
        if not results or (written is None and any(any(x is p for p in op.parameters) for x in results)):
            for x in every:
                tensors.mark(x, None)
        elif op.name in RANDOM or any(tensors.opaque(p) for p in op.parameters):
            hidden = next((h for p in op.parameters if (h := tensors.opaque(p)) is not None), None)
            for x in results:
                tensors.mark_opaque(x, tensors.records(op.parameters), op.name if hidden is None else hidden[1])
        else:
            derived = derive(op, results[0], tensors.derived, tensors.leaf, before)
            for x, d in zip(every, derived, strict=True):
                if x.requires_grad:
                    tensors.mark_derived(x, d)
                else:  # indices, as of topk
                    tensors.mark(x, None)
        return out

    def _leave_out(self, op: Operation, operands: list[Tensor], why: str | None) -> Any:
        """Refuse an operation, or run it without measuring its parameters."""
        self.accumulator.uncovered(self.tensors.records(op.parameters), op.name, why)
        out = op.func(*op.args, **op.kwargs)
        self._follow(op, [t for t in operands if not any(t is p for p in op.parameters)], out)
        return out
