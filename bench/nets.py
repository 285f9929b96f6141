"""The table of networks: models with a batch, whose gradient noise is measured. A new one is a line of `NETS`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A model, a batch, and a loss that is a mean over samples."""

    model: nn.Module
    inputs: Tensor
    target: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def value(self) -> Tensor:
        return self.loss(self.model(self.inputs), self.target)

    def to(self, dtype: torch.dtype) -> Task:
        """Return a copy in this dtype; ids and labels keep theirs."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return replace(
            self, model=copy.deepcopy(self.model).to(dtype), inputs=cast(self.inputs), target=cast(self.target)
        )


@dataclass(frozen=True)
class Net:
    """make: -> the task that is timed. small: -> one of the same layers, on which peers are checked.

    tags: "quick", also in `make bench QUICK=1`.
    """

    name: str
    make: Callable[[], Task]
    small: Callable[[], Task]
    tags: frozenset[str] = frozenset()


def cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), target.flatten())


def squared_distance(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, target)


def mlp(batch: int, *widths: int) -> Task:
    """Linear and ReLU, one row per sample."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return Task(
        nn.Sequential(*layers[:-1]), torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,)), cross_entropy
    )


def stack(batch: int, steps: int, *widths: int) -> Task:
    """Linear and ReLU on (B, T, D)."""
    model = mlp(1, *widths).model
    return Task(model, torch.randn(batch, steps, widths[0]), torch.randn(batch, steps, widths[-1]), squared_distance)


class Block(nn.Module):
    """GPT's: pre-norm attention by one projection, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.norm2(x))))


class Gpt(nn.Module):
    """A language model without ties and broadcast positions, which some peers refuse and others get wrong."""

    def __init__(self, words: int, context: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        return self.head(self.norm(self.blocks(self.words(ids) + self.positions(places))))


def gpt(batch: int, context: int, words: int, width: int, heads: int, blocks: int) -> Task:
    ids = torch.randint(words, (batch, context))
    return Task(Gpt(words, context, width, heads, blocks), ids, ids.roll(-1, 1), cross_entropy)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))


def resnet(batch: int, size: int, *widths: int) -> Task:
    """GroupNorm, one residual block per width, strided convolutions between them."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        stride = 1 if before == 3 else 2
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        layers += [Residual(width)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return Task(model, torch.randn(batch, 3, size, size), torch.randint(10, (batch,)), cross_entropy)


QUICK = frozenset({"quick"})
WIDTHS, NARROW = (512, 2048, 512, 2048, 512), (12, 33, 12, 33, 12)

NETS: dict[str, Net] = {
    net.name: net
    for net in (
        Net("MLP, B=128", lambda: mlp(128, 784, 1024, 1024, 10), lambda: mlp(6, 20, 33, 17, 10), QUICK),
        Net("Linear stack, B=32, T=128", lambda: stack(32, 128, *WIDTHS), lambda: stack(5, 19, *NARROW)),
        Net("Linear stack, B=32, T=16", lambda: stack(32, 16, *WIDTHS), lambda: stack(5, 16, *NARROW)),
        Net("GPT blocks, B=8, T=128", lambda: gpt(8, 128, 1000, 256, 4, 2), lambda: gpt(4, 9, 30, 24, 2, 2)),
        Net("GroupNorm ResNet, B=32", lambda: resnet(32, 32, 32, 64, 128), lambda: resnet(5, 8, 8, 16, 24)),
    )
}
