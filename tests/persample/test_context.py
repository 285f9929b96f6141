"""The life of a context: what it must be given, what it leaves, and what happens in another order."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import nn

import normkern
from normkern.persample.parts import Outer

from .budgets import SCALARS, TIERS, assert_says, close
from .left_behind import anatomy, assert_nothing_left
from .measuring import REFUSED, assert_right, measured, noise_of, problem_of, refuses, told_of
from .problem import numbers, squares
from .reference import expected, gradient

F64 = torch.float64


@pytest.fixture
def mlp():
    return problem_of("mlp")


@pytest.fixture
def gpt():
    return problem_of("gpt_tied_by_module")


def same(a, b):
    """Two results, to the last bit."""
    for field in SCALARS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    for field in ("sq_norms", "projections"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    same_variance(a, b)


def same_variance(a, b):
    assert all(torch.equal(v, b.variance[name]) for name, v in a.variance.items())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
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


def test_tiers_that_were_not_asked_for_are_none(mlp):
    result = measured(mlp, ("nsr",))
    assert (result.sq_norms, result.sq_norms_per_param, result.projections, result.variance) == (None, None, None, None)
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


# --- the batch --------------------------------------------------------------------------------------------------------


def test_one_sample_has_no_variance(mlp):
    before = anatomy(mlp.model)
    with refuses("at least 2 samples.*1"), normkern.GradientNoise(mlp.model):
        mlp.sample(0, 1).value().backward()
    assert_nothing_left(mlp.model, before)


def test_no_samples(mlp):
    with refuses("at least 2 samples.*0"), normkern.GradientNoise(mlp.model):
        mlp.model(torch.zeros(0, 6, dtype=F64)).sum().backward()


def test_batch_size_that_the_input_contradicts(mlp):
    with refuses("batch_size.*4.*5"), normkern.GradientNoise(mlp.model, batch_size=4):
        mlp.value().backward()


def test_batch_size_that_the_input_confirms(mlp):
    noise = normkern.GradientNoise(mlp.model, TIERS, batch_size=5)
    with noise:
        mlp.value().backward()
    assert_right(mlp, noise.result())


class TakesDictionaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, batch, scale=1.0):
        return {"logits": self.body(batch["x"][0]) * scale}


def test_inputs_in_dictionaries_and_lists():
    problem = numbers(TakesDictionaries().to(F64), 4, 5, loss=lambda out, y: squares(out["logits"], y)).to(F64)
    noise = noise_of(problem)
    with noise:
        problem.loss(problem.model({"name": "x", "x": [problem.inputs[0]]}, scale=2.0), problem.target).backward()
    plain = numbers(nn.Linear(5, 3), 4, 5, loss=lambda out, y: squares(2 * out, y)).to(F64)
    plain.model.load_state_dict(problem.model.body.state_dict())
    told = told_of(type(plain)(plain.model, problem.inputs, problem.target, plain.loss))
    close("sq_norms", noise.result().sq_norms, told.sq_norms, float(told.sq_norms.max()), 1e-11)


# --- order ------------------------------------------------------------------------------------------------------------


def test_result_before_anything(mlp):
    noise = noise_of(mlp)
    with refuses("expected a forward and a backward inside"):
        noise.result()
    with noise:
        mlp.value()
    with refuses("no backward"):
        noise.result()


def test_backward_after_the_context(mlp):
    noise, before = noise_of(mlp), anatomy(mlp.model)
    with noise:
        loss = mlp.value()
    assert_nothing_left(mlp.model, before)
    with refuses(""):
        loss.backward()
        noise.result()
    mlp.model.zero_grad()
    mlp.value().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(mlp.model.parameters(), gradient(mlp).values(), strict=True))


def test_forward_before_the_context(mlp):
    loss, noise = mlp.value(), noise_of(mlp)
    with refuses("forward"), noise:
        loss.backward()
    with refuses(""):
        noise.result()


@pytest.mark.parametrize("who", ["itself", "the same model's", "another model's"])
def test_contexts_do_not_nest(mlp, who):
    model = nn.Linear(2, 2) if who == "another model's" else mlp.model
    noise, before = noise_of(mlp), anatomy(mlp.model)
    inner = noise if who == "itself" else normkern.GradientNoise(model)
    with noise:
        with refuses("inside another"), inner:
            pass
        mlp.value().backward()
    assert_right(mlp, noise.result())  # the outer one goes on
    assert_nothing_left(mlp.model, before)


@pytest.mark.parametrize("when", ["before", "between", "in forward", "in backward", "after"])
def test_exception_leaves_the_model_as_it_was(gpt, when):
    def fail(*_):
        raise KeyError(when)

    noise, before = noise_of(gpt), anatomy(gpt.model)

    def step():
        if when == "before":
            fail()
        handle = gpt.model.norm.register_forward_hook(fail) if when == "in forward" else None
        try:
            loss = gpt.value()
        finally:
            if handle:
                handle.remove()
        if when == "in backward":
            loss.register_hook(fail)
        if when == "between":
            fail()
        loss.backward()
        fail()

    with pytest.raises(KeyError, match=when), noise:
        step()
    assert_nothing_left(gpt.model, before)
    if when != "after":
        with refuses(""):
            noise.result()
    gpt.model.zero_grad()
    with noise:
        gpt.value().backward()
    assert_right(gpt, noise.result())


def test_result_can_be_repeated(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    same(noise.result(), noise.result())
    assert_right(mlp, noise.result())


def test_a_result_between_two_backwards_stays_and_the_next_is_right():
    problem = problem_of("mlp")
    noise = noise_of(problem, ("nsr", "norms", "variance"))
    with noise:
        problem.sample(0, 3).value().backward()
        between = noise.result()
        variance = {name: x.clone() for name, x in between.variance.items()}
        problem.sample(3, 5).value().backward()
    after = noise.result()
    for name, x in between.variance.items():
        assert torch.equal(x, variance[name])
        assert not torch.equal(x, after.variance[name])
    same_variance(after, noise.result())


def test_a_variance_that_was_changed_is_not_given_twice(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    result = noise.result()
    next(iter(result.variance.values())).sqrt_()
    with refuses("the variance of .* that an earlier result gave has been changed in place.*expected a copy"):
        noise.result()


def test_numbers_as_large_as_the_model_go_with_the_result(mlp):
    noise = noise_of(mlp)
    gone = []
    gc.disable()
    try:
        for _ in range(3):
            mlp.model.zero_grad()
            with noise:
                mlp.value().backward()
            result = noise.result()
            gone += [weakref.ref(x) for x in result.variance.values()]
        assert all(x() is None for x in gone[: -len(result.variance)])
    finally:
        gc.enable()


def test_result_inside_the_context(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
        inside = noise.result()
    same(inside, noise.result())
    assert_right(mlp, inside)


def test_new_entry_is_a_new_measurement(mlp):
    noise = noise_of(mlp)
    for samples in (slice(0, 5), slice(0, 3), slice(2, 4)):
        part = mlp.sample(samples.start, samples.stop)
        mlp.model.zero_grad()
        with noise:
            part.value().backward()
        assert_right(part, noise.result())
    with noise:
        pass
    with refuses("no backward"):
        noise.result()


def test_result_stays_what_it_was(mlp):
    noise = noise_of(mlp)
    with noise:
        mlp.value().backward()
    result, told = noise.result(), told_of(mlp)
    means = {name: x.clone() for name, x in result.mean.items()}
    for p in mlp.model.parameters():
        p.grad.mul_(3.0)
        with torch.no_grad():
            p.add_(1.0)
    with noise:
        mlp.value().backward()
    close("sq_norms", result.sq_norms, told.sq_norms, float(told.sq_norms.max()), 1e-11)
    for name, x in result.mean.items():
        assert torch.equal(x, means[name])
        close(name, result.variance[name], told.variance[name], float(told.second_moment[name].max()), 1e-11)


@pytest.mark.parametrize("to_none", [True, False])
def test_result_after_the_step(mlp, to_none):
    noise, told = noise_of(mlp), told_of(mlp)
    opt = torch.optim.SGD(mlp.model.parameters(), lr=0.1)
    with noise:
        mlp.value().backward()
    opt.step()
    opt.zero_grad(set_to_none=to_none)
    result = noise.result()
    for field in SCALARS:
        assert math.isclose(getattr(result, field), told.scalars[field], rel_tol=1e-9)
    close("projections", result.projections, told.projections, float(told.sq_norms.max()), 1e-11)
    try:
        means = result.mean
    except RuntimeError as error:  # it may have been in .grad; zeros it must not be
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        for name, x in means.items():
            close(name, x, told.mean[name], float(x.abs().max()), 1e-11)


# --- several backwards ------------------------------------------------------------------------------------------------

WITHOUT_PROJECTIONS = ("nsr", "norms", "variance")


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("mlp_wide", (2, 4, 9)),
        ("mlp", (3,)),
        *((name, (2,)) for name in ("gpt_tied_by_module", "resnet", "token_mean", "keywords")),
    ],
)
def test_micro_batches_of_one_context_are_one_batch(name, cuts):
    problem = problem_of(name)
    parts = [problem.sample(a, b) for a, b in itertools.pairwise((0, *cuts, problem.samples))]
    noise = noise_of(problem, WITHOUT_PROJECTIONS)
    with noise:
        for part in parts:
            share = part.samples / problem.samples
            if problem.weights is not None:
                share = float((part.target != -100).sum() / (problem.target != -100).sum())
            (part.value() * share).backward()
    assert_right(problem, noise.result(), WITHOUT_PROJECTIONS)
    for name, g in gradient(problem).items():
        torch.testing.assert_close(problem.model.get_parameter(name).grad, g)


def test_projections_of_micro_batches_are_right_or_refused(mlp):
    noise = noise_of(mlp)
    try:
        with noise:
            for part in (mlp.sample(0, 2), mlp.sample(2, 5)):
                (part.value() * part.samples / 5).backward()
        result = noise.result()
    except RuntimeError as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
        assert "projections" in str(error)  # noqa: PT017
    else:
        assert_right(mlp, result)


def test_a_parameter_that_only_one_micro_batch_uses():
    problem = numbers(Either(), 6, 5).to(F64)
    noise = noise_of(problem, WITHOUT_PROJECTIONS)
    with noise:
        for part, left in ((problem.sample(0, 2), True), (problem.sample(2, 6), False)):
            problem.model.left = left
            (part.value() * part.samples / 6).backward()
    problem.model.left = None
    assert_right(problem, noise.result(), WITHOUT_PROJECTIONS)


class Either(nn.Module):
    """One layer or another, for all samples of a call; `left` None: the first two samples that it ever sees go left."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.left, self.seen = nn.Linear(5, 3), nn.Linear(5, 3), None, 0

    def forward(self, x):
        left = self.seen < 2 if self.left is None else self.left
        self.seen += len(x) if self.left is None else 0
        return self.a(x) if left else self.b(x)


