"""Layers as papers and libraries write them: parameters meet samples in every way but through a layer of torch."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, classes, numbers, squares, words

PUBLISHED = Cases()


def stack(*layers):
    return nn.Sequential(*layers)


class Gem(nn.Module):
    """Generalised-mean pooling: a power that is learned, and its inverse."""

    def __init__(self):
        super().__init__()
        self.conv, self.p, self.head = nn.Conv2d(2, 4, 3), nn.Parameter(torch.tensor(2.5)), nn.Linear(4, 3)

    def forward(self, x):
        x = F.softplus(self.conv(x)).clamp(min=1e-3)
        return self.head(x.pow(self.p).mean((2, 3)).pow(1.0 / self.p))


@PUBLISHED()
def gem_pooling():
    """x ** parameter."""
    return numbers(Gem(), 4, 2, 5, 5)


class Radial(nn.Module):
    """Distances from centres: (B, 1, D) - (K, D); widths, and a Swish with a slope that is learned."""

    def __init__(self, centres):
        super().__init__()
        self.centres, self.log_width = nn.Parameter(torch.randn(centres, 4)), nn.Parameter(torch.randn(centres) / 3)
        self.beta, self.head = nn.Parameter(torch.tensor(1.2)), nn.Linear(centres, 3)

    def forward(self, x):
        distance = (x.unsqueeze(1) - self.centres).square().sum(-1)
        y = torch.exp(-distance * self.log_width.exp())
        return self.head(y * torch.sigmoid(self.beta * y))


@PUBLISHED()
def radial_basis():
    """Centres that broadcast against samples."""
    return numbers(Radial(6), 5, 4)


@PUBLISHED()
def radial_basis_square():
    """As many centres as samples and inputs."""
    return numbers(Radial(4), 4, 4)


class Features(nn.Module):
    """Learned Fourier features of every input, (B, D, 1) * (K,), with a phase."""

    def __init__(self, count):
        super().__init__()
        self.frequency, self.phase = nn.Parameter(torch.randn(count)), nn.Parameter(torch.randn(count))
        self.head = nn.Linear(count, 2)

    def forward(self, x):
        return self.head(torch.sin(x.unsqueeze(-1) * self.frequency + self.phase)).sum(1)


@PUBLISHED()
def fourier_features():
    """A vector that spans a dimension of its own."""
    return numbers(Features(5), 4, 3)


@PUBLISHED()
def fourier_features_square():
    """The same with all sizes B."""
    return numbers(Features(4), 4, 4)


class Crf(nn.Module):
    """A conditional random field's normaliser: (B, K, 1) + (K, K) + (B, 1, K), step after step."""

    def __init__(self, states):
        super().__init__()
        self.emit, self.transitions = nn.Linear(5, states), nn.Parameter(torch.randn(states, states))
        self.start, self.stop = nn.Parameter(torch.randn(states)), nn.Parameter(torch.randn(states))

    def forward(self, x):
        scores = self.emit(x)
        alpha = self.start + scores[:, 0]
        for t in range(1, scores.shape[1]):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.transitions + scores[:, t].unsqueeze(1), 1)
        gold = scores.diagonal(dim1=1, dim2=2)[:, :2].sum(1) + self.transitions[0, 1]
        return (torch.logsumexp(alpha + self.stop, 1) - gold).unsqueeze(1)


@PUBLISHED()
def random_field():
    """A matrix that is added at every step, and one of its entries."""
    return numbers(Crf(3), 4, 6, 5)


@PUBLISHED()
def random_field_square():
    """The same with as many states as samples and steps."""
    return numbers(Crf(4), 4, 4, 5)


