"""`Ensemble`: many small normalised ResNets of one shape as one batched model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CLASSES, LOOKED_AT, Data, for_all

#: torch refuses 0 in batch normalisation; this is 0 beside any variance, and leaves scale invariance exact.
EPS = 1e-30
#: Frobenius norm of the last layer where it is fixed (Kodryan et al., arXiv 2209.03695, fix it at 10 too).
HEAD_NORM = 10.0
#: Groups of group normalisation.
GROUPS = 4


class Ensemble(nn.Module):
    """Members that share no weight: a stem, two residual blocks, a fixed last layer; every weight is scale-invariant.

    Every convolution is followed by a normalisation without affine parameters. A weight is (members, out, in, k, k):
    convolutions with one group per member run all of them at once, and ``stats="row"`` measures each on its own.

    Args:
        members: how many.
        channels_in: of the images.
        norm: "batch", "group", "layer" or "instance".
        width: channels of the first block; the second has twice as many.
        trained_head: the last layer is trained, and has a bias.
        shrinking: the second block halves the maps.
    """

    def __init__(
        self, members: int, channels_in: int, generator: torch.Generator, *, norm: str = "batch", width: int = 8,
        trained_head: bool = False, shrinking: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.members, self.norm, self._stride = members, norm, 2 if shrinking else 1
        shapes = {
            "stem": (width, channels_in, 3),
            "first_a": (width, width, 3),
            "first_b": (width, width, 3),
            "second_a": (2 * width, width, 3),
            "second_b": (2 * width, 2 * width, 3),
            "shortcut": (2 * width, width, 1),
        }
        for name, (out, fan, k) in shapes.items():
            weight = torch.randn(members, out, fan, k, k, generator=generator)
            setattr(self, name, nn.Parameter(weight * (2 / (fan * k * k)) ** 0.5))
        # The same in all networks: ensembles that are compared are to differ in nothing that training cannot change.
        square = torch.randn(2 * width, 2 * width, generator=torch.Generator().manual_seed(0))
        head = torch.linalg.qr(square).Q[:CLASSES]
        head = (head * HEAD_NORM / head.norm()).expand(members, -1, -1).clone()
        self.head = nn.Parameter(head, requires_grad=trained_head)
        self.bias = nn.Parameter(torch.zeros(members, CLASSES), requires_grad=trained_head)
        self.statistics: dict[str, tuple[Tensor, Tensor]] | None = None
        self._recording = False

    def scale_invariant(self) -> list[tuple[str, nn.Parameter]]:
        """Names and weights of the convolutions."""
        return [(name, p) for name, p in self.named_parameters() if name not in ("head", "bias")]

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, members, channels, height, width) -> logits (n, members, classes)."""
        x = F.relu(self._conv_norm("stem", images.flatten(1, 2), 2))
        x = F.relu(self._conv_norm("first_b", F.relu(self._conv_norm("first_a", x))) + x)
        y = self._conv_norm("second_b", F.relu(self._conv_norm("second_a", x, self._stride)))
        x = F.relu(y + self._conv_norm("shortcut", x, self._stride))
        features = x.mean((2, 3)).view(len(x), self.members, -1)
        return torch.einsum("nmf,mcf->nmc", features, self.head) + self.bias

    def _conv_norm(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = getattr(self, name)
        x = F.conv2d(x, weight.flatten(0, 1), stride=stride, padding=weight.shape[-1] // 2, groups=self.members)
        if self.norm != "batch":
            groups = {"group": GROUPS, "layer": 1, "instance": weight.shape[1]}[self.norm]
            return F.group_norm(x, self.members * groups, eps=EPS)
        if self._recording and self.statistics is not None:
            var, mean = torch.var_mean(x, (0, 2, 3))
            self.statistics[name] = mean, var
        elif self.statistics is not None:
            return F.batch_norm(x, *self.statistics[name], training=False, eps=EPS)
        return F.batch_norm(x, None, None, training=True, eps=EPS)

    @contextmanager
    def recalibrated(self, images: Tensor) -> Iterator[None]:
        """Batch normalisation with the statistics of these images under the weights as they are now.

        Running averages would be of weights of other lengths: wherever norms move they are out of date.
        """
        self.statistics, self._recording = {}, True
        try:
            with torch.no_grad():
                self(for_all(images, self.members))
            self._recording = False
            yield
        finally:
            self.statistics, self._recording = None, False

    @torch.no_grad()
    def logits(self, data: Data, images: Tensor) -> Tensor:
        """Of the same images for all members, (n, members, classes); statistics recalibrated on training images."""
        with self.recalibrated(data.images[:LOOKED_AT]):
            return self(for_all(images, self.members))

    def accuracy(self, data: Data) -> list[float]:
        """The share of test images that each member gets right."""
        right = self.logits(data, data.test_images[:LOOKED_AT]).argmax(2) == data.test_labels[:LOOKED_AT, None]
        return right.double().mean(0).tolist()

    def train_accuracy(self, data: Data) -> list[float]:
        """The share of training images that each member gets right."""
        right = self.logits(data, data.images[:LOOKED_AT]).argmax(2) == data.labels[:LOOKED_AT, None]
        return right.double().mean(0).tolist()

    def weight_sq(self) -> Tensor:
        """|w|^2 of all scale-invariant weights of each member, (members,), float64."""
        return torch.stack([p.detach().double().flatten(1).square().sum(1) for _, p in self.scale_invariant()]).sum(0)


def by_member(values: Tensor, members: int) -> Tensor:
    """Slots of statistics by row, layer after layer, as (layers, members)."""
    return values.view(-1, members)
