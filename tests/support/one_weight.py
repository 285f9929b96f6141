"""One weight vector that a loss sees the direction of only: quadratic forms of w/|w|, and an optimizer of it."""

import torch
from torch import nn

SIZE = 12


def forms(steps=400, size=SIZE):
    """The loss of step t is <v, A_t v> with v = w/|w|."""
    a = torch.randn(steps, size, size, dtype=torch.float64)
    return (a + a.mT) / 2


def gradient(w, a):
    norm = w.norm()
    v = w / norm
    av = a @ v
    return 2 * (av - v * (v @ av)) / norm


def one(kind=torch.optim.SGD, w=None, dtype=torch.float64, **options):
    """An optimizer of one parameter."""
    w = torch.linspace(-1, 2, SIZE, dtype=dtype) if w is None else w
    return kind([nn.Parameter(w.clone())], **{"lr": 0.1, **options})


def the(opt):
    return opt.param_groups[0]["params"][0]
