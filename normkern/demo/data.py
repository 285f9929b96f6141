"""The demo's data: scikit-learn's handwritten digits, moved by a pixel at random, in batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import BATCH_SIZE


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's 1797 handwritten digits, split 80:20, every digit in the same proportion on both sides.

    Returns:
        Training images, training labels, test images, test labels: float32 (n, 1, 8, 8) from 0 to 1, int64 (n,).
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, shuffle=True, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return every image moved by at most one pixel in each direction; zeros fill the edge."""
    size = images.shape[-1]
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, size, 1).unfold(3, size, 1)
    down, right = torch.randint(3, (2, len(images)), generator=generator).to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


def batches_of_pairs(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of twice the batch size without end: pass after pass, each in another random order.

    The rest of a pass would be a smaller batch, whose noise has another size: it is left out.
    """
    size = 2 * BATCH_SIZE
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in torch.split(order[: len(order) // size * size], size):
            yield shifted(images[batch], generator), labels[batch]