class Factors(nn.Module):
    """Users and items: vectors, biases of one column, and a global one."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.user_bias, self.item_bias = nn.Embedding(5, 1), nn.Embedding(6, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, user, item):
        score = (self.users(user) * self.items(item)).sum(1)
        return (score + self.user_bias(user).squeeze(1) + self.item_bias(item)[:, 0] + self.bias).unsqueeze(1)


@PUBLISHED()
def matrix_factorisation():
    """Two inputs of ids (B,)."""
    inputs = torch.tensor([0, 1, 1, 4]), torch.tensor([5, 0, 5, 5])
    return Problem(Factors(), inputs, torch.randn(4, 1), squares)


class Film(nn.Module):
    """Feature-wise modulation, and a hypernetwork that makes each sample's own weight."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv, self.weight = nn.Linear(5, 8), nn.Conv2d(2, 4, 3), nn.Linear(5, 12)

    def forward(self, x, condition):
        scale, shift = self.scale(condition)[:, :, None, None].chunk(2, 1)
        y = torch.relu((1 + scale) * self.conv(x) + shift).mean((2, 3))
        return torch.bmm(self.weight(condition).view(-1, 3, 4), y.unsqueeze(2)).squeeze(2)


@PUBLISHED()
def modulation_and_hypernetwork():
    """Weights that belong to samples."""
    return Problem(Film(), (torch.randn(4, 2, 5, 5), torch.randn(4, 5)), torch.randn(4, 1), squares)


class Axial(nn.Module):
    """Attention along rows, then along columns; `columns first` folds the samples behind them."""

    def __init__(self, behind=False):
        super().__init__()
        self.behind = behind
        self.rows, self.columns = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        b, h, w, c = x.shape
        y = x.reshape(b * h, w, c)
        x = x + self.rows(y, y, y)[0].view(b, h, w, c)
        x = self.norm(x)
        if self.behind:
            y = x.permute(2, 0, 1, 3).reshape(w * b, h, c)
            return x + self.columns(y, y, y)[0].view(w, b, h, c).permute(1, 2, 0, 3)
        y = x.transpose(1, 2).reshape(b * w, h, c)
        return x + self.columns(y, y, y)[0].view(b, w, h, c).transpose(1, 2)


@PUBLISHED()
def axial_attention():
    """(B * H, W, C), (B * W, H, C)."""
    return numbers(Axial(), 3, 4, 2, 4)


@PUBLISHED()
def axial_attention_behind():
    """(W * B, H, C) with W == B."""
    return numbers(Axial(behind=True), 3, 2, 3, 4)


class Video(nn.Module):
    """Space, then time: (B * F, C, H, W), then (B * H * W, C, F)."""

    def __init__(self):
        super().__init__()
        self.space, self.time, self.norm = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv1d(4, 3, 3, padding=1),
            nn.GroupNorm(2, 4),
        )

    def forward(self, x):
        b, f, c, h, w = x.shape
        y = torch.relu(self.norm(self.space(x.reshape(b * f, c, h, w)))).view(b, f, 4, h, w)
        y = self.time(y.permute(0, 3, 4, 2, 1).reshape(b * h * w, 4, f))
        return y.view(b, h, w, 3, f).mean((1, 2))


@PUBLISHED()
def separated_video():
    """Two different folds."""
    return numbers(Video(), 3, 4, 2, 3, 2)


