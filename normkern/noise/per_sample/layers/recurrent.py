"""Recurrent cells, computed by the linear layers that they consist of.

torch computes a cell in one call, in which the products with its weights are hidden. Recurrent layers (nn.LSTM) have no
handler.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operation import Operation
from ..tensor_state import TensorState
from .registry import handles


def rnn_tanh_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
                  b_h: Tensor | None = None) -> Tensor:  # fmt: skip
    """Compute torch.nn.RNNCell."""
    return torch.tanh(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))


def rnn_relu_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
                  b_h: Tensor | None = None) -> Tensor:  # fmt: skip
    """Compute torch.nn.RNNCell with relu."""
    return torch.relu(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))


def gru_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
             b_h: Tensor | None = None) -> Tensor:  # fmt: skip
    """Compute torch.nn.GRUCell."""
    r_x, z_x, n_x = F.linear(x, w_x, b_x).chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_h, b_h).chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return n + z * (h - n)


def lstm_cell(
    x: Tensor, state: tuple[Tensor, Tensor], w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute torch.nn.LSTMCell."""
    h, c = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


FORMULAS = {f.__name__: f for f in (rnn_tanh_cell, rnn_relu_cell, gru_cell, lstm_cell)}


@handles(*FORMULAS, needs_batch=True)
def cell(tensors: TensorState, op: Operation) -> Any:
    """One step of a recurrent cell."""
    return tensors.run(FORMULAS[op.name], *op.args, **op.kwargs)
