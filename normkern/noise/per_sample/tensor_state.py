"""`TensorState`: for each tensor of a context, the place of its samples, and the parameters it was made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import sample_layout
from .accumulator import Accumulator
from .contributions import Contribution
from .derived import Derived
from .numbered import NO_SAMPLE, Numbered, described, table_of
from .operation import map_tensors
from .propagation import LayoutRules
from .record import ParameterRecord, Root, Target
from .replayed import replayed
from .sample_layout import Mixed, SampleLayout, State

_T = TypeVar("_T")
_Entry = tuple["weakref.ref[Tensor]", Any]


class Use:
    """One operation of the forward that joins parameters with samples, for its backward.

    Args:
        targets: whose gradients the operation contributes to; None in the place of an operand that needs none.
    """

    def __init__(self, accumulator: Accumulator, name: str, batch: int, targets: list[Target | None]) -> None:
        self.accumulator, self.name, self.batch, self.targets = accumulator, name, batch, targets
        self.call, self.origin = accumulator.call(), accumulator.origin
        self.done = False
        for target in targets:
            if target is not None:
                accumulator.expect(target)

    def begin(self) -> None:
        """Check that this backward may run; call it before `measure`."""
        self.accumulator.backward_of(self)

    def measure(self, i: int, contribution: Callable[[], Contribution]) -> Tensor | None:
        """Return the gradient of the i-th target, and accumulate its contributions, which the function returns."""
        target = self.targets[i]
        assert target is not None
        return self.accumulator.measure(target, contribution)

    def compare(self, i: int, measured: Tensor | None, plain: Tensor, g: Tensor, x: Tensor) -> None:
        """Compare the sum of the contributions with autograd's gradient, whose terms are of the size of |g| |x|."""
        target = self.targets[i]
        assert measured is not None
        assert target is not None
        self.accumulator.compare(target, self.name, measured, plain, g, x)


