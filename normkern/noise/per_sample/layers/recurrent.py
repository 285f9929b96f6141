"""Recurrent layers (nn.RNN, nn.LSTM, nn.GRU), their packed sequences, and recurrent cells.

torch's own operation computes each layer of a stack. The backward goes back through time with the saved outputs
(`recurrent_steps`), and the contributions to each weight are those of one linear layer over all time steps.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import sample_layout
from ..contributions import Contribution, Matrix
from ..numbered import Grouping, Order, numbers_of, packed_numbers
from ..operation import Operation
from ..recurrent_call import RecurrentCall
from ..sums import real
from ..tensor_state import TensorState, Use
from . import recurrent_steps
from .base import first_order, mixed, without_modes
from .broadcast import PerSampleParameter
from .collected import Collected, collect
from .linear import LinearContribution
from .recurrent_steps import Gradients, Steps, Weights, gru_gates, lstm_gates, products
from .registry import handles


@contextlib.contextmanager
def _without_cudnns_warning() -> Iterator[None]:
    """Silence cuDNN's warning that the weights of one layer are not contiguous in memory with those of all layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield


class Layer:
    """One layer of a recurrent stack, in one direction or both.

    Args:
        call: the arguments of the stack.
        order: the sample of each sequence.
        batch: the number of samples.
        shapes: of the weights.
    """

    def __init__(self, call: RecurrentCall, order: Order, batch: int, shapes: Sequence[torch.Size]) -> None:
        self.name, self.batch_sizes, self.has_biases = call.name, call.batch_sizes, call.has_biases
        self.train, self.bidirectional, self.batch_first = call.train, call.bidirectional, call.batch_first
        self.directions, self.of_lstm = call.directions, call.name == "lstm"
        self.order, self.batch, self.shapes = order, batch, shapes

    def run(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs and the last states, as torch computes them."""
        first = (x,) if self.batch_sizes is None else (x, self.batch_sizes)
        last = (self.batch_first,) if self.batch_sizes is None else ()
        with _without_cudnns_warning() if x.is_cuda else contextlib.nullcontext():
            out: tuple[Tensor, ...] = getattr(torch._VF, self.name)(
                *first, tuple(states) if self.of_lstm else states[0], list(weights),
                self.has_biases, 1, 0.0, self.train, self.bidirectional, *last,
            )  # fmt: skip
        return out

    def run_as_in_training(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return what `run` returns where a backward follows: oneDNN's LSTM has other bits without."""
        if not (self.of_lstm and x.device.type == "cpu" and x.dtype != torch.float64):
            return self.run(x, states, weights)
        with torch.enable_grad():
            out = self.run(x.detach(), [s.detach() for s in states], [w.detach().requires_grad_() for w in weights])
        return tuple(y.detach() for y in out)

    def rows(self, t: Tensor) -> Tensor:
        """Return an input or output as rows, one time step after the other, in the dtype of sums."""
        if self.batch_sizes is None:
            t = (t.transpose(0, 1) if self.batch_first else t).flatten(0, 1)
        return t.to(real(t.dtype))

    def unrowed(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape and dtype of an input."""
        if self.batch_sizes is None:
            steps, sequences = like.shape[:2] if not self.batch_first else like.shape[1::-1]
            rows = rows.view(steps, sequences, -1)
            rows = rows.transpose(0, 1) if self.batch_first else rows
        return rows.to(like.dtype)

    def sizes(self, x: Tensor) -> list[int]:
        """Return the number of sequences at each time step."""
        if self.batch_sizes is not None:
            return self.batch_sizes.tolist()
        steps, sequences = x.shape[1::-1] if self.batch_first else x.shape[:2]
        return [sequences] * steps

    def grouped(self, sizes: Sequence[int], device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a function that turns rows into those of each sample, (B, T, width)."""
        order, batch = self.order, self.batch
        if isinstance(order, int) and len(set(sizes)) == 1:
            return functools.partial(_views, len(sizes), order, batch)
        return Grouping.of(packed_numbers(numbers_of(order, sizes[0], batch), sizes), batch, device).group


def _views(steps: int, inner: int, batch: int, rows: Tensor) -> Tensor:
    width = rows.shape[1]
    out = sample_layout.by_sample(rows.view(steps, -1, width), inner * width, batch, width)
    assert out is not None
    return out


class RecurrentFunction(torch.autograd.Function):
    """The autograd function of one recurrent layer."""

    @staticmethod
    def forward(ctx: Any, collected: Collected, layer: Layer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.collected, ctx.layer = collected, layer
        count = 2 if layer.of_lstm else 1
        with without_modes():
            out = layer.run_as_in_training(x, tensors[:count], tensors[count:])
            out = tuple(torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y for y in out)
        ctx.check = RecurrentCheck(layer.run, x) if collected.use.accumulator.checking else None
        ctx.save_for_backward(x, out[0], *tensors)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        layer, needs = ctx.layer, ctx.needs_input_grad[2:]
        if all(g is None for g in gs):
            return (None,) * (2 + len(needs))
        x, y, *tensors = ctx.saved_tensors  # with the mode on, as in `base`
        with without_modes():
            count = 2 if layer.of_lstm else 1
            states, weights = tensors[:count], tensors[count:]
            dx, d_states, contribution = _through_time(layer, x, y, states, weights, gs)
            ctx.collected.add(contribution)
            if ctx.check is not None and ctx.collected.use.accumulator.is_measuring:
                ctx.check.compare(ctx.collected.use, x, states, weights, gs, contribution)
                ctx.check = None
            of_states = (d if n else None for d, n in zip(d_states, needs[1:], strict=False))
            return (None, None, dx() if needs[0] else None, *of_states, *(None,) * len(weights))


def _through_time(
    layer: Layer, x: Tensor, y: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor],
    gs: Sequence[Tensor | None],
) -> tuple[Callable[[], Tensor], list[Tensor], Callable[[int], Contribution]]:  # fmt: skip
    """Return functions that return dL/dx and the contributions to a weight, and dL/d of the first states."""
    sizes, per = layer.sizes(x), len(weights) // layer.directions
    x_rows, y_rows = layer.rows(x), layer.rows(y)
    g_rows = None if gs[0] is None else layer.rows(gs[0])
    width = y_rows.shape[1] // layer.directions
    group = layer.grouped(sizes, x.device)
    group_of_x = functools.cache(lambda: group(x_rows))
    backs: list[tuple[Weights, Gradients]] = []
    contributions: list[Callable[[int], Contribution]] = []
    for d in range(layer.directions):
        kind = x_rows.dtype
        w = _weights(layer, [p.to(kind) for p in weights[d * per :][:per]])
        first = [s[d].to(kind) for s in states]
        last = [torch.zeros_like(s) if g is None else g[d].to(kind) for g, s in zip(gs[1:], first, strict=True)]
        steps = Steps(sizes, d == 1)
        part = slice(d * width, (d + 1) * width)
        before = steps.before(y_rows[:, part], first[0])
        g = None if g_rows is None else g_rows[:, part]
        if layer.of_lstm:
            gates = lstm_gates(*products(x_rows, before, w))
            of = recurrent_steps.lstm(steps, gates, first[1], g, last[0], last[1], w)
        elif layer.name == "gru":
            of = recurrent_steps.gru(steps, gru_gates(*products(x_rows, before, w)), before, g, last[0], w)
        else:
            of = recurrent_steps.rnn(steps, y_rows[:, part], g, last[0], w, layer.name == "rnn_relu")
        backs.append((w, of))
        contributions.append(contribution_of(group, group_of_x, before, of, layer.has_biases, layer.shapes[d * per :]))

    def dx() -> Tensor:
        (w, of), *others = backs
        rows = of.of_x @ w.w_x
        for w, of in others:
            rows.addmm_(of.of_x, w.w_x)
        return layer.unrowed(rows, x)

    d_states = [torch.stack([of.h for _, of in backs]).to(states[0].dtype)]
    if layer.of_lstm:
        d_states.append(torch.stack([of.c for _, of in backs if of.c is not None]).to(states[1].dtype))
    return dx, d_states, lambda i: contributions[i // per](i % per)


def _weights(layer: Layer, given: list[Tensor]) -> Weights:
    w_x, w_h, *more = given
    b_x, b_h = (more.pop(0), more.pop(0)) if layer.has_biases else (None, None)
    return Weights(w_x, w_h, b_x, b_h, more[0] if more else None)


def contribution_of(
    group: Callable[[Tensor], Tensor], group_of_x: Callable[[], Tensor], before: Tensor, of: Gradients,
    has_biases: bool, shapes: Sequence[torch.Size],
) -> Callable[[int], Contribution]:  # fmt: skip
    """Return a function that returns the contributions to the i-th weight of one direction."""
    of_x = functools.cache(lambda: group(of.of_x))
    of_h = of_x if of.of_h is of.of_x else functools.cache(lambda: group(of.of_h))
    bias_x = functools.cache(lambda: of_x().sum(1))
    bias_h = bias_x if of_h is of_x else functools.cache(lambda: of_h().sum(1))

    def contribution(i: int) -> Contribution:
        if i == 0:
            return LinearContribution(group_of_x(), of_x(), shapes[0])
        if i == 1:
            return LinearContribution(group(before), of_h(), shapes[1])
        if has_biases and i < 4:
            return Matrix((bias_x if i == 2 else bias_h)(), shapes[i])
        assert of.projected is not None
        inner, outer = of.projected
        return LinearContribution(group(inner), group(outer), shapes[i])

    return contribution


class RecurrentCheck:
    """Computes the gradients of the weights by torch's own backward, for the contributions must add up to them.

    Args:
        run: computes the layer from x, the first states and the weights.
        x: the input of the forward.
    """

    def __init__(self, run: Callable[[Tensor, Sequence[Tensor], Sequence[Any]], tuple[Tensor, ...]], x: Tensor) -> None:
        self.run = run
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)

    def compare(
        self, use: Use, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None],
        gs: Sequence[Tensor | None], contribution: Callable[[int], Contribution],
    ) -> None:  # fmt: skip
        """Raise RuntimeError if the contributions do not add up to the gradients of torch's own backward."""
        wanted = [i for i, target in enumerate(use.targets) if target is not None]
        if not wanted:
            return
        enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=enabled):
            leaves = {i: w.detach().requires_grad_(i in wanted) for i, w in enumerate(weights) if w is not None}
            outs = self.run(x.detach(), [s.detach() for s in states], [leaves.get(i) for i in range(len(weights))])
            pairs = [(y, g) for y, g in zip(outs, gs, strict=True) if g is not None]
            plain = torch.autograd.grad(
                [y for y, _ in pairs], [leaves[i] for i in wanted], [g for _, g in pairs], materialize_grads=True
            )
        outer = torch.cat([g.flatten() for _, g in pairs])
        outer = outer.to(dtype) if enabled and outer.dtype != torch.float64 else outer  # the precision of the products
        for i, d in zip(wanted, plain, strict=True):
            use.compare(i, contribution(i).total().to(d.dtype), d, outer, x)


