"""Nets that have no per-sample gradient, or none that can be had exactly."""

import torch
import torch.nn.functional as F
from torch import nn

from normkern.noise.per_sample.propagation import propagates
from normkern.noise.per_sample.sample_layout import SampleLayout

from .case import Cases, classes, numbers, words

#: No sample has a gradient of its own here. Whatever `uncovered` says.
COUPLED = Cases()
#: The forward mixes samples in a way that can be seen before the last layer.
MIXED = Cases()
#: Each sample has one, which must be estimated.
UNCOVERED = Cases()


def stack(*layers):
    return nn.Sequential(*layers)


@COUPLED("refused")
def batch_norm_1d():
    """In training."""
    return classes(stack(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), 5, 6)


@COUPLED("refused")
def batch_norm_2d():
    """On images, in place after it."""
    net = stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 4))
    return classes(net, 5, 3, 5, 5)


@COUPLED("refused")
def batch_norm_3d():
    """On volumes."""
    return numbers(stack(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), 4, 2, 3, 3, 3)


@COUPLED("refused")
def batch_norm_without_weights():
    """affine=False: it has no parameter that would be seen to be used."""
    return classes(stack(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 4)), 5, 6)


@COUPLED("refused")
def batch_norm_with_frozen_weights():
    """requires_grad_(False)."""
    net = stack(nn.Linear(6, 8), nn.BatchNorm1d(8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 4))
    return classes(net, 5, 6)


@COUPLED("refused")
def batch_norm_without_running_statistics():
    """track_running_stats=False: batch statistics in eval, too."""
    return classes(stack(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4)).eval(), 5, 6)


