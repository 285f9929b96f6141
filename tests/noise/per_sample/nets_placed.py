"""Parameters that autograd functions change, that are chosen, or that come into the places of samples; lists of losses."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, numbers, squares, words

PLACED = Cases()


class Rounded(torch.autograd.Function):
    """Straight through: rounds, and hands the gradient on."""

    @staticmethod
    def forward(ctx, w):
        return (w * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Factors(torch.autograd.Function):
    """A product of two parameters and a sum of one, with their own backward."""

    @staticmethod
    def forward(ctx, a, scale, b):
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return a @ b * scale, a.sum(1)

    @staticmethod
    def backward(ctx, grad, grad_of_sum):
        a, b = ctx.saved_tensors
        return grad @ b.t() * ctx.scale + grad_of_sum[:, None], None, a.t() @ grad * ctx.scale


class ByFunctions(nn.Module):
    """Weights that functions make; each weight is used without them, too."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        x = torch.tanh(F.linear(x, Rounded.apply(self.into.weight * 1.5), self.into.bias) + self.into(x))
        product, bias = Factors.apply(self.a, 0.5, self.b)
        x = torch.tanh(x @ product + bias) + x @ self.a @ self.b
        return F.linear(x, Rounded.apply(self.out.weight)) + self.out(x)


@PLACED()
def weights_by_functions():
    """Several rows of a sample; B is not the size of a weight."""
    return numbers(ByFunctions(), 3, 2, 5)


@PLACED()
def weights_by_functions_of_batch_size():
    """B is the first size of every factor: they are no samples."""
    return numbers(ByFunctions(), 4, 5)


class RoundedConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, Rounded.apply(self.weight), self.bias)


@PLACED()
def rounded_kernels():
    """Training aware of quantisation."""
    return numbers(nn.Sequential(RoundedConv(2, 4, 3), nn.Tanh(), RoundedConv(4, 2, 2)), 3, 2, 6, 5)


class Bank(nn.Module):
    """A matrix of the best vectors of a bank: topk returns indices, too."""

    def __init__(self):
        super().__init__()
        self.scores, self.bank = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 5))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        best, at = self.scores.topk(2, -1)
        weight = (best.softmax(-1)[..., None] * self.bank[at]).sum(1)
        return self.head(torch.tanh(F.linear(x, weight)))


@PLACED()
def bank_of_vectors():
    return numbers(Bank(), 3, 5)


class Tokens(nn.Module):
    """Words, and vectors of the table or of a parameter in some places."""

    def __init__(self, way):
        super().__init__()
        self.way, self.table, self.out = way, nn.Embedding(7, 6), nn.Linear(6, 3)
        self.token = nn.Parameter(torch.randn(6))
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, ids):
        h = torch.tanh(self.table(ids))
        h = WAYS[self.way](self, ids, h)
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return self.out(h).sum(1)


def _masked(net, ids, h):
    h = h * 1.5
    h[ids == 0] = net.token
    return h


def _first(net, ids, h):
    h = h * 1.5
    h[:, 1] = net.token * 2
    h[:, 2:4, 1:] = net.token[1:]
    return h


def _padded(net, ids, h):
    pad = ids.new_full((len(ids), 2), 3)
    return torch.cat([h, net.table(pad)], 1)


def _padded_before(net, ids, h):
    pad = torch.full((len(ids), 2), 3, dtype=torch.int64) * torch.ones(1, 2, dtype=torch.int64)
    return torch.cat([net.table(pad), h, net.table(pad)], 1)


def _stacked(net, ids, h):
    last = net.table(ids.new_full((len(ids),), 2))
    return torch.stack([h[:, 0], last, h[:, 1], last], 1)


WAYS = {"masked": _masked, "first": _first, "padded": _padded, "before": _padded_before, "stacked": _stacked}


@PLACED()
def token_of_a_mask():
    """x[ids == 0] = token: other places in every sample, none in some."""
    problem = words(Tokens("masked"), 4, 5)
    problem.inputs[0][0].clamp_(min=1)
    problem.inputs[0][1, :2] = 0
    return problem


