"""Layers used more than once, several samples folded into one dimension, and samples that are not in the first."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, classes, cross_entropy, numbers, squares, two_heads

SHARED = Cases()


def stack(*layers):
    return nn.Sequential(*layers)


class Again(nn.Module):
    """One layer, `times` times."""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


@SHARED()
def linear_twice():
    """Cross terms between two uses, one row per sample."""
    return classes(stack(nn.Linear(6, 5), Again(nn.Linear(5, 5), 2), nn.Linear(5, 4)), 4, 6)


@SHARED()
def linear_three_times():
    """On (B, T, D)."""
    return numbers(stack(Again(nn.Linear(5, 5), 3), nn.Linear(5, 2)), 4, 3, 5)


@SHARED()
def linear_many_times():
    """More uses than columns, one row each."""
    return numbers(stack(Again(nn.Linear(3, 3), 9), nn.Linear(3, 2)), 4, 3)


@SHARED()
def conv_three_times():
    """A convolution in a loop."""
    return numbers(
        stack(nn.Conv2d(2, 4, 3), Again(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), 3)), 3, 2, 6, 5
    )


@SHARED()
def conv_of_two_sizes():
    """One convolution on images of two sizes, and a norm used with it."""
    return numbers(Pyramid(), 3, 4, 8, 8)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x):
        a = torch.tanh(self.norm(self.conv(x)))
        b = torch.tanh(self.norm(self.conv(F.avg_pool2d(x, 2))))
        return torch.cat([a.flatten(1), b.flatten(1)], 1)


@SHARED()
def norms_twice():
    """LayerNorm and a bias used by two layers."""
    return numbers(TiedNorm(), 4, 3, 6)


class TiedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.norm(self.b(torch.tanh(self.norm(self.a(x)))))


@SHARED()
def weight_tied_across_kinds():
    """One tensor is the weight of a Linear and of a 1x1 convolution on another number of rows."""
    return numbers(TwoKinds(), 4, 3, 5)


class TwoKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        y = torch.tanh(self.linear(x)).transpose(1, 2)
        return self.head(torch.tanh(F.conv1d(y, self.linear.weight.unsqueeze(-1), self.linear.bias)).mT)


@SHARED()
def bias_used_twice_on_different_shapes():
    """One vector added to (B, T, D) and to (B, D)."""
    return numbers(Biased(), 4, 3, 5)


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bias = nn.Linear(5, 6, bias=False), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.a(x) + self.bias)
        return self.head(torch.tanh(x.mean(1) + self.bias))


class Autoencoder(nn.Module):
    """The decoder is the encoder transposed."""

    def __init__(self, how):
        super().__init__()
        self.how, self.encoder, self.bias = how, nn.Linear(6, 4), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        h, w = torch.tanh(self.encoder(x)), self.encoder.weight
        return F.linear(h, w.t(), self.bias) if self.how == "linear" else h @ w + self.bias


@SHARED()
def autoencoder():
    """F.linear(h, w.t())."""
    return numbers(Autoencoder("linear"), 5, 6)


@SHARED()
def autoencoder_of_rows():
    """h @ w on (B, T, D)."""
    return numbers(Autoencoder("product"), 5, 3, 6)


class ConvAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, x):
        return F.conv_transpose2d(torch.tanh(self.conv(x)), self.conv.weight, stride=2, padding=1, output_padding=1)


@SHARED()
def conv_autoencoder():
    """conv_transpose2d with the convolution's own weight."""
    return numbers(ConvAutoencoder(), 3, 3, 6, 6)


