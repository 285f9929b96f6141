"""GradientNoiseResult: numbers for a logger, joined micro-batches, copies."""

import copy
import io
import itertools
import json
import math
import pickle

import pytest
import torch
from torch import nn

import normkern
from normkern import GradientNoise, GradientNoiseResult

from .budgets import SCALARS
from .measuring import problem_of

F64 = torch.float64


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def pairs(count=13):
    return torch.randn(count, 4, dtype=F64), torch.randint(3, (count,))


def measured(model=None, batch=None, **options):
    return GradientNoise.measure(model or net(), loss, batch or pairs(), **options)


# ---- scalars


def test_scalars_are_flat_finite_and_json():
    result = measured()
    every = result.scalars(normkern.noise.per_sample.result.QUANTITIES, prefix="")
    assert json.loads(json.dumps(every, allow_nan=False)) == every
    assert all(type(key) is str and type(value) is float for key, value in every.items())
    for q in SCALARS:
        if f"{q}/all" in every:
            assert every[f"{q}/all"] == getattr(result, q).item()
        for name, of in result.per_param.items():
            if f"{q}/{name}" in every:
                assert every[f"{q}/{name}"] == getattr(of, q).item()
    assert every["batch_size"] == 13
    assert set(result.scalars("nsr", prefix="a/")) == {"a/batch_size", "a/nsr/all"} | {
        f"a/nsr/{name}" for name in result.per_param
    }
    assert result.scalars([]) == {"noise/batch_size": 13.0}


def test_what_is_not_known_is_absent():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    model.add_module("unused", nn.Linear(2, 2))

    def alternating(model, x):  # contributions that cancel: no signal, only noise
        return (model[1](model[0](x)).flatten() * torch.tensor([1.0, -1.0], dtype=F64)).sum()

    result = GradientNoise.measure(model, alternating, torch.ones(2, 2, dtype=F64), batch_size=2)
    found = result.scalars(["gns", "nsr", "trace_sigma", "grad_sq_norm_unbiased"])
    assert found["noise/trace_sigma/0.weight"] > 0
    assert found["noise/grad_sq_norm_unbiased/0.weight"] < 0  # an unbiased estimate, for averages over steps
    assert "noise/gns/0.weight" not in found
    assert "noise/gns/all" not in found
    assert "noise/nsr/unused.weight" not in found  # 0 / 0
    assert found["noise/trace_sigma/unused.weight"] == 0
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("quantities", ["noise", ["gns", "cosine"], [3]])
def test_unknown_quantities_are_refused(quantities):
    with pytest.raises(
        ValueError, match=r"^GradientNoiseResult.scalars: quantities expected some of trace_sigma, .*got"
    ):
        measured().scalars(quantities)


# ---- joined


def assert_joined(ours, theirs):
    assert ours.batch_size == theirs.batch_size
    for q in SCALARS:
        torch.testing.assert_close(getattr(ours, q), getattr(theirs, q), rtol=1e-12, atol=0)
    assert list(ours.per_param) == list(theirs.per_param)
    for name, of in theirs.per_param.items():
        for q in SCALARS:
            torch.testing.assert_close(getattr(ours.per_param[name], q), getattr(of, q), rtol=1e-11, atol=1e-16)
        torch.testing.assert_close(ours.mean[name], theirs.mean[name], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(ours.variance[name], theirs.variance[name], rtol=1e-11, atol=1e-16)
    torch.testing.assert_close(ours.sq_norms, theirs.sq_norms, rtol=1e-12, atol=0)
    assert str(ours.coverage) == str(theirs.coverage)


TIERS = ("nsr", "norms", "variance")


@pytest.mark.parametrize("sizes", [(13,), (6, 7), (2, 2, 9), (3, 2, 5, 3)])
def test_joined_results_are_those_of_the_concatenated_batch(sizes):
    model, (x, y) = net(), pairs()
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    results = [measured(model, part, stats=TIERS) for part in parts]
    whole = measured(model, (x, y), stats=TIERS)
    assert_joined(GradientNoiseResult.join(results), whole)
    one_by_one = results[0]
    for result in results[1:]:
        one_by_one = GradientNoiseResult.join([one_by_one, result])
    assert_joined(one_by_one, whole)


@pytest.mark.parametrize("name", ["gpt_tied_by_module", "resnet"])
def test_joined_results_of_real_nets(name):
    problem = problem_of(name)
    half = problem.samples // 2
    parts = [problem.sample(0, half), problem.sample(half, problem.samples)]

    def of(p):
        return GradientNoise.measure(
            p.model, lambda model, batch: p.loss(model(*batch), p.target), p.inputs, stats=TIERS,
            batch_size=p.batch_size,
        )  # fmt: skip

    assert_joined(GradientNoiseResult.join([of(p) for p in parts]), of(problem))


def test_joined_contexts_are_those_of_the_concatenated_batch():
    model, (x, y) = net(), pairs()
    sizes = (6, 2, 5)
    noise = GradientNoise(model, TIERS)
    for _ in range(2):
        model.zero_grad()
        for i, part in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            noise.open(join=i > 0)
            (loss(model, part) * (sizes[i] / 13)).backward()
            noise.close()
        assert_joined(noise.result(), measured(model, (x, y), stats=TIERS))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_must_stay_between_joined_contexts(set_to_none):
    model, batch = net(), pairs()
    noise = GradientNoise(model)
    with noise:
        loss(model, batch).backward()
    model.zero_grad(set_to_none=set_to_none)
    noise.open(join=True)
    with pytest.raises(RuntimeError, match=r"^GradientNoise: the mean of '.*' is read from its .grad, which has been"):
        loss(model, batch).backward()
    noise.close()


def test_a_result_before_further_backwards_has_no_mean_of_them():
    model, batch = net(), pairs()
    noise = GradientNoise(model)
    with noise:
        loss(model, batch).backward()
    first, read = noise.result(), noise.result()
    kept = {name: x.clone() for name, x in read.mean.items()}
    noise.open(join=True)
    loss(model, batch).backward()
    noise.close()
    with pytest.raises(RuntimeError, match=r"^GradientNoise: the context has had another backward since this result"):
        first.mean  # noqa: B018
    assert all(torch.equal(x, kept[name]) for name, x in read.mean.items())
    assert first.coverage.exact


def test_joins_that_cannot_be_are_refused():
    model = net()
    one = measured(model)
    for given, match in (([], "got none"), (3, "got int"), ([one, 3], "got int")):
        with pytest.raises(
            TypeError, match=f"^GradientNoiseResult.join: expected a list of GradientNoiseResult.*{match}"
        ):
            GradientNoiseResult.join(given)
    for other, match in (
        (GradientNoise.measure(nn.Linear(4, 3).double(), loss, pairs()), "different parameters"),
        (measured(model, stats="variance"), "different statistics"),
        (measured(model, stats="norms"), "different statistics"),
    ):
        with pytest.raises(ValueError, match=f"^GradientNoiseResult.join: the results have {match}; expected"):
            GradientNoiseResult.join([one, other])
    projected = [measured(model, stats="projections") for _ in range(2)]
    with pytest.raises(ValueError, match='^GradientNoiseResult.join: stats "projections"'):
        GradientNoiseResult.join(projected)
    noise = GradientNoise(model)
    with pytest.raises(RuntimeError, match=r"^GradientNoise.open: join=True adds to the context before, but there is"):
        noise.open(join=True)
    with noise:
        loss(model, pairs()).backward()
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"^GradientNoise.open: join=True expected the trainable parameters"):
        noise.open(join=True)
    with noise:
        loss(model, pairs()).backward()


