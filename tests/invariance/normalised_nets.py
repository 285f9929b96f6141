"""Nets of many kinds, with and without norms, of which it is known by hand what their loss does not see the scale of."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def pairs(*shape, classes=4, count=3):
    """Batches (inputs, labels)."""
    return [(torch.randn(shape), torch.randint(classes, shape[:1])) for _ in range(count)]


def tokens(count=3, words=11):
    return [(torch.randint(words, (8, 6)), torch.randint(words, (8,))) for _ in range(count)]


def convnet(norm, bias=False):
    """conv - norm - relu - conv - BatchNorm - relu - mean - linear."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), norm, nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


class QKNorm(nn.Module):
    """Attention that normalises queries and keys of each of four heads."""

    def __init__(self, bias=False):
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(16, 16, bias=bias))
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.LayerNorm(4)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.head(self.o(y.transpose(1, 2).flatten(2)).mean(1))


class FusedQKV(nn.Module):
    """One projection; queries divided by their length plus an eps of the code's own, keys by F.normalize."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o, self.head = nn.Linear(16, 48, bias=False), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = q / (q.norm(dim=-1, keepdim=True) + 1e-6), F.normalize(k, dim=-1)
        return self.head(self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


class PreActivationBlock(nn.Module):
    def __init__(self, channels_in, channels_out, stride=1, raw=False):
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        by_side = x if self.raw or isinstance(self.shortcut, nn.Identity) else y
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + self.shortcut(by_side)


class PreActivationResNet(nn.Module):
    """Two stages; the shortcut between them reads the normalised stream, or the raw one."""

    def __init__(self, raw=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            PreActivationBlock(4, 4), PreActivationBlock(4, 8, 2, raw), PreActivationBlock(8, 8)
        )
        self.bn, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


def vgg():
    """Biases before batch norms, a hidden layer without one."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


class TwoBranches(nn.Module):
    """A stream from a matrix and from two with a relu between: raw parameters, as x @ w.T."""

    def __init__(self):
        super().__init__()
        self.w1, self.v, self.w2 = (nn.Parameter(torch.randn(s)) for s in ((6, 5), (7, 5), (6, 7)))
        self.bn = nn.BatchNorm1d(6, affine=False)

    def forward(self, x):
        return self.bn(x @ self.w1.T + F.relu(x @ self.v.T) @ self.w2.T)


class LlamaNorm(nn.Module):
    """As language models write it: in float32 whatever comes, with an eps of its own."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


class Llama(nn.Module):
    """One block: everything written into the stream shares a scale, and queries and keys compensate each other."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.norm1, self.norm2, self.norm = LlamaNorm(16), LlamaNorm(16), LlamaNorm(16)
        for name in "qkvo":
            setattr(self, name, nn.Linear(16, 16, bias=False))
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((16, 24), (16, 24), (24, 16))
        )  # fmt: skip
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(x)).mean(1)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class RawWeights(nn.Module):
    """x @ w, whose output channels are dim 1, before a functional norm; a scale of no dimension before it."""

    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.tensor(2.0))
        self.power, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(8, 4)

    def forward(self, x):
        y = F.batch_norm(self.scale * (x @ self.w), None, None, training=True)
        return self.head(self.power * F.relu(y))


