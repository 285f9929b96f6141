"""A call of torch's recurrent operations: its arguments, and which sample each of its sequences is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .numbered import Numbered, Order, is_same, numbers_of, order_along, order_of, ordered, packed_numbers
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

    def order(self, of: dict[int, State], batch: int) -> Order | str:
        """Return which sample each sequence is, or why that is not known.

        Args:
            of: the states of x and of the first states, by their ids.
            batch: the number of samples.
        """
        return agreed(self._order_of_x(of[id(self.x)], batch), self.x, self.states, 1, of, batch)

    def _order_of_x(self, state: State, batch: int) -> Order | str:
        if self.batch_sizes is None:
            order = order_along(self.x.shape, state, self.batch_dim, batch)
            if order is None:
                return (
                    f"they are not along dimension {self.batch_dim} of its input, as it expects them with "
                    f"batch_first={self.batch_first}"
                )
            return order
        found, sizes = order_along(self.x.shape, state, 0, batch), self.batch_sizes.tolist()
        if found is not None:
            rows = numbers_of(found, len(self.x), batch)
            if torch.equal(rows, packed_numbers(rows[: sizes[0]], sizes)):
                return order_of(rows[: sizes[0]], batch)
        return "a sequence was not packed from samples inside of the model"

    def after(self, results: Sequence[Tensor], order: Order, batch: int) -> list[State]:
        """Return the states of the outputs and of the last states."""
        y, *lasts = results
        if self.batch_sizes is None:
            state = ordered(y.shape, self.batch_dim, order, batch)
        else:
            sizes = self.batch_sizes.tolist()
            state = ordered(y.shape, 0, packed_numbers(numbers_of(order, sizes[0], batch), sizes), batch)
        return [state, *(ordered(s.shape, 1, order, batch) for s in lasts)]


def agreed(
    order: Order | str, x: Tensor, states: Sequence[Tensor], dim: int, of: dict[int, State], batch: int
) -> Order | str:
    """Return which samples a recurrent layer or cell gets, or why that is not known.

    Args:
        order: those of its input x, or why these are not known.
        states: the first states, whose samples lie along `dim`.
        of: the states of x and of the first states, by their ids.
        batch: the number of samples.
    """
    if isinstance(order, str) and (x.requires_grad or _is_certain(of[id(x)])):
        return order
    for s in states:
        state = of[id(s)]
        if not _is_certain(state):
            continue
        own = order_along(s.shape, state, dim, batch)
        if isinstance(order, str) and own is not None:
            order = own
        elif s.requires_grad and (own is None or isinstance(order, str) or not is_same(own, order)):
            return "those of its first states do not lie as those of its input"
    return order


def _is_certain(state: State) -> bool:
    return isinstance(state, Numbered) or (isinstance(state, SampleLayout) and state.certain)
