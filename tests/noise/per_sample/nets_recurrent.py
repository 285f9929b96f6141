"""Recurrent layers: nn.RNN, nn.LSTM and nn.GRU, stacks of them, packed sequences, states, cells."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .case import Cases, Problem, numbers, squares

RECURRENT = Cases()
WIDTH = 5


class Layer(nn.Module):
    """A recurrent layer between Linears; `reads`: "outputs", "states" (the last ones), or "both"."""

    def __init__(self, kind, reads="both", batch_first=True, **options):
        super().__init__()
        self.reads, self.batch_first = reads, batch_first
        self.into = nn.Linear(4, 6)
        self.layer = kind(6, WIDTH, batch_first=batch_first, **options)
        wide = (options.get("proj_size") or WIDTH) * (1 + options.get("bidirectional", False))
        self.head = nn.Linear(wide, 3)

    def forward(self, x):
        x = torch.tanh(self.into(x))
        y, states = self.layer(x if self.batch_first else x.transpose(0, 1))
        y = self.head(y if self.batch_first else y.transpose(0, 1)).flatten(1)
        states = torch.cat([s.transpose(0, 1).flatten(1) for s in as_tuple(states)], 1)
        return {"outputs": y, "states": states, "both": torch.cat([y, states], 1)}[self.reads]


def as_tuple(states):
    return (states,) if isinstance(states, Tensor) else states


def sequences(model, batch=4, steps=7, **more):
    return numbers(model, batch, steps, 4, **more)


@RECURRENT()
def rnn_tanh():
    """nn.RNN."""
    return sequences(Layer(nn.RNN))


@RECURRENT()
def rnn_relu():
    """nn.RNN with relu, time first, without biases."""
    return sequences(Layer(nn.RNN, batch_first=False, nonlinearity="relu", bias=False))


@RECURRENT()
def rnn_deep():
    """nn.RNN of three layers, both directions; an odd number of samples."""
    return sequences(Layer(nn.RNN, num_layers=3, bidirectional=True), batch=5)


@RECURRENT()
def lstm():
    """nn.LSTM; outputs, h_n and c_n are used."""
    return sequences(Layer(nn.LSTM))


@RECURRENT()
def lstm_by_its_outputs():
    """Only the outputs are used."""
    return sequences(Layer(nn.LSTM, "outputs", num_layers=2))


@RECURRENT()
def lstm_by_its_states():
    """Only h_n and c_n are used; time first."""
    return sequences(Layer(nn.LSTM, "states", batch_first=False, num_layers=2))


@RECURRENT()
def lstm_square():
    """As many samples as steps and layers times directions: every guess would be wrong."""
    return sequences(Layer(nn.LSTM, batch_first=False, num_layers=2, bidirectional=True), batch=4, steps=4)


@RECURRENT()
def lstm_without_biases():
    """bias=False, both directions."""
    return sequences(Layer(nn.LSTM, bias=False, bidirectional=True))


@RECURRENT()
def lstm_projected():
    """proj_size, in a stack of both directions."""
    return sequences(Layer(nn.LSTM, proj_size=3, num_layers=2, bidirectional=True))


@RECURRENT()
def lstm_projected_without_biases():
    """proj_size and bias=False: three weights of a layer."""
    return sequences(Layer(nn.LSTM, proj_size=2, bias=False))


@RECURRENT()
def lstm_of_one_step():
    """T = 1."""
    return sequences(Layer(nn.LSTM, bidirectional=True), steps=1)


@RECURRENT()
def gru():
    """nn.GRU: b_hh is inside of the reset gate."""
    return sequences(Layer(nn.GRU))


@RECURRENT()
def gru_deep():
    """nn.GRU of two layers, both directions, time first."""
    return sequences(Layer(nn.GRU, batch_first=False, num_layers=2, bidirectional=True), batch=6)


@RECURRENT()
def gru_without_biases():
    """bias=False."""
    return sequences(Layer(nn.GRU, "outputs", bias=False))


class Partly(Layer):
    """Frozen: some weights of a layer, or all of a second one."""

    def __init__(self):
        super().__init__(nn.LSTM)
        self.second = nn.GRU(4, 4, bidirectional=True, batch_first=True)
        self.second.requires_grad_(False)
        self.layer.weight_hh_l0.requires_grad_(False)
        self.layer.bias_ih_l0.requires_grad_(False)

    def forward(self, x):
        return super().forward(x + self.second(torch.tanh(x))[0][..., :4])


@RECURRENT()
def recurrent_partly_frozen():
    """Frozen weights of a layer that is trained, and a frozen layer before it."""
    return sequences(Partly())


class Folded(Layer):
    """Three sequences for each sample, side by side in the batch."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1)


