"""Who uses which parameter: a mode that sees every operation of torch while the context is open.

An operation that joins a parameter with samples becomes a `layers` function, which hands the parameter's contributions
on in backward; one on parameters alone is remembered (`derived`); every other one only moves the samples along
(`follow`). The model itself is not touched.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode

from . import propagation as follow
from . import sample_layout as rows
from .derived import ELEMENTWISE, Derived, selects
from .layers import registry as joins
from .propagation import Follower, tensors_in
from .sample_layout import Lost, Rows, State
from .words import words

if TYPE_CHECKING:
    from .accumulator import Ledger, Record

#: Read something of a tensor, and make none.
READS = words(
    """size dim numel nelement ndimension is_floating_point is_complex element_size stride storage_offset is_contiguous
    data_ptr item tolist __len__ __repr__ __str__ __format__ __hash__ __bool__ __int__ __float__ __index__
    is_same_size requires_grad_ retain_grad register_hook is_set_to is_nonzero equal allclose __contains__ __set__
    __delete__ set_ _set_grad_enabled set_grad_enabled get_device is_tensor is_storage result_type can_cast
    promote_types finfo iinfo is_inference is_neg is_conj has_names _is_view untyped_storage type_as_dtype
    __dlpack__ __dlpack_device__ numpy broadcast_shapes manual_seed"""
)
_TENSOR_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "data", "real"))


def body(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch written in Python, without the line that hands it to whoever overrides it."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    return rebuilt(func, {name: lambda *_: False for name in names})


def rebuilt(func: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """The same function with other globals."""
    out = types.FunctionType(
        func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__, func.__closure__
    )
    out.__kwdefaults__ = func.__kwdefaults__
    return out


def without_guesses(samples: list[tuple[Tensor, Rows]]) -> list[tuple[Tensor, Rows]]:
    """A guess where the samples are, about what no gradient reaches, yields to what is certain."""
    if not any(r.certain for _, r in samples):
        return samples
    return [(t, r) for t, r in samples if r.certain or t.requires_grad]


_bodies: dict[Any, Callable[..., Any]] = {}
_names: dict[Any, str] = {}


def name_of(func: Any) -> str:
    """A function's or method's name; of an attribute its own. In-place operations as those that are not."""
    name = _names.get(func)
    if name is None:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            name = attribute if attribute in _TENSOR_ATTRIBUTES else "size"
        elif (
            name.startswith("__i")
            and name.endswith("__")
            and name not in ("__iter__", "__index__", "__int__", "__invert__")
        ):
            name = "__" + name[3:]
        elif name.endswith("_") and not name.endswith("__") and name not in READS:
            name = name[:-1]
        _names[func] = name
    return name


class Use:
    """One operation that joins parameters with samples."""

    def __init__(self, ledger: Ledger, name: str, batch: int, targets: Sequence[Tensor | None]) -> None:
        self.ledger, self.name, self.batch, self.targets = ledger, name, batch, list(targets)
        self.call, self.origin = ledger.call(), ledger.origin
        self.done = False
        for t in self.targets:
            if t is not None:
                ledger.expect(t)

    def begin(self) -> None:
        """Its backward runs."""
        self.ledger.backward_of(self)

    def measure(self, i: int, part: Callable[[], Any]) -> Tensor | None:
        """The gradient of the i-th target, whose contributions `part` can say."""
        target = self.targets[i]
        assert target is not None
        return self.ledger.measure(self, target, part)

    def compare(self, i: int, measured: Tensor | None, plain: Tensor, g: Tensor, x: Tensor) -> None:
        """Measured contributions' sum against autograd's gradient, whose terms are of the size of |g| |x|."""
        target = self.targets[i]
        assert measured is not None
        assert target is not None
        self.ledger.compare(self.ledger.first_of(target), self.name, measured, plain, g, x)


class Capture(TorchFunctionMode):
    """The mode. States of tensors live as long as the tensors do."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self._states: dict[int, tuple[weakref.ref[Tensor], State]] = {}
        self._derived: dict[int, tuple[weakref.ref[Tensor], Derived]] = {}
        self._leaves: dict[int, Tensor] = {}
        self._written: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._opaque: dict[int, tuple[weakref.ref[Tensor], list[Record], str]] = {}
        self._follower: Follower | None = None
        self._entered = 0

    def forget(self) -> None:
        """All tensors."""
        self._states.clear()
        self._derived.clear()
        self._leaves.clear()
        self._opaque.clear()
        self._written.clear()

    # ---- Where the samples of a tensor are

    @property
    def follower(self) -> Follower:
        """For the batch size of now."""
        batch = self.ledger.batch
        assert batch is not None
        if self._follower is None or self._follower.batch != batch:
            self._follower = Follower(batch)
        return self._follower

    def mark(self, t: Tensor, state: State) -> None:
        """Says where a tensor's samples are."""
        self._states[id(t)] = (weakref.ref(t), state)

    def known(self, t: Tensor) -> bool:
        """Whether it came out of an operation seen here, or was given to the model."""
        entry = self._states.get(id(t))
        return entry is not None and entry[0]() is t

    def state(self, t: Tensor) -> State:
        """Of a tensor nobody has seen: the batch is in front if that dimension is as long."""
        entry = self._states.get(id(t))
        if entry is not None and entry[0]() is t:
            return entry[1]
        batch = self.ledger.batch
        if batch is None or t.dim() == 0 or t.shape[0] != batch or self.ledger.constant(t):
            return None
        return rows.leading(t.shape, batch, certain=False)

    def derived(self, t: Tensor) -> Derived | None:
        """What a tensor was made of, if of parameters alone."""
        entry = self._derived.get(id(t))
        return entry[1] if entry is not None and entry[0]() is t else None

    def opaque(self, t: Tensor) -> tuple[list[Record], str] | None:
        """The parameters in a tensor made of them by operations through which contributions cannot go back."""
        entry = self._opaque.get(id(t))
        return (entry[1], entry[2]) if entry is not None and entry[0]() is t else None

    # ---- Operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in READS or peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        if name == "backward" or func is torch.autograd.grad:
            return self._backward(func, args, kwargs)
        ledger = self.ledger
        operands = list(tensors_in((*args, *kwargs.values())))
        mine = [t for t in operands if ledger.knows(t) or self.derived(t) is not None or self.opaque(t) is not None]
        if mine:
            if torch.is_grad_enabled():
                return self._joined(name, func, args, kwargs, operands, mine)
            for t in mine:
                ledger.seen_without_grad(t)
        if name == "batch_norm" and joins.uses_batch_statistics(args, kwargs):
            ledger.refuse_batch_norm()
        if name == "__setitem__":
            return self._assign(func, args, kwargs)
        if self._composite(func) and not (mine or Follower.knows(name)):
            return self._enter(func, args, kwargs)
        out = func(*args, **kwargs)
        self._follow(name, func, args, kwargs, operands, out)
        return out

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Inside, the mode stays on: activation checkpointing runs the forward again there."""
        if func not in _bodies:
            _bodies[func] = body(func)
        outermost = self._entered == 0 and torch._C._current_graph_task_id() == -1
        outermost = outermost and func is not torch.autograd.grad
        self._entered += 1
        try:
            with self:
                out = _bodies[func](*args, **kwargs)
        except BaseException:
            if outermost:
                self.ledger.backward_failed()
            raise
        finally:
            self._entered -= 1
        if outermost:
            self.ledger.backward_ended()
            self._sweep()
        return out

    def _sweep(self) -> None:
        """Forgets tensors that are no more."""
        for table in (self._states, self._derived, self._opaque, self._written):
            for key in [k for k, entry in table.items() if entry[0]() is None]:
                del table[key]

    def _assign(self, func: Any, args: Any, kwargs: Any) -> Any:
        """x[index] = y: what has no samples yet, or was taken for a batch, gets those that are written into it."""
        x, index, y = args
        before = self.state(x)
        out = func(*args, **kwargs)
        state = self.state(y) if isinstance(y, Tensor) else None
        batch = self.ledger.batch
        if batch is None or not isinstance(state, Rows):
            if isinstance(state, Lost) and y.requires_grad:
                self.mark(x, state)
            return out
        with torch._C.DisableTorchFunction(), torch.no_grad():
            written = self._written.get(id(x))
            known = None if written is None or written[0]() is not x else written[1]
            if known is None:
                if isinstance(before, Rows) and before.certain:
                    known = rows.numbers(x.shape, before.block, batch)
                else:
                    known = torch.full(x.shape, -1, dtype=torch.int32)
                self._written[id(x)] = (weakref.ref(x), known)
            known[index] = rows.numbers(y.shape, state.block, batch)
            block = rows.block_where_known(known, batch)
        self.mark(x, Lost("samples were written into each other's places") if block is None else Rows(block))
        return out

    def _follow(self, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor], out: Any) -> None:
        results = list(tensors_in((out,)))
        if not results or self.ledger.batch is None:
            return
        with_rows: list[tuple[Tensor, Rows]] = []
        for t in operands:
            state = self.state(t)
            if isinstance(state, Rows):
                with_rows.append((t, state))
            elif isinstance(state, Lost) and t.requires_grad:
                for x in results:
                    self.mark(x, state)
                return
        if len(with_rows) == 1 and name in follow.POINTWISE:
            t, kept = with_rows[0]
            if all(x.shape == t.shape for x in results):
                for x in results:
                    self.mark(x, kept)
                return
        if not with_rows:
            batch = self.ledger.batch
            for x in results:
                made = name in follow.MAKES and x.dim() > 1
                widened = name in ("expand", "expand_as", "repeat", "broadcast_to", "tile") and x.dim() > 1
                if (made or widened) and x.shape[0] == batch:
                    self.mark(x, rows.leading(x.shape, batch, certain=False))
                else:
                    self.mark(x, None)
            return
        with torch._C.DisableTorchFunction():
            states = self.follower.after(name, func, args, kwargs, with_rows, out)
            sure = without_guesses(with_rows)
            if any(isinstance(s, Lost) for s in states) and 0 < len(sure) < len(with_rows):
                with_rows = sure
                states = self.follower.after(name, func, args, kwargs, with_rows, out)
        if len(with_rows) > 1 and any(isinstance(s, Lost) for s in states) and name not in follow.REDUCES:
            for t, r in with_rows:
                if not r.certain and t.requires_grad and self.known(t):
                    self.ledger.refuse_guess(name, tuple(t.shape))
        for x, state in zip(results, states, strict=True):
            if not isinstance(state, Lost) or x.dim():
                self.mark(x, state)
            else:
                self.mark(x, None if not x.requires_grad else state)

    # ---- Operations that touch parameters

    def _joined(self, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor], mine: list[Tensor]) -> Any:
        if self.ledger.batch is None and name in joins.LAYERS and len(mine) < len(operands):
            self.ledger.refuse_unknown_batch(self._records(mine)[0])
        samples: list[tuple[Tensor, Rows]] = []
        for t in operands:
            if any(t is m for m in mine):
                continue
            state = self.state(t)
            if isinstance(state, Rows):
                samples.append((t, state))
            elif isinstance(state, Lost) and t.requires_grad:
                self.ledger.refuse_lost(self._records(mine)[0], name, state.why)
        spread = name in joins.WIDENS and joins.widens_to_batch(self, mine, func, args, kwargs)
        if not samples and not spread:
            return self._derive(name, func, args, kwargs, operands, mine)
        for t in mine:
            hidden = self.opaque(t)
            if hidden is not None:
                return self._uncovered(name, func, args, kwargs, operands, mine, f"made by {hidden[1]}")
        join = joins.find(name)
        if join is not None:
            out = join(self, name, func, args, kwargs, samples, mine)
            sure = without_guesses(samples)
            if out is NotImplemented and 0 < len(sure) < len(samples):
                out = join(self, name, func, args, kwargs, sure, mine)
            if out is not NotImplemented:
                return out
        elif self._composite(func):
            return self._enter(func, args, kwargs)
        return self._uncovered(name, func, args, kwargs, operands, mine, None)

    @staticmethod
    def _composite(func: Any) -> bool:
        """One of torch.nn.functional's that is written in Python."""
        return isinstance(func, types.FunctionType) and func.__module__ == F.__name__

    def _enter(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Its body, with the mode on."""
        if func not in _bodies:
            _bodies[func] = body(func)
        with self:
            return _bodies[func](*args, **kwargs)

    def run(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """An operation instead of the one that was asked for, with the mode on."""
        with self:
            return func(*args, **kwargs)

    def use(self, name: str, targets: Sequence[Tensor | None]) -> Use:
        """A new use of these tensors."""
        batch = self.ledger.batch
        assert batch is not None
        return Use(self.ledger, name, batch, targets)

    def roots(self, t: Tensor) -> list[tuple[int, Derived | None]]:
        """The parameters in a target, by id, and the way to each."""
        if self.ledger.knows(t):
            return [(id(t), None)]
        d = self.derived(t)
        assert d is not None
        return [(root, d) for root in d.leaves]

    def _records(self, mine: list[Tensor]) -> list[Record]:
        """The parameters in these tensors."""
        records: list[Record] = []
        for t in mine:
            hidden = self.opaque(t)
            found = hidden[0] if hidden else [self.ledger.record(root) for root, _ in self.roots(t)]
            records += [r for r in found if r not in records]
        return records

    def _derive(self, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor], mine: list[Tensor]) -> Any:
        """Of parameters alone."""
        out = func(*args, **kwargs)
        results = [x for x in tensors_in((out,)) if x.requires_grad]
        if not results or any(any(x is m for m in mine) for x in results):
            for x in tensors_in((out,)):
                self.mark(x, None)
            return out
        hidden = [self.opaque(t) for t in mine]
        if any(hidden) or name in joins.OPAQUE or len(results) != sum(1 for _ in tensors_in((out,))):
            self._hide(name, mine, results)
            return out
        stands: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}
        transposed: int | None = None
        chosen = elementwise = True
        for t in mine:
            d = self.derived(t)
            if d is None:
                leaf = self._leaves.get(id(t))
                if leaf is None:
                    leaf = self._leaves[id(t)] = t.detach().requires_grad_()
                stands[id(t)], leaves[id(t)] = leaf, leaf
                if name in ("t", "T", "mT") or (name in ("transpose", "swapaxes", "swapdims", "permute")):
                    transposed = id(t) if t.dim() == 2 and results[0].shape == t.shape[::-1] else None
                    if transposed is not None and results[0].stride() == t.stride():
                        transposed = None
            else:
                stands[id(t)] = d.value
                leaves.update(d.leaves)
                chosen, elementwise = chosen and d.selects, elementwise and d.elementwise

        def stand(a: Any) -> Any:
            if isinstance(a, Tensor):
                return stands.get(id(a), a)
            if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
                return type(a)(stand(y) for y in a)
            return a

        with torch._C.DisableTorchFunction(), torch.enable_grad():
            twin = func(*map(stand, args), **{k: stand(v) for k, v in kwargs.items()})
        picks = selects(name, args)
        pointwise = picks or (name in ELEMENTWISE and len(mine) == 1 and results[0].shape == mine[0].shape)
        for x, value in zip(results, tensors_in((twin,)), strict=True):
            self.mark(x, None)
            self._derived[id(x)] = (
                weakref.ref(x),
                Derived(value, leaves, chosen and picks, elementwise and pointwise, transposed),
            )
        return out

    def _hide(self, name: str, mine: list[Tensor], results: list[Tensor]) -> None:
        """Contributions cannot go back through this operation."""
        records = self._records(mine)
        for x in results:
            self.mark(x, None)
            self._opaque[id(x)] = (weakref.ref(x), records, name)

    def _uncovered(
        self, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor], mine: list[Tensor], why: str | None
    ) -> Any:
        """Refuses, or goes on without these parameters."""
        self.ledger.uncovered(self._records(mine), name, why)
        out = func(*args, **kwargs)
        self._follow(name, func, args, kwargs, [t for t in operands if not any(t is m for m in mine)], out)
        return out
