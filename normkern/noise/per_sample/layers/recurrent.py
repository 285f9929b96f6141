"""Recurrent cells as the linear layers that they are: torch computes them in one call, where their parts are hidden."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rnn_tanh_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
                  b_h: Tensor | None = None) -> Tensor:  # fmt: skip
    """torch.nn.RNNCell."""
    return torch.tanh(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))


def rnn_relu_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
                  b_h: Tensor | None = None) -> Tensor:  # fmt: skip
    """torch.nn.RNNCell with relu."""
    return torch.relu(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))


def gru_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
             b_h: Tensor | None = None) -> Tensor:  # fmt: skip
    """torch.nn.GRUCell."""
    r_x, z_x, n_x = F.linear(x, w_x, b_x).chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_h, b_h).chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return n + z * (h - n)


def lstm_cell(
    x: Tensor, state: tuple[Tensor, Tensor], w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.nn.LSTMCell."""
    h, c = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


FORMULAS = {f.__name__: f for f in (rnn_tanh_cell, rnn_relu_cell, gru_cell, lstm_cell)}
