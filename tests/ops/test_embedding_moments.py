"""embedding_moments: the gradients of a table, sample by sample, against the float64 reference and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import Fenced, here, same_bits
from torch import nn

from normkern import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITH_FMA = [name for name in ops.supported_isas() if name not in ("v2", "portable")]
# (B, T, D, V): eight columns at a time, 256 to a stretch; one id, all ids, most ids missing; few and many samples.
SIZES = [
    (1, 1, 1, 1), (2, 3, 7, 1), (3, 5, 8, 4), (2, 9, 9, 50), (5, 1, 17, 3), (4, 30, 255, 6), (3, 8, 256, 9),
    (3, 7, 257, 11), (40, 2, 33, 5), (2, 200, 3, 3), (6, 12, 600, 1000), (0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5),
]  # fmt: skip


def batch(b, t, d, v, dtype=torch.float32, offset=0):
    make = torch.Generator().manual_seed(b + t + d + v)
    ids = torch.randint(v, (b, t), generator=make, device="cpu")
    g = (0.5 + torch.randn((b, t, d), generator=make, dtype=torch.float64, device="cpu")).to(dtype)
    return here(ids), Fenced(here(g), offset).tensor


def assert_near(got, exact, g):
    eps = torch.finfo(got[0].dtype).eps
    near = {"rtol": 2 * eps if got[0].dtype == torch.float32 else 1e-12, "atol": 1e-13}
    for a, b in zip(got[:2], exact[:2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == (torch.float64 if g.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(a.double(), b, **near)
    assert got[2].dtype == torch.float64
    torch.testing.assert_close(got[2], exact[2], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel(backend, dtype):
    for i, (b, t, d, v) in enumerate(SIZES):
        ids, g = batch(b, t, d, v, dtype, offset=i % 4)
        for padding in (None, 0, -1):
            exact = reference.embedding_moments(ids, g.double(), v, padding_idx=padding, squares=True)
            before = g.clone()
            assert_near(ops.embedding_moments(ids, g, v, padding_idx=padding, squares=True), exact, g)
            plain = ops.embedding_moments(ids.int(), g, v, padding_idx=padding, squares=False)
            assert_near(plain, (exact[0], None, exact[2]), g)
            assert same_bits(g, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_stay_inside(backend, dtype, monkeypatch):
    made = []

    def fenced(self, shape, dtype):
        made.append(Fenced(torch.zeros(shape, dtype=dtype), 1))
        return made[-1].tensor

    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch.Tensor, f"new_{name}", fenced)
        monkeypatch.setattr(torch, f"{name}_like", lambda x: fenced(x, x.shape, x.dtype))
    for d in (1, 7, 16, 257):
        ops.embedding_moments(*batch(3, 5, d, 4, dtype), 4, squares=True)
    assert len(made) == 12
    assert all(f.is_intact() for f in made)


def test_definition(backend):
    """From the samples' tables, side by side."""
    ids, g = batch(7, 11, 5, 13, torch.float64)
    tables = torch.stack([torch.zeros(13, 5).double().index_add_(0, i, x) for i, x in zip(ids, g, strict=True)])
    total, centred, norms = ops.embedding_moments(ids, g, 13, squares=True)
    torch.testing.assert_close(total, tables.sum(0))
    torch.testing.assert_close(centred, tables.var(0) * 6)
    torch.testing.assert_close(norms, tables.square().sum((1, 2)))


def test_agrees_with_autograd(backend):
    layer = nn.Embedding(10, 6, padding_idx=-3)
    ids, g = torch.randint(10, (4, 9)), torch.randn(4, 9, 6)
    layer(ids).backward(g)
    total, _, _ = ops.embedding_moments(ids, g, 10, padding_idx=layer.padding_idx, squares=False)
    torch.testing.assert_close(total, layer.weight.grad)
    assert not total[7].any()


