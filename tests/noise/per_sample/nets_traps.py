"""Nets that look like something else: sizes that agree by accident, samples that move where no layer is."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, classes, numbers, squares

TRAPS = Cases()
WORDS = 7


class TimeMajorBy(nn.Module):
    """(T, B, D) made in an unusual way, layers, and back."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(WAYS[self.how](x)))).transpose(0, 1)


class Swap(torch.autograd.Function):
    """Transposes, in a function of the user's own."""

    @staticmethod
    def forward(ctx, x):
        return x.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.transpose(0, 1).contiguous()


def _by_assignment(x):
    out = x.new_empty(x.shape[1], x.shape[0], x.shape[2])
    for t in range(x.shape[1]):
        out[t] = x[:, t]
    return out


def _by_columns(x):
    out = torch.zeros(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype)
    for b in range(len(x)):
        out[:, b] = x[b]
    return out


def _by_copy(x):
    return torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype).copy_(x.transpose(0, 1))


def _into_out(x):
    with torch.no_grad():
        out = torch.empty(0, dtype=x.dtype)
        torch.stack(x.unbind(1), out=out)
    return out


WAYS = {
    "assignment": _by_assignment,
    "columns": _by_columns,
    "copy": _by_copy,
    "out": _into_out,
    "transpose_in_place": lambda x: x.clone().transpose_(0, 1),
    "function": Swap.apply,
    "einsum": lambda x: torch.einsum("btd->tbd", x),
    "identity_matrix": lambda x: torch.tensordot(torch.eye(x.shape[1], dtype=x.dtype), x, dims=([1], [1])),
    "rearranged_strides": lambda x: x.contiguous().as_strided(
        (x.shape[1], x.shape[0], x.shape[2]), (x.shape[2], x.shape[1] * x.shape[2], 1)
    ),
    "numpy": lambda x: torch.from_numpy(x.numpy().transpose(1, 0, 2).copy()),
    "list": lambda x: torch.tensor(x.transpose(0, 1).tolist(), dtype=x.dtype),
    "stacked_columns": lambda x: torch.stack([x[:, t] for t in range(x.shape[1])]),
    "chunks": lambda x: torch.cat([c.transpose(0, 1) for c in x.chunk(x.shape[1], 1)]),
    "scan": lambda x: torch.stack(x.cumsum(1).unbind(1)),
    "sparse": lambda x: x.transpose(0, 1).to_sparse().to_dense(),
    "data": lambda x: x.data.transpose(0, 1),
}  # fmt: skip


def _time_major(how):
    def make():
        return numbers(TimeMajorBy(how), 4, 4, 5)

    make.__name__, make.__doc__ = f"time_major_by_{how}", f"(T, B, D) by {how}, with T == B."
    return make


for _how in WAYS:
    TRAPS("exact or refused")(_time_major(_how))


class Given(nn.Module):
    """Positions and a score bias come with the call, and have no samples."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.bias = nn.Embedding(WORDS, 6), nn.Embedding(9, 6), nn.Embedding(3, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, ids, places, distances):
        x = self.words(ids) + self.places(places)
        scores = x @ x.mT + self.bias(distances).squeeze(-1)
        return self.head(scores.softmax(-1) @ x)


def given(tokens):
    ids, places = torch.randint(WORDS, (4, tokens)), torch.arange(tokens)
    common = {"places": places, "distances": (places[:, None] - places).clamp(-1, 1) + 1}
    return Problem(Given(), (ids,), torch.randn(4, 1), squares, common=common)


@TRAPS()
def positions_given():
    """Arguments without samples."""
    return given(6)


@TRAPS("exact or refused")
def positions_given_square():
    """The same, T == B: they look like samples."""
    return given(4)


class Conditioned(nn.Module):
    """A class of each sample scales its rows, all sizes B."""

    def __init__(self):
        super().__init__()
        self.labels, self.a, self.b = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, label):
        scale = self.labels(label)
        return self.b(torch.tanh(self.a(x)) * scale.unsqueeze(1))


@TRAPS()
def conditioned_square():
    """Labels (B,) that are samples, next to T == B tokens."""
    return Problem(Conditioned(), (torch.randn(4, 4, 4), torch.tensor([0, 3, 3, 1])), torch.randn(4, 1), squares)


class MixedTokens(nn.Module):
    """Synthesizer: attention weights that are parameters, (T, T); and a (T, 1) bias."""

    def __init__(self, tokens):
        super().__init__()
        self.mix, self.bias = nn.Parameter(torch.randn(tokens, tokens)), nn.Parameter(torch.randn(tokens, 1))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.mix.softmax(-1) @ torch.tanh(x) + self.bias)


@TRAPS("exact or refused")
def mixed_tokens():
    """softmax(parameter) @ x."""
    return numbers(MixedTokens(6), 4, 6, 5)


@TRAPS("exact or refused")
def mixed_tokens_square():
    """The same, T == B."""
    return numbers(MixedTokens(4), 4, 4, 5)


class Modulated(nn.Module):
    """StyleGAN: one kernel per sample, all samples in the channels of one image, groups=B; a learned first image."""

    def __init__(self):
        super().__init__()
        self.style, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4, 3, 3) / 3)
        self.first, self.rgb = nn.Parameter(torch.randn(1, 4, 4, 4)), nn.Conv2d(3, 2, 1)

    def forward(self, z):
        batch = len(z)
        weight = self.weight * self.style(z)[:, None, :, None, None]
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-6).rsqrt()
        x = self.first.repeat(batch, 1, 1, 1).reshape(1, batch * 4, 4, 4)
        x = F.conv2d(x, weight.view(batch * 3, 4, 3, 3), padding=1, groups=batch)
        return self.rgb(F.leaky_relu(x.view(batch, 3, 4, 4), 0.2))


@TRAPS("exact or refused")
def modulated_convolution():
    """Samples inside the channels."""
    return numbers(Modulated(), 3, 5)


class FirstImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.scale = nn.Parameter(torch.randn(1, 3, 4, 4)), nn.Conv2d(3, 3, 3), nn.Linear(5, 3)

    def forward(self, z):
        return self.conv(self.first.expand(len(z), -1, -1, -1)) * self.scale(z)[:, :, None, None]


@TRAPS()
def learned_first_image():
    """A parameter, expanded over samples, is what a convolution sees."""
    return numbers(FirstImage(), 3, 5)


class Experts(nn.Module):
    """CondConv: each sample mixes the experts' weights."""

    def __init__(self):
        super().__init__()
        self.route, self.weights, self.head = nn.Linear(5, 3), nn.Parameter(torch.randn(3, 6, 5)), nn.Linear(6, 4)

    def forward(self, x):
        weight = torch.einsum("be,eoi->boi", self.route(x).softmax(-1), self.weights)
        return self.head(torch.tanh(torch.bmm(weight, x.unsqueeze(2)).squeeze(2)))


