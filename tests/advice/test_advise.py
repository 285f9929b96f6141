"""What `advise` reads, answers and refuses."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from torch import nn

import normkern
from normkern import advise, theory
from normkern.noise.ddp import DDPNoiseResult

TRUE_SCALE = 40.0  # samples


def numbers(n=200, nsr=3.0, samples=32, seed=0, size=50):
    """A log of pairs of gradients of `samples` samples whose N/G is `nsr`."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(size, dtype=torch.float64)
    mean[0] = 1
    a, b = (mean + math.sqrt(nsr / size) * torch.randn(n, size, generator=generator, dtype=torch.float64) for _ in "ab")
    return {"trace_sigma": (a - b).square().sum(1) / 2, "grad_sq_norm_unbiased": (a * b).sum(1)}


def of_numbers(batch_size=32, optimizer="sgd", samples=32, **given):
    log = given.pop("log", None) or numbers(samples=samples)
    return advise(log, batch_size=batch_size, gradient_samples=samples, optimizer=optimizer, **given)


# What it reads: the same gradients through every result


def sample_gradients(count, generator):
    """(count, 6) gradients of single samples: mean norm 1, covariance of trace `TRUE_SCALE`."""
    mean = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    return mean + math.sqrt(TRUE_SCALE / 6) * torch.randn(count, 6, generator=generator, dtype=torch.float64)


def as_moments(g):
    return normkern.moments(g)


def as_pair(g):
    return normkern.noise_from_pair([g[:16].mean(0)], [g[16:].mean(0)])


def as_micro_batches(g, population=None):
    w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    moments = normkern.RunningMoments([("w", w)], batch_size=8)
    for part in g.split(8):
        w.grad = part.mean(0)
        moments.update()
    return moments.result(population=population)


def as_samples(g):
    model = nn.Linear(6, 1, bias=False).double()
    return normkern.GradientNoise.measure(model, lambda model, x: model(x).mean(), g)


def as_ranks(g):
    """What DDPNoise of 4 ranks with 8 samples each returns, by its formulas."""
    ranks = torch.stack([part.mean(0) for part in g.split(8)])
    local, mean, m = ranks.square().sum(), ranks.mean(0).square().sum(), 4
    trace, signal = (local - m * mean) / (m - 1), (m * mean - local / m) / (m - 1)
    return DDPNoiseResult(
        steps=1, skipped=0, ranks=m, count=m, batch_size=8, trace_sigma=trace, grad_sq_norm=mean,
        grad_sq_norm_unbiased=signal, nsr=trace / signal, nsr_batch=trace / signal / m, gns=8 * trace / signal,
        names=["w"], slots={"w": slice(0, 1)}, slot_trace_sigma=trace.view(1), slot_grad_sq_norm=mean.view(1),
        slot_grad_sq_norm_unbiased=signal.view(1), slot_nsr_batch=(trace / signal / m).view(1),
    )  # fmt: skip


@pytest.mark.parametrize("measured", [as_moments, as_pair, as_micro_batches, as_samples, as_ranks])
def test_every_source_has_the_same_unit(measured):
    generator = torch.Generator().manual_seed(5)
    results = [measured(sample_gradients(32, generator)) for _ in range(150)]
    given = {"gradient_samples": 16} if measured is as_pair else {}
    advice = advise(results, batch_size=32, **given)
    assert advice.noise_scale.low < TRUE_SCALE < advice.noise_scale.high
    assert advice.nsr_batch.estimate == pytest.approx(advice.noise_scale.estimate / 32)
    assert advice.noise_scale.high < 5 * advice.noise_scale.low
    assert advice.source == type(results[0]).__name__


def test_micro_batches_of_a_small_population_have_its_noise_scale():
    g = [sample_gradients(32, torch.Generator().manual_seed(i)) for i in range(20)]
    results = [as_micro_batches(x, population=40) for x in g]
    advice = advise(results, batch_size=32)
    trace = sum(float(r.gns * r.grad_sq_norm_unbiased) for r in results)
    signal = sum(float(r.grad_sq_norm_unbiased) for r in results)
    assert sum(advice.noise) == pytest.approx(trace)
    assert sum(advice.signal) == pytest.approx(signal)


