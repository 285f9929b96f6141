"""Models of torch_geometric: a graph is a sample, and the graphs of a batch are the parts of one large graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .entry import SAMPLES, Problem, Zoo, distance

WIDTH, HIDDEN = 5, 6
NODES = (4, 6, 5)
CONVS: dict[str, dict[str, Any]] = {
    "GCNConv": {}, "GATConv": {"heads": 2, "concat": False}, "GATv2Conv": {"heads": 2, "concat": False}, "SAGEConv": {},
    "GINConv": {}, "TransformerConv": {"heads": 2, "concat": False}, "GraphConv": {}, "ChebConv": {"K": 2},
    "TAGConv": {}, "ARMAConv": {}, "SGConv": {}, "LEConv": {}, "ClusterGCNConv": {}, "FeaStConv": {}, "MFConv": {},
    "ResGatedGraphConv": {}, "GeneralConv": {}, "EdgeConv": {}, "SuperGATConv": {"heads": 1},
}  # fmt: skip
QUICK = frozenset(["GCNConv", "GATConv", "SAGEConv", "GINConv", "TransformerConv"])


class Net(nn.Module):
    """Two convolutions, the mean over the nodes of a graph, and a linear layer."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        def conv(wide: int) -> nn.Module:
            make = getattr(layers, kind)
            if kind == "GINConv":
                return make(
                    nn.Sequential(nn.Linear(wide, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN)), train_eps=True
                )
            if kind == "EdgeConv":
                return make(nn.Sequential(nn.Linear(2 * wide, HIDDEN), nn.ReLU()))
            return make(wide, HIDDEN, **options)

        self.a, self.b, self.head = conv(WIDTH), conv(HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = torch.tanh(self.a(x, edge_index))
        return self.head(global_mean_pool(torch.tanh(self.b(x, edge_index)), batch))


def graph(i: int) -> tuple[Tensor, Tensor]:
    """Return the nodes and the edges of a sample's graph: a circle, and some more."""
    made = torch.Generator().manual_seed(i)
    n = NODES[i]
    circle = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    edges = torch.cat([circle, circle.flip(0), torch.randint(n, (2, 3), generator=made)], 1)
    return torch.randn(n, WIDTH, generator=made, dtype=torch.float64), edges


def joined(samples: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nodes and edges of the graphs of samples, and the graph of each node."""
    xs, edges, batch, offset = [], [], [], 0
    for place, i in enumerate(samples):
        x, e = graph(i)
        xs.append(x)
        edges.append(e + offset)
        batch.append(torch.full((len(x),), place))
        offset += len(x)
    return torch.cat(xs), torch.cat(edges, 1), torch.cat(batch)


def network(kind: str) -> Problem:
    """A network of one kind of convolution."""

    def loss(model: nn.Module, samples: Sequence[int]) -> Tensor:
        return distance(model(*joined(samples)), samples)

    return Problem(Net(kind, CONVS[kind]), loss, {"samples": "batch"})


def add(zoo: Zoo) -> None:
    """Add all of them."""
    assert len(NODES) == SAMPLES
    for kind in CONVS:
        zoo.add("torch_geometric", kind, functools.partial(network, kind), kind in QUICK)
