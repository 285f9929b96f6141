"""Nets with operations whose rule is easily forgotten or wrong: empty slices, complex numbers, norms, transforms."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .case import Cases, Problem, numbers, squares

OPERATIONS = Cases()


class Between(nn.Module):
    """A Linear, an operation, a Linear."""

    def __init__(self, operation, width=8, out=None):
        super().__init__()
        self.a, self.b, self.operation = nn.Linear(6, width), nn.Linear(out or width, 3), operation

    def forward(self, x):
        return self.b(torch.tanh(getattr(Between, self.operation)(self.a(x))))

    @staticmethod
    def empty_slice(x):
        return torch.cat([x[..., :8].sin(), x[..., 8:]], -1)

    @staticmethod
    def rotated(x):
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turn = torch.polar(torch.ones(4, dtype=x.dtype), torch.arange(4, dtype=x.dtype))
        return torch.view_as_real(z * turn).flatten(-2)

    @staticmethod
    def responses(x):
        size = torch.linalg.vector_norm(x, 2, (1,), True)
        return x * size / (size.mean(-1, keepdim=True) + 1e-6)

    @staticmethod
    def matrix_norms(x):
        return x / torch.linalg.matrix_norm(x)[:, None, None] + x / torch.linalg.norm(x, dim=(1, 2), keepdim=True)

    @staticmethod
    def mixed_by_fourier(x):
        return torch.fft.fftn(x, dim=(-2, -1)).real + torch.fft.fft2(x).imag + torch.fft.fftn(x, s=(3,)).real[..., :1]

    @staticmethod
    def triangular(x):
        left = torch.tril(x[..., :5]) + 4 * torch.eye(5, dtype=x.dtype)
        return torch.linalg.solve_triangular(left, x, upper=False)


@OPERATIONS()
def empty_slice():
    """x[..., 8:] of eight features, concatenated: rotary embeddings over the whole head."""
    return numbers(Between("empty_slice"), 4, 5, 6)


@OPERATIONS()
def complex_pairs():
    """Neighbouring features as complex numbers, turned."""
    return numbers(Between("rotated"), 4, 5, 6)


@OPERATIONS()
def responses_by_vector_norm():
    """linalg.vector_norm over time, as ConvNeXt V2 has it."""
    return numbers(Between("responses"), 4, 5, 6)


@OPERATIONS()
def matrix_norms():
    """linalg.matrix_norm and norm of each sample."""
    return numbers(Between("matrix_norms"), 4, 5, 6)


@OPERATIONS()
def fourier_over_time_and_features():
    """fftn and fft2 of the last two dimensions, fftn of the last one by its size."""
    return numbers(Between("mixed_by_fourier"), 4, 5, 6)


@OPERATIONS(weaker=10)
def triangular_solve():
    """linalg.solve_triangular of each sample."""
    return numbers(Between("triangular"), 4, 5, 6)


class Alibi(nn.Module):
    """Scores with a position bias that has samples: baddbmm by keywords, heads folded into the batch."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(5, 3)

    def forward(self, x, mask):
        q, k = (f(x).unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1) for f in (self.q, self.k))
        slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)
        bias = (slopes[:, None] * mask[:, None].cumsum(-1)).flatten(0, 1)[:, None]
        scores = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=0.5)
        return self.o(torch.tanh(scores).unflatten(0, (-1, 2)))


@OPERATIONS()
def baddbmm_by_keywords():
    """Attention scores of Bloom."""
    mask = torch.ones(4, 5)
    mask[1, 3:] = 0
    return Problem(Alibi(), (torch.randn(4, 5, 6),), torch.randn(4, 1), squares, keywords={"mask": mask})


class LanguageModel(nn.Module):
    """Returns its loss, of labels that it is given."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, ids, labels):
        scores = self.head(torch.tanh(self.hidden(self.words(ids))))
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@OPERATIONS()
def labels_that_are_the_inputs():
    """model(ids, labels=ids): one tensor twice."""
    ids = torch.randint(9, (4, 6))
    return Problem(LanguageModel(), (ids,), None, lambda out, target: out, keywords={"labels": ids})


class TwoInputs(nn.Module):
    """One body for two inputs, of which only the first is sure to be a batch, and a loss that takes both."""

    def __init__(self, loss):
        super().__init__()
        self.body, self.loss = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), loss

    def forward(self, x, y):
        return self.loss(self.body(x), self.body(y))


@OPERATIONS()
def two_inputs_and_a_fused_loss():
    """F.mse_loss, which reduces in one operation."""
    return Problem(
        TwoInputs(F.mse_loss), (torch.randn(6, 5), torch.randn(6, 5)), None, lambda out, target: out
    )  # fmt: skip


class LabelsFirst(nn.Module):
    """The batch, which comes first, has no gradient."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, labels, x):
        return F.cross_entropy(self.body(x), labels)


@OPERATIONS()
def labels_first():
    """model(labels, x) with the loss inside."""
    return Problem(LabelsFirst(), (torch.randint(3, (6,)), torch.randn(6, 5)), None, lambda out, target: out)


class Recomputed(nn.Module):
    """A block that non-reentrant checkpointing runs again in the backward."""

    def __init__(self, block):
        super().__init__()
        self.into, self.block, self.head = nn.Linear(6, 8), block, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.block, self.into(x), use_reentrant=False))


class RootMeanSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


@OPERATIONS()
def recomputed_attention():
    """A TransformerEncoderLayer."""
    return numbers(Recomputed(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)), 4, 5, 6)


@OPERATIONS()
def recomputed_norms():
    """LayerNorm, an RMSNorm written by hand, a convolution."""
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), RootMeanSquare(), nn.Conv1d(5, 5, 3, padding=1))
    return numbers(Recomputed(block), 4, 5, 6)
