"""Images and labels: scikit-learn's digits, or CIFAR-10 from a folder; batches for an ensemble, each member its own."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normkern.demo.data import digits, shifted

CLASSES = 10
#: Images that are looked at between steps, at most: statistics and accuracies of CIFAR-10 need no more.
LOOKED_AT = 1000


class Data(NamedTuple):
    """Images (n, channels, height, width) with mean 0 and standard deviation 1, labels (n,), a name for the report."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str

    def to(self, dtype: torch.dtype) -> Data:
        """The same with images of another precision."""
        return self._replace(images=self.images.to(dtype), test_images=self.test_images.to(dtype))

    def first(self, count: int) -> Data:
        """The first training images alone, as many of each class as there are."""
        return self._replace(images=self.images[:count], labels=self.labels[:count])

    def with_wrong_labels(self, share: float, seed: int = 0) -> Data:
        """A share of the training labels replaced by random ones, always the same."""
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(self.labels), generator=generator) < share
        random = torch.randint(CLASSES, self.labels.shape, generator=generator)
        return self._replace(labels=torch.where(wrong, random, self.labels))


def load(folder: str | None) -> Data:
    """CIFAR-10 where a folder in torchvision's layout is given (``cifar-10-batches-py`` in it), else the digits."""
    if folder is None:
        images, labels, test_images, test_labels = digits()
        name = "scikit-learn's digits, 8 x 8"
    else:
        images, labels = _cifar(folder, [f"data_batch_{i}" for i in range(1, 6)])
        test_images, test_labels = _cifar(folder, ["test_batch"])
        name = "CIFAR-10"
    mean, std = images.mean(), images.std()
    return Data((images - mean) / std, labels, (test_images - mean) / std, test_labels, name)


def _cifar(folder: str, files: list[str]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for name in files:
        path = Path(folder) / "cifar-10-batches-py" / name
        with path.open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        images.append(torch.tensor(batch[b"data"]).view(-1, 3, 32, 32))
        labels += batch[b"labels"]
    return torch.cat(images).float() / 255, torch.tensor(labels)


class Batch(NamedTuple):
    """Images (size, members, channels, height, width), labels (size, members)."""

    images: Tensor
    labels: Tensor


def batches(
    data: Data, members: int, size: int, generator: torch.Generator, *, shift: bool = False, wrong: float = 0.0
) -> Iterator[Batch]:
    """Without end, drawn with replacement, so that batches are independent and their covariance is Sigma_1 / size.

    Args:
        shift: move images by at most one pixel.
        wrong: the share of labels that are replaced by random ones, others at each draw. A network that fits every
            image has neither gradient nor noise left.
    """
    while True:
        chosen = torch.randint(len(data.images), (size * members,), generator=generator)
        images, labels = data.images[chosen], data.labels[chosen]
        if shift:
            images = shifted(images, generator)
        if wrong:
            replaced = torch.rand(len(labels), generator=generator) < wrong
            labels = torch.where(replaced, torch.randint(CLASSES, labels.shape, generator=generator), labels)
        yield Batch(images.view(size, members, *images.shape[1:]), labels.view(size, members))


def for_all(images: Tensor, members: int) -> Tensor:
    """The same images for every member: (n, members, channels, height, width)."""
    return images.unsqueeze(1).expand(-1, members, -1, -1, -1)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the batch, summed over the members, which share no weight: each has its own gradient."""
    return losses_of(logits, labels).sum()


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each member, (members,), from logits (n, members, classes) and labels (n, members)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(0)