@RECURRENT()
def lstm_of_folded_sequences():
    """(B, 3, T, F) folded to (3B, T, F)."""
    return numbers(Folded(nn.LSTM, num_layers=2), 4, 3, 5, 4)


class FromStates(nn.Module):
    """The first states are parameters, repeated for every sample, or come from an encoder."""

    def __init__(self, kind, how, **options):
        super().__init__()
        self.how, self.layer = how, kind(4, WIDTH, batch_first=True, **options)
        self.rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        self.h, self.c = (nn.Parameter(torch.randn(self.rows, 1, WIDTH)) for _ in range(2))
        self.encoder = nn.Linear(4, self.rows * WIDTH)

    def forward(self, x):
        batch = len(x)
        h, c = self.h.expand(-1, batch, -1).contiguous(), self.c.repeat(1, batch, 1)
        if self.how == "encoded":
            h = h * self.encoder(x.mean(1)).view(batch, self.rows, WIDTH).transpose(0, 1)
        elif self.how == "constant":
            h, c = torch.ones_like(h), torch.zeros_like(c)
        return self.layer(x, (h, c) if isinstance(self.layer, nn.LSTM) else h)[0]


@RECURRENT()
def lstm_from_learned_states():
    """Parameters as first states, expanded and repeated."""
    return sequences(FromStates(nn.LSTM, "learned", num_layers=2))


@RECURRENT()
def gru_from_encoded_states():
    """First states that an encoder computes from each sample."""
    return sequences(FromStates(nn.GRU, "encoded", bidirectional=True))


@RECURRENT()
def rnn_from_constant_states():
    """Constants as first states."""
    return sequences(FromStates(nn.RNN, "constant", num_layers=3))


class Decoder(nn.Module):
    """An LSTM that starts from encoded states and gets no input, then its own last output, step by step."""

    def __init__(self):
        super().__init__()
        self.encoder, self.layer = nn.Linear(4, 2 * WIDTH), nn.LSTM(WIDTH, WIDTH)
        self.again = nn.LSTM(3, WIDTH)

    def forward(self, x):
        states = tuple(torch.tanh(self.encoder(x.mean(1))).unsqueeze(0).chunk(2, -1))
        y, _ = self.again(x.new_zeros(3, len(x), 3), tuple(s.contiguous() for s in states))
        step = y[-1:]
        outs = []
        for _ in range(4):
            step, states = self.layer(step, states)
            outs.append(step)
        return torch.cat([y, *outs]).transpose(0, 1)


@RECURRENT()
def lstm_as_a_decoder():
    """Zeros as inputs, samples in the first states alone; then one step at a time."""
    return sequences(Decoder())


class Twice(nn.Module):
    """The same layer for two sequences of each sample, of different lengths."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.layer, self.head = kind(4, WIDTH, batch_first=True, bidirectional=True), nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        a, b = self.layer(x)[0], self.layer(torch.sin(x[:, :4]))[0]
        return self.head(torch.cat([a, b], 1))


@RECURRENT()
def lstm_twice():
    """One LSTM called twice: the contributions of a sample add up before they are squared."""
    return sequences(Twice())


@RECURRENT()
def gru_twice():
    """One GRU called twice."""
    return sequences(Twice(nn.GRU))


class Variational(nn.Module):
    """One mask of dropped units for all steps, from a buffer, and weights that are normalised."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, WIDTH, batch_first=True)
        self.register_buffer("mask", (torch.arange(4 * WIDTH * WIDTH).view(4 * WIDTH, WIDTH) % 3 > 0) * 1.5)

    def forward(self, x):
        p = self.layer
        weights = [p.weight_ih_l0, p.weight_hh_l0 * self.mask, p.bias_ih_l0, p.bias_hh_l0]
        state = x.new_zeros(1, len(x), WIDTH)
        return torch.lstm(x, (state, state), weights, True, 1, 0.0, True, False, True)[0]


