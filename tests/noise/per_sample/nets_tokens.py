"""Embeddings, positions, and what else is looked up by an index."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, cross_entropy, numbers, squares, text, words

TOKENS = Cases()
WORDS, WIDTH = 7, 6


class Reader(nn.Module):
    """Embeddings of any shape of ids, then one hidden layer, the mean over tokens."""

    def __init__(self, embedding=None, width=WIDTH):
        super().__init__()
        self.embedding = embedding or nn.Embedding(WORDS, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))


@TOKENS()
def embedding_of_one_word():
    """ids (B,), with repeats."""
    return words(Reader(), 5)


@TOKENS()
def embedding_of_words():
    """ids (B, T), with repeats within a sample and across."""
    return words(Reader(), 4, 9)


@TOKENS()
def embedding_of_pages():
    """ids (B, T1, T2)."""
    return words(Reader(), 4, 3, 2)


@TOKENS()
def embedding_square():
    """As many tokens as samples, words and widths."""
    return words(Reader(nn.Embedding(4, 4), 4), 4, 4, count=4)


@TOKENS()
def embedding_with_padding():
    """padding_idx: its row has no gradient; one sample is nothing else."""
    problem = words(Reader(nn.Embedding(WORDS, WIDTH, padding_idx=2)), 4, 9)
    problem.inputs[0][1] = 2
    return problem


@TOKENS()
def embedding_with_negative_padding():
    """padding_idx=-1, and the functional form with one."""
    return words(ReaderByFunction(), 4, 9)


class ReaderByFunction(Reader):
    def __init__(self):
        super().__init__(nn.Embedding(WORDS, WIDTH, padding_idx=-1))
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH))

    def forward(self, ids):
        return super().forward(ids) * F.embedding(ids, self.table, padding_idx=1).sum(-1, keepdim=True)


@TOKENS()
def embedding_one_word_repeated():
    """Every token of every sample is the same."""
    problem = words(Reader(), 4, 6)
    problem.inputs[0].fill_(3)
    return problem


class Lookups(nn.Module):
    """Rows of a parameter without an embedding: by index, index_select, one_hot, gather, take_along_dim."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(WORDS, WIDTH)) for _ in range(3))
        self.d, self.head = nn.Parameter(torch.randn(WORDS)), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.a[ids] + self.b.index_select(0, ids.flatten()).view(*ids.shape, WIDTH)
        x = x + F.one_hot(ids, WORDS).to(x.dtype) @ self.c
        return self.head(torch.tanh(x * self.d[ids].unsqueeze(-1)))


@TOKENS("exact or refused")
def lookups():
    """parameter[ids] and its relatives."""
    return words(Lookups(), 4, 5)


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Parameter(torch.randn(WORDS, WIDTH)), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.a[ids]))


@TOKENS()
def rows_by_index():
    """parameter[ids]."""
    return words(Rows(), 4, 5)


@TOKENS()
def embedding_bag():
    """nn.EmbeddingBag of (B, T), with padding_idx."""
    return words(stack(nn.EmbeddingBag(WORDS, WIDTH, mode="mean", padding_idx=0), nn.Tanh(), nn.Linear(WIDTH, 3)), 4, 5)


def stack(*layers):
    return nn.Sequential(*layers)


@TOKENS("exact or refused")
def embedding_sparse():
    """Sparse gradients."""
    return words(Reader(nn.Embedding(WORDS, WIDTH, sparse=True)), 4, 5)


@TOKENS()
def embedding_max_norm():
    """Rows renormalised in place by the forward."""
    return words(Reader(nn.Embedding(WORDS, WIDTH, max_norm=1.0)), 4, 5)


# --- positions --------------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Word plus position embeddings; `how` the position ids come."""

    def __init__(self, how, tokens, width=WIDTH):
        super().__init__()
        self.how = how
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Embedding(tokens, width)
        self.head = nn.Linear(width, 3)
        self.register_buffer("position_ids", torch.arange(tokens).expand(1, -1))

    def forward(self, ids):
        tokens = ids.shape[1]
        flat = torch.arange(tokens)
        where = {
            "flat": flat,
            "one row": self.position_ids[:, :tokens],
            "expanded": flat.unsqueeze(0).expand_as(ids),
            "repeated": flat.repeat(len(ids), 1),
            "all of the weight": None,
        }[self.how]
        placed = self.positions.weight[:tokens] if where is None else self.positions(where)
        return self.head(torch.tanh(self.words(ids) + placed) * placed.cos())


@TOKENS()
def positions_flat():
    """arange(T): ids without a batch, the output used twice."""
    return words(Positions("flat", 5), 4, 5)


