"""norm_sums: what each sample adds to a normalisation layer's gradients, against its float64 reference and autograd."""

import functools

import pytest
import torch
from support.memory import Fenced, here, same_bits, same_sums
from torch import nn

from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
# Eight rows at a time and 128 to a group, 1024 columns to a tile; 1024 numbers to a sum along a row.
SHAPES = [
    (1, 1, 1), (2, 7, 3), (3, 8, 16), (2, 9, 17), (1, 128, 31), (2, 129, 33), (2, 300, 5), (1, 3, 1024), (2, 5, 1025),
    (1, 17, 2100), (5, 40, 64), (40, 2, 3), (0, 3, 4), (2, 0, 4), (2, 3, 0),
]  # fmt: skip


def inputs(shape, dtype, offset=0):
    """g, x, mean, rstd, each in a fence; x far from 0, as before a normalisation."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    make = torch.Generator().manual_seed(sum(shape))
    g = torch.randn(shape, generator=make, dtype=torch.float64, device="cpu")
    x = 3 + 2 * torch.randn(shape, generator=make, dtype=torch.float64, device="cpu")
    mean = 3 + torch.randn(shape[:2], generator=make, dtype=torch.float64, device="cpu")
    rstd = 0.2 + torch.rand(shape[:2], generator=make, dtype=torch.float64, device="cpu")
    return [Fenced(here(t.to(d)), offset) for t, d in ((g, dtype), (x, dtype), (mean, real), (rstd, real))]


def assert_near(got, g, x, mean, rstd, channels):
    """25 roundings, each of a term or of part of a sum; no more, however long the sum."""
    exact = reference.norm_sums(
        g.double(), x.double(), None if mean is None else mean.double(), rstd.double(), channels=channels
    )
    distance = x.double().abs() + (0 if mean is None else mean.double().abs().unsqueeze(2))
    size = reference.norm_sums(g.double().abs(), distance, None, rstd.double(), channels=channels)
    eps = torch.finfo(got[0].dtype).eps
    for a, b, s in zip(got, exact, size, strict=True):
        assert a.dtype == (torch.float64 if g.dtype == torch.float64 else torch.float32)
        assert a.shape == b.shape
        assert ((a.double() - b).abs() <= 12 * eps * s).all()


@pytest.mark.pairwise
@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel(backend, dtype, channels):
    for i, shape in enumerate(SHAPES):
        fenced = inputs(shape, dtype, offset=i % 4)
        g, x, mean, rstd = (f.tensor for f in fenced)
        before = [t.clone() for t in (g, x, mean, rstd)]
        assert_near(ops.norm_sums(g, x, mean, rstd, channels=channels), g, x, mean, rstd, channels)
        assert_near(ops.norm_sums(g, x, None, rstd, channels=channels), g, x, None, rstd, channels)
        assert all(map(same_bits, before, (g, x, mean, rstd)))


@pytest.mark.pairwise
@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_stay_inside(backend, dtype, channels, monkeypatch):
    for shape in ((2, 3, 1), (3, 9, 17), (2, 5, 1030)):
        g, x, mean, rstd = (f.tensor for f in inputs(shape, dtype))
        made = []

        def fenced(self, shape, dtype, made=made):
            made.append(Fenced(torch.zeros(shape, dtype=dtype), 1))
            return made[-1].tensor

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", fenced)
            ops.norm_sums(g, x, mean, rstd, channels=channels)
        assert len(made) == 2
        assert all(f.is_intact() for f in made)


@pytest.mark.parametrize("channels", ["last", "first"])
def test_long_sums_keep_their_digits(backend, channels):
    """Sums of 100 000 terms whose sign does not change: a single float sum would lose three digits."""
    shape = (2, 100_000, 3) if channels == "last" else (2, 3, 100_000)
    g, x = 1 + torch.rand(shape), torch.rand(shape)
    mean, rstd = -torch.ones(shape[:2]), torch.rand(shape[:2])
    got = ops.norm_sums(g, x, mean, rstd, channels=channels)
    exact = reference.norm_sums(g.double(), x.double(), mean.double(), rstd.double(), channels=channels)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-7, atol=0)


@pytest.mark.parametrize("channels", ["last", "first"])
def test_layouts(backend, channels):
    """Slices, expanded gradients, and channels that lie elsewhere than they are."""
    g, x, mean, rstd = (f.tensor for f in inputs((4, 9, 40), torch.float32))
    expected = ops.norm_sums(g, x, mean, rstd, channels=channels)
    same = functools.partial(same_sums, backend) if channels == "first" else same_bits
    wide = [torch.nn.functional.pad(t, (2, 3), value=torch.nan)[..., 2:-3] for t in (g, x)]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (g, x)]
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (g, x, mean, rstd)]
    for a, b, m, r in ((*wide, mean, rstd), (*turned, mean, rstd), swapped, (wide[0], turned[1], mean, swapped[3])):
        assert all(map(same, ops.norm_sums(a, b, m, r, channels=channels), expected))
    one = torch.ones(()).expand(4, 9, 40)
    assert all(
        map(
            same,
            ops.norm_sums(one, x, mean, rstd, channels=channels),
            ops.norm_sums(one.contiguous(), x, mean, rstd, channels=channels),
        )
    )
    watched = g.clone().requires_grad_()
    assert not ops.norm_sums(watched, x, mean, rstd, channels=channels)[0].requires_grad


@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_everywhere(dtype, channels):
    """Whatever the number of threads, and on every level with FMA hardware."""
    chosen, results = ops.isa(), []
    batches = [[f.tensor for f in inputs(shape, dtype)] for shape in ((3, 300, 1500), (64, 40, 33), (2, 7, 20_000))]
    try:
        for name in WITH_FMA or [chosen]:
            ops.select_isa(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append([t for batch in batches for t in ops.norm_sums(*batch, channels=channels)])
    finally:
        ops.select_isa(chosen)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


def test_a_sample_does_not_know_its_neighbours(backend):
    for channels in ("last", "first"):
        g, x, mean, rstd = (f.tensor for f in inputs((6, 50, 70), torch.float32))
        whole = ops.norm_sums(g, x, mean, rstd, channels=channels)
        for b in range(6):
            alone = ops.norm_sums(g[b : b + 1], x[b : b + 1], mean[b : b + 1], rstd[b : b + 1], channels=channels)
            assert all(same_bits(w[b : b + 1], a) for w, a in zip(whole, alone, strict=True))


def test_agrees_with_autograd(backend):
    """The sum over samples is what torch gives for LayerNorm, RMSNorm and GroupNorm."""
    x = torch.randn(5, 12, 16, dtype=torch.float64, requires_grad=True)
    up = torch.randn(5, 12, 16, dtype=torch.float64)
    layer = nn.LayerNorm(16).double()
    layer(x).backward(up)
    mean, var = x.mean(2), x.var(2, unbiased=False)
    weight, bias = ops.norm_sums(up, x, mean.detach(), (var + layer.eps).rsqrt().detach(), channels="last")
    torch.testing.assert_close(weight.sum(0), layer.weight.grad)
    torch.testing.assert_close(bias.sum(0), layer.bias.grad)

    rms = nn.RMSNorm(16, eps=1e-6).double()
    rms(x).backward(up)
    weight, _ = ops.norm_sums(up, x, None, (x.square().mean(2) + 1e-6).rsqrt().detach(), channels="last")
    torch.testing.assert_close(weight.sum(0), rms.weight.grad)

    group = nn.GroupNorm(3, 12).double()
    group(x).backward(up)
    grouped = x.detach().view(5, 3, -1)
    mean, var = grouped.mean(2), grouped.var(2, unbiased=False)
    each = [t.repeat_interleave(4, dim=1) for t in (mean, (var + group.eps).rsqrt())]
    weight, bias = ops.norm_sums(up, x, *each, channels="first")
    torch.testing.assert_close(weight.sum(0), group.weight.grad)
    torch.testing.assert_close(bias.sum(0), group.bias.grad)


def test_nan_stays_in_its_sample(backend):
    g, x, mean, rstd = (f.tensor for f in inputs((3, 4, 20), torch.float32))
    x[1, 2, 5] = torch.nan
    weight, bias = ops.norm_sums(g, x, mean, rstd, channels="last")
    assert weight.isnan().nonzero().tolist() == [[1, 5]]
    assert not bias.isnan().any()
    weight, _ = ops.norm_sums(g, x, mean, rstd, channels="first")
    assert weight.isnan().nonzero().tolist() == [[1, 2]]


ONE, TWO = torch.ones(2, 3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((ONE, ONE, TWO, TWO, "middle"), ValueError, "norm_sums: channels expected \"last\" or \"first\", got 'middle'"),
        ((3, ONE, TWO, TWO, "last"), TypeError, "norm_sums: g is int; expected a torch.Tensor of float64"),
        ((ONE, ONE.long(), TWO, TWO, "last"), TypeError, "norm_sums: x is torch.int64 on cpu; expected a torch.Tensor of"),
        ((ONE, ONE, TWO, None, "last"), TypeError, "norm_sums: rstd is NoneType; expected a torch.Tensor of"),
        (
            (ONE, ONE.double(), TWO, TWO, "last"), TypeError,
            "norm_sums: x is torch.float64 on cpu but g is torch.float32 on cpu; expected torch.float32",
        ),
        (
            (ONE.half(), ONE.half(), TWO.half(), TWO, "last"), TypeError,
            "norm_sums: mean is torch.float16 on cpu but g is torch.float16 on cpu; expected torch.float32",
        ),
        ((ONE[0], ONE[0], TWO, TWO, "last"), ValueError, "norm_sums: g has shape (3, 4); expected three dimensions"),
        ((ONE, ONE[:, :2], TWO, TWO, "last"), ValueError,
         "norm_sums: x has shape (2, 2, 4) but g (2, 3, 4); expected (2, 3, 4)"),
        ((ONE, ONE, TWO, TWO[:, :2], "first"), ValueError,
         "norm_sums: rstd has shape (2, 2) but g (2, 3, 4); expected (2, 3)"),
    ],
)  # fmt: skip
def test_refusals(arguments, error, sentence):
    with pytest.raises(error) as raised:
        ops.norm_sums(*arguments[:4], channels=arguments[4])
    assert str(raised.value).startswith(sentence)
