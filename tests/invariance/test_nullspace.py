"""Null spaces that are known: made from integer symmetries, with columns and rows of any size, and noise."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from normkern.invariance.nullspace import is_joint, null_space, separate, simplest_basis


def matrix(symmetries, columns, draws=None, noise=0.0, seed=0):
    """Random rows that are orthogonal to the symmetries; units that differ by thousands."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.tensor(symmetries, dtype=torch.float64).reshape(-1, columns)
    draws = draws or columns - int(torch.linalg.matrix_rank(v)) + 4
    units = 10 ** (3 * torch.rand(columns, generator=generator, dtype=torch.float64))
    # <w,g> in units of its own: the symmetry holds for the numbers, so make them orthogonal to v as they are.
    m = torch.randn(draws, columns, generator=generator, dtype=torch.float64) * units
    weight = units**2
    m = m - (m @ v.T) @ torch.linalg.pinv((v * weight) @ v.T) @ (v * weight) if len(v) else m
    m = m + noise * m.abs() * torch.randn(m.shape, generator=generator, dtype=torch.float64)
    return m * 10 ** (6 * torch.rand(draws, 1, generator=generator, dtype=torch.float64) - 3)


def found(symmetries, columns, **options):
    return separate(simplest_basis(null_space(matrix(symmetries, columns, **options), 1e-8)))


def test_example_of_a_stream():
    """Streams x W1 + relu(x V) W2 before a norm: W1 with W2, and V against W2."""
    assert found([(1, 0, 1), (0, 1, -1)], 3) == ([(1, 0, 1)], [(0, 1, -1)])


@pytest.mark.parametrize(
    ("symmetries", "joint", "others"),
    [
        ([], [], []),
        ([(1, 1, 0, 0), (0, 0, 1, 1)], [(1, 1, 0, 0), (0, 0, 1, 1)], []),
        ([(1, 1, 1, 1), (0, 0, 1, 1)], [(1, 1, 0, 0), (0, 0, 1, 1)], []),
        ([(1, -1, 0, 0), (0, 1, -1, 0), (0, 0, 1, -1)], [], [(1, -1, 0, 0), (0, 1, -1, 0), (0, 0, 1, -1)]),
        ([(1, 1, -1, 0, 0, 0), (0, 0, 1, 1, -1, 0)], [], [(1, 1, -1, 0, 0, 0), (0, 0, 1, 1, -1, 0)]),
        ([(1, 2, 0, 0)], [], [(1, 2, 0, 0)]),  # of different degrees
        ([(3, 2, 0, 0)], [], [(3, 2, 0, 0)]),
        ([(1, 1, 0), (0, 1, 1)], [(0, 1, 1)], [(1, 0, -1)]),  # no tensor has two scales
        ([(1, 1, 1, 0, 0), (0, 0, 1, 1, 0)], [(0, 0, 1, 1, 0)], [(1, 1, 0, -1, 0)]),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_known(symmetries, joint, others, noise):
    assert found(symmetries, len(symmetries[0]) if symmetries else 4, noise=noise) == (joint, others)


def test_noise_of_float32():
    assert found([(1, 1, 0, 0, 0), (0, 0, 1, -1, 0)], 5, noise=1e-7) == ([(1, 1, 0, 0, 0)], [(0, 0, 1, -1, 0)])


def test_too_few_draws_leave_too_large_a_space():
    assert len(null_space(matrix([], 6, draws=3), 1e-8).rows) == 3


def test_zeros():
    space = null_space(torch.zeros(3, 2, dtype=torch.float64), 1e-8)
    assert sorted(simplest_basis(space)) == [(0, 1), (1, 0)]


sets = st.lists(st.integers(0, 3), min_size=3, max_size=14)


@settings(deadline=None, max_examples=60)
@given(sets, st.integers(0, 1000), st.data())
def test_disjoint_sets_are_found_whatever_mixes_them(labels, seed, data):
    """Tensors with label k > 0 are one set; any integer combination of the sets is given."""
    kinds = sorted(set(labels) - {0})
    vectors = [tuple(float(x == k) for x in labels) for k in kinds]
    vectors = [v for v in vectors if sum(v) > 1]
    mixed = [list(v) for v in vectors]
    for i in range(len(mixed)):
        for j in range(i):
            c = data.draw(st.integers(-2, 2))
            mixed[i] = [a + c * b for a, b in zip(mixed[i], mixed[j], strict=True)]
    joint, others = found(mixed, len(labels), seed=seed)
    assert sorted(joint) == sorted(vectors)
    assert others == []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-1, 1), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(0, 1000))
def test_any_symmetries_are_spanned(vectors, seed):
    v = torch.tensor(vectors, dtype=torch.float64)
    dimension = int(torch.linalg.matrix_rank(v))
    # A tensor that is invariant on its own is a column of rounding: it is left out before.
    assume(all(int(torch.linalg.matrix_rank(torch.cat([v, e[None]]))) > dimension for e in torch.eye(7).double()))
    joint, others = found(vectors, 7, seed=seed)
    got = torch.tensor([*joint, *others], dtype=torch.float64).reshape(-1, 7)
    assert len(got) == dimension
    assert int(torch.linalg.matrix_rank(torch.cat([v, got]))) == dimension
    assert all(map(is_joint, joint))
    assert torch.tensor(joint).reshape(-1, 7).sum(0).le(1).all()