@PLACED()
def tokens_in_places():
    """x[:, i] = token."""
    return words(Tokens("first"), 4, 5)


@PLACED()
def padding_of_ids():
    """Ids that no sample has, as new_full makes them, and their vectors behind those of the samples."""
    return words(Tokens("padded"), 3, 5)


@PLACED()
def padding_before_and_behind():
    """The same on both sides, by ids that no rule follows."""
    return words(Tokens("before"), 3, 5)


@PLACED()
def stacked_with_padding():
    return words(Tokens("stacked"), 3, 5)


class Positions(nn.Module):
    """Keys of relative positions, made of a parameter and repeated for each sample, as in XLNet."""

    def __init__(self):
        super().__init__()
        self.into, self.keys, self.out = nn.Linear(5, 8), nn.Parameter(torch.randn(5, 2, 4)), nn.Linear(3, 2)

    def forward(self, x):
        q = self.into(x).unflatten(-1, (2, 4)).transpose(0, 1)  # (T, B, heads, width)
        waves = torch.cos(torch.arange(15, dtype=x.dtype).view(3, 5))
        waves = waves[:, None].expand(-1, x.shape[0], -1)
        k = torch.einsum("jbd,dhw->jbhw", waves, self.keys)
        return self.out(torch.einsum("ibhw,jbhw->bhij", q, k).softmax(-1)).flatten(1)


@PLACED()
def keys_of_each_sample():
    return numbers(Positions(), 4, 3, 5)


class Biased(nn.Module):
    """Attention whose mask is a table of relative positions alone."""

    def __init__(self, per_head=True):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 2)
        self.table = nn.Embedding(9, 2) if per_head else nn.Embedding(9, 1)
        self.per_head = per_head

    def forward(self, x):
        t = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        apart = torch.arange(t)[:, None] - torch.arange(t) + 4
        mask = self.table(apart).permute(2, 0, 1)
        mask = mask[None] if self.per_head else mask[0]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(h.transpose(1, 2).flatten(2)).sum(1)


@PLACED()
def attention_with_positions():
    return numbers(Biased(), 3, 5, 6)


@PLACED()
def attention_with_positions_for_all_heads():
    """A mask of two dimensions; B is its size."""
    return numbers(Biased(False), 5, 5, 6)


class Windows(nn.Module):
    """Overlapping windows by as_strided of a tensor that is not contiguous, as in Longformer."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.into(x)).transpose(0, 1)  # (T, B, width)
        h = h.unflatten(-1, (2, 2)).permute(1, 2, 0, 3)  # (B, heads, T, width)
        size, stride = list(h.shape), list(h.stride())
        windows = h.as_strided((*size[:2], size[2] // 2 - 1, 4, size[3]), (*stride[:2], 2 * stride[2], *stride[2:]))
        return self.out(windows.tanh().flatten(3).unflatten(-1, (2, 4))).sum((1, 3)).flatten(1)


@PLACED()
def windows_in_memory():
    return numbers(Windows(), 3, 8, 5)


class Quantised(nn.Module):
    """The nearest vector of a codebook, straight through: no gradient goes through the distances."""

    def __init__(self):
        super().__init__()
        self.into, self.codes, self.out = nn.Linear(5, 4), nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        z = self.into(x)
        at = torch.cdist(z.flatten(0, -2), self.codes.weight).argmin(1)
        q = self.codes(at).view_as(z)
        loss = (q - z.detach()).square() + 0.25 * (q.detach() - z).square()
        return self.out(z + (q - z).detach()) + loss.sum(-1, keepdim=True)


@PLACED()
def codebook_by_distances():
    return numbers(Quantised(), 3, 2, 5)


class Near(nn.Module):
    """Distances to prototypes, with a gradient."""

    def __init__(self):
        super().__init__()
        self.into, self.prototypes = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.cdist(self.into(x), self.prototypes)


@PLACED()
def distances_to_prototypes():
    """The samples are the rows of which distances are taken."""
    return numbers(Near(), 4, 5)


class Listed(nn.Module):
    """A loss for each sample from a loop, or for each output."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.net = kind, nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x, y):
        out = self.net(x)
        if self.kind == "samples":
            return torch.stack([F.cross_entropy(o, t) for o, t in zip(out, y, strict=True)])
        if self.kind == "written":
            losses = x.new_zeros(len(x))
            for i in range(len(x)):
                losses[i] = F.cross_entropy(out[i], y[i])
            return losses
        losses = [F.cross_entropy(out, y), 0.1 * F.mse_loss(out, torch.ones_like(out)), out.square().mean()]
        return torch.stack(losses) * torch.tensor([1.0, 2.0, 0.5], dtype=x.dtype)


