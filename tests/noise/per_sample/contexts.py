"""What is shared by the tests of contexts."""

import torch

from .budgets import SCALARS

F64 = torch.float64


def same(a, b):
    """Two results, to the last bit."""
    for field in SCALARS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    for field in ("sq_norms", "projections"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    same_variance(a, b)


def same_variance(a, b):
    assert all(torch.equal(v, b.variance[name]) for name, v in a.variance.items())