def test_gradient_that_was_there_before(mlp):
    for p in mlp.model.parameters():
        p.grad = torch.ones_like(p)
    result = measured(mlp)
    assert_right(mlp, result)
    for p, g in zip(mlp.model.parameters(), gradient(mlp).values(), strict=True):
        torch.testing.assert_close(p.grad, g + 1)


@pytest.mark.parametrize("zeroed", ["zeros", "None"])
def test_training_is_what_it_is_without(zeroed):
    runs = []
    for watched in (False, True):
        problem = problem_of("resnet", torch.float32)
        opt = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
        noise, losses = noise_of(problem), []
        for _ in range(4):
            opt.zero_grad(set_to_none=zeroed == "None")
            if watched:
                with noise:
                    loss = problem.value()
                    loss.backward()
            else:
                loss = problem.value()
                loss.backward()
            losses.append(loss.item())
            opt.step()
        runs.append(losses)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=0)
    assert runs[0][-1] < runs[0][0]


def second_backward(problem):
    loss = problem.value()
    loss.backward(retain_graph=True)
    loss.backward()


def losses_apart(problem):
    out = problem.model(*problem.inputs)
    problem.loss(out, problem.target).backward(retain_graph=True)
    (0.5 * out.square().sum()).backward()


def gradients_only(problem):
    torch.autograd.grad(problem.value(), list(problem.model.parameters()))