@pytest.mark.parametrize("measured", [as_moments, as_pair, as_micro_batches, as_samples, as_ranks])
def test_batches_without_replacement_are_corrected(measured):
    """Of a data set of 40 samples, whose gradient and covariance are known."""
    generator = torch.Generator().manual_seed(7)
    everything = sample_gradients(40, generator)
    signal, noise = everything.mean(0).square().sum(), everything.var(0, correction=0).sum()
    results = [measured(everything[torch.randperm(40, generator=generator)[:32]]) for _ in range(300)]
    given = {"gradient_samples": 16} if measured is as_pair else {}
    corrected, plain = (advise(results, batch_size=32, population=n, **given) for n in (40, None))
    error = torch.tensor(corrected.signal).std() / math.sqrt(300)
    assert abs(sum(corrected.signal) / 300 - signal) < 4 * error
    assert abs(sum(plain.signal) / 300 - signal) > 8 * error
    assert abs(sum(corrected.noise) / 300 - noise) < 4 * torch.tensor(corrected.noise).std() / math.sqrt(300)
    assert any("without replacement" in s for s in plain.cannot_say)
    assert not any("without replacement" in s for s in corrected.cannot_say)


def test_pairs_of_an_svag_run_are_of_the_batch():
    w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = normkern.SVAG([("w", w)], lr=0.0, l=1, noise_decay=0)
    generator, results = torch.Generator().manual_seed(1), []
    for _ in range(100):
        for _ in range(2):
            optimizer.hold() if w.grad is not None else None
            w.grad = sample_gradients(16, generator).mean(0)
        optimizer.step()
        results.append(optimizer.noise())
        optimizer.zero_grad()
    advice = advise(results, batch_size=16, optimizer=optimizer)
    assert advice.noise_scale.low < TRUE_SCALE < advice.noise_scale.high
    assert advice.optimizer == "SVAG"


def test_parameters_restrict_the_sums():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    results = [
        normkern.GradientNoise.measure(
            model, lambda model, x: model(x).square().mean(), sample_gradients(16, generator)
        )
        for _ in range(5)
    ]
    some = advise(results, batch_size=16, parameters=["0.weight", "2.bias"])
    parts = [[r.per_param[n] for n in ("0.weight", "2.bias")] for r in results]
    assert some.noise == pytest.approx([float(a.trace_sigma + b.trace_sigma) for a, b in parts])
    assert some.signal == pytest.approx([float(a.grad_sq_norm_unbiased + b.grad_sq_norm_unbiased) for a, b in parts])
    pairs = [
        normkern.noise_from_pair(*([torch.randn(k, generator=generator) for k in (3, 5)] for _ in range(2)))
        for _ in range(4)
    ]
    of_second = advise(pairs, batch_size=2, parameters=["1"])
    assert of_second.signal == pytest.approx([float(p.slot_grad_sq_norm_unbiased[1]) for p in pairs])


# What it answers


def test_answers_are_the_formulas_of_theory():
    advice = of_numbers(batch_size=64, samples=32, C=1.5)
    nsr = advice.noise_scale.estimate / 64
    assert advice.nsr_batch.estimate == pytest.approx(nsr)
    for name in ("estimate", "low", "high"):
        limit = theory.max_linear_scaling(nsr_batch=getattr(advice.nsr_batch, name), C=1.5)
        assert getattr(advice.max_k, name) == pytest.approx(limit)
    assert f"{theory.nsr_condition(1.5):.3g}" in advice.follows_sde.question
    assert advice.max_k.known
    assert advice.max_k.more == 0


@pytest.mark.parametrize(
    ("nsr", "answer", "known"), [(30.0, "not excluded", True), (0.05, "no: ", True), (1.0, "unknown", False)]
)
def test_whether_sgd_can_follow_its_sde(nsr, answer, known):
    advice = of_numbers(log=numbers(n=300, nsr=nsr))
    assert advice.follows_sde.answer.startswith(answer)
    assert advice.follows_sde.known is known
    assert (advice.follows_sde.more == 0) is known