@TOKENS()
def positions_flat_square():
    """T == B: ids of shape (B,) that are not samples."""
    return words(Positions("flat", 4), 4, 4)


@TOKENS()
def positions_one_row():
    """ids (1, T)."""
    return words(Positions("one row", 6), 4, 5)


@TOKENS()
def positions_one_row_square():
    """ids (1, T), T == B."""
    return words(Positions("one row", 4), 4, 4)


@TOKENS()
def positions_expanded():
    """ids (B, T) with a stride of 0."""
    return words(Positions("expanded", 5), 4, 5)


@TOKENS()
def positions_repeated():
    """ids (B, T) in memory."""
    return words(Positions("repeated", 4), 4, 4)


@TOKENS()
def positions_by_weight():
    """embedding.weight[:T] added."""
    return words(Positions("all of the weight", 6), 4, 5)


@TOKENS()
def positions_by_weight_square():
    """The same, T == B."""
    return words(Positions("all of the weight", 4), 4, 4)


class RawPositions(nn.Module):
    """A parameter added to tokens: (1, T, D) or (T, D), longer than the text, or (1, 1, D)."""

    def __init__(self, *shape, width=WIDTH):
        super().__init__()
        self.body, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.positions = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        p = self.positions
        p = p if p.shape[-2] in (1, x.shape[1]) else p[..., : x.shape[1], :]
        return self.head(torch.tanh(self.body(x) + p))


@TOKENS()
def raw_positions():
    """(1, T, D)."""
    return numbers(RawPositions(1, 7, WIDTH), 4, 7, 5)


@TOKENS()
def raw_positions_without_batch():
    """(T, D)."""
    return numbers(RawPositions(7, WIDTH), 4, 7, 5)


@TOKENS()
def raw_positions_sliced():
    """pos[:, :T]."""
    return numbers(RawPositions(1, 9, WIDTH), 4, 7, 5)


@TOKENS()
def raw_positions_square():
    """(T, D) with T == B."""
    return numbers(RawPositions(4, 4, width=4), 4, 4, 5)


@TOKENS()
def raw_positions_sliced_square():
    """pos[:T] with T == B."""
    return numbers(RawPositions(6, 4, width=4), 4, 4, 5)


@TOKENS()
def raw_segment():
    """(1, 1, D)."""
    return numbers(RawPositions(1, 1, WIDTH), 4, 3, 5)


class ClassToken(nn.Module):
    """ViT: patches by a convolution, a class token, positions; attention; the class token's output."""

    def __init__(self, how="expand", width=8):
        super().__init__()
        self.how, self.width = how, width
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.norm, self.qkv, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = {
            "expand": lambda: self.token.expand(len(x), -1, -1),
            "repeat": lambda: self.token.repeat(len(x), 1, 1),
            "expand_as": lambda: self.token.expand_as(x[:, :1]),
        }[self.how]()
        x = torch.cat((token, x), dim=1) + self.positions
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


def images(net, size):
    return Problem(net, (torch.randn(size, 3, 4, 4),), torch.randint(4, (size,)), cross_entropy)


@TOKENS()
def class_token():
    """token.expand(B, -1, -1), torch.cat."""
    return images(ClassToken(), 4)


@TOKENS()
def class_token_repeated():
    """token.repeat(B, 1, 1), as many tokens as samples."""
    return images(ClassToken("repeat"), 5)


@TOKENS()
def class_token_expanded_as():
    """token.expand_as(x), B == 2."""
    return images(ClassToken("expand_as"), 2)


class Perceiver(nn.Module):
    """Learned queries attend to the input."""

    def __init__(self, how, queries=3, width=8):
        super().__init__()
        self.how = how
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.kv, self.q, self.out = nn.Linear(5, 2 * width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        if self.how == "broadcast":  # projected once, for all samples
            q = self.q(self.queries).expand(len(x), -1, -1)
        elif self.how == "repeat":
            q = self.q(self.queries.unsqueeze(0).repeat(len(x), 1, 1))
        else:
            q = self.q(self.queries.unsqueeze(0).expand(len(x), -1, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v))


@TOKENS()
def learned_queries_repeated():
    """parameter.unsqueeze(0).repeat(B, 1, 1) through a Linear."""
    return numbers(Perceiver("repeat"), 4, 6, 5)


@TOKENS()
def learned_queries_expanded():
    """expand, as many queries as samples."""
    return numbers(Perceiver("expand", 4), 4, 6, 5)


@TOKENS()
def learned_queries_projected_once():
    """A Linear of a parameter, (Q, D), before it meets a sample."""
    return numbers(Perceiver("broadcast"), 4, 6, 5)


@TOKENS()
def learned_queries_projected_once_square():
    """The same with Q == B: (B, D) that are not samples."""
    return numbers(Perceiver("broadcast", 4), 4, 6, 5)


class Window(nn.Module):
    """Swin: a bias table indexed by a buffer in which entries repeat; a fused qkv; a mask."""

    def __init__(self, tokens=4, width=8, heads=2):
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.table = nn.Parameter(torch.randn(2 * tokens - 1, heads))
        place = torch.arange(tokens)
        self.register_buffer("index", place[:, None] - place + tokens - 1)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.randn(heads, 1, 1))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(self.tokens, self.tokens, -1).permute(2, 0, 1).contiguous()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale + bias.unsqueeze(0)
        scores = scores.masked_fill(torch.ones(self.tokens, self.tokens).triu(1).bool(), -1e9)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@TOKENS()
