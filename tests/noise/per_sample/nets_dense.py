"""Linear layers with inputs of every rank, and weights that a forward uses without a layer."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, classes, cross_entropy, numbers, ones, share_of_tokens, squares_sum, text

DENSE = Cases()


def stack(*layers):
    return nn.Sequential(*layers)


@DENSE()
def mlp():
    """One row per sample."""
    return classes(stack(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4)), 5, 6)


@DENSE()
def mlp_without_bias():
    """Weights alone."""
    net = stack(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 4, bias=False))
    return classes(net, 5, 6)


@DENSE()
def mlp_of_two_samples():
    """The smallest batch that has a variance."""
    return numbers(stack(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)), 2, 3)


@DENSE()
def mlp_square():
    """Every width is the batch size."""
    return classes(stack(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 4, 4)


@DENSE()
def mlp_with_sum():
    """A loss that is summed: w_b = 1."""
    return numbers(stack(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), 5, 6, loss=squares_sum, weights=ones)


@DENSE()
def mlp_wide():
    """More columns than a register tile, and not a multiple of one."""
    return classes(stack(nn.Linear(70, 131), nn.ReLU(), nn.Linear(131, 37), nn.ReLU(), nn.Linear(37, 4)), 19, 70)


@DENSE()
def linear_of_rows():
    """(B, T, D)."""
    return numbers(stack(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), 4, 6, 5)


@DENSE()
def linear_of_images():
    """(B, T1, T2, D)."""
    return numbers(stack(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), 4, 3, 2, 5)


@DENSE()
def linear_of_five_dimensions():
    """(B, 2, 1, 3, D)."""
    return numbers(stack(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)), 4, 2, 1, 3, 5)


@DENSE()
def linear_of_long_rows():
    """T beyond every block, sizes beyond every tile."""
    return numbers(stack(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 17)), 3, 150, 33)


@DENSE()
def linear_square_of_rows():
    """B = T = D."""
    return numbers(stack(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), 4, 4, 4)


@DENSE()
def linear_of_one_row():
    """(B, 1, D)."""
    return numbers(stack(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), 4, 1, 5)


@DENSE()
def linear_of_one_input():
    """(B, T, 1) and one output."""
    return numbers(stack(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)), 4, 3, 1)


class Transposed(nn.Module):
    """MLP-mixer: over tokens, then over channels."""

    def __init__(self, tokens, width):
        super().__init__()
        self.over_tokens, self.over_width = nn.Linear(tokens, tokens), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.over_tokens(F.gelu(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_width(F.gelu(x))


@DENSE()
def mixer():
    """A Linear over (B, D, T), strided inputs."""
    return numbers(stack(Transposed(6, 5), Transposed(6, 5)), 4, 6, 5)


@DENSE()
def mixer_square():
    """The same with B = T = D."""
    return numbers(stack(Transposed(4, 4), Transposed(4, 4)), 4, 4, 4)


class Expanded(nn.Module):
    """A Linear whose input has strides of 0, and whose output's gradient has them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        y = torch.tanh(self.a(x)).unsqueeze(1).expand(-1, 6, -1)
        return self.b(y * y.cumsum(1)).sum(1)


@DENSE()
def expanded_rows():
    """Strides of 0 in inputs and gradients."""
    return numbers(Expanded(), 4, 5)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear, self.head = nn.Bilinear(5, 4, 6), nn.Linear(6, 4)

    def forward(self, a, b):
        return self.head(torch.tanh(self.bilinear(a, b)))


@DENSE()
def bilinear():
    """nn.Bilinear of two inputs."""
    return Problem(TwoInputs(), (torch.randn(5, 5), torch.randn(5, 4)), torch.randint(4, (5,)), cross_entropy)