class EmbeddingNorm(nn.Module):
    """Each word normalised; the gain of that norm meets the next one; an own part nobody calls."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.hidden, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head, self.spare = nn.Linear(8, 11), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.bn(self.hidden(self.norm(self.embedding(x)).mean(1))))


class Contrast(nn.Module):
    """Cosine similarities of two towers over a temperature."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(6, 8)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        a = F.normalize(self.a(x), dim=-1)
        return self.temperature.exp() * a @ F.normalize(self.b(torch.cat([x, x[:, :1].sin()], 1)), dim=-1).T


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))
        self.bn, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.bn((x.to(self.w.dtype) @ self.w.T).abs()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.head = nn.LSTM(5, 8, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


class ZeroGain(nn.Module):
    """The last norm of the branch and the head begin at zero: at the start hardly anything has a gradient."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.bn1.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        return self.head(F.relu(x + self.bn1(self.conv(x))).mean((2, 3)))


def half_way_frozen():
    net = convnet(nn.BatchNorm2d(8))
    net[0].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def transposed():
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(150, 4),
    )  # fmt: skip


IMAGES, ROWS, SEQUENCES = (6, 3, 8, 8), (9, 5), (6, 5, 16)
_STREAM_2 = "blocks.1.conv2.weight blocks.1.shortcut.weight blocks.2.conv2.weight"
_PAIRS = ("blocks.0.bn1.weight blocks.0.bn1.bias", "blocks.2.bn1.weight blocks.2.bn1.bias")
_INNER = tuple(f"blocks.{i}.bn2.weight blocks.{i}.bn2.bias -blocks.{i}.conv2.weight" for i in range(3))
_LAST = "bn.weight bn.bias -head.weight"
_CONVS = {f"blocks.{i}.conv1.weight": "row" for i in range(3)}

#: name -> (net, batches, what is neither "none" nor "joint", joint sets, compensating ones with "-" before power -1).
CASES = {
    "batch norm": (
        lambda: convnet(nn.BatchNorm2d(8)), IMAGES,
        {"0.weight": "row", "3.weight": "row"}, ["1.weight 1.bias"], ["4.weight 4.bias -8.weight"],
    ),
    "group norm": (
        lambda: convnet(nn.GroupNorm(2, 8)), IMAGES,
        {"0.weight": "tensor", "3.weight": "row"}, ["1.weight 1.bias"], ["4.weight 4.bias -8.weight"],
    ),
    "group norm, biases": (
        lambda: convnet(nn.GroupNorm(2, 8), bias=True), IMAGES,
        {"3.weight": "row", "3.bias": "no gradient"}, ["0.weight 0.bias", "1.weight 1.bias"],
        ["4.weight 4.bias -8.weight"],
    ),
    "instance norm": (
        lambda: convnet(nn.InstanceNorm2d(8)), IMAGES,
        {"0.weight": "row", "3.weight": "row"}, [], ["4.weight 4.bias -8.weight"],
    ),
    "layer norm and RMSNorm": (
        lambda: nn.Sequential(
            nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 4)
        ), ROWS,
        {"0.weight": "tensor"}, ["3.weight 3.bias"], ["1.weight 1.bias -3.weight", "4.weight -5.weight"],
    ),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(5, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 4))), ROWS,
        {"0.parametrizations.weight.original1": "row", "2.parametrizations.weight.original1": "row"}, [],
        ["0.bias 0.parametrizations.weight.original0 -2.parametrizations.weight.original0"],
    ),
    "spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 4)), ROWS,
        {"0.parametrizations.weight.original": "tensor"}, [], [],
    ),
    "standardised weights": (
        lambda: nn.Sequential(StandardisedConv(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), IMAGES,
        {"0.weight": "row"}, [], [],
    ),
    "QK norm": (
        QKNorm, SEQUENCES,
        {"q.weight": "tensor", "k.weight": "tensor", "k_norm.bias": "no gradient"}, [],
        ["v.weight -o.weight", "o.weight -head.weight", "q_norm.weight -k_norm.weight"],
    ),
    "QK norm, biases": (
        lambda: QKNorm(bias=True), SEQUENCES,
        {"k_norm.bias": "no gradient"}, ["q.weight q.bias", "k.weight k.bias"],
        ["v.weight v.bias -o.weight", "o.weight o.bias -head.weight", "q_norm.weight -k_norm.weight"],
    ),
    "fused QKV": (
        FusedQKV, SEQUENCES, {}, [], ["qkv.weight -o.weight", "o.weight o.bias -head.weight"],
    ),
    "VGG": (
        vgg, IMAGES,
        {"0.weight": "row", "0.bias": "no gradient", "4.weight": "row"}, ["1.weight 1.bias"],
        ["5.weight 5.bias -9.weight", "9.weight 9.bias -11.weight"],
    ),
    "pre-activation ResNet": (
        PreActivationResNet, IMAGES,
        _CONVS, ["stem.weight blocks.0.conv2.weight", _STREAM_2, *_PAIRS],
        ["blocks.1.bn1.weight blocks.1.bn1.bias -blocks.1.shortcut.weight", *_INNER, _LAST],
    ),
    "pre-activation ResNet, raw shortcut": (
        lambda: PreActivationResNet(raw=True), IMAGES,
        _CONVS, [_STREAM_2, *_PAIRS, "blocks.1.bn1.weight blocks.1.bn1.bias"],
        ["stem.weight blocks.0.conv2.weight -blocks.1.shortcut.weight", *_INNER, _LAST],
    ),
    "two branches": (TwoBranches, ROWS, {}, ["w1 w2"], ["v -w2"]),
    "relu": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), ROWS,
        {}, [], ["0.weight 0.bias -2.weight", "2.weight 2.bias -4.weight"],
    ),
    "tanh": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)), ROWS, {}, [], [],
    ),
    "transposed and depthwise": (
        transposed, (6, 4, 5, 5),
        {"0.weight": "row", "0.bias": "no gradient", "3.weight": "row", "3.bias": "no gradient"},
        ["1.weight 1.bias"], ["4.weight 4.bias -7.weight"],
    ),
    "raw weights": (
        RawWeights, ROWS,
        {"w": "row", "scale": "no gradient"}, [], ["power -head.weight"],
    ),
    "embedding norm": (
        EmbeddingNorm, tokens,
        {
            "embedding.weight": "row", "norm.weight": "tensor", "norm.bias": "no gradient", "hidden.weight": "row",
            "hidden.bias": "no gradient", "spare.weight": "unused", "spare.bias": "unused",
        }, [], ["bn.weight bn.bias -head.weight"],
    ),
    "contrast": (
        Contrast, lambda: pairs(6, 5, classes=6), {"a.weight": "tensor"}, ["b.weight b.bias"], [],
    ),
    "complex": (
        Complex, ROWS, {"w": "row"}, [], ["bn.weight bn.bias -head.weight"],
    ),
    "LSTM": (Recurrent, (6, 7, 5), {}, [], ["norm.weight norm.bias -head.weight"]),
    "zero gain": (
        ZeroGain, IMAGES,
        {"stem.weight": "row", "conv.weight": "row"}, [],
        ["bn0.weight bn0.bias bn1.weight bn1.bias -head.weight"],
    ),
    "half-way frozen": (
        half_way_frozen, IMAGES,
        {"0.weight": "frozen", "4.bias": "frozen", "3.weight": "row"}, ["1.weight 1.bias"], ["4.weight -8.weight"],
    ),
    "eval mode": (
        lambda: convnet(nn.BatchNorm2d(8)).eval(), IMAGES,
        {}, [], ["0.weight -1.weight", "1.weight 1.bias -3.weight", "3.weight -4.weight", "4.weight 4.bias -8.weight"],
    ),
    "language model": (
        Llama, tokens,
        {}, ["embedding.weight o.weight down.weight"],
        ["norm2.weight -gate.weight -up.weight", "up.weight -down.weight", "v.weight -o.weight", "q.weight -k.weight",
         "norm.weight -head.weight", "norm1.weight -q.weight -k.weight -v.weight"],
    ),
    "language model, tied": (
        lambda: Llama(tied=True), tokens,
        {}, [],
        ["norm2.weight -gate.weight -up.weight", "up.weight -down.weight", "v.weight -o.weight", "q.weight -k.weight",
         "embedding.weight o.weight down.weight -norm.weight", "norm1.weight -q.weight -k.weight -v.weight"],
    ),
}  # fmt: skip


def case(name):
    """The net and its batches, seeded; expected kinds, joint sets and compensating ones."""
    torch.manual_seed(0)
    make, batches, kinds, joint, compensating = CASES[name]
    net = make()
    return net, batches() if callable(batches) else pairs(*batches), kinds, joint, compensating


def powers(text):
    """ "a -b" as {"a": 1, "b": -1}."""
    return {name.lstrip("-"): -1.0 if name.startswith("-") else 1.0 for name in text.split()}