def gradients_then_backward(problem):
    loss = problem.value()
    torch.autograd.grad(loss, list(problem.model.parameters()), retain_graph=True)
    loss.backward()


def one_backward_of_two_forwards(problem):
    (problem.value() + problem.value()).backward()


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (second_backward, 2.0),
        (losses_apart, None),
        (gradients_only, None),
        (gradients_then_backward, 1.0),
        (one_backward_of_two_forwards, 2.0),
    ],
)
def test_unusual_backwards_are_right_or_refused(step, factor, mlp):
    noise, before = noise_of(mlp, WITHOUT_PROJECTIONS), anatomy(mlp.model)
    try:
        with noise:
            step(mlp)
        result = noise.result()
    except RuntimeError as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        assert factor is not None
        if result.batch_size == mlp.samples:
            scaled = type(mlp)(mlp.model, mlp.inputs, mlp.target, lambda out, y: factor * mlp.loss(out, y))
            assert_right(scaled, result, WITHOUT_PROJECTIONS)
        else:  # each forward has samples of its own: twice the same batch
            assert result.batch_size == 2 * mlp.samples
            told = told_of(mlp)
            grad_sq = told.scalars["grad_sq_norm"] * factor**2
            assert math.isclose(result.grad_sq_norm, grad_sq, rel_tol=1e-9)
    assert_nothing_left(mlp.model, before)