@DENSE()
def prelu():
    """One slope, and one per channel, over rows and over images."""
    net = stack(
        nn.Linear(6, 12), nn.PReLU(), nn.Unflatten(1, (3, 4)), nn.PReLU(3), nn.Flatten(),
        nn.Linear(12, 8), nn.PReLU(8), nn.Linear(8, 4),
    )  # fmt: skip
    return classes(net, 5, 6)


class Products(nn.Module):
    """x w written in as many ways as there are."""

    def __init__(self, width=4):
        super().__init__()
        make = lambda *shape: nn.Parameter(torch.randn(shape) / width**0.5)  # noqa: E731
        self.a, self.b, self.c, self.d = (make(width, width) for _ in range(4))
        self.e, self.f, self.g = make(width, width), make(width, width), make(width, width)
        self.bias, self.scale = make(width), make(width)

    def forward(self, x):
        x = torch.tanh(x @ self.a)
        x = torch.tanh(x @ self.b.t())
        x = torch.tanh(torch.matmul(x, self.c.mT))
        x = torch.tanh(torch.einsum("...d,de->...e", x, self.d))
        x = torch.tanh(torch.einsum("ed,...d->...e", self.e, x) + self.bias)
        x = torch.tanh(F.linear(x, self.f, self.bias) * self.scale)
        return torch.tensordot(x, self.g, dims=1)


@DENSE()
def raw_products_of_samples():
    """@, t(), matmul, einsum, F.linear, tensordot on (B, D), sizes all B."""
    return numbers(Products(), 4, 4)


@DENSE()
def raw_products_of_rows():
    """The same on (B, T, D)."""
    return numbers(Products(), 4, 3, 4)


@DENSE()
def raw_products_cube():
    """The same with B = T = D."""
    return numbers(Products(), 4, 4, 4)


class WeightFirst(nn.Module):
    """Column vectors: w x, the samples last."""

    def __init__(self, width, out):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.randn(out, 1))
        self.head = nn.Linear(out, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a @ x.mT + self.b).mT)


@DENSE()
def weight_first():
    """w @ x.t() + b: samples along the last dimension."""
    return numbers(WeightFirst(5, 7), 4, 5)


@DENSE()
def weight_first_square():
    """The same with all sizes equal: who takes the first dimension for the samples is wrong here."""
    return numbers(WeightFirst(4, 4), 4, 4)


@DENSE()
def weight_first_of_rows():
    """w @ x.mT on (B, T, D), a broadcast matmul."""
    return numbers(WeightFirst(5, 7), 4, 6, 5)


class MoreProducts(nn.Module):
    """addmm, baddbmm, bmm of an expanded weight, mv, dot products by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6))
        self.c, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.tanh(torch.addmm(self.b, x, self.a))
        x = torch.bmm(x.unsqueeze(1), self.c.expand(len(x), -1, -1)).squeeze(1)
        return torch.mv(torch.tanh(x), self.v).unsqueeze(1) + (x * self.v).sum(-1, keepdim=True)


@DENSE()
def more_products():
    """addmm, bmm, mv."""
    return numbers(MoreProducts(), 4, 5)


class Temperature(nn.Module):
    """CLIP's logit scale, a plain temperature, and a bias of no dimension."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.classes = nn.Parameter(torch.randn(4, 8))
        self.logit_scale, self.temperature = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        y, c = F.normalize(self.body(x) + self.shift, dim=-1), F.normalize(self.classes, dim=-1)
        return self.logit_scale.exp() * (y @ c.t()) / self.temperature


@DENSE("exact or refused")
def temperature():
    """Functions of parameters before they meet a sample: exp, normalize."""
    return classes(Temperature(), 5, 6)


class ScalarScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.scale * self.body(x)


@DENSE()
def scalar_scale():
    """A parameter of no dimension times (B, D)."""
    return classes(ScalarScale(), 5, 6)


class LogitScale(ScalarScale):
    def forward(self, x):
        return self.body(x) * self.scale.exp()


@DENSE()
def logit_scale_alone():
    """logit_scale.exp() times outputs."""
    return classes(LogitScale(), 5, 6)