@RECURRENT()
def lstm_with_dropped_weights():
    """A weight times a mask, given to torch.lstm."""
    return sequences(Variational())


class Normalised(nn.Module):
    """Recurrent weights of which each row has a length of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.lengths = nn.GRU(4, WIDTH, batch_first=True), nn.Parameter(torch.ones(3 * WIDTH, 1))

    def forward(self, x):
        p = self.layer
        w = self.lengths * p.weight_hh_l0 / p.weight_hh_l0.norm(dim=1, keepdim=True)
        state = x.new_zeros(1, len(x), WIDTH)
        weights = [p.weight_ih_l0, w, p.bias_ih_l0, p.bias_hh_l0]
        return torch.gru(x, state, weights, True, 1, 0.0, True, False, True)[0]


@RECURRENT("exact or refused")
def gru_weight_normalised():
    """A recurrent weight made of two parameters."""
    return sequences(Normalised())


# --- packed sequences -------------------------------------------------------------------------------------------------

#: Of samples in the order of the batch.
LENGTHS, SORTED = (3, 7, 1, 6, 2, 6), (7, 6, 6, 3, 2, 1)


class Packed(nn.Module):
    """Sequences of different lengths; `rows`: layers work on the packed rows, not on padded outputs."""

    def __init__(
        self, kind, batch_first=True, rows=False, is_sorted=False, learned=False, encoded=False, embed=False, **options
    ):
        super().__init__()
        self.batch_first, self.rows, self.is_sorted = batch_first, rows, is_sorted
        self.embedding = nn.Embedding(7, 4) if embed else None
        self.into, self.layer = nn.Linear(4, 6), kind(6, WIDTH, batch_first=batch_first, **options)
        directions = 1 + options.get("bidirectional", False)
        out = options.get("proj_size") or WIDTH
        self.norm, self.head = nn.LayerNorm(out * directions), nn.Linear(out * directions, 3)
        self.scale = nn.Parameter(torch.randn(out * directions))
        rows = options.get("num_layers", 1) * directions
        self.h, self.c = (nn.Parameter(torch.randn(rows, 1, n)) for n in (out, WIDTH)) if learned else (None, None)
        self.encoder = nn.Linear(4, rows * out) if encoded else None

    def forward(self, x, lengths):
        inputs, steps = x, x.shape[1]
        if self.rows:
            packed = self.packed(x, lengths)
            data = packed.data if self.embedding is None else self.embedding(packed.data)
            packed = packed._replace(data=torch.tanh(self.into(data)))
        else:
            x = x if self.embedding is None else self.embedding(x)
            packed = self.packed(torch.tanh(self.into(x)), lengths)
        y, states = self.layer(packed, self.states(inputs))
        if self.rows:
            y = PackedSequence(self.after(y.data), *y[1:])
        y = pad_packed_sequence(y, self.batch_first, total_length=steps)[0]
        y = y if self.batch_first else y.transpose(0, 1)
        y = y if self.rows else self.after(y)
        return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in as_tuple(states))], 1)

    def after(self, y):
        return self.head(F.dropout(self.norm(y) * self.scale, 0.0))

    def packed(self, x, lengths):
        x = x if self.batch_first else x.transpose(0, 1)
        return pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=self.is_sorted)

    def states(self, x):
        if self.h is None:
            return None
        batch = len(x)
        h, c = self.h.expand(-1, batch, -1).contiguous(), self.c.repeat(1, batch, 1)
        if self.encoder is not None:  # of each sample
            h = h * self.encoder(x[:, 0]).view(batch, len(self.h), -1).transpose(0, 1)
            c = c * x[:, 0, :1]
        return (h, c) if isinstance(self.layer, nn.LSTM) else h


def packed(model):
    lengths = SORTED if model.is_sorted else LENGTHS
    x = torch.randn(6, 7, 4) if model.embedding is None else torch.randint(7, (6, 7))
    return Problem(model, (x, torch.tensor(lengths)), torch.randn(6, 1), squares)


@RECURRENT()
def packed_lstm():
    """nn.LSTM of a PackedSequence, in the order of the lengths."""
    return packed(Packed(nn.LSTM, is_sorted=True))


@RECURRENT()
def packed_lstm_unsorted():
    """enforce_sorted=False: the samples are in another order inside."""
    return packed(Packed(nn.LSTM, num_layers=2, bidirectional=True))


@RECURRENT()
def packed_lstm_projected():
    """proj_size, both directions, time first, learned first states."""
    return packed(Packed(nn.LSTM, batch_first=False, learned=True, proj_size=3, bidirectional=True))


@RECURRENT()
def packed_gru():
    """nn.GRU, both directions, learned first states."""
    return packed(Packed(nn.GRU, learned=True, bidirectional=True))


@RECURRENT()
def packed_gru_from_encoded_states():
    """First states of each sample, which nn.GRU puts into the order of the lengths."""
    return packed(Packed(nn.GRU, learned=True, encoded=True, num_layers=2, bidirectional=True))


@RECURRENT()
def packed_lstm_from_encoded_states():
    """The same of nn.LSTM, whose samples are in order already."""
    return packed(Packed(nn.LSTM, learned=True, encoded=True, is_sorted=True, bidirectional=True))


@RECURRENT()
def packed_rnn():
    """nn.RNN of two layers, time first, sorted."""
    return packed(Packed(nn.RNN, batch_first=False, is_sorted=True, num_layers=2))


@RECURRENT()
def packed_rows():
    """Linear, LayerNorm and a raw parameter on the packed rows themselves."""
    return packed(Packed(nn.GRU, rows=True, bidirectional=True))


@RECURRENT()
def packed_words():
    """An embedding of the packed rows; sorted."""
    return packed(Packed(nn.LSTM, rows=True, embed=True, is_sorted=True))


@RECURRENT()
def packed_words_padded():
    """An embedding before packing."""
    return packed(Packed(nn.LSTM, embed=True))


class Turned(nn.Module):
    """Samples in another order inside of the model, and back."""

    def __init__(self):
        super().__init__()
        self.into, self.layer, self.head = nn.Linear(4, 6), nn.GRU(6, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        y = self.layer(torch.tanh(self.into(x.index_select(0, order))))[0]
        return self.head(y).index_select(0, order.argsort())


@RECURRENT()
def samples_in_another_order():
    """index_select of the samples before a GRU and Linears, and after them."""
    return sequences(Turned())


# --- cells ------------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A loop over time; the model's call ends, or goes on with another sequence, at its end."""

    def __init__(self, cell, bias=True, stops=False):
        super().__init__()
        self.cell, self.head, self.stops = cell(4, WIDTH, bias=bias), nn.Linear(WIDTH, 3), stops
        self.h, self.c = (nn.Parameter(torch.randn(1, WIDTH)) for _ in range(2))

    def forward(self, x):
        outs, of_lstm = [], isinstance(self.cell, nn.LSTMCell)
        h, c = self.h.expand(len(x), -1), self.c.expand(len(x), -1)
        state = (h, c) if of_lstm else h
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outs.append(self.head(state[0] if of_lstm else state))
        if self.stops:  # steps whose results are not used
            self.cell(x[:, 0], state)
        return torch.stack(outs, 1)


@RECURRENT()
def lstm_cells_from_learned_states():
    """nn.LSTMCell over time, from parameters; the last call is not in the loss."""
    return sequences(Cells(nn.LSTMCell, stops=True))


@RECURRENT()
def gru_cells_without_biases():
    """nn.GRUCell without biases."""
    return sequences(Cells(nn.GRUCell, bias=False))


@RECURRENT()
def rnn_cells():
    """nn.RNNCell over time, from a parameter."""
    return sequences(Cells(nn.RNNCell))


@RECURRENT()
def rnn_cells_with_relu():
    """nn.RNNCell with relu."""
    return sequences(Cells(lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)))


class Stacked(nn.Module):
    """Two LSTMCells, of which the second shares the recurrent weight of the first; states start by default."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LSTMCell(WIDTH, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.b.weight_hh = self.a.weight_hh
        self.into = nn.Linear(4, WIDTH)

    def forward(self, x):
        x, a, b = self.into(x), None, None
        for t in range(x.shape[1]):
            a = self.a(x[:, t], a)
            b = self.b(a[0], b)
        return torch.cat([a[1], b[0]], 1)


@RECURRENT()
def cells_that_share_a_weight():
    """A stack of LSTMCells with one recurrent weight."""
    return sequences(Stacked())