def relative_positions():
    """table[index] added to scores; a scale per head."""
    return numbers(stack(Window(5), Window(5)), 3, 5, 8)


@TOKENS()
def relative_positions_square():
    """The same with T == B == heads."""
    return numbers(Window(4, heads=4), 4, 4, 8)


class Buckets(nn.Module):
    """T5: relative positions by an embedding of (T, T) ids, shared by two blocks."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads = heads
        self.bias, self.words = nn.Embedding(3, heads), nn.Embedding(WORDS, width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, ids):
        x, place = self.words(ids), torch.arange(ids.shape[1])
        bias = self.bias((place[:, None] - place).clamp(-1, 1) + 1).permute(2, 0, 1).unsqueeze(0)
        for _ in range(2):
            q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return self.head(x)


@TOKENS()
def relative_buckets():
    """An embedding of ids (T, T), added through an attention mask."""
    return text(Buckets(), 3, 5)


@TOKENS()
def relative_buckets_square():
    """The same with T == B: ids (B, B) that have no samples."""
    return text(Buckets(4), 4, 4)


class Types(nn.Module):
    """BERT's three embeddings, LayerNorm, a mask; called with keywords."""

    def __init__(self):
        super().__init__()
        self.words, self.types, self.places = (
            nn.Embedding(WORDS, 8, padding_idx=0),
            nn.Embedding(2, 8),
            nn.Embedding(9, 8),
        )
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, token_type_ids=None, attention_mask=None, position_ids=None):
        x = self.norm(self.words(input_ids) + self.types(token_type_ids) + self.places(position_ids))
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask, need_weights=False)[0]
        return self.head(x[:, 0])


@TOKENS()
def keywords():
    """A model that is called with keywords only, one of which has no samples."""
    ids = torch.randint(1, WORDS, (4, 6))
    mask = torch.arange(6) >= torch.tensor([[6], [3], [4], [6]])
    ids[mask] = 0
    return Problem(
        Types(), (), torch.randn(4, 1), squares,
        keywords={"input_ids": ids, "token_type_ids": (torch.arange(6) > 2).long().expand(4, 6), "attention_mask": mask},
        common={"position_ids": torch.arange(6)},
    )  # fmt: skip


class Picks(nn.Module):
    """gather, index_select, scatter_add, topk along tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x.index_select(1, torch.tensor([2, 0, 0, 3]))))
        best = x.sum(-1).topk(3, dim=1).indices
        y = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        return self.c(torch.zeros_like(x).scatter_add(1, best.unsqueeze(-1).expand_as(y), y))


@TOKENS()
def picks():
    """Tokens that are chosen and put back."""
    return numbers(Picks(), 4, 5, 5)


class Packed(nn.Module):
    """Only the tokens that count go through a layer: rows that belong to samples by a mask."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x, mask):
        out = x.new_zeros(*x.shape[:2], 2)
        out[mask] = self.b(torch.tanh(self.a(x[mask])))
        return out


@TOKENS("exact or refused")
def packed_tokens():
    """x[mask]: as many rows as there are tokens that count."""
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    return Problem(Packed(), (torch.randn(3, 4, 5), mask), torch.randn(3, 1), squares)


@TOKENS("exact or refused")
def packed_tokens_as_many_as_samples():
    """The same where that number happens to be B: who takes the first dimension for the samples is wrong here."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    return Problem(Packed(), (torch.randn(4, 3, 5), mask), torch.randn(4, 1), squares)


@TOKENS("exact or refused")
def packed_tokens_a_multiple_of_samples():
    """And where it is 2 B."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]]).bool()
    return Problem(Packed(), (torch.randn(4, 3, 5), mask), torch.randn(4, 1), squares)
