"""Rows in any order: tokens picked for experts, masks, sorting, loops over samples."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, classes, numbers

ROWS = Cases()
EXPERTS = 3


class Experts(nn.Module):
    """A mixture of experts; `way`: how its tokens come to their experts and back."""

    def __init__(self, way, experts=EXPERTS):
        super().__init__()
        self.way, self.count = way, experts
        self.into, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, experts), nn.Linear(6, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(experts, 6, 6) / 3), nn.Parameter(torch.randn(experts, 6))

    def forward(self, x):
        x = torch.tanh(self.into(x))
        h = x.reshape(-1, 6)
        scores = self.router(h).softmax(-1)
        return self.head(x + WAYS[self.way](self, h, *scores.topk(2, -1)).view_as(x))

    def one(self, e, rows):
        return torch.tanh(F.linear(rows, self.weight[e], self.bias[e]))


def _loop(self, h, weights, chosen):
    out = torch.zeros_like(h)
    for e in range(self.count):
        at, place = torch.where(chosen == e)
        out.index_add_(0, at, self.one(e, h[at]) * weights[at, place, None])
    return out


def _masks(self, h, weights, chosen):
    out = torch.zeros_like(h)
    for e in range(self.count):
        for k in range(2):
            mask = chosen[:, k] == e
            out[mask] = out[mask] + self.one(e, h[mask]) * weights[mask, k].unsqueeze(-1)
    return out


def _selects(self, h, weights, chosen):
    out = h.new_zeros(h.shape)
    for e in range(self.count):
        at = (chosen == e).any(-1).nonzero().squeeze(-1)
        mine = (weights * (chosen == e)).sum(-1).index_select(0, at)
        out = out.index_put((at,), self.one(e, h.index_select(0, at)) * mine[:, None], accumulate=True)
    return out


def _sorted(self, h, weights, chosen):
    order = chosen.flatten().argsort(stable=True)
    rows = h[order // 2]
    parts = rows.split(chosen.flatten().bincount(minlength=self.count).tolist())
    y = torch.cat([self.one(e, part) for e, part in enumerate(parts)]) * weights.flatten()[order, None]
    return torch.zeros_like(h).scatter_add(0, (order // 2)[:, None].expand_as(y), y)


def _unsorted(self, h, weights, chosen):
    order = chosen.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    rows = h.repeat_interleave(2, 0)[order]
    counts = chosen.flatten().bincount(minlength=self.count).tolist()
    y = torch.cat([self.one(e, part) for e, part in enumerate(rows.split(counts))])
    return (y[inverse] * weights.reshape(-1, 1)).view(-1, 2, 6).sum(1)


def _batched(self, h, weights, chosen):
    w, b = self.weight[chosen.flatten()], self.bias[chosen.flatten()]
    y = torch.tanh(torch.bmm(w, h.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1) + b)
    return (y * weights.reshape(-1, 1)).view(-1, 2, 6).sum(1)


def _places(self, chosen):
    """Which place of its expert every token has, (tokens * 2)."""
    one = F.one_hot(chosen.flatten(), self.count)
    return (one.cumsum(0) * one).sum(-1) - 1


def _capacity(self, h, weights, chosen):
    flat, place = chosen.flatten(), _places(self, chosen)
    room = int(place.max()) + 2
    rows = h.new_zeros(self.count, room, 6)
    rows[flat, place] = h.repeat_interleave(2, 0)
    y = torch.tanh(torch.bmm(rows, self.weight) + self.bias[:, None])
    return (y[flat, place] * weights.reshape(-1, 1)).view(-1, 2, 6).sum(1)


def _einsum(self, h, weights, chosen):
    flat, place = chosen.flatten(), _places(self, chosen)
    rows = h.new_zeros(self.count, int(place.max()) + 1, 6).index_put((flat, place), h.repeat_interleave(2, 0))
    y = torch.einsum("eci,eio->eco", rows, self.weight)
    return (y[flat, place] * weights.reshape(-1, 1)).view(-1, 2, 6).sum(1)


def _grouped(self, h, weights, chosen):
    order = chosen.flatten().argsort(stable=True)
    ends = chosen.flatten().bincount(minlength=self.count).cumsum(0).int()
    rows = h.repeat_interleave(2, 0)[order]
    kind = h.dtype
    y = F.grouped_mm(rows.float(), self.weight.float(), offs=ends).to(kind) * weights.flatten()[order, None]
    return torch.zeros_like(h).index_add(0, order // 2, y)


WAYS = {
    "loop": _loop, "masks": _masks, "selects": _selects, "sorted": _sorted, "unsorted": _unsorted, "batched": _batched,
    "capacity": _capacity, "einsum": _einsum,
}  # fmt: skip


def _experts(way, batch, tokens, experts=EXPERTS):
    def make():
        return numbers(Experts(way, experts), batch, tokens, 5)

    make.__name__, make.__doc__ = f"experts_by_{way}_{experts}", f"Experts by {way}; some of many get no token."
    return make


for _way in WAYS:
    ROWS()(_experts(_way, 4, 5))
    ROWS()(_experts(_way, 3, 2, 9))


def _lengths(x):
    """A number for each sample, which its own entries decide."""
    return ((x[:, :, 0] > 0).sum(1).clamp(min=1)).tolist()


class Each(nn.Module):
    """Samples one at a time, their results stacked."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.b, self.scale = way, nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.randn(5))

    def forward(self, x):
        if self.way == "zip":
            rows = [torch.tanh(self.a(x_) * self.scale).sum(0) for x_ in x]
        elif self.way == "lengths":
            rows = [torch.tanh(self.a(x[i, :n])).mean(0) for i, n in enumerate(_lengths(x))]
        elif self.way == "blocks":
            lengths = _lengths(x)
            flat = torch.cat([x[i, :n] for i, n in enumerate(lengths)])
            rows = [part.mean(0) for part in torch.tanh(self.a(flat)).split(lengths)]
        else:
            rows = [torch.tanh(self.a(row)).mean(0) for row in x.unbind()]
        return self.b(torch.stack(rows))