def test_noise_that_hides_the_signal_is_unknown_and_says_how_much_is_missing():
    advice = of_numbers(log=numbers(n=40, nsr=60.0))
    for answer in (advice.noise_scale, advice.nsr_batch, advice.max_k):
        assert answer.answer == "unknown, average longer"
        assert not answer.known
        assert answer.high is None
        assert answer.more > 40
        assert "measurements" in answer.note
    assert "at least" in advice.noise_scale.note
    # With as many as it asks for (and some to spare) it is known.
    enough = of_numbers(log=numbers(n=3 * (40 + advice.noise_scale.more), nsr=60.0))
    assert enough.noise_scale.known
    assert enough.noise_scale.low < 60 * 32 < enough.noise_scale.high


def test_a_signal_below_zero_is_no_noise_scale():
    log = {"trace_sigma": [5.0, 6.0] * 30, "grad_sq_norm_unbiased": [-1.0, -1.2] * 30}
    advice = of_numbers(log=log)
    assert advice.noise_scale.estimate is None
    assert advice.noise_scale.answer == "unknown, average longer"
    assert any("below zero by more than its error" in s for s in advice.cannot_say)


def test_signal_around_zero_asks_for_more_than_a_number():
    signal = torch.randn(60, generator=torch.Generator().manual_seed(0))
    advice = of_numbers(log={"trace_sigma": [5.0, 6.0] * 30, "grad_sq_norm_unbiased": signal - signal.mean() - 0.01})
    assert advice.noise_scale.estimate is None
    assert "more than" in advice.noise_scale.note


def test_noise_that_moves_is_named():
    early, late = numbers(n=150, nsr=1.0), numbers(n=150, nsr=20.0, seed=1)
    moving = of_numbers(log={k: torch.cat([early[k], late[k]]) for k in early})
    assert any("moved from" in s for s in moving.cannot_say)
    assert not any("moved from" in s for s in of_numbers().cannot_say)


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        ("sgd", "linear"),
        ("AdamW", "square root"),
        (torch.optim.SGD, "linear"),
        (normkern.SGD, "linear"),
        (normkern.AdamW, "square root"),
        (torch.optim.Adam, "square root"),
        (torch.optim.RMSprop, "square root"),
        (torch.optim.Adagrad, "unknown for Adagrad"),
        (None, "not asked"),
    ],
)
def test_rule_by_optimizer(optimizer, rule):
    given = optimizer([nn.Parameter(torch.zeros(2))], lr=0.1) if isinstance(optimizer, type) else optimizer
    advice = of_numbers(optimizer=given)
    assert advice.rule.answer.startswith(rule)
    assert advice.max_k.known is (rule == "linear")
    if rule == "square root":
        assert any("no criterion is known" in s for s in advice.cannot_say)
        assert advice.follows_sde.answer.startswith("not asked")
        decay = "weight decay x sqrt(k)" if "AdamW" in str(optimizer) else "weight decay stays"
        assert advice.rule.answer.endswith(decay)


def test_betas_bound_the_square_root_rule_and_momentum_is_named():
    w = nn.Parameter(torch.zeros(2))
    assert "k <= 20" in of_numbers(optimizer=torch.optim.Adam([w], betas=(0.95, 0.999))).rule.note
    assert "k <= 100" in of_numbers(optimizer=torch.optim.RMSprop([w], alpha=0.99)).rule.note
    with_momentum = of_numbers(optimizer=torch.optim.SGD([w], lr=0.1, momentum=0.9))
    assert any("momentum is 0.9" in s for s in with_momentum.cannot_say)
    assert not any("momentum" in s for s in of_numbers().cannot_say)


def test_wrapped_optimizer_is_found():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    assert of_numbers(optimizer=Wrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))).optimizer == "SGD"