def test_tiny_spread_around_a_large_gradient(backend):
    """Every sample has the id, with nearly the same gradient: the spread is not lost in the sum."""
    g = (1000 + 0.01 * torch.randn(50, 1, 40, dtype=torch.float64)).float()
    _, centred, _ = ops.embedding_moments(torch.zeros(50, 1, dtype=torch.int64), g, 2, squares=True)
    torch.testing.assert_close(centred[0].double(), g[:, 0].double().var(0) * 49, rtol=1e-6, atol=0)
    assert not centred[1].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_ids(data):
    b, t, v = (data.draw(st.integers(1, 6)) for _ in range(3))
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, v - 1), min_size=t, max_size=t), min_size=b, max_size=b))
    )
    padding = data.draw(st.one_of(st.none(), st.integers(-v, v - 1)))
    g = torch.randn(b, t, 3, dtype=torch.float64)
    got = ops.embedding_moments(ids, g, v, padding_idx=padding, squares=True)
    exact = reference.embedding_moments(ids, g, v, padding_idx=padding, squares=True)
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_everywhere(dtype):
    """Whatever the number of threads, and on every level with FMA hardware."""
    chosen, results = ops.isa(), []
    batches = [batch(9, 100, 70, 30, dtype), batch(4, 300, 600, 2, dtype), batch(5, 60, 300, 5000, dtype)]
    try:
        for name in WITH_FMA or [chosen]:
            ops.select_isa(name)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(
                    [t for (ids, g), v in zip(batches, (30, 2, 5000), strict=True)
                     for t in ops.embedding_moments(ids, g, v, squares=True)]
                )  # fmt: skip
    finally:
        ops.select_isa(chosen)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


def test_layouts(backend):
    ids, g = batch(4, 9, 40, 6)
    expected = ops.embedding_moments(ids, g, 6, squares=True)
    others = [
        (ids.t().contiguous().t(), g.transpose(0, 1).contiguous().transpose(0, 1)),
        (torch.stack([ids, ids * 0 - 7], -1)[..., 0], torch.nn.functional.pad(g, (2, 3), value=torch.nan)[..., 2:-3]),
        (ids, g.transpose(1, 2).contiguous().transpose(1, 2)),
        (ids, g.clone().requires_grad_()),
    ]
    for i, x in others:
        assert all(map(same_bits, ops.embedding_moments(i, x, 6, squares=True), expected))
    one = ops.embedding_moments(ids, torch.ones(()).expand(4, 9, 40), 6, squares=True)
    assert all(map(same_bits, one, ops.embedding_moments(ids, torch.ones(4, 9, 40), 6, squares=True)))


def test_nan_stays_in_its_row(backend):
    ids, g = torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2, 3)
    g[0, 1, 2] = torch.nan
    total, centred, norms = ops.embedding_moments(ids, g, 4, squares=True)
    assert total.isnan().nonzero().tolist() == [[1, 2]]
    assert centred.isnan().nonzero().tolist() == [[1, 2]]
    assert norms.isnan().tolist() == [True, False]


IDS, G = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("ids", "g", "rows", "padding", "error", "sentence"),
    [
        (IDS, G, 0, None, ValueError, "embedding_moments: num_embeddings expected a whole number from 1, got 0"),
        (IDS, G, 2.0, None, ValueError, "embedding_moments: num_embeddings expected a whole number from 1, got 2.0"),
        (IDS, G.long(), 2, None, TypeError, "embedding_moments: g is torch.int64 on cpu; expected a torch.Tensor of"),
        (IDS.float(), G, 2, None, TypeError,
         "embedding_moments: ids is torch.float32 on cpu; expected a torch.Tensor of int64 or int32 on cpu"),
        ([[0]], G, 2, None, TypeError, "embedding_moments: ids is list; expected"),
        (IDS[0], G, 2, None, ValueError, "embedding_moments: ids has shape (3,) and g (2, 3, 4); expected (B, T) and"),
        (IDS, G[:, :2], 2, None, ValueError, "embedding_moments: ids has shape (2, 3) and g (2, 2, 4); expected (B, T)"),
        (IDS, G, 2, 2, ValueError, "embedding_moments: padding_idx expected None or -2 to 1, got 2"),
        (IDS, G, 2, -3, ValueError, "embedding_moments: padding_idx expected None or -2 to 1, got -3"),
        (torch.tensor([[0, 1, 1], [0, 2, 9]]), G, 2, None, ValueError,
         "embedding_moments: ids[1, 1] is 2; expected 0 to 1, for num_embeddings is 2"),
        (torch.tensor([[0, 1, -1], [0, 1, 1]]), G, 2, None, ValueError,
         "embedding_moments: ids[0, 2] is -1; expected 0 to 1, for num_embeddings is 2"),
    ],
)  # fmt: skip
def test_refusals(ids, g, rows, padding, error, sentence):
    with pytest.raises(error) as raised:
        ops.embedding_moments(ids, g, rows, padding_idx=padding, squares=True)
    assert str(raised.value).startswith(sentence)