@TRAPS()
def mixed_experts():
    """einsum of scores with a three-dimensional parameter, then a product per sample."""
    return classes(Experts(), 4, 5)


class ParallelHeads(nn.Module):
    """A weight per head: einsum with the head in every operand."""

    def __init__(self, heads=3, width=4):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(heads, width, 5)), nn.Parameter(torch.randn(heads, 5))
        self.out = nn.Parameter(torch.randn(heads, 5, width))

    def forward(self, x):
        y = torch.tanh(torch.einsum("bthd,hde->bthe", x.unflatten(-1, (len(self.w), -1)), self.w) + self.b)
        return torch.einsum("bthe,hed->btd", y, self.out)


@TRAPS()
def heads_by_einsum():
    """Grouped products."""
    return numbers(ParallelHeads(), 4, 5, 12)


@TRAPS()
def heads_by_einsum_square():
    """All sizes B."""
    return numbers(ParallelHeads(4, 4), 4, 4, 16)


class FirstState(nn.Module):
    """A recurrence from a learned state, and with a learned step."""

    def __init__(self):
        super().__init__()
        self.state, self.step = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.tensor(0.3))
        self.into, self.onto, self.head = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        h = self.state
        for part in x.unbind(1):
            h = h + self.step * torch.tanh(self.into(part) + self.onto(h))
        return self.head(h)


@TRAPS()
def recurrent_from_a_learned_state():
    """The first step joins a layer with a parameter of one row, not with samples."""
    return numbers(FirstState(), 4, 3, 4)


class Scripted(nn.Module):
    """A part of the model is compiled by TorchScript, which no Python sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(scripted_swap(torch.tanh(self.a(x)))).transpose(0, 1)


def _swap(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous()


def scripted_swap(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14
        return torch.jit.script(_swap)(x)


@TRAPS("exact or refused")
def time_major_by_script():
    """(T, B, D) by a scripted function, T == B."""
    return numbers(Scripted(), 4, 4, 5)


class Mapped(nn.Module):
    """torch.vmap over the samples, inside the model."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.vmap(lambda sample: torch.tanh(self.a(sample)))(x))


@TRAPS("exact or refused")
def mapped():
    """vmap hides the layer."""
    return numbers(Mapped(), 4, 3, 5)


class Again(torch.autograd.Function):
    """The user's own function of values without weights: reverses the samples, twice."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(0).contiguous()


class Reversed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return Again.apply(self.b(torch.tanh(self.a(Again.apply(x)))))


@TRAPS("exact or refused")
def samples_backwards_by_function():
    """Norms belong to other rows, where no operation of torch is seen to exchange them."""
    return numbers(Reversed(), 4, 3, 5)


class Tensors(nn.Module):
    """Masks and targets of odd shapes next to the samples; a first argument that is no tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, scale, batch, mask):
        return self.b(torch.tanh(self.a(batch * scale)).masked_fill(mask, 0.0))


@TRAPS()
def masks_square():
    """A mask (T, 1) with T == B, by keyword."""
    mask = torch.tensor([[True], [False], [True], [False]])
    common = {"scale": 2.0, "mask": mask}
    return Problem(Tensors(), (), torch.randn(4, 1), squares, keywords={"batch": torch.randn(4, 4, 5)}, common=common)