def test_evaluation_inside_the_context(mlp):
    noise = noise_of(mlp)
    with noise:
        loss = mlp.value()
        with torch.no_grad():
            mlp.value()
        loss.backward()
    assert_right(mlp, noise.result())


def test_double_backward_is_refused(mlp):
    """A gradient penalty, whose own backward goes through the layers' backwards."""
    x = mlp.inputs[0].clone().requires_grad_()

    def step():
        out = mlp.model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (mlp.loss(out, mlp.target) + slope.square().sum()).backward()

    with pytest.raises(RuntimeError), noise_of(mlp):  # torch's own sentence will do
        step()


def test_gradients_of_inputs_are_autograds(gpt):
    x = torch.randn(4, 6, 8, dtype=F64, requires_grad=True)
    block = gpt.model.blocks[0]
    noise = normkern.GradientNoise(block, TIERS)
    with noise:
        block(x).square().sum().backward()
    ours, x.grad = x.grad, None
    block(x).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-12, atol=1e-12)


def test_a_part_of_a_model(gpt):
    """Only its parameters are measured, though the loss is of the whole."""
    whole, noise = told_of(gpt), normkern.GradientNoise(gpt.model.blocks, TIERS, check=True, batch_size=gpt.samples)
    with noise:
        gpt.value().backward()
    for name, norms in noise.result().sq_norms_per_param.items():
        close(name, norms, whole.sq_norms_per_param[f"blocks.{name}"], float(norms.max()), 1e-11)


def test_another_model_beside_it(mlp, gpt):
    noise = noise_of(mlp)
    with noise:
        (mlp.value() + gpt.value()).backward()
    assert_right(mlp, noise.result())
    assert all(p.grad is not None for p in gpt.model.parameters())


class Encoder(nn.Module):
    """Used by a method of its own, which gives its layers (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def encode(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, x):
        return self.encode(x)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_method_instead_of_a_call_is_right_or_refused(batch_size):
    """The first tensor that any module sees has another leading dimension than the batch."""
    problem = numbers(Encoder(), 4, 3, 5).to(F64)
    noise = normkern.GradientNoise(problem.model, TIERS, batch_size=batch_size)
    try:
        with noise:
            problem.loss(problem.model.encode(*problem.inputs), problem.target).backward()
        result = noise.result()
    except REFUSED as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        assert_right(problem, result)


def test_chunks_of_a_batch_in_one_backward_are_right_or_refused(mlp):
    """Two calls of the model on different samples, one loss."""
    problem = mlp.sample(0, 4)
    noise = noise_of(problem, WITHOUT_PROJECTIONS)
    try:
        with noise:
            (0.5 * problem.sample(0, 2).value() + 0.5 * problem.sample(2, 4).value()).backward()
        result = noise.result()
    except REFUSED as error:
        assert "GradientNoise" in str(error)  # noqa: PT017
    else:
        assert_right(problem, result, WITHOUT_PROJECTIONS)


def test_hooks_on_activations_are_part_of_the_gradient(mlp):
    def halve(module, args, out):
        out.register_hook(lambda g: g / 2)

    mlp.model[2].register_forward_hook(halve)
    assert_right(mlp, measured(mlp))


def test_dropout():
    """Samples cannot be taken alone here: the terms of one forward are, with the same random numbers."""
    problem = numbers(
        nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3), nn.Dropout(0.2)), 6, 5
    )
    problem = problem.to(F64)
    torch.manual_seed(3)
    result = measured(problem)
    torch.manual_seed(3)
    out = problem.model(*problem.inputs)
    named = dict(problem.model.named_parameters())
    terms = [squares(out[b : b + 1], problem.target[b : b + 1]) / 6 for b in range(6)]
    rows = [torch.autograd.grad(term, list(named.values()), retain_graph=True) for term in terms]
    told = expected({name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)})
    assert_says(result, told, TIERS, 1e-11)


# --- what must not be believed ----------------------------------------------------------------------------------------


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


# --- what stays -------------------------------------------------------------------------------------------------------


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
    before = anatomy(mlp.model)
    assert_right(mlp, measured(mlp))
    del calls[:]
    assert anatomy(mlp.model) == before
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


# --- batch norm and scripts -----------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


def test_batch_norm_is_named_and_eval_is_offered():
    problem = numbers(Named(), 6, 5).to(F64)
    before = anatomy(problem.model)
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
    right = Outer.sums

    def wrong(self, squares):
        sums = right(self, squares)
        sums.total[0] *= 1.01
        return sums

    monkeypatch.setattr(Outer, "sums", wrong)
    noise = normkern.GradientNoise(mlp.model, check=check)
    with noise, pytest.raises(RuntimeError, match=r"do not add up to the gradient of autograd"):
        mlp.value().backward()
