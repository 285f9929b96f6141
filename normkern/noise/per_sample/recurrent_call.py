"""A call of torch's recurrent operations: its arguments, and which sample each of its sequences is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .numbered import Numbered, numbered, numbers_along, packed_numbers
from .operation import Operation
from .sample_layout import SampleLayout, State


@dataclass(frozen=True)
class RecurrentCall:
    """The arguments of torch.lstm, gru, rnn_tanh or rnn_relu."""

    name: str
    x: Tensor
    batch_sizes: Tensor | None  #: of a packed sequence, whose data x is
    states: list[Tensor]  #: h, and c of an LSTM
    weights: list[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False

    @classmethod
    def of(cls, op: Operation) -> RecurrentCall:
        """Read the arguments of an operation."""
        of_lstm = op.name == "lstm"
        is_packed = isinstance(op.argument(1 if of_lstm else 2, "hx" if of_lstm else "params"), Tensor)
        is_packed = "batch_sizes" in op.kwargs or is_packed
        first = "data batch_sizes" if is_packed else "input"
        last = "" if is_packed else " batch_first"
        x, *more = op.bind(f"{first} hx params has_biases num_layers dropout train bidirectional{last}")
        sizes = more.pop(0) if is_packed else None
        hx, *more = more
        return cls(op.name, x, sizes, list(hx) if of_lstm else [hx], *more)

    @property
    def directions(self) -> int:
        """The number of directions."""
        return 1 + bool(self.bidirectional)

    @property
    def per_direction(self) -> int:
        """The number of weights of a layer in one direction."""
        return len(self.weights) // (self.num_layers * self.directions)

    @property
    def batch_dim(self) -> int:
        """The dimension of x along which the sequences lie, if x is not packed."""
        return 0 if self.batch_first else 1

    def numbers(self, of: dict[int, State], batch: int) -> Tensor | str:
        """Return the sample of each sequence, or why it is not known.

        Args:
            of: the states of x and of the first states, by their ids.
            batch: the number of samples.
        """
        state = of[id(self.x)]
        found = self._of_x(state, batch)
        if isinstance(found, str) and (self.x.requires_grad or (isinstance(state, SampleLayout) and state.certain)):
            return found
        for s in self.states:
            state = of[id(s)]
            is_certain = isinstance(state, Numbered) or (isinstance(state, SampleLayout) and state.certain)
            if not is_certain:
                continue
            own = numbers_along(s.shape, state, 1, batch)
            if isinstance(found, str) and own is not None:
                found = own
            elif s.requires_grad and (own is None or isinstance(found, str) or not torch.equal(own, found)):
                return "those of its first states do not lie as those of its input"
        return found

    def _of_x(self, state: State, batch: int) -> Tensor | str:
        if self.batch_sizes is None:
            numbers = numbers_along(self.x.shape, state, self.batch_dim, batch)
            if numbers is None:
                return (
                    f"they are not along dimension {self.batch_dim} of its input, as it expects them with "
                    f"batch_first={self.batch_first}"
                )
            return numbers
        rows = numbers_along(self.x.shape, state, 0, batch)
        columns = None if rows is None else rows[: int(self.batch_sizes[0])]
        if rows is None or columns is None or not torch.equal(rows, packed_numbers(columns, self.batch_sizes)):
            return "a sequence was not packed from samples inside of the model"
        return columns

    def after(self, results: Sequence[Tensor], numbers: Tensor, batch: int) -> list[State]:
        """Return the states of the outputs and of the last states."""
        y, *lasts = results
        if self.batch_sizes is None:
            state = numbered(y.shape, self.batch_dim, numbers, batch)
        else:
            state = numbered(y.shape, 0, packed_numbers(numbers, self.batch_sizes), batch)
        return [state, *(numbered(s.shape, 1, numbers, batch) for s in lasts)]