def _listed(kind, reduce):
    return Problem(
        Listed(kind), (torch.randn(4, 5), torch.randint(3, (4,))), None, lambda losses, target: reduce(losses)
    )


@PLACED()
def losses_of_samples_in_a_list():
    """The model returns a loss for each sample."""
    return _listed("samples", torch.mean)


@PLACED()
def losses_of_samples_written():
    return _listed("written", torch.mean)


@PLACED()
def losses_of_outputs_in_a_list():
    """The model returns a vector of losses, each a mean over the samples."""
    return _listed("outputs", torch.sum)


class Captioned(nn.Module):
    """The features of a second input, image by image, in the places of a text."""

    def __init__(self):
        super().__init__()
        self.vision, self.words, self.out = nn.Linear(3, 6), nn.Embedding(7, 6), nn.Linear(6, 4)

    def forward(self, ids, images):
        features = torch.cat(list(self.vision(images)), 0)
        text = self.words(ids)
        return self.out(torch.tanh(text.masked_scatter((ids == 0)[..., None].expand_as(text), features)))


@PLACED()
def features_by_image():
    """A list of the rows of an input whose samples are a guess."""
    ids = torch.randint(1, 7, (3, 5))
    ids[:, 1:3] = 0
    return Problem(Captioned(), (ids, torch.randn(3, 2, 3)), torch.randn(3, 1), squares)


class Modulated(nn.Module):
    """Kernels of each sample's style, by one convolution with a group for each sample, as in StyleGAN2."""

    def __init__(self, transposed):
        super().__init__()
        self.style, self.transposed = nn.Linear(3, 3), transposed
        self.kernels = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        style = self.style(x.mean((2, 3)))
        kernels = self.kernels * style[:, None, :, None, None]
        images = x.reshape(1, -1, *x.shape[2:])
        if self.transposed:
            kernels = kernels.transpose(1, 2)
            y = F.conv_transpose2d(images, kernels.reshape(-1, *kernels.shape[2:]), groups=len(x))
        else:
            y = F.conv2d(images, kernels.reshape(-1, *kernels.shape[2:]), padding=1, groups=len(x))
        return y.view(len(x), -1, *y.shape[2:]).tanh()


@PLACED()
def kernels_of_samples():
    return numbers(Modulated(False), 4, 3, 5, 4)


@PLACED()
def transposed_kernels_of_samples():
    return numbers(Modulated(True), 3, 3, 4, 5)


class Put(nn.Module):
    """index_put of a parameter."""

    def __init__(self):
        super().__init__()
        self.into, self.token = nn.Linear(5, 4), nn.Parameter(torch.randn(2, 1, 1))

    def forward(self, x):
        at = torch.tensor([[1], [3]])
        x = self.into(x)
        h = x.mT.index_put((torch.arange(len(x)).view(-1, 1, 1), at), self.token)
        return h.index_put((torch.arange(len(x)).view(-1, 1, 1), at - 1), self.token, accumulate=True)


@PLACED()
def put_at_indices():
    return numbers(Put(), 4, 3, 5)