class LayerScale(nn.Module):
    """A residual branch times a vector, of shape (D,), (1, 1, D) or (T, 1)."""

    def __init__(self, *shape, width=6):
        super().__init__()
        self.branch, self.gamma = nn.Linear(width, width), nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x):
        return x + self.gamma * torch.tanh(self.branch(x))


@DENSE()
def layer_scale():
    """Vectors that broadcast over samples, tokens or channels."""
    net = stack(LayerScale(6), LayerScale(1, 1, 6), LayerScale(5, 1), LayerScale(1), LayerScale(5, 6))
    return numbers(net, 4, 5, 6)


@DENSE()
def layer_scale_cube():
    """The same with B = T = D."""
    net = stack(*(LayerScale(*shape, width=4) for shape in ((4,), (1, 1, 4), (4, 1), (1,), (4, 4), (1, 4, 4))))
    return numbers(net, 4, 4, 4)


class Affine(nn.Module):
    """x * w + b by hand, and the same by addcmul, subtraction, division, where, maximum and lerp."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.c = (nn.Parameter(1 + 0.3 * torch.randn(6)) for _ in range(3))
        self.d, self.e, self.floor = (nn.Parameter(1 + 0.3 * torch.randn(6)) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(x * self.w + self.b)
        x = torch.addcmul(self.c, x, self.d) - self.b
        x = torch.where(x > 0, x / self.e, x)
        return self.head(torch.maximum(x, self.floor - 1))


@DENSE()
def affine_by_hand():
    """Elementwise operations of broadcast parameters."""
    return numbers(Affine(), 4, 5, 6)


class Derived(nn.Module):
    """Weights made from parameters: pruned, standardised, mixed by a softmax, low-rank."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.mix = nn.Parameter(torch.randn(2))
        self.register_buffer("kept", torch.arange(36).view(6, 6) % 3 != 0)

    def forward(self, x):
        weight = self.b.weight - self.b.weight.mean(1, keepdim=True)
        p = self.mix.softmax(0)
        pruned = F.linear(x, self.a.weight * self.kept, self.a.bias)
        return p[0] * torch.tanh(pruned) + p[1] * F.linear(x, weight + self.up @ self.down, self.b.bias)


@DENSE("exact or refused")
def derived_weights():
    """Weights computed from parameters; refused where that has no exact elementwise answer at hand."""
    return numbers(Derived(), 4, 6)


class Parts(nn.Module):
    """Slices of one parameter used as different weights, and one used whole besides."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(12, 4) / 2), nn.Parameter(torch.randn(12))

    def forward(self, x):
        q, k, v = self.w.chunk(3)
        a, b, c = self.b.split(4)
        y = torch.tanh(F.linear(x, q, a)) * F.linear(x, k, b)
        return F.linear(y, v, c) + F.linear(x, self.w, self.b).tanh()[..., 4:8]


@DENSE()
def parts_of_a_weight():
    """chunk and split of a parameter: cross terms between its uses."""
    return numbers(Parts(), 4, 4)


@DENSE()
def parts_of_a_weight_in_rows():
    """The same on (B, T, D)."""
    return numbers(Parts(), 4, 3, 4)


class Unequal(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))


@DENSE()
def token_mean():
    """Unequal lengths, ignore_index: w_b is the sample's share of all tokens."""
    problem = text(Unequal(), 4, 6, weights=share_of_tokens)
    for b, length in enumerate((6, 1, 3, 4)):
        problem.target[b, length:] = -100
    return problem


@DENSE()
def token_mean_of_an_empty_sample():
    """One sample has no token that counts: a contribution of 0."""
    problem = text(Unequal(), 4, 6, loss=token_mean_or_nothing, weights=share_of_tokens)
    problem.target[2] = -100
    return problem


def token_mean_or_nothing(out, target):
    if (target == -100).all():  # the sample alone: torch says 0/0
        return out.sum() * 0
    return cross_entropy(out, target)