class TensorState:
    """Tables of tensors, by id; an entry is valid as long as its tensor lives. Handlers of operations get this object.

    Attributes:
        accumulator: takes the contributions of the parameters.
        declared: the sample of each row, where the user told it: also of rows into which nothing was added.

    A handler uses `state` (where a tensor's samples are), `mark` (say where they are, of what the handler returns),
    `derived` and `roots` (which parameters a tensor was made of), `use` (announce contributions), `once_per_call` (what
    all uses in one call of the model share), `run` (other operations in place of its own), `rules` (where the samples
    are after an operation) and `accumulator`.
    """

    def __init__(self, accumulator: Accumulator, mode: AbstractContextManager[Any]) -> None:
        """`mode` sees the operations that `run` runs."""
        self.accumulator = accumulator
        self._mode: AbstractContextManager[Any] | None = mode
        self._states: dict[int, _Entry] = {}
        self._derived: dict[int, _Entry] = {}
        self._opaque: dict[int, _Entry] = {}
        self._written: dict[int, _Entry] = {}
        self._by_node: dict[tuple[Any, int], Derived] = {}
        self._leaves: dict[int, Tensor] = {}
        self._parameters = accumulator.parameters
        self._rules: LayoutRules | None = None
        self._made: dict[Any, Any] = {}
        self._made_in: int | None = None
        self.declared: Tensor | None = None

    def forget(self) -> None:
        """Forget all tensors, and the mode, which holds this object."""
        for table in (self._states, self._derived, self._opaque, self._written, self._leaves, self._by_node):
            table.clear()
        self._made.clear()
        self._mode = None

    def sweep(self) -> None:
        """Forget tensors that no longer exist."""
        self._by_node.clear()
        for table in (self._states, self._derived, self._opaque, self._written):
            for key in [k for k, entry in table.items() if entry[0]() is None]:
                del table[key]

    # ---- Samples

    @property
    def rules(self) -> LayoutRules:
        """The layout rules, for the current batch size."""
        batch = self.accumulator.batch
        assert batch is not None
        if self._rules is None or self._rules.batch != batch:
            self._rules = LayoutRules(batch)
        return self._rules

    def mark(self, t: Tensor, state: State) -> None:
        """Record where a tensor's samples are."""
        self._states[id(t)] = (weakref.ref(t), state)

    def known(self, t: Tensor) -> bool:
        """Return whether the tensor came out of an operation seen here, or was given to the model."""
        entry = self._states.get(id(t))
        return entry is not None and entry[0]() is t

    def state(self, t: Tensor) -> State:
        """Return where a tensor's samples are; a guess for an unknown one whose first dimension is of size B."""
        entry = self._states.get(id(t))
        if entry is not None and entry[0]() is t:
            return entry[1]
        batch = self.accumulator.batch
        if batch is None or t.dim() == 0 or t.shape[0] != batch:
            return None
        if self.accumulator.constant(t) or id(t) in self._parameters:
            return None
        return sample_layout.leading(t.shape, batch, certain=False)

    def plain_block(self, t: Tensor) -> int | None:
        """Return the block of a tensor whose samples are certain, 0 if it has none; None: what else it may be."""
        key = id(t)
        entry = self._states.get(key)
        if entry is not None and entry[0]() is t:
            state = entry[1]
            if type(state) is SampleLayout:
                return state.block if state.certain else None
            if state is not None or t.requires_grad or key in self._derived or key in self._opaque:
                return None
        elif self.state(t) is not None:
            return None
        return None if key in self._parameters else 0

    def layout(self, t: Any) -> SampleLayout | None:
        """Return the layout of a tensor's samples; None where they are mixed, or it has none or is no tensor."""
        state = self.state(t) if isinstance(t, Tensor) else None
        return state if isinstance(state, SampleLayout) else None

    def write(self, x: Tensor, index: Any, y: Tensor, before: State, source: SampleLayout | Numbered) -> None:
        """Record the samples `source` that ``x[index] = y`` wrote into x, which had the state `before`."""
        batch = self.rules.batch
        with torch._C.DisableTorchFunction(), torch.no_grad():
            entry = self._written.get(id(x))
            known = None if entry is None or entry[0]() is not x or entry[1][1] is not before else entry[1][0]
            if known is None:
                is_sure = isinstance(before, Numbered) or (isinstance(before, SampleLayout) and before.certain)
                table = table_of(x.shape, before, batch) if is_sure else None
                known = torch.full(x.shape, NO_SAMPLE) if table is None else table.expand(x.shape).clone()
            written = table_of(y.shape, source, batch)
            assert written is not None
            known[map_tensors(index, lambda t: t.cpu())] = written
            block = sample_layout.block_where_known(known, batch)
            is_guess = isinstance(source, SampleLayout) and not source.certain
            after: State = Mixed("samples were written into each other's places")
            if block is not None:
                after = SampleLayout(block)
            elif not is_guess:
                after = described(known, x.shape, batch)
        self.mark(x, after)
        self._written[id(x)] = (weakref.ref(x), (known, after))

    def write_through(self, view: Tensor, before: State) -> None:
        """Record in the tensor that a view is of what an operation in place wrote into the view, of state `before`."""
        after, base, batch = self.state(view), view._base, self.rules.batch
        if (
            base is None
            or after == before
            or base.dim() == 0
            or (isinstance(after, SampleLayout) and not after.certain)
        ):
            return
        if type(after) is Mixed:
            if view.requires_grad:
                self.mark(base, after)
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            state = self.state(base)
            is_sure = isinstance(state, Numbered) or (isinstance(state, SampleLayout) and state.certain)
            known = table_of(base.shape, state, batch) if is_sure else None
            flat = (torch.tensor(NO_SAMPLE) if known is None else known).expand(base.shape).reshape(-1).clone()
            if not base.is_contiguous():
                self.mark(base, Mixed("they were written into a part of a tensor that is not contiguous"))
                return
            offset = view.storage_offset() - base.storage_offset()
            places = torch.arange(base.numel()).as_strided(view.shape, view.stride(), offset)
            table = table_of(view.shape, after, batch)
            flat[places] = torch.tensor(NO_SAMPLE) if table is None else table.expand(view.shape)
            self.mark(base, described(flat.view(base.shape), base.shape, batch))

    # ---- Parameters

    def is_parameter(self, t: Tensor) -> bool:
        """Return whether this is a parameter, or was made of parameters alone."""
        key = id(t)
        if key in self._parameters:
            return True
        marked = self._states.get(key)
        if marked is None or marked[1] is not None:  # what is made of parameters is marked as without samples
            return False
        for table in (self._derived, self._opaque):
            entry = table.get(key)
            if entry is not None and entry[0]() is t:
                return True
        return t.requires_grad and self._is_replayed(t)

    def _is_replayed(self, t: Tensor) -> bool:
        """Return whether an autograd function made a tensor of parameters alone, and remember the way back."""
        if not self.known(t):
            return False
        d = replayed(t, self._derived_by, lambda saved: self.state(saved) is not None)
        if d is not None:
            self.mark_derived(t, d)
        return d is not None

    def _derived_by(self, node: Any, at: int) -> Derived | None:
        """Return what the result of a node of autograd's graph was derived from, or the parameter that it is."""
        parameter = getattr(node, "variable", None)
        if parameter is None:
            return self._by_node.get((node, at))
        leaf = self.leaf(parameter)
        return Derived(leaf, {id(parameter): leaf}, True) if self.accumulator.knows(parameter) else None

    def derived(self, t: Tensor) -> Derived | None:
        """Return what a tensor was derived from; None: not from parameters alone."""
        entry = self._derived.get(id(t))
        return entry[1] if entry is not None and entry[0]() is t else None

    def opaque(self, t: Tensor) -> tuple[list[ParameterRecord], str] | None:
        """Return the parameters in a tensor made by an operation without a way back, and the operation's name."""
        entry = self._opaque.get(id(t))
        return entry[1] if entry is not None and entry[0]() is t else None

    def roots(self, t: Tensor) -> list[Root]:
        """Return the parameters in a tensor that is one or was derived from some, and the way to each."""
        if self.accumulator.knows(t):
            return [Root(self.accumulator.record(id(t)), None)]
        d = self.derived(t)
        assert d is not None
        return [Root(self.accumulator.record(root), d) for root in d.leaves]

    def records(self, parameters: Sequence[Tensor]) -> list[ParameterRecord]:
        """Return the records of all parameters in these tensors."""
        records: list[ParameterRecord] = []
        for t in parameters:
            hidden = self.opaque(t)
            found = hidden[0] if hidden else [root.record for root in self.roots(t)]
            records += [r for r in found if r not in records]
        return records

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return the stand-in of a parameter in the graphs of derived tensors."""
        leaf = self._leaves.get(id(parameter))
        if leaf is None:
            leaf = self._leaves[id(parameter)] = parameter.detach().requires_grad_()
        return leaf

    def mark_derived(self, t: Tensor, derived: Derived) -> None:
        """Record what a tensor was derived from."""
        self.mark(t, None)
        self._derived[id(t)] = (weakref.ref(t), derived)
        self._by_node[t.grad_fn, t.output_nr] = derived

    def forget_aliases(self, t: Tensor, records: list[ParameterRecord], operation: str) -> None:
        """Record that other tensors made of parameters are in the memory that an operation wrote into."""
        storage = t.untyped_storage()._cdata
        for table in (self._derived, self._opaque):
            for entry in list(table.values()):
                other = entry[0]()
                if other is not None and other is not t and other.untyped_storage()._cdata == storage:
                    self.mark_opaque(other, records + [r for r in self.records([other]) if r not in records], operation)

    def mark_opaque(self, t: Tensor, records: list[ParameterRecord], operation: str) -> None:
        """Record that contributions to a tensor cannot go back through an operation to these parameters."""
        self.mark(t, None)
        self._opaque[id(t)] = (weakref.ref(t), (records, operation))

    def may_measure(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether contributions to all of these tensors can go back to parameters."""
        return all(self.target(p) is not None for p in parameters)

    def target(self, t: Any) -> Tensor | None:
        """Return the argument if it is a parameter or was derived from some; else None."""
        if isinstance(t, Tensor) and (self.accumulator.knows(t) or self.derived(t) is not None):
            return t
        return None

    # ---- Operations

    def run(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operation in place of the one that the user called; the tracer sees it."""
        assert self._mode is not None
        with self._mode:
            return func(*args, **kwargs)

    def once_per_call(self, key: Any, make: Callable[[], _T]) -> _T:
        """Return what `make` returned for this key in the current call of the model; else call it."""
        call = self.accumulator.call()
        if call is None:
            return make()
        if call != self._made_in:
            self._made, self._made_in = {}, call
        if key not in self._made:
            self._made[key] = make()
        found: _T = self._made[key]
        return found

    def use(self, name: str, operands: Sequence[Any]) -> Use:
        """Return a use of these operands, of which those that are no parameters need no gradient here."""
        targets = [self.target(t) for t in operands]
        return Use(
            self.accumulator, name, self.rules.batch,
            [None if t is None else Target(self.roots(t), t.dtype) for t in targets],
        )  # fmt: skip