def _each(way):
    def make():
        return classes(Each(way), 5, 4, 5, count=3)

    make.__name__, make.__doc__ = f"each_by_{way}", f"A loop over samples, by {way}."
    return make


for _way in ("zip", "lengths", "blocks", "unbind"):
    ROWS()(_each(_way))


class Rows(nn.Module):
    """Layers on rows of all samples in another order, and back into the samples."""

    def __init__(self, layer):
        super().__init__()
        self.into, self.layer, self.head = nn.Linear(6, 6), layer, nn.Linear(6, 2)

    def forward(self, x):
        batch, tokens = x.shape[:2]
        order = torch.arange(batch * tokens).view(batch, tokens).t().flatten().roll(2)
        rows = torch.tanh(self.into(x)).flatten(0, 1)[order]
        out = torch.zeros_like(rows).index_copy(0, order, self.layer(rows))
        return self.head(out.view(batch, tokens, -1))


class Image(nn.Module):
    """A convolution of rows as little images."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.bias = (
            nn.Conv1d(2, 2, 3, padding=1),
            nn.GroupNorm(1, 2),
            nn.Parameter(torch.randn(2, 1)),
        )

    def forward(self, rows):
        return (self.norm(self.conv(rows.view(-1, 2, 3))) + self.bias).flatten(1)


LAYERS = {
    "norm": lambda: nn.LayerNorm(6), "image": Image,
    "padded": lambda: nn.Sequential(nn.ConstantPad1d((1, 2), 0.0), nn.Linear(9, 6)),
}  # fmt: skip


def _rows(name):
    def make():
        return numbers(Rows(LAYERS[name]()), 3, 4, 6)

    make.__name__, make.__doc__ = f"rows_of_{name}", f"{name} on rows in another order."
    return make


for _name in LAYERS:
    ROWS()(_rows(_name))


class Placed(nn.Module):
    """Rows in another order, each with the position that it had; a matrix after them."""

    def __init__(self):
        super().__init__()
        self.into, self.places, self.mix = (
            nn.Linear(6, 6),
            nn.Parameter(torch.randn(4, 6)),
            nn.Parameter(torch.randn(6, 6)),
        )

    def forward(self, x):
        order = torch.arange(len(x) * 4).roll(3)
        rows = torch.tanh(self.into(x)).flatten(0, 1)[order] + self.places.repeat(len(x), 1)[order]
        rows = torch.tanh(rows @ self.mix)
        return rows.new_zeros(len(x), 6).index_add_(0, order // 4, rows)


@ROWS()
def rows_with_places():
    """A parameter that has a row for each row of samples."""
    return numbers(Placed(), 3, 4, 6)


class Kept(nn.Module):
    """The tokens of each sample with the highest scores; sorted by them."""

    def __init__(self, sort):
        super().__init__()
        self.sort, self.score, self.a, self.b = sort, nn.Linear(5, 1), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        scores = self.score(x).squeeze(-1)
        best = scores.sort(1, descending=True).indices[:, :3] if self.sort else scores.topk(3, 1).indices
        picked = x[torch.arange(len(x))[:, None], best]
        gate = scores.gather(1, best).sigmoid().unsqueeze(-1)
        return self.b(torch.tanh(self.a(picked)) * gate)


@ROWS()
def kept_by_topk():
    """Mixture of depths: tokens picked by two indices."""
    return numbers(Kept(False), 4, 6, 5)


@ROWS()
def kept_by_sort():
    """The same, by sort."""
    return numbers(Kept(True), 4, 6, 5)


class Words(nn.Module):
    """Embeddings of ids in another order, of a mask."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        ids = (x.abs() * 3).long().clamp(max=6)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 1::2] = False
        rows = self.table(ids[mask])
        out = torch.zeros(*ids.shape, 5, dtype=rows.dtype).masked_scatter(mask[..., None], rows)
        return self.head(out[:, 0::2])


@ROWS()
def words_by_mask():
    """An embedding of masked ids, scattered back."""
    return numbers(Words(), 4, 5)


class Prompted(nn.Module):
    """Learned tokens in front of each sample, looked up with a buffer that was expanded to the batch and cut again."""

    def __init__(self):
        super().__init__()
        self.table, self.into, self.head = nn.Embedding(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.register_buffer("ids", torch.arange(2))

    def forward(self, x):
        ids = self.ids.unsqueeze(0).expand(len(x), -1)
        prompt = self.table(ids[:1]).repeat(len(x), 1, 1)
        return self.head(torch.cat([prompt, torch.tanh(self.into(x))], 1).cumsum(1).cos())


@ROWS()
def prompted():
    """A guess may not become certain when it is cut."""
    return numbers(Prompted(), 3, 4, 5)