def test_limits_of_the_criterion_are_always_named():
    text = str(of_numbers())
    assert "has not been checked against runs that continue with k times the batch" in text.replace("\n  ", " ")
    assert any("Pass equilibrium=" in s for s in of_numbers().cannot_say)


def test_batchnorm_in_eval_mode_is_named():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = torch.randn(16, 6, dtype=torch.float64)
    results = [normkern.GradientNoise.measure(model, lambda model, x: model(x).mean(), x) for _ in range(3)]
    assert any("eval mode" in s for s in advise(results, batch_size=16).cannot_say)


# The object


def test_advice_is_plain_data():
    advice = of_numbers()
    for again in (pickle.loads(pickle.dumps(advice)), copy.deepcopy(advice)):
        assert again == advice
        assert str(again) == str(advice)
    read = json.loads(advice.to_json())
    assert read == json.loads(json.dumps(advice.to_dict()))
    assert read["answers"]["max_k"]["estimate"] == advice.max_k.estimate
    assert len(read["noise"]) == read["count"] == 200
    hidden = of_numbers(log=numbers(n=20, nsr=500.0))
    assert json.loads(hidden.to_json(indent=2))["answers"]["noise_scale"]["high"] is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice.count = 1


@pytest.mark.parametrize("width", [60, 100, 120])
def test_table_has_every_answer_and_fits(width):
    advice = of_numbers(log=numbers(n=30, nsr=100.0))
    lines = advice.table(width).splitlines()
    assert max(map(len, lines)) <= max(width, 95)
    text = " ".join(" ".join(lines).split())
    for _, answer in advice.answers:
        assert answer.question in text
    for sentence in advice.cannot_say:
        assert sentence in text
    assert "unknown, average" in text


