"""The life of a context: what it must be given, what it leaves, and what happens in another order."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import normkern
from normkern.noise.per_sample.layers.linear import LinearContribution

from .budgets import SCALARS, close
from .case import numbers
from .contexts import F64, same
from .left_behind import assert_nothing_left, snapshot
from .measuring import assert_right, measured, noise_of, problem_of, refuses, told_of


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stats": 5}, "stats expected some of nsr, norms, variance, projections, got 5"),
        ({"stats": ("nsr", "kurtosis")}, "stats expected some of nsr, norms, variance, projections.*kurtosis"),
        ({"stats": ()}, "stats expected"),
        ({"stats": "variances"}, "stats expected.*variances"),
        ({"stats": (1,)}, "stats expected"),
        ({"reduction": "max"}, 'reduction expected "mean" or "sum", got \'max\''),
        ({"reduction": None}, "reduction expected"),
        ({"uncovered": "ignore"}, 'uncovered expected "raise", "estimate" or "exclude", got \'ignore\''),
        ({"check": "sometimes"}, "check expected True, False or \"first\", got 'sometimes'"),
        ({"check": None}, "check expected"),
        ({"batch_size": 1}, "batch_size expected at least 2.*1"),
        ({"batch_size": 0}, "batch_size expected at least 2.*0"),
        ({"batch_size": 4.0}, "batch_size expected an int.*float"),
        ({"batch_size": True}, "batch_size expected an int.*bool"),
    ],
)
def test_arguments_are_refused_with_a_sentence(options, match):
    with refuses(match):
        normkern.GradientNoise(nn.Linear(2, 2), **options)


def test_a_model_is_a_module_with_parameters_to_train():
    with refuses("model expected a torch.nn.Module, got list"):
        normkern.GradientNoise([nn.Linear(2, 2)])
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with refuses("no parameter that requires a gradient"), normkern.GradientNoise(model):
            pass


@pytest.mark.parametrize(
    ("attribute", "tier"),
    [("sq_norms", "norms"), ("sq_norms_per_param", "norms"), ("projections", "projections"), ("variance", "variance")],
)
def test_a_tier_that_was_not_asked_for_says_how_to_ask(mlp, attribute, tier):
    result = measured(mlp, ("nsr",))
    match = f'^GradientNoiseResult.{attribute}: not measured; expected "{tier}" in stats'
    with pytest.raises(AttributeError, match=match):
        getattr(result, attribute)


def test_an_unknown_tier_gets_the_nearest_one():
    with refuses(r"stats expected some of .*, got \('norm',\); did you mean 'norms'\?"):
        normkern.GradientNoise(nn.Linear(2, 2), stats=("norm",))


def test_sparse_embeddings_are_refused_by_their_option():
    model, ids = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)), torch.ones(6, 2).long()
    with pytest.raises(NotImplementedError, match="sparse=True .* use sparse=False"), normkern.GradientNoise(model):
        model(ids).sum().backward()


def test_a_penalty_on_the_weights_is_named():
    model, x = nn.Linear(5, 3), torch.randn(6, 5)
    match = "leave a penalty on the weights to weight_decay"
    with pytest.raises(RuntimeError, match=match), normkern.GradientNoise(model):
        (model(x).mean() + 0.01 * model.weight.square().sum()).backward()


def test_measuring_only_the_basic_tier_gives_the_same_ratio(mlp):
    result = measured(mlp, ("nsr",))
    assert measured(problem_of("mlp"), "nsr").nsr == result.nsr


def test_keys_are_the_models_names(gpt):
    result = measured(gpt)
    names = [name for name, _ in gpt.model.named_parameters()]
    assert "head.weight" not in names  # tied: one name
    for field in ("mean", "variance", "sq_norms_per_param", "per_param"):
        assert list(getattr(result, field)) == names, field
    for name, p in gpt.model.named_parameters():
        assert result.mean[name].shape == result.variance[name].shape == p.shape
        assert not result.mean[name].requires_grad


def penalised(problem, how):
    weight = next(problem.model.parameters())
    if how == "hook":
        return problem.value()
    if how == "copy":
        return problem.value() + weight.clone().square().sum()
    if how == "scaled":
        return problem.value() * next(reversed(list(problem.model.parameters()))).sum().exp()
    return problem.value() + 0.1 * weight.square().sum()


@pytest.mark.parametrize("how", ["penalty", "copy", "hook", "scaled"])
@pytest.mark.parametrize("check", [True, "first"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt"])
def test_gradient_that_is_not_of_samples_is_refused(how, check, name):
    problem = problem_of(name)
    noise = noise_of(problem, check=check)
    if how == "hook":
        next(problem.model.parameters()).register_hook(lambda g: 2 * g)
    with (
        refuses(next(n for n, _ in reversed(list(problem.model.named_parameters()))) if how == "scaled" else ""),
        noise,
    ):
        penalised(problem, how).backward()
        noise.result()


def test_penalty_from_a_parameter_that_was_taken_before(mlp):
    weight = mlp.model[2].weight
    noise = noise_of(mlp)
    with refuses("'2.weight'"), noise:
        (mlp.value() + 0.1 * weight.square().sum()).backward()
        noise.result()


def test_checks_of_every_context(mlp):
    noise = noise_of(mlp, check=True)
    for _ in range(2):
        with noise:
            mlp.value().backward()
    mlp.model[0].bias.register_hook(lambda g: g * 1.01)
    with refuses("'0.bias'"), noise:
        mlp.value().backward()
        noise.result()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_shows(value, mlp):
    mlp.inputs[0][1, 2] = value
    told, result = told_of(problem_of("mlp")), measured(mlp)
    assert result.sq_norms.isfinite().tolist() == [True, False, True, True, True]
    kept = [0, 2, 3, 4]
    close("others", result.sq_norms[kept], told.sq_norms[kept], float(told.sq_norms.max()), 1e-11)
    for field in SCALARS:
        assert not math.isfinite(getattr(result, field)), field
    assert not result.variance["0.weight"].isfinite().all()


def test_zero_gradients(mlp):
    noise = noise_of(mlp)
    with noise:
        (mlp.value() * 0).backward()
    result = noise.result()
    assert result.trace_sigma == result.grad_sq_norm == 0
    assert math.isnan(result.nsr)
    assert result.sq_norms.tolist() == [0.0] * 5


def test_one_sample_many_times():
    """No noise at all: nothing but rounding may be left of the variance, and it is not negative."""
    problem = problem_of("mlp", torch.float32)
    problem = type(problem)(
        problem.model, (problem.inputs[0][:1].expand(64, -1),), problem.target[:1].expand(64), problem.loss
    )
    result = measured(problem)
    assert 0 <= result.trace_sigma <= 1e-10 * result.grad_sq_norm
    assert all((v >= 0).all() for v in result.variance.values())


def test_nothing_is_kept_alive(mlp):
    kept = []
    mlp.model[1].register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    gc.collect()
    assert len(kept) == 1
    assert kept[0]() is None


def test_hooks_of_the_user_stay_and_work(mlp):
    calls = []
    mlp.model[0].register_forward_hook(lambda module, args, out: calls.append("forward") or 2 * out)
    mlp.model[2].register_full_backward_hook(lambda module, into, onto: calls.append("backward"))
    mlp.model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    before = snapshot(mlp.model)
    assert_right(mlp, measured(mlp))
    del calls[:]
    assert snapshot(mlp.model) == before
    mlp.model.zero_grad()
    measured(mlp)
    assert sorted(calls) == ["accumulated", "backward", "forward"]


def test_random_numbers_are_the_users(mlp):
    torch.manual_seed(7)
    measured(mlp)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))


def test_default_dtype_and_grad_mode_are_left_alone(mlp):
    with noise_of(mlp):
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
        mlp.value().backward()
    with torch.no_grad(), noise_of(mlp):
        assert not torch.is_grad_enabled()


def test_results_of_runs_are_the_same_bits():
    same(measured(problem_of("gpt", torch.float32)), measured(problem_of("gpt", torch.float32)))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


def test_tensors_are_filled_inside_by_name(mlp):
    """`nn.init` hands its tensor on as a keyword alone."""
    noise = noise_of(mlp)
    with noise:
        layer = nn.Linear(4, 3)
        nn.init.ones_(tensor=layer.weight[:2])
        mlp.value().backward()
    assert torch.equal(layer.weight[:2], torch.ones(2, 4))
    assert noise.result().nsr == measured(problem_of("mlp")).nsr


def test_batch_norm_is_named_and_eval_is_offered():
    problem = numbers(Named(), 6, 5).to(F64)
    before = snapshot(problem.model)
    with refuses("norm \\(BatchNorm1d\\).*eval.*RunningMoments"):
        measured(problem)
    assert_nothing_left(problem.model, before)
    problem.model.norm.eval()
    problem.model.zero_grad()
    assert_right(problem, measured(problem))


@pytest.mark.filterwarnings("ignore")
def test_scripted_models_are_refused(mlp):
    model = torch.jit.trace(mlp.model, mlp.inputs)
    noise = normkern.GradientNoise(model)
    with refuses(""), noise:
        mlp.loss(model(*mlp.inputs), mlp.target).backward()
        noise.result()


@pytest.mark.parametrize("check", [True, "first"])
def test_a_kernel_that_is_wrong_is_caught(mlp, monkeypatch, check):
    """Contributions that do not add up to autograd's gradient, though they are what arrives in .grad."""
    right = LinearContribution.sums

    def wrong(self, squares):
        sums = right(self, squares)
        sums.total[0] *= 1.01
        return sums

    monkeypatch.setattr(LinearContribution, "sums", wrong)
    noise = normkern.GradientNoise(mlp.model, check=check)
    with noise, pytest.raises(RuntimeError, match=r"do not add up to the gradient of autograd"):
        mlp.value().backward()