@handles("lstm", "gru", "rnn_tanh", "rnn_relu", needs_batch=True, takes_numbered=True)
def recurrent(tensors: TensorState, op: Operation) -> Any:
    """torch.nn.RNN, LSTM and GRU: one layer after the other."""
    call, batch = RecurrentCall.of(op), tensors.rules.batch
    if tensors.is_parameter(call.x):
        return NotImplemented
    order = call.order({id(t): tensors.state(t) for t in (call.x, *call.states)}, batch)
    if isinstance(order, str):
        raise mixed(tensors, op.name, op.parameters[0], order)
    states = [_per_sample(tensors, op.name, s, order) for s in call.states]
    if any(s is None for s in states):
        return NotImplemented
    count, per = call.directions, call.per_direction
    x, ends = call.x, []
    for i in range(call.num_layers):
        weights = call.weights[i * count * per :][: count * per]
        collected, used = collect(tensors, op.name, weights)
        layer = Layer(call, order, batch, [w.shape for w in weights])
        firsts = [s[i * count : (i + 1) * count] for s in states if s is not None]
        x, *last = RecurrentFunction.apply(collected, layer, x, *firsts, *used)
        ends.append(last)
        if call.dropout and call.train and i < call.num_layers - 1:
            x = F.dropout(x, call.dropout, True)
    results = [x, *(torch.cat(each) if len(each) > 1 else each[0] for each in zip(*ends, strict=True))]
    for t, state in zip(results, call.after(results, order, batch), strict=True):
        tensors.mark(t, state)
    return tuple(results)


def _per_sample(tensors: TensorState, name: str, state: Tensor, order: Order) -> Tensor | None:
    """Return a first state; of a parameter as large as the batch, its entries of each sample. None: not known."""
    if not tensors.is_parameter(state):
        return state
    if isinstance(order, Tensor) or tensors.opaque(state) is not None:
        return None
    use = tensors.use(name, [state])
    out: Tensor = PerSampleParameter.apply(use, state, 1, state.shape[1] // (use.batch * order), order)
    return out