class Recurrent(nn.Module):
    """Over time by hand; `cell`: "linear", or torch's."""

    def __init__(self, cell, width=5):
        super().__init__()
        self.kind, self.width = cell, width
        if cell == "linear":
            self.into, self.onto = nn.Linear(4, width), nn.Linear(width, width, bias=False)
        else:
            self.cell = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell](4, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        h = state = x.new_zeros(len(x), self.width)
        outs = []
        for t in range(x.shape[1]):
            if self.kind == "linear":
                h = torch.tanh(self.into(x[:, t]) + self.onto(h))
            elif self.kind == "lstm":
                h, state = self.cell(x[:, t], (h, state))
            else:
                h = self.cell(x[:, t], h)
            outs.append(self.head(h))
        return torch.stack(outs, 1)


@SHARED()
def recurrent_by_hand():
    """Two Linears and a head at every step; a state of zeros at the first."""
    return numbers(Recurrent("linear"), 4, 6, 4)


@SHARED()
def recurrent_rnn_cell():
    """nn.RNNCell."""
    return numbers(Recurrent("rnn"), 4, 5, 4)


@SHARED()
def recurrent_lstm_cell():
    """nn.LSTMCell."""
    return numbers(Recurrent("lstm"), 4, 5, 4)


@SHARED()
def recurrent_gru_cell():
    """nn.GRUCell."""
    return numbers(Recurrent("gru"), 4, 5, 4)


class Siamese(nn.Module):
    """One encoder for two inputs: called twice, or once with both."""

    def __init__(self, how="twice", width=5):
        super().__init__()
        self.how, self.encoder, self.norm = how, nn.Linear(width, 6), nn.LayerNorm(6)

    def encode(self, x):
        return self.norm(torch.tanh(self.encoder(x)))

    def forward(self, a, b):
        if self.how == "twice":
            a, b = self.encode(a), self.encode(b)
        elif self.how == "cat":
            a, b = self.encode(torch.cat([a, b])).chunk(2)
        elif self.how == "stack":
            a, b = self.encode(torch.stack([a, b]))
        else:
            a, b = self.encode(torch.stack([a, b], 1).flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return torch.cat([a - b, a * b], -1)


def pair(net):
    return Problem(net, (torch.randn(4, 5), torch.randn(4, 5)), torch.randn(4, 1), squares)


@SHARED()
def siamese():
    """The encoder is called twice."""
    return pair(Siamese())


@SHARED()
def siamese_concatenated():
    """torch.cat([a, b]): rows b and B + b are one sample's, not rows 2b and 2b + 1."""
    return pair(Siamese("cat"))


@SHARED()
def siamese_stacked():
    """(2, B, D)."""
    return pair(Siamese("stack"))


@SHARED()
def siamese_stacked_of_two():
    """(2, B, D) with B == 2."""
    return Problem(Siamese("stack"), (torch.randn(2, 5), torch.randn(2, 5)), torch.randn(2, 1), squares)


@SHARED()
def siamese_interleaved():
    """(B, 2, D) folded to (2B, D)."""
    return pair(Siamese("interleaved"))


# --- folds ------------------------------------------------------------------------------------------------------------


class Folded(nn.Module):
    """Rows of all samples in one dimension, through layers that would take more."""

    def __init__(self, width=5):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        batch, tokens, width = x.shape
        y = self.b(torch.tanh(self.norm(self.a(x.view(batch * tokens, width)))))
        return y.view(batch, tokens, -1)


@SHARED()
def folded():
    """x.view(B * T, D)."""
    return numbers(Folded(), 4, 3, 5)


@SHARED()
def folded_square():
    """The same, T == B."""
    return numbers(Folded(4), 4, 4, 4)


@SHARED()
def folded_and_not():
    """One Linear on (B, T, D) and on (B * T, D)."""
    return numbers(FoldedAndNot(), 4, 3, 5)


class FoldedAndNot(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x):
        return torch.tanh(self.a(torch.tanh(self.a(x)).flatten(0, 1))).view_as(x)


class Frames(nn.Module):
    """Video: frames through a 2d net, one after the other in the batch; then their mean."""

    def __init__(self, channels=2):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
        return self.head(y).unflatten(0, x.shape[:2]).mean(1)


@SHARED()
def frames():
    """(B * F, C, H, W)."""
    return classes(Frames(), 4, 3, 2, 5, 5)


@SHARED()
def frames_square():
    """The same with F == B."""
    return classes(Frames(4), 4, 4, 4, 4, 4)


class Heads(nn.Module):
    """Folds of heads into the batch, as in BERT's time: (B * heads, T, D / heads) through a Linear."""

    def __init__(self):
        super().__init__()
        self.a, self.mix, self.out = nn.Linear(6, 6), nn.Linear(3, 3), nn.Linear(6, 2)

    def forward(self, x):
        batch, tokens, _ = x.shape
        y = self.a(x).view(batch, tokens, 2, 3).transpose(1, 2).reshape(batch * 2, tokens, 3)
        y = torch.tanh(self.mix(y)).view(batch, 2, tokens, 3).transpose(1, 2).reshape(batch, tokens, 6)
        return self.out(y)


@SHARED()
def heads_folded():
    """(B * heads, T, D / heads)."""
    return numbers(Heads(), 4, 5, 6)


class Windows(nn.Module):
    """Swin's windows: (B * windows, tokens, D), all in memory order of the samples."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 2)
        self.bias = nn.Parameter(torch.randn(4, 1))

    def forward(self, x):
        b, h, w, c = x.shape
        y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = torch.tanh(self.mix(y) + self.bias)
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.out(y)


@SHARED()
def windows():
    """(B * windows, 4, D), and a parameter that broadcasts over them."""
    return numbers(Windows(), 3, 4, 4, 6)


@SHARED()
def windows_as_many_as_positions():
    """B * windows == 4, the length of the broadcast parameter."""
    return numbers(Windows(), 2, 2, 4, 6)


class TimeMajor(nn.Module):
    """(T, B, D) inside, or folded to (T * B, D)."""

    def __init__(self, fold=False, width=5):
        super().__init__()
        self.fold, self.a, self.norm, self.b = fold, nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        tokens, batch, width = x.shape
        x = x.reshape(tokens * batch, width) if self.fold else x
        y = self.b(torch.tanh(self.norm(self.a(x))))
        return y.view(tokens, batch, -1).transpose(0, 1)


@SHARED()
def time_major():
    """x.transpose(0, 1) before the layers."""
    return numbers(TimeMajor(), 4, 3, 5)


@SHARED()
def time_major_square():
    """The same with T == B: who takes the first dimension for the samples is wrong here."""
    return numbers(TimeMajor(), 4, 4, 5)


@SHARED()
def time_major_folded():
    """(T * B, D): rows t B + b are sample b's."""
    return numbers(TimeMajor(fold=True), 4, 3, 5)


@SHARED()
def time_major_folded_square():
    """The same with T == B."""
    return numbers(TimeMajor(fold=True), 4, 4, 5)


class Copies(nn.Module):
    """Each sample several times: repeat_interleave keeps a sample's copies together, repeat does not."""

    def __init__(self, how):
        super().__init__()
        self.how, self.noise = how, nn.Parameter(torch.randn(3, 5))
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        batch = len(x)
        if self.how == "repeat":
            y = self.b(torch.tanh(self.a(x.repeat(3, 1) * self.noise.repeat_interleave(batch, 0))))
            return y.view(3, batch, -1).transpose(0, 1)
        y = x.repeat_interleave(3, 0) * self.noise.repeat(batch, 1)
        return self.b(torch.tanh(self.a(y))).view(batch, 3, -1)


@SHARED()
def copies_together():
    """repeat_interleave(3, 0) of samples, repeat(B, 1) of a parameter."""
    return numbers(Copies("interleave"), 4, 5)


@SHARED()
def copies_apart():
    """repeat(3, 1) of samples, repeat_interleave(B, 0) of a parameter."""
    return numbers(Copies("repeat"), 4, 5)


@SHARED()
def copies_apart_square():
    """The same with three samples."""
    return numbers(Copies("repeat"), 3, 5)


class Piecewise(nn.Module):
    """Not all samples at once: one by one, in halves, backwards, sorted by a length."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(5, 6), nn.Linear(6, 2)

    def net(self, x):
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x):
        if self.how == "one by one":
            return torch.stack([self.net(sample) for sample in x])
        if self.how == "halves":
            return torch.cat([self.net(part) for part in x.split((len(x) + 1) // 2)])
        if self.how == "backwards":
            return self.net(x.flip(0)).flip(0)
        order = x[:, 0].flatten(1).sum(1).argsort()
        return self.net(x[order])[order.argsort()]


@SHARED()
def samples_one_by_one():
    """A loop in the model: layers see (T, D)."""
    return numbers(Piecewise("one by one"), 4, 3, 5)


@SHARED()
def samples_one_by_one_square():
    """The same with T == B: who takes the first dimension for the samples is wrong here."""
    return numbers(Piecewise("one by one"), 4, 4, 5)


@SHARED()
def samples_in_halves():
    """Two calls of half the batch."""
    return numbers(Piecewise("halves"), 4, 3, 5)


@SHARED()
def samples_backwards():
    """flip(0) before the layers and after them: the norms belong to other rows."""
    return numbers(Piecewise("backwards"), 4, 3, 5)


@SHARED()
def samples_sorted():
    """Sorted before the layers, and back after them."""
    return numbers(Piecewise("sorted"), 4, 3, 5)


class Routed(nn.Module):
    """A mixture of experts: each token goes through the one that its scores choose."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(5, 2)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x):
        score, choice = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(*x.shape[:-1], 3)
        for i, expert in enumerate(self.experts):
            out[choice == i] = expert(x[choice == i])
        return out * score.unsqueeze(-1)


@SHARED("exact or refused")
def experts():
    """Experts see as many rows as were sent to them."""
    return numbers(Routed(), 4, 5, 5)


@SHARED("exact or refused")
def experts_for_samples():
    """Each sample is sent to one expert: rows are samples, but not all of them."""
    return numbers(Routed(), 6, 5)


# --- what is used by some, or by nobody -------------------------------------------------------------------------------


class Several(nn.Module):
    """Heads, and layers that nobody uses: not called, called but not in the loss, cut off by detach."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)
        self.idle, self.ignored, self.cut = nn.Linear(8, 2), nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        self.ignored(x)
        return self.first(x), self.second(x + self.cut(x).detach())


@SHARED()
def two_losses():
    """The sum of two heads' losses; unused layers."""
    return Problem(Several(), (torch.randn(5, 6),), (torch.randint(4, (5,)), torch.randn(5, 1)), two_heads)


@SHARED()
def two_losses_of_six():
    """The same of an even number of samples."""
    return Problem(Several(), (torch.randn(6, 6),), (torch.randint(4, (6,)), torch.randn(6, 1)), two_heads)


@SHARED()
def frozen():
    """A frozen body between trained ends, a frozen bias, a trained bias on a frozen weight."""
    net = stack(
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    )
    net[2].requires_grad_(False)
    net[3].weight.requires_grad_(False)
    net[5].bias.requires_grad_(False)
    net[7].weight.requires_grad_(False)
    return classes(net, 5, 6)


@SHARED()
def frozen_convolutions():
    """Only biases and norms are trained, as in BitFit."""
    net = stack(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 4)
    )
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith("bias") or p.ndim == 1)
    return classes(net, 4, 3, 6, 6)


