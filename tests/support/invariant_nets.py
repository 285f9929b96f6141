"""Small networks that do not see the scale of some of their weights, and a run of one with any optimizer."""

import functools

import torch
from torch import nn

#: batch_norm refuses eps = 0; beside any variance this is 0.
EPS = 1e-30
#: What the loss is multiplied with. Decay turns weights of small gradients faster and faster: so a run of 500 steps learns
#: and turns a lot, but keeps its last digits, which runs at equilibrium lose, with torch as here.
LOSS = 3e-3
KINDS = ("batch", "batch of images", "group", "instance", "layer", "rms", "weight norm")
_WIDTH, _CLASSES, _BATCH = 16, 3, 32


class Net(nn.Module):
    """Two normalised layers and a classifier. `invariant`: two lists of parameters, the layers'; `rest`: the others."""

    def __init__(self, kind, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.is_image = kind in ("batch of images", "instance")
        if self.is_image:
            # A bias before a norm over each channel has no gradient, and decays all the same.
            layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2, bias=False)]
            width, outputs = 4, 64
        else:
            # Before a norm over several channels, weight and bias are invariant together only.
            layers = [nn.Linear(8, _WIDTH, bias=kind != "weight norm"), nn.Linear(_WIDTH, _WIDTH, bias=False)]
            width, outputs = _WIDTH, _WIDTH
        norms = {
            "batch": lambda: nn.BatchNorm1d(width, eps=EPS),
            "batch of images": lambda: nn.BatchNorm2d(width, eps=EPS),
            "group": lambda: nn.GroupNorm(width // 8 or 2, width, eps=0.0),
            "instance": lambda: nn.InstanceNorm2d(width, eps=EPS, affine=True),
            "layer": lambda: nn.LayerNorm(width, eps=0.0),
            "rms": lambda: nn.RMSNorm(width, eps=EPS),
            "weight norm": nn.Identity,
        }
        if kind == "weight norm":
            layers = [nn.utils.parametrizations.weight_norm(layer) for layer in layers]
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms[kind]() for _ in layers)
        self.classifier = nn.Linear(outputs, _CLASSES)
        self.to(dtype)
        self.invariant = [self._invariant(layer) for layer in layers]
        known = {id(p) for group in self.invariant for p in group}
        self.rest = [p for p in self.parameters() if id(p) not in known]

    @staticmethod
    def _invariant(layer):
        if hasattr(layer, "parametrizations"):
            return [layer.parametrizations.weight.original1]
        return list(layer.parameters())

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.tanh(norm(layer(x)))
        return self.classifier(x.flatten(1))


def batch(net, step, size=_BATCH):
    """The same inputs and labels for every net of a kind."""
    return _batch((size, 3, 7, 7) if net.is_image else (size, 8), net.classifier.weight.dtype, step % 20)


@functools.cache
def _batch(shape, dtype, seed):
    make = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(shape, generator=make, dtype=torch.float64)
    return x.to(dtype), x.flatten(1)[:, :_CLASSES].argmax(1)


def backward(net, step):
    """A batch's gradients; returns the outputs and the loss."""
    x, y = batch(net, step)
    net.zero_grad()
    out = net(x)
    loss = nn.functional.cross_entropy(out, y)
    (loss * LOSS).backward()
    return out.detach(), loss.detach()


def groups(net, *options):
    """Param groups of an optimizer: each normalised layer and the rest, which keeps coupled decay where there is a choice.

    `options`: of each group; the last ones are those of the groups that follow, too.
    """
    lists = [*net.invariant, net.rest]
    return [{**options[min(i, len(options) - 1)], "params": params} for i, params in enumerate(lists)]


def gradient_of_direction(w, n):
    """Of <n, w/|w|>: at right angles to w, and twice as long at half the w. In the dtype of `n`."""
    w = w.detach().to(n.dtype)
    norm = torch.linalg.vector_norm(w)
    flat = [torch.view_as_real(x).flatten() if x.is_complex() else x.flatten() for x in (w, n)]
    return (n - w * ((flat[0] @ flat[1]) / norm**2)) / norm
