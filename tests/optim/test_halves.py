"""halves: a batch of 2B is two batches of B, as views, in the containers it came in."""

import enum
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normkern.optim.halves import halves

Pair = namedtuple("Pair", "x y")
Fold = enum.Enum("Fold", "TRAIN TEST")


def is_view(part, whole):
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(2,), (6,), (6, 3), (4, 0), (8, 3, 5, 5)])
def test_tensor_halves_are_views(shape):
    x = torch.randn(shape)
    first, second = halves(x)
    assert first.shape == second.shape == (shape[0] // 2, *shape[1:])
    assert torch.equal(torch.cat([first, second]), x)
    assert is_view(first, x)
    assert is_view(second, x)
    second.fill_(7)
    assert x[shape[0] // 2 :].eq(7).all()


def test_layout_and_gradient_pass_through():
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    first, second = halves(x)
    assert first.is_contiguous(memory_format=torch.channels_last)
    (first.sum() + 2 * second.sum()).backward()
    assert torch.equal(x.grad[:, 0, 0, 0], torch.tensor([1.0, 1, 2, 2]))


def test_containers_keep_their_types():
    x, y = torch.arange(4), torch.arange(8).reshape(4, 2)
    for batch in ((x, y), [x, y], Pair(x, y), ((x,), [y]), {"x": x, "y": {"z": y}}):
        first, second = halves(batch)
        assert type(first) is type(second) is type(batch)
        assert repr(first) == repr(batch).replace(repr(x), repr(x[:2])).replace(repr(y), repr(y[:2]))
    assert halves(Pair(x, y))[1].y.equal(y[2:])


def test_mappings_keep_their_types_and_what_they_hold():
    x = torch.arange(4)
    counted = defaultdict(list, x=x)
    first, second = halves(counted)
    assert first.default_factory is list
    assert first["x"].equal(x[:2])
    assert second["x"].equal(x[2:])
    assert counted["x"] is x
    for kind in (OrderedDict, UserDict, MappingProxyType):
        first, second = halves(kind({"x": x}))
        assert type(first) is kind
        assert second["x"].equal(x[2:])


def test_what_belongs_to_the_whole_batch_goes_to_both():
    common = {"name": "abcd", "n": 4, "r": 0.5, "none": None, "flag": True, "raw": b"abcd", "fold": Fold.TEST,
              "scale": torch.tensor(2.0), "scalar": np.float32(1)}  # fmt: skip
    for half in halves({"x": torch.zeros(4), **common}):
        assert {k: v for k, v in half.items() if k != "x"} == common
        assert half["scale"] is common["scale"]


@pytest.mark.parametrize(
    "names", [list("abcd"), tuple("abcd"), range(4), [1, 2, 3, 4], [None] * 4, [["a"], [], "b", 1]]
)
def test_one_entry_per_sample_is_cut(names):
    first, second = halves((torch.zeros(4), names))
    assert first[1] == names[:2]
    assert second[1] == names[2:]
    assert type(first[1]) is type(names)


def test_sequences_of_another_length_are_containers():
    first, second = halves([torch.zeros(4), ["a", "b"], [list("abcd"), "z"], []])
    assert first[1:] == [["a", "b"], [["a", "b"], "z"], []]
    assert second[1:] == [["a", "b"], [["c", "d"], "z"], []]


def test_a_pair_beside_a_batch_of_two_is_one_entry_per_sample_unless_a_dict_says_otherwise():
    first, _ = halves((torch.zeros(2), (10, 20), {"a": 10, "b": 20}, Pair(10, 20)))
    assert first[1:] == ((10,), {"a": 10, "b": 20}, Pair(10, 20))


def test_a_container_of_tensors_is_no_list_of_samples():
    x, y = torch.arange(2), torch.arange(2)
    (first, _), (second, _) = halves([x, y])
    assert (first.item(), second.item()) == (0, 1)
    first, _ = halves([x, [torch.tensor(1.0), torch.tensor(2.0)]])  # tensors without dimensions are tensors
    assert len(first[1]) == 2


def test_arrays_are_cut_as_views():
    a = np.arange(8).reshape(4, 2)
    first, second = halves((torch.zeros(4), a))
    assert np.shares_memory(second[1], a)
    np.testing.assert_array_equal(np.concatenate([first[1], second[1]]), a)


def test_what_default_collate_makes():
    samples = [
        {"image": torch.full((3,), float(i)), "label": i, "name": f"n{i}", "box": (i, i + 0.5)} for i in range(6)
    ]
    batch = torch.utils.data.default_collate(samples)
    first, second = halves(batch)
    alone = [torch.utils.data.default_collate(part) for part in (samples[:3], samples[3:])]
    assert repr([first, second]) == repr(alone)


TENSORS = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@settings(deadline=None)
@given(st.integers(1, 4), st.recursive(TENSORS, lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=2), inner, min_size=1, max_size=3), max_leaves=6))  # fmt: skip
def test_halves_put_together_are_the_batch(b, tree):
    def build(node):
        if isinstance(node, tuple):
            return torch.randn(2 * b, *node)
        return [build(n) for n in node] if isinstance(node, list) else {k: build(n) for k, n in node.items()}

    def check(whole, first, second):
        if isinstance(whole, torch.Tensor):
            assert torch.equal(torch.cat([first, second]), whole)
            assert first.shape == second.shape
            return
        assert len(whole) == len(first) == len(second)
        for key in whole if isinstance(whole, dict) else range(len(whole)):
            check(whole[key], first[key], second[key])

    batch = build(tree)
    check(batch, *halves(batch))