class Shuffle(nn.Module):
    """ShuffleNet's units: channels split and interleaved; ghost features; a blur without weights over all channels."""

    def __init__(self):
        super().__init__()
        self.point, self.depth = nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.register_buffer("blur", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.point(x).view(b, 2, 3, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        a, y = torch.relu(self.depth(y)).chunk(2, 1)
        return torch.cat([a, F.conv2d(y, self.blur.expand(3, 1, 3, 3), groups=3, padding=1)], 1)


@PUBLISHED()
def channel_shuffle():
    """Channels change places, samples do not."""
    return numbers(stack(Shuffle(), Shuffle()), 3, 6, 4, 4)


class BlurOfAll(nn.Module):
    """All samples' channels as one image's, groups=B*C."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        y = torch.tanh(self.a(x))
        b, c, h, w = y.shape
        kernel = torch.ones(b * c, 1, 2, 2, dtype=x.dtype) / 4
        return self.b(F.conv2d(y.reshape(1, b * c, h, w), kernel, groups=b * c).view(b, c, h - 1, w - 1))


@PUBLISHED("exact or refused")
def blur_of_all_samples_at_once():
    """A convolution without weights whose groups are samples."""
    return numbers(BlurOfAll(), 3, 2, 6, 5)


class Memory(nn.Module):
    """Attention over rows of a parameter, which are keys and values."""

    def __init__(self, slots):
        super().__init__()
        self.into, self.slots, self.head = nn.Linear(5, 4), nn.Parameter(torch.randn(slots, 4)), nn.Linear(4, 2)

    def forward(self, x):
        q = self.into(x)
        return self.head(q + (q @ self.slots.t()).softmax(-1) @ self.slots)


@PUBLISHED()
def memory_slots():
    """One parameter transposed and not."""
    return numbers(Memory(6), 4, 5)


@PUBLISHED()
def memory_slots_square():
    """As many slots as samples."""
    return numbers(Memory(4), 4, 3, 5)


class Quantised(nn.Module):
    """A codebook: the nearest row by distances, whose gradient is cut; straight through; a commitment in the output."""

    def __init__(self):
        super().__init__()
        self.into, self.book, self.head = nn.Linear(5, 4), nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.into(x)
        with torch.no_grad():
            nearest = (y.unsqueeze(-2) - self.book.weight).square().sum(-1).argmin(-1)
        code = self.book(nearest)
        out = self.head(y + (code - y).detach())
        return torch.cat([out, code - y.detach(), 0.25 * (code.detach() - y)], -1)


@PUBLISHED()
def codebook():
    """VQ-VAE: a parameter that is looked at without gradient, and used with."""
    return numbers(Quantised(), 4, 3, 5)


class Steps(nn.Module):
    """Learned step size quantisation of activations, by division, rounding straight through, product."""

    def __init__(self):
        super().__init__()
        self.a, self.step, self.b = nn.Linear(5, 6), nn.Parameter(torch.tensor(0.3)), nn.Linear(6, 2)

    def forward(self, x):
        y = torch.tanh(self.a(x)) / self.step
        return self.b((y + (y.round() - y).detach()) * self.step)


@PUBLISHED()
def learned_step():
    """One scalar divides and multiplies."""
    return numbers(Steps(), 4, 5)


class Merged(nn.Module):
    """Three weights concatenated into one product; a bias with zeros in the middle, as in BEiT."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(4, 4) / 2) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, torch.cat([self.q, self.k, self.v]), bias).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


@PUBLISHED()
def merged_weights():
    """torch.cat of parameters."""
    return numbers(Merged(), 3, 5, 4)


class Spectral(nn.Module):
    """A Fourier neural operator: complex weights, stored as pairs, on the lowest frequencies."""

    def __init__(self):
        super().__init__()
        self.weight, self.skip = nn.Parameter(torch.randn(3, 4, 3, 2) / 3), nn.Conv1d(3, 4, 1)

    def forward(self, x):
        low = torch.fft.rfft(x)[..., :3]
        mixed = torch.einsum("bif,iof->bof", low, torch.view_as_complex(self.weight).to(low.dtype))
        return self.skip(x) + torch.fft.irfft(mixed, n=x.shape[-1])


@PUBLISHED("exact or refused")
def fourier_operator():
    """Complex numbers inside."""
    return numbers(Spectral(), 4, 3, 8)


class Gated(nn.Module):
    """A layer used without gradient and with, and its weight used detached."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.a(x))
        y = gate * self.a(x)
        return self.b(y + F.linear(y, self.a.weight.detach(), self.a.bias))


@PUBLISHED()
def used_without_gradient():
    """Uses that contribute nothing are not counted."""
    return numbers(Gated(), 4, 5)


class Logits(nn.Module):
    """A class that is no class: a parameter as one more logit, and a margin."""

    def __init__(self):
        super().__init__()
        self.body, self.none, self.margin = nn.Linear(6, 3), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.body(x)
        return torch.cat([y - self.margin, self.none.expand(len(x), 1)], 1)


@PUBLISHED()
def one_more_logit():
    """parameter.expand(B, 1), torch.cat."""
    return classes(Logits(), 5, 6)


class Alphas(nn.Module):
    """Additions that scale what they add."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(4)) for _ in range(4))
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = torch.add(x, self.a, alpha=0.5).tanh()
        x = torch.sub(x, self.b, alpha=2.0).tanh()
        x = x.add(self.c, alpha=-0.3)
        x = torch.addmm(self.d, x, self.w, beta=0.7, alpha=1.3).tanh()
        x = torch.addcmul(x, x, self.a, value=0.4)
        return torch.rsub(self.b, x, alpha=0.6) * 2


@PUBLISHED()
def scaled_additions():
    """alpha, beta, value."""
    return numbers(Alphas(), 5, 4)


class Chain(nn.Module):
    """Several factors in one call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4) / 2) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(torch.einsum("bd,de,ef->bf", x, self.a, self.b))
        return torch.linalg.multi_dot([x, self.b, self.c])


@PUBLISHED("exact or refused")
def products_of_three():
    """einsum of three, multi_dot."""
    return numbers(Chain(), 4, 4)


class Counts(nn.Module):
    """Whole numbers times parameters; ids and their lengths."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))
        self.head = nn.Linear(5, 2)

    def forward(self, ids):
        return self.head(torch.tanh(ids * self.a)) + (ids > 3).sum(1, keepdim=True) * self.b


@PUBLISHED()
def whole_numbers_times_parameters():
    """int64 meets float."""
    return words(Counts(), 4, 5)


class Rightmost(nn.Module):
    """(B,) samples against (K, 1): samples last."""

    def __init__(self, count):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(count, 1)), nn.Parameter(torch.randn(count, 1))

    def forward(self, x):
        return torch.tanh(self.w * x + self.b).t()


@PUBLISHED()
def samples_last_by_broadcasting():
    """A parameter with more dimensions than the samples."""
    return numbers(Rightmost(3), 5)


@PUBLISHED()
def samples_last_by_broadcasting_square():
    """The same, (B, B)."""
    return numbers(Rightmost(4), 4)


class Empty(nn.Module):
    """A branch without tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(5, 3), nn.Linear(5, 3), nn.LayerNorm(5)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(self.norm(x[:, :0]))], 1).sum(1)


@PUBLISHED("exact or refused")
def no_tokens():
    """T == 0: gradients of 0."""
    return numbers(Empty(), 4, 3, 5)


@PUBLISHED()
def many_samples():
    """More than any block of them."""
    return numbers(stack(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)), 261, 2, 5)


@PUBLISHED()
def many_images():
    """The same of convolutions and norms."""
    return numbers(stack(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 2, groups=2)), 67, 2, 5, 4)


@PUBLISHED()
def many_words():
    """And of embeddings."""
    return words(stack(nn.Embedding(300, 5), nn.Linear(5, 2)), 70, 9, count=300)


class Warped(nn.Module):
    """A spatial transformer: the image is sampled where a small net says."""

    def __init__(self):
        super().__init__()
        self.where, self.conv = nn.Linear(32, 6), nn.Conv2d(2, 3, 3)

    def forward(self, x):
        theta = self.where(x.flatten(1)).tanh().view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.conv(F.grid_sample(x, grid, align_corners=False))


@PUBLISHED()
def spatial_transformer():
    """affine_grid, grid_sample."""
    return numbers(Warped(), 3, 2, 4, 4)


class Solved(nn.Module):
    """A small linear system per sample."""

    def __init__(self):
        super().__init__()
        self.matrix, self.head = nn.Linear(5, 9), nn.Linear(3, 2)

    def forward(self, x):
        a = self.matrix(x).view(-1, 3, 3)
        a = a @ a.mT + torch.eye(3, dtype=x.dtype)
        return self.head(torch.linalg.solve(a, x[:, :3]) + torch.linalg.det(a).unsqueeze(1) * 0.1)


@PUBLISHED("exact or refused")
def systems_of_equations():
    """torch.linalg over a batch of matrices."""
    return numbers(Solved(), 4, 5)