class Adapted(nn.Module):
    """LoRA beside a frozen weight."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(x))


@SHARED()
def adapters():
    """LoRA."""
    return numbers(stack(Adapted(), nn.Tanh(), Adapted()), 4, 3, 6)


class Masked(nn.Module):
    """A different part of the net for each sample; some samples use none of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x, chosen, dropped):
        x = torch.where(chosen[:, None], self.a(x), self.b(x))
        return self.head(torch.relu(x) * dropped)


@SHARED()
def masked():
    """torch.where by sample, and a dropout mask that is an input."""
    chosen = torch.tensor([True, False, False, False, False])
    problem = classes(Masked(), 5, 5)
    dropped = (torch.rand(5, 6) > 0.3).float() / 0.7
    return Problem(problem.model, (*problem.inputs, chosen, dropped), problem.target, cross_entropy)


class Dictionary(nn.Module):
    """Takes tensors by name in one dictionary, as data loaders of language models give them."""

    def __init__(self):
        super().__init__()
        self.words, self.image, self.head = nn.Embedding(7, 5), nn.Conv2d(2, 5, 3), nn.Linear(5, 4)

    def forward(self, ids, image):
        return self.head(torch.tanh(self.words(ids).mean(1) + self.image(image).mean((2, 3))))


@SHARED()
def two_kinds_of_inputs():
    """Ids and images."""
    inputs = torch.randint(7, (4, 6)), torch.randn(4, 2, 4, 5)
    return Problem(Dictionary(), inputs, torch.randint(4, (4,)), cross_entropy)


@SHARED()
def large_net_of_everything():
    """Convolutional tokens, a shared attention layer, ties, norms, a scale: all at once."""
    return classes(Everything(), 3, 2, 8, 8, count=8)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, stride=2, padding=1, padding_mode="circular"), nn.GroupNorm(2, 8)
        self.positions, self.token = nn.Parameter(torch.randn(1, 17, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.classes, self.scale = nn.Embedding(8, 8), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = F.relu_(self.norm(self.stem(x))).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.layer(self.layer(x))
        return self.scale * F.linear(x[:, 0] + self.classes(torch.tensor(3)), self.classes.weight)