class Sometimes(nn.Module):
    """A model whose gate is excluded where it is used, because random numbers are not drawn twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(4, 3), nn.Parameter(torch.ones(4, dtype=F64))
        self.double()

    def forward(self, x):
        return self.linear(x * torch.dropout(self.gate, 1e-12, True) if x[0, 0] > 0 else x)


def test_parameters_that_one_result_excludes_are_excluded_in_all():
    torch.manual_seed(0)
    model = Sometimes()
    used, unused = (torch.randn(5, 4, dtype=F64) + torch.tensor([s, 0, 0, 0], dtype=F64) * 9 for s in (1, -1))
    labels = torch.randint(3, (5,))
    results = [measured(model, (x, labels), uncovered="exclude") for x in (used, unused)]
    assert results[0].coverage.excluded == ("gate",)
    assert results[1].coverage.unused == ("gate",)
    for order in itertools.permutations(results):
        joined = GradientNoiseResult.join(order)
        assert list(joined.per_param) == ["linear.weight", "linear.bias"]
        assert joined.coverage.excluded == ("gate",)
        assert joined.coverage.exact == ("linear.weight", "linear.bias")


# ---- copies


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_results_can_be_copied_and_have_the_mean_if_it_was_read(copied):
    for read in (False, True):
        result = measured(stats=TIERS)
        if read:
            result.mean  # noqa: B018
        twin = copied(result)
        assert twin.scalars() == result.scalars()
        assert twin.coverage == result.coverage
        assert all(torch.equal(v, result.variance[name]) for name, v in twin.variance.items())
        assert torch.equal(twin.sq_norms, result.sq_norms)
        if read:
            assert all(torch.equal(x, result.mean[name]) for name, x in twin.mean.items())
            assert GradientNoiseResult.join([twin, result]).batch_size == 26
        else:
            with pytest.raises(
                RuntimeError, match=r"^GradientNoise: this copy of a result \(pickle.* has no mean.*read"
            ):
                twin.mean  # noqa: B018
            assert result.mean  # the result itself has it


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_used_contexts_can_be_copied(copied):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.noise = GradientNoise(self.net, ("nsr", "variance"), uncovered="exclude")

    globals()["Holding"] = Holding
    Holding.__qualname__ = "Holding"
    module = Holding()
    batch = pairs()
    with module.noise:
        loss(module.net, batch).backward()
    twin = copied(module)
    assert (twin.noise.model is module.net) == (copied is copy.copy)
    assert twin.noise.model is twin.net
    if twin.noise is not module.noise:
        with pytest.raises(RuntimeError, match=r"^GradientNoise.result: expected a forward and a backward"):
            twin.noise.result()
    twin.net.zero_grad()
    with twin.noise:
        loss(twin.net, batch).backward()
    assert twin.noise.result().scalars() == measured(module.net, batch, stats=("nsr", "variance")).scalars()