@pytest.mark.parametrize("log", [numbers(), numbers(n=12, nsr=300.0)], ids=["known", "unknown"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_picture(log, optimizer, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    advice = of_numbers(log=log, optimizer=optimizer)
    advice.plot(tmp_path / "advice.png")
    assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG")
    axes = Figure().subplots(1, 3)
    assert advice.plot(axes) == list(axes)
    assert [a.get_title() for a in axes] == ["Noise scale", "batch x k and lr x k", "Norms over equilibrium"]
    with pytest.raises(TypeError, match=r"Advice.plot: to expected a path or three Axes"):
        advice.plot(3)


# What it refuses


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normkern.noise_from_pair(*([torch.randn(4, generator=generator)] for _ in range(2)))


def average():
    w = nn.Parameter(torch.zeros(2))
    optimizer = normkern.SVAG([w], lr=0.1, l=1)
    for _ in range(3):
        w.grad = torch.randn(2)
        optimizer.hold()
        w.grad = torch.randn(2)
        optimizer.step()
    return optimizer.noise()


LOG = {"trace_sigma": [1.0, 2.0], "grad_sq_norm_unbiased": [1.0, 2.0]}
REFUSED = {
    "no batch size": ((LOG,), {"batch_size": 0}, ValueError, "batch_size expected an integer >= 1"),
    "batch size is no number": ((LOG,), {"batch_size": "32"}, ValueError, "batch_size expected an integer"),
    "one measurement": (([pair()],), {}, ValueError, "at least 2 results, got 1: one measurement has no interval"),
    "a result alone": ((pair(),), {}, ValueError, "at least 2 results, got 1"),
    "nothing": (([],), {}, ValueError, "at least 2 results, got 0"),
    "numbers": (([1.0, 2.0],), {}, TypeError, "expected a list of one of normkern.Noise.*got float"),
    "several types": (
        ([pair(), normkern.moments(torch.randn(3, 2))],), {}, TypeError, "results of one type, got Moments, Noise"
    ),
    "averages": (([average(), average()],), {}, ValueError, "noise_decay=0"),
    "keys": (({"trace": [1.0]},), {}, ValueError, "expected the keys 'trace_sigma' and 'grad_sq_norm_unbiased'"),
    "no samples": ((LOG,), {}, ValueError, "gradient_samples expected the number of samples"),
    "samples": ((LOG,), {"gradient_samples": 0}, ValueError, "gradient_samples expected an integer >= 1"),
    "lengths": (
        ({"trace_sigma": [1.0], "grad_sq_norm_unbiased": [1.0, 2.0]},), {"gradient_samples": 1}, ValueError,
        "two arrays of one length of at least 2, got 1 and 2",
    ),
    "text": (
        ({"trace_sigma": ["a", "b"], "grad_sq_norm_unbiased": [1.0, 2.0]},), {"gradient_samples": 1}, TypeError,
        "an array of numbers",
    ),
    "not finite": (
        ({"trace_sigma": [1.0, math.nan], "grad_sq_norm_unbiased": [1.0, 2.0]},), {"gradient_samples": 1}, ValueError,
        "finite numbers, got trace nan and signal 2 in measurement 1",
    ),
    "negative": (
        ({"trace_sigma": [1.0, -1.0], "grad_sq_norm_unbiased": [1.0, 2.0]},), {"gradient_samples": 1}, ValueError,
        "trace_sigma >= 0, got -1 in measurement 1",
    ),
    "samples of samples": (
        ([normkern.moments(torch.randn(3, 2)) for _ in range(2)],), {"gradient_samples": 8}, ValueError,
        "gradient_samples expected 1, which the Moments has, or None, got 8",
    ),
    "names with a dict": ((LOG,), {"gradient_samples": 1, "parameters": ["w"]}, ValueError, "parameters expected None"),
    "names with moments": (
        ([normkern.moments(torch.randn(3, 2)) for _ in range(2)],), {"parameters": ["w"]}, ValueError, "no names",
    ),
    "unknown name": (([pair(), pair()],), {"parameters": ["w"]}, ValueError, "names that the measurements have, got 'w'"),
    "one name as text": (([pair(), pair()],), {"parameters": "w"}, TypeError, "names of parameters"),
    "population": ((LOG,), {"gradient_samples": 1, "population": 31}, ValueError, "population expected an integer >= 32"),
    "population twice": (
        ([as_micro_batches(torch.randn(32, 6).double(), population=n) for n in (40, 40)],), {"population": 40},
        ValueError, "population expected None",
    ),
    "population in some": (
        ([as_micro_batches(torch.randn(32, 6).double(), population=n) for n in (40, None)],), {},
        ValueError, "in all RunningMomentsResult or in none",
    ),
    "optimizer": ((LOG,), {"gradient_samples": 1, "optimizer": "lion"}, ValueError, "one of 'sgd', 'svag', 'adamw'"),
    "no optimizer": ((LOG,), {"gradient_samples": 1, "optimizer": 3}, TypeError, "a name or None, got int"),
    "C": ((LOG,), {"gradient_samples": 1, "C": 1.0}, ValueError, "C expected a finite number > 1"),
    "span": ((LOG,), {"gradient_samples": 1, "span": 1}, ValueError, "span expected a finite number > 1"),
    "confidence": ((LOG,), {"gradient_samples": 1, "confidence": 95}, ValueError, r"confidence expected a number in \(0, 1\)"),
    "equilibrium": ((LOG,), {"gradient_samples": 1, "equilibrium": [1]}, TypeError, "reports of an EquilibriumMonitor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_was_expected(case):
    positional, given, error, text = REFUSED[case]
    with pytest.raises(error, match=f"advise: .*{text}"):
        advise(*positional, **{"batch_size": 32, **given})


def test_micro_batches_without_a_size_need_one():
    w = nn.Parameter(torch.zeros(3))
    results = []
    for _ in range(3):
        moments = normkern.RunningMoments([w])
        for _ in range(2):
            w.grad = torch.randn(3)
            moments.update()
        results.append(moments.result())
    with pytest.raises(ValueError, match="gradient_samples expected the samples of each measured gradient"):
        advise(results, batch_size=8)
    assert advise(results, batch_size=8, gradient_samples=4).count == 3