class FunctionalBatchNorm(nn.Module):
    """`sees`: what F.batch_norm is given, "nothing" but the inputs, or a layer's "weight" too."""

    def __init__(self, sees):
        super().__init__()
        self.sees, self.body, self.head = sees, nn.Linear(6, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        weight = self.scale if self.sees == "weight" else None
        return self.head(F.relu(F.batch_norm(self.body(x), None, None, weight, training=True)))


@COUPLED("refused")
def batch_norm_by_function():
    """F.batch_norm(training=True) with a parameter."""
    return classes(FunctionalBatchNorm("weight"), 5, 6)


@COUPLED("refused")
def embedding_scaled_by_frequency():
    """scale_grad_by_freq: how often a word comes in the whole batch divides its gradient."""
    return words(stack(nn.Embedding(7, 6, scale_grad_by_freq=True), nn.Tanh(), nn.Linear(6, 3)), 4, 9)


class Mixing(nn.Module):
    """A layer, something that goes over all samples, a layer."""

    def __init__(self, how, width=6):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.b(torch.tanh(MIXTURES[self.how](self.a(x))))


def _subtract_mean(x):
    x -= x.mean(0)
    return x


def _with_first_row(x):
    out = x.clone()
    out[1:] = out[1:] * x[0]
    return out


#: What goes over the samples, which are the first dimension.
MIXTURES = {
    "mean": lambda x: x - x.mean(0),
    "mean_kept": lambda x: x - x.mean(0, keepdim=True),
    "mean_in_place": _subtract_mean,
    "mean_of_all": lambda x: x / x.abs().mean(),
    "standardised": lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(),
    "softmax": lambda x: x.softmax(0),
    "normalize": lambda x: F.normalize(x, dim=0),
    "cumsum": lambda x: x.cumsum(0),
    "sorted": lambda x: x.sort(0).values,
    "rolled": lambda x: x + x.roll(1, 0),
    "flipped": lambda x: x.flip(0) * x,
    "shuffled": lambda x: x * x[torch.arange(len(x) - 1, -1, -1)],
    "partners": lambda x: 0.3 * x + 0.7 * x.index_select(0, torch.tensor([1, 2, 3, 4, 5, 0])),
    "gram": lambda x: x @ x.t() @ x,
    "distances": lambda x: torch.cdist(x, x),
    "similarities": lambda x: F.cosine_similarity(x[:, None], x[None], dim=-1),
    "einsum": lambda x: torch.einsum("bd,cd->bc", x, x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention_unsqueezed": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "transposed": lambda x: x.t(),
    "norm_over_all": lambda x: F.layer_norm(x, x.shape),
    "norm_of_transposed": lambda x: F.layer_norm(x.t(), (len(x),)).t(),
    "group_norm_of_one": lambda x: F.group_norm(x[None], 1)[0],
    "batch_norm_of_transposed": lambda x: F.instance_norm(x.t()[None])[0].t(),
    "pooled": lambda x: F.avg_pool1d(x.t()[None], 3, 1, 1)[0].t(),
    "convolved": lambda x: F.conv1d(x.t()[:, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)[:, 0].t(),
    "fourier": lambda x: torch.fft.fft(x, dim=0).real,
    "fourier_2d": lambda x: torch.fft.fft2(x[..., None], dim=(0, 1)).real[..., 0],
    "fourier_all": lambda x: torch.fft.fftn(x).real,
    "vector_norm": lambda x: x / torch.linalg.vector_norm(x, dim=0),
    "product_added_to_transposed": lambda x: torch.addmm(x, torch.ones(6, 6, dtype=x.dtype), x.t()).t(),
    "products_added_to_transposed": lambda x: torch.baddbmm(x[None], torch.ones(1, 6, 6, dtype=x.dtype), x.t()[None])[0].t(),
    "complex_samples": lambda x: torch.view_as_real(
        torch.view_as_complex(x.t().contiguous().unflatten(1, (3, 2))).square()
    ).flatten(1).t(),
    "solved": lambda x: torch.linalg.solve_triangular(torch.tril(x) + torch.eye(6, dtype=x.dtype) * 3, x, upper=False),
    "added_by_index": lambda x: torch.zeros_like(x).index_add(0, torch.tensor([0, 0, 1, 1, 2, 2]), x),
    "covariance": lambda x: torch.cov(x),
    "median": lambda x: x - x.median(0).values,
    "greatest": lambda x: x - x.max(),
    "pairs": lambda x: torch.relu(x[:, None] + x[None]).mean(1),
    "norm_of_all": lambda x: x / x.norm(),
    "matrix_norm": lambda x: x / torch.linalg.matrix_norm(x),
    "orthogonal": lambda x: torch.linalg.qr(x).Q,
    "singular_values": lambda x: x * torch.linalg.svdvals(x),
    "condensed_distances": lambda x: x * torch.pdist(x).sum(),
    "cut_across": lambda x: torch.tanh(F.layer_norm(x.reshape(4, 9), (9,))).reshape(6, 6),
    "transposed_and_reshaped": lambda x: torch.layer_norm(x.view(6, 2, 3).transpose(0, 1).reshape(6, 6), (6,)),
    "flattened": lambda x: x.flatten().softmax(0).view(6, 6),
    "convolved_flat": lambda x: F.conv1d(x.view(1, 1, 36), torch.ones(1, 1, 3, dtype=x.dtype), padding=1).view(6, 6),
    "outer": lambda x: torch.outer(x[:, 0], x[:, 1]),
    "kronecker": lambda x: torch.kron(x, x)[:6, :6],
    "triangle": lambda x: torch.tril(torch.ones(6, 6, dtype=x.dtype)) @ x,
    "copied_from_the_first": lambda x: x + x[:1],
    "taken_from_the_last": lambda x: torch.cat([x[:-1], x[-1:] * x[:1]]),
    "assigned": lambda x: _with_first_row(x),
    "by_numpy_indices": lambda x: x[[1, 0, 3, 2, 5, 4]] * x,
    "scattered": lambda x: torch.zeros_like(x).scatter(0, torch.arange(5, -1, -1)[:, None].expand(6, 6), x) * x,
    "global_pooling": lambda x: x * F.adaptive_avg_pool2d(x[None, None], 1).view(1, 1),
    "unfolded": lambda x: x + F.unfold(x[None, None], 3, padding=1).mean(1).view(6, 6),
    "interpolated": lambda x: F.interpolate(x[None, None], scale_factor=2).view(12, 12)[:6, :6],
}  # fmt: skip


def _mixing(how):
    def make():
        return numbers(Mixing(how), 6, 6)

    make.__name__, make.__doc__ = f"mixed_{how}", f"{how}, on six samples of width six."
    return make


for _how in MIXTURES:
    MIXED("refused")(_mixing(_how))


class AttendedAcross(nn.Module):
    """nn.MultiheadAttention that takes the samples for time; a convolution that takes them for channels."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a = how, nn.Linear(6, 6)
        self.b = nn.Conv1d(6, 6, 3, padding=1) if how == "channels" else nn.MultiheadAttention(6, 2)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.b(x) if self.how == "channels" else self.b(x, x, x)[0]


@MIXED("refused")
def attention_over_samples():
    """(B, D) without a batch: torch reads (T, D)."""
    return numbers(AttendedAcross("time"), 6, 6)


@MIXED("refused")
def attention_over_samples_with_time():
    """(B, T, D) given to a layer with batch_first=False: torch reads (T, B, D)."""
    return numbers(AttendedAcross("time"), 6, 6, 6)


@MIXED("refused")
def convolution_of_samples_as_channels():
    """(B, L) without a batch: torch reads (C, L)."""
    return numbers(AttendedAcross("channels"), 6, 6)


@MIXED("refused")
def lstm_over_samples():
    """(B, T, D) given to an LSTM with batch_first=False: torch reads (T, B, D)."""
    return numbers(RecurrentAcross(nn.LSTM(6, 6)), 6, 6, 6)


@MIXED("refused")
def gru_over_samples_without_batch():
    """(B, D) given to a GRU: torch reads one sequence."""
    return numbers(RecurrentAcross(nn.GRU(6, 6)), 6, 6)


@MIXED("refused")
def frozen_rnn_over_samples():
    """A frozen RNN takes the samples for time, before a layer that is trained."""
    return numbers(RecurrentAcross(nn.RNN(6, 6).requires_grad_(False)), 6, 6, 6)


class RecurrentAcross(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.into, self.layer, self.head = nn.Linear(6, 6), layer, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.into(x)))[0])


@torch.library.custom_op("normkern_tests::squashed_linear", mutates_args=())
def squashed_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """An operation of the user's own, which nothing describes."""
    return torch.tanh(x @ w.t() + b)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output)


def _backward(ctx, grad):
    x, w, y = ctx.saved_tensors
    grad = grad * (1 - y * y)
    rows = grad.flatten(0, -2)
    return grad @ w, rows.t() @ x.flatten(0, -2), rows.sum(0)


squashed_linear.register_autograd(_backward, setup_context=_save)


@propagates("normkern_tests::squashed_linear")
def rows_of_samples(op, results, batch):
    """The samples stay where they are."""
    [(x, layout)] = op.samples
    return [SampleLayout(layout.block // x.shape[-1] * y.shape[-1], layout.certain) for y in results]


class Own(nn.Linear):
    def forward(self, x):
        return torch.ops.normkern_tests.squashed_linear(x, self.weight, self.bias)


class OwnBetween(nn.Module):
    """Layers of the user's own between Linears."""

    def __init__(self, layers=1):
        super().__init__()
        self.into, self.layer, self.head = nn.Linear(4, 5), stack(*(Own(5, 5) for _ in range(layers))), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.into(x))))


@UNCOVERED("refused")
def own_operation():
    """A custom op between Linears."""
    return numbers(OwnBetween(), 4, 5, 4)


@UNCOVERED("refused")
def own_operations():
    """Two of them."""
    return numbers(OwnBetween(2), 6, 5, 4)


@UNCOVERED("refused")
def own_operation_odd():
    """An odd number of samples."""
    return numbers(OwnBetween(), 5, 5, 4)


class Cubes(torch.autograd.Function):
    """x w^T, elementwise cubed: an operation of the user's own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w.t()) ** 3

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = 3 * (x @ w.t()) ** 2 * grad
        return grad @ w, grad.t() @ x


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5, 6) / 2), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(Cubes.apply(x, self.w))


@UNCOVERED("refused")
def custom_function():
    """A torch.autograd.Function that takes the weight."""
    return classes(Custom(), 6, 6)


class Determinant(nn.Module):
    """A parameter whose use no rule describes: the inverse of a matrix."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.eye(6) * 2), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x @ torch.linalg.inv(self.w) + torch.logdet(self.w @ self.w.t()))


@UNCOVERED("exact or refused")
def inverse_of_a_weight():
    """linalg.inv and logdet of a parameter."""
    return classes(Determinant(), 6, 6)