def test_batch_norm_sees_two_batches_of_b():
    x = torch.randn(8, 3)
    model, twin = (nn.BatchNorm1d(3) for _ in range(2))
    outputs = [model(half) for half in halves(x)]
    for half, out in zip(x.split(4), outputs, strict=True):
        torch.testing.assert_close(out, nn.functional.batch_norm(half, None, None, model.weight, model.bias, True))
        twin(half.clone())
    assert model.num_batches_tracked == 2
    assert torch.equal(model.running_mean, twin.running_mean)
    assert torch.equal(model.running_var, twin.running_var)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (torch.zeros(7, 2), "batch expected an even number of samples > 0, got 7"),
        (torch.zeros(0, 2), "batch expected an even number of samples > 0, got 0"),
        ({"x": [torch.zeros(3)]}, "batch['x'][0] expected an even number of samples > 0, got 3"),
        ((torch.zeros(4), {"w": torch.zeros(6, 2)}), "batch[1]['w'] has shape (6, 2) but batch[0] has 4 samples"),
        (Pair(torch.zeros(4), torch.zeros(5)), "batch.y has shape (5,) but batch.x has 4 samples"),
        ((torch.zeros(4), np.zeros(2)), "batch[1] has shape (2,) but batch[0] has 4 samples"),
        (["a", "b"], "batch expected a tensor with a first dimension in it, got list"),
        (None, "batch expected a tensor with a first dimension in it, got NoneType"),
        (torch.tensor(1.0), "batch expected a tensor with a first dimension in it, got Tensor"),
        ([torch.zeros(4), SimpleNamespace(x=torch.zeros(4))], "batch[1] expected tensors, containers, text or numbers, got SimpleNamespace"),
        ([torch.zeros(4), {1, 2}], "batch[1] expected tensors, containers, text or numbers, got set"),
        ([torch.zeros(4), range(3)], "batch[1] expected tensors, containers, text or numbers, got range"),
        (nn.utils.rnn.pack_sequence([torch.zeros(4)]), "batch expected samples in the first dimension, got a PackedSequence"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_refusals(batch, sentence):
    with pytest.raises(ValueError) as caught:
        halves(batch)
    assert str(caught.value) == f"halves: {sentence}"
