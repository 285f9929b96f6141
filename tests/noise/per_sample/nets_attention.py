"""Attention and transformers."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, Problem, cross_entropy, numbers, squares, text

ATTENTION = Cases()
WORDS = 7


class Attended(nn.Module):
    """nn.MultiheadAttention with everything between it and the loss."""

    def __init__(self, width=8, heads=2, need_weights=False, time_major=False, mask=None, **options):
        super().__init__()
        self.time_major, self.need_weights, self.mask = time_major, need_weights, mask
        self.attention = nn.MultiheadAttention(width, heads, batch_first=not time_major, **options)
        self.head = nn.Linear(width, 3)

    def forward(self, q, k=None, v=None):
        k = q if k is None else k
        v = k if v is None else v
        if self.time_major:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = None if self.mask is None else torch.ones(len(q[0]), len(k[0])).triu(1).bool()
        y, weights = self.attention(q, k, v, need_weights=self.need_weights, attn_mask=mask)
        y = y.transpose(0, 1) if self.time_major else y
        return self.head(y) if weights is None else self.head(y) + weights.square().sum((-1, -2)).view(-1, 1, 1)


@ATTENTION()
def attention():
    """Self-attention, batch first."""
    return numbers(Attended(), 4, 5, 8)


@ATTENTION()
def attention_with_weights():
    """need_weights=True: another path through torch; the weights are in the loss."""
    return numbers(Attended(need_weights=True), 4, 5, 8)


@ATTENTION()
def attention_square():
    """B = T = width = heads."""
    return numbers(Attended(4, 4, mask="causal"), 4, 4, 4)


@ATTENTION()
def attention_time_major():
    """batch_first=False: (T, B, D) inside."""
    return numbers(Attended(time_major=True), 4, 5, 8)


@ATTENTION()
def attention_time_major_square():
    """The same with T == B: who takes the first dimension for the samples is wrong here."""
    return numbers(Attended(4, 2, time_major=True), 4, 4, 4)


@ATTENTION("exact or refused")
def attention_time_major_inputs():
    """The model itself takes (T, B, D)."""
    x = torch.randn(5, 4, 8)
    return Problem(
        nn.MultiheadAttention(8, 2), (x, x, x), torch.randn(4, 1), squares_time_major, batch_dim=1, batch_size=4
    )


def squares_time_major(out, target):
    return squares(out[0].transpose(0, 1), target)


def three(net, *widths, tokens=5, keys=6):
    """Queries, keys and values of their own."""
    q, k, v = (torch.randn(4, n, d) for n, d in zip((tokens, keys, keys), widths, strict=True))
    return Problem(net, (q, k, v), torch.randn(4, 1), squares)


@ATTENTION()
def attention_cross():
    """Three tensors of the same width."""
    return three(Attended(), 8, 8, 8)


@ATTENTION()
def attention_cross_of_two():
    """Keys and values are one tensor."""
    problem = three(Attended(), 8, 8, 8)
    return Problem(problem.model, problem.inputs[:2], problem.target, squares)


@ATTENTION()
def attention_of_other_widths():
    """kdim and vdim: separate weights; without bias."""
    return three(Attended(kdim=5, vdim=3, bias=False, need_weights=True), 8, 5, 3)


@ATTENTION("exact or refused")
def attention_with_learned_keys():
    """add_bias_kv, add_zero_attn."""
    return numbers(Attended(add_bias_kv=True, add_zero_attn=True), 4, 5, 8)


class Block(nn.Module):
    """GPT: pre-norm attention by one projection, MLP; rotary positions if asked."""

    def __init__(self, width=8, heads=2, rotary=False):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (y.view(batch, tokens, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(batch, tokens, width))
        return x + self.out(F.gelu(self.fc(self.norm2(x))))


def rotate(x):
    angle = torch.outer(
        torch.arange(x.shape[-2], dtype=x.dtype), 10.0 ** -torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    )
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Gpt(nn.Module):
    """`tie`: "", "module" (head.weight is the embedding's) or "functional" (F.linear, a product)."""

    def __init__(self, tie="", width=8, heads=2, tokens=6, words=WORDS, rotary=False):
        super().__init__()
        self.tie, self.rotary = tie, rotary
        self.wte = nn.Embedding(words, width)
        self.wpe = None if rotary else nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads, rotary) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        if tie in ("", "module"):
            self.head = nn.Linear(width, words, bias=False)
        if tie == "module":
            self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        if not self.rotary:
            x = x + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.tie == "functional":
            return F.linear(x, self.wte.weight)
        return x @ self.wte.weight.t() if self.tie == "product" else self.head(x)


@ATTENTION()
def gpt():
    """Blocks, positions, no ties."""
    return text(Gpt(), 4, 6)


@ATTENTION()
def gpt_tied_by_module():
    """head.weight = wte.weight."""
    return text(Gpt("module"), 4, 6)


@ATTENTION()
def gpt_tied_by_function():
    """F.linear(x, wte.weight), rotary positions."""
    return text(Gpt("functional", rotary=True), 4, 6)


@ATTENTION()
def gpt_tied_by_product():
    """x @ wte.weight.t()."""
    return text(Gpt("product"), 4, 6)


@ATTENTION()
def gpt_square():
    """B = T = width = heads = words, tied."""
    return text(Gpt("module", 4, 2, 4, 4), 4, 4, count=4)


class Encoder(nn.Module):
    def __init__(self, layer, *, time_major=False):
        super().__init__()
        self.layer, self.time_major, self.head = layer, time_major, nn.Linear(8, 3)

    def forward(self, x, **masks):
        x = x.transpose(0, 1) if self.time_major else x
        x = self.layer(x, **masks)
        return self.head(x.transpose(0, 1) if self.time_major else x)


@ATTENTION()
def encoder_layer():
    """nn.TransformerEncoderLayer in training, dropout 0."""
    return numbers(Encoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)), 4, 5, 8)


@ATTENTION()
def encoder_layer_norm_first():
    """norm_first, gelu, without bias."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    return numbers(Encoder(layer), 4, 5, 8)


@ATTENTION()
def encoder_layer_time_major():
    """batch_first=False: every layer inside sees (T, B, D)."""
    return numbers(Encoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0), time_major=True), 4, 5, 8)


@ATTENTION()
def encoder_layer_time_major_square():
    """The same with T == B."""
    return numbers(Encoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0), time_major=True), 4, 4, 8)


@ATTENTION()
def encoder_with_padding():
    """nn.TransformerEncoder of two layers and a key padding mask."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    mask = torch.arange(5) >= torch.tensor([[5], [2], [4], [3]])
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    return numbers(Encoder(encoder), 4, 5, 8, keywords={"src_key_padding_mask": mask})


class Translator(nn.Module):
    """A decoder layer that attends to an encoder layer; a causal mask."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, 8), nn.Embedding(WORDS, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        memory = self.encoder(self.source(source))
        return self.head(self.decoder(self.target(target), memory, tgt_mask=mask, tgt_is_causal=True))


@ATTENTION()
def encoder_and_decoder():
    """Two inputs of ids."""
    source, target = torch.randint(WORDS, (4, 6)), torch.randint(WORDS, (4, 5))
    return Problem(Translator(), (source, target), target.roll(-1, 1), cross_entropy)
