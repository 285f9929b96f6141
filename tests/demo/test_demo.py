"""The demo does what it says: its data, its results, its errors."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import sys

import pytest
import torch

import normkern
from normkern.__main__ import main
from normkern.demo import data, measurements, output, plots, settings, timing, training
from normkern.demo.model import ResNet
from normkern.demo.noise import NOISE, SampleNoise, pair_noise


@pytest.fixture(scope="module", autouse=True)
def _short():
    """One thread, for layers that are too small for two; optimizers are timed for fewer rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time_steps", functools.partial(timing.time_steps, rounds=20))
        yield
    torch.set_num_threads(threads)


def run(folder, *options, drawn=False):
    """The results. Curves are drawn if asked for: that takes longer than an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(plots, "plot", lambda *curves: None)
        assert main(["train", "--epochs", "1", "--out", str(folder), *options]) == 0
    return json.loads((folder / "train.json").read_text())


def run_and_listen(folder, *options):
    """The results and what was printed; with curves."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = run(folder, *options, drawn=True)
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return *run_and_listen(folder), folder


def test_split_is_stratified_shuffled_disjoint_and_reproducible():
    images, labels, test_images, test_labels = data.digits()
    assert images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert images.dtype == torch.float32
    assert 0 == images.min() < images.max() == 1
    share = torch.bincount(test_labels) / (torch.bincount(labels) + torch.bincount(test_labels))
    assert (share - 0.2).abs().max() < 0.01, "each digit has its 20 % in the test set"
    assert not torch.equal(labels.sort().values, labels), "shuffled"
    training = {tuple(x.flatten().tolist()) for x in images}
    assert not training & {tuple(x.flatten().tolist()) for x in test_images}
    assert all(
        torch.equal(a, b) for a, b in zip(data.digits(), (images, labels, test_images, test_labels), strict=True)
    )


def test_shifts_move_by_at_most_one_pixel():
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 4] = 1
    moved = data.shifted(image, torch.Generator().manual_seed(0))
    at = moved.flatten(1).argmax(1)
    rows, columns = at // 8, at % 8
    assert moved.sum() == 200
    assert set(rows.tolist()) == set(columns.tolist()) == {3, 4, 5}


def test_groups_are_found(first):
    groups, model = first[0]["groups"], ResNet()
    convolutions = [name for name, p in model.named_parameters() if p.ndim == 4]
    norms = [name for name, p in model.named_parameters() if p.ndim == 1]
    assert groups == {"scale_invariant": convolutions, "norm_and_bias": norms, "rest": ["head.weight"]}


def test_results(first):
    result, _, folder = first
    assert result["epochs"] == 1
    assert result["seed"] == 0
    assert 0.2 < result["test_accuracy"] <= 1
    assert result["test_accuracy"] == result["curves"][-1]["test_accuracy"]
    assert set(result["step_seconds"]) == {"normkern", "torch", "torch-foreach", "torch-fused"}
    assert all(0 < s < 10 for s in result["step_seconds"].values())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_run_and_another_seed_another(first, tmp_path):
    again, other = run(tmp_path / "a"), run(tmp_path / "b", "--seed", "1")
    assert again["curves"] == first[0]["curves"]
    assert other["curves"] != first[0]["curves"]


def test_printed_lines(first):
    printed = first[1]
    assert "predicted: sqrt(2 * lr * weight_decay / (1 + momentum))" in printed
    row = first[0]["curves"][0]
    assert f"{row['loss']:7.4f}" in printed
    assert f"{row['angular_update']:.5f}" in printed
    assert "\x1b" not in printed, "control codes where there is no terminal"


@pytest.mark.parametrize("optimizer", ["torch", "torch-foreach", "torch-fused"])
def test_torchs_optimizers_train_too_and_agree(optimizer, first, tmp_path):
    result = run(tmp_path / "out", "--optimizer", optimizer)
    assert result["curves"][0]["angular_update"] is None
    assert result["curves"][0]["loss"] == pytest.approx(first[0]["curves"][0]["loss"], rel=0.05)


@pytest.fixture(scope="module")
def of_adamw(tmp_path_factory):
    return run_and_listen(tmp_path_factory.mktemp("adamw"), "--optimizer", "adamw")


def test_adamw_trains_and_is_timed_against_torchs(of_adamw):
    result, printed = of_adamw
    assert set(result["step_seconds"]) == {"adamw", "torch-adamw", "torch-adamw-foreach", "torch-adamw-fused"}
    assert 'normkern.AdamW(stats="tensor")' in printed
    assert 0.2 < result["test_accuracy"] <= 1
    assert result["hyperparameters"] == {
        "lr": settings.ADAMW_LR, "betas": list(settings.ADAMW_BETAS), "weight_decay": settings.ADAMW_WEIGHT_DECAY,
        "batch_size": settings.BATCH_SIZE,
    }  # fmt: skip


def test_adamw_predicts_its_own_angle(of_adamw):
    result, printed = of_adamw
    (row,) = result["curves"]
    of_theory = normkern.theory.adamw_equilibrium_angle(
        lr=settings.ADAMW_LR, weight_decay=settings.ADAMW_WEIGHT_DECAY, beta1=settings.ADAMW_BETAS[0]
    )
    assert row["predicted_angular_update"] == pytest.approx(of_theory, rel=1e-3)
    assert row["predicted_angular_update"] == pytest.approx(measurements.predicted_angle(settings.LR), rel=1e-12)
    assert "predicted: sqrt(2 * lr * weight_decay * (1 - beta1) / (1 + beta1))" in printed
    assert row["effective_lr"] < 0.1, "lr / |w|"


@pytest.mark.slow
def test_torchs_adamw_trains_alike(of_adamw, tmp_path):
    result = run(tmp_path / "out", "--optimizer", "torch-adamw")
    assert result["curves"][0]["angular_update"] is None
    assert result["curves"][0]["loss"] == pytest.approx(of_adamw[0]["curves"][0]["loss"], rel=0.05)


SVAG = ("--optimizer", "svag", "--l", "0.5")  # the fewest steps


@pytest.fixture(scope="module")
def of_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svag")
    return run(folder, *SVAG, "--epochs", "2", drawn=True), folder


def test_svag_measures_the_noise(of_pairs, first):
    result, folder = of_pairs
    assert result["optimizer"] == "svag"
    assert result["hyperparameters"] == {**first[0]["hyperparameters"], "l": 0.5}
    assert [row["epoch"] for row in result["curves"]] == [1, 2]
    for row in result["curves"]:
        assert row["trace_sigma"] > 0
        assert all(row[key] > 0 for key in ("trace_sigma_stderr", "grad_sq_norm_unbiased_stderr"))
        if row["grad_sq_norm_unbiased"] <= row["grad_sq_norm_unbiased_stderr"]:
            assert row["nsr"] is None
        else:
            assert row["nsr"] == pytest.approx(row["trace_sigma"] / row["grad_sq_norm_unbiased"])
            assert row["nsr_stderr"] > 0
        assert row["angular_update"] > 0
    assert result["curves"][1]["loss"] < result["curves"][0]["loss"] < 2.5
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "nsr" not in first[0]["curves"][0]


def test_svag_epoch_is_as_much_time_as_one_of_the_others(of_pairs):
    steps = -(-1437 // settings.BATCH_SIZE)
    assert of_pairs[0]["curves"][0]["passes"] == pytest.approx(-(-steps // 2) / (1437 // (2 * settings.BATCH_SIZE)))
    assert of_pairs[0]["curves"][1]["passes"] == pytest.approx(steps / (1437 // (2 * settings.BATCH_SIZE)))
    assert [row["lr"] for row in of_pairs[0]["curves"]] == [settings.LR, settings.LR]
    assert of_pairs[0]["curves"][0]["predicted_angular_update"] == measurements.predicted_angle(settings.LR / 0.5)


def test_svag_follows_the_schedule_of_the_original_run(monkeypatch, tmp_path):
    """Learning rates of every step, as the kernel has them, of three epochs at l = 1.5."""
    seen = []

    def no_training(model, optimizer, schedule, batches, count, after_step):
        for _ in range(count):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return 0.0, []

    monkeypatch.setattr(normkern.SVAG, "step", lambda self: None)
    monkeypatch.setattr(normkern.SVAG, "noise", lambda self: normkern.noise_from_pair([torch.ones(1)], [torch.ones(1)]))
    monkeypatch.setattr(training, "train_pairs", no_training)
    monkeypatch.setattr(timing, "time_steps", lambda model, settings: {"normkern": 1.0})
    monkeypatch.setattr(plots, "plot", lambda *args: None)
    training.run(settings.Settings("svag", 3, 0, tmp_path, l=1.5))
    factors = [min(1.0, 2 * (1 - (int(k / 1.5) // 45) / 3)) for k in range(203)]
    assert seen == pytest.approx([settings.LR * factor for factor in factors])


def test_svag_prints_a_column_more(of_pairs, capsys, tmp_path):
    again = run(tmp_path, *SVAG)
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("epoch"))
    assert head.split()[-3:] == ["passes", "nsr", "+-"]
    row = again["curves"][0]
    line = lines[lines.index(head) + 1].split()
    assert line[-3:] == [f"{row['passes']:.1f}", f"{row['nsr']:.3g}", f"{row['nsr_stderr']:.3g}"]
    assert again["curves"][0] == of_pairs[0]["curves"][0], "the same seed, the same run"


@pytest.fixture(scope="module")
def exponential(tmp_path_factory):
    return run_and_listen(tmp_path_factory.mktemp("exponential"), "--decay", "exponential")


@pytest.mark.parametrize("optimizer", settings.EXPONENTIAL)
def test_exponential_decay_is_the_same_run(optimizer, first, of_pairs, exponential, tmp_path):
    options = SVAG if optimizer == "svag" else ()
    result = run(tmp_path, *options, "--decay", "exponential") if options else exponential[0]
    row, other = result["curves"][0], (of_pairs if options else first)[0]["curves"][0]
    assert result["hyperparameters"]["decay"] == "exponential"
    for key in ("loss", "effective_lr", "angular_update"):
        assert row[key] == pytest.approx(other[key], rel=0.02), key
    # A tenth of it is lost to the first steps, in which the momentum builds up.
    steps = 23 if options else 45
    lr = settings.LR / 0.5 if options else settings.LR
    grown = 2 * steps * lr * settings.WEIGHT_DECAY / (1 - settings.MOMENTUM)
    assert 0.6 * grown < math.log(row["exponential_lr"] / settings.LR) < grown


def test_exponential_decay_prints_its_learning_rate(exponential):
    result, printed = exponential
    lines = printed.splitlines()
    head = next(line for line in lines if line.startswith("epoch"))
    assert head.endswith("   exponential LR")
    line = lines[lines.index(head) + 1]
    assert line.split()[-1] == f"{result['curves'][0]['exponential_lr']:.5g}"
    assert len(line) == len(head)


EVERY = ("--noise-every", "20")  # the 20th and the 40th of 45 steps


@pytest.fixture(scope="module")
def of_samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return run(folder, *EVERY, drawn=True), folder


def without_noise(row):
    return {key: x for key, x in row.items() if key not in ("gns", "nsr_batch", *SampleNoise.SUMS)}


def test_noise_of_samples_is_in_the_results(of_samples, first):
    (row,) = of_samples[0]["curves"]
    assert of_samples[0]["noise_every"] == 20
    assert without_noise(row) == first[0]["curves"][0], "the same run"
    assert row["trace_sigma"] > 0
    assert row["gns"] == pytest.approx(row["trace_sigma"] / row["grad_sq_norm_unbiased"])
    assert row["nsr_batch"] == pytest.approx(row["trace_sigma"] / settings.BATCH_SIZE / row["grad_sq_norm"])
    assert (of_samples[1] / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert first[0]["noise_every"] is None
    assert "gns" not in first[0]["curves"][0]


@functools.cache
def few_steps(optimizer_name, every):
    """Everything that five steps leave, the last from a smaller batch."""
    torch.manual_seed(0)
    images, labels, *_ = (x[: 4 * settings.BATCH_SIZE + 5] for x in data.digits())
    generator = torch.Generator().manual_seed(0)
    model = ResNet()
    optimizer = settings.make_optimizer(settings.Settings(optimizer_name), [{"params": list(model.parameters())}])
    noise = None if every is None else SampleNoise(model, optimizer, every)
    loss, _ = training.train_epoch(model, optimizer, images, labels, generator, lambda: None, noise)
    assert noise is None or len(noise.measured) == 5 // every
    state = [x for of in optimizer.state.values() for x in of.values()]
    grads = [p.grad for p in model.parameters()]
    return [
        torch.tensor(loss), *model.state_dict().values(), *state, *grads, generator.get_state(), torch.get_rng_state(),
        torch.tensor([module.training for module in model.modules()]),
    ]  # fmt: skip


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("optimizer", [*settings.SGDS, "adamw"])
def test_noise_of_samples_leaves_the_training_as_it_is_to_the_bit(optimizer, every):
    for a, b in zip(few_steps(optimizer, None), few_steps(optimizer, every), strict=True):
        assert torch.equal(a, b)


def test_noise_of_samples_is_that_of_gradient_noise_in_ratios_of_means():
    images, labels, *_ = data.digits()
    torch.manual_seed(0)
    model = ResNet()
    model(images[:100])  # running statistics that are some
    optimizer = settings.make_optimizer(settings.Settings("torch"), [{"params": list(model.parameters())}])
    noise = SampleNoise(model, optimizer, 2)
    batches = [slice(0, 8), slice(8, 40), slice(40, 50), slice(50, 90)]
    for batch in batches:
        noise.before_step(images[batch], labels[batch])
    told = noise.take()
    results = []
    for batch in batches[1::2]:
        other = copy.deepcopy(model).eval()
        with normkern.GradientNoise(other) as of_batch:
            torch.nn.functional.cross_entropy(other(images[batch]), labels[batch]).backward()
        results.append(of_batch.result())
    mean = {key: sum(getattr(r, key) for r in results) / 2 for key in SampleNoise.SUMS}
    of_batch = sum(r.trace_sigma / r.batch_size for r in results) / 2
    expected = mean | {
        "gns": mean["trace_sigma"] / mean["grad_sq_norm_unbiased"], "nsr_batch": of_batch / mean["grad_sq_norm"],
    }  # fmt: skip
    assert told == {key: pytest.approx(x.item(), rel=1e-12) for key, x in expected.items()}
    assert all(p.grad is None for p in model.parameters())
    assert set(noise.take().values()) == {None}, "nothing since"


def test_noise_of_samples_under_exponential_decay_is_of_the_run_with_weight_decay():
    images, labels = (x[:32] for x in data.digits()[:2])
    torch.manual_seed(0)
    model = ResNet()
    model(images)
    ours, scale = copy.deepcopy(model), 0.8
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight /= scale
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean /= scale
                module.running_var /= scale**2
    told = []
    for net in (model, ours):
        groups = [{"params": [p for p in net.parameters() if (p.ndim == 4) == convolutions]} for convolutions in (1, 0)]
        optimizer = settings.make_optimizer(settings.Settings("normkern"), groups)
        if net is ours:
            optimizer.param_groups[0]["gauge"] = (scale, 0.0, 0)
        noise = SampleNoise(net, optimizer, 1)
        noise.before_step(images, labels)
        told.append(noise.take())
    assert told[1] == pytest.approx(told[0], rel=0.01)


@pytest.mark.parametrize("every", ["20", "46"])
def test_noise_of_samples_prints_two_columns(every, of_samples, capsys, tmp_path):
    (row,) = run(tmp_path, "--noise-every", every)["curves"]
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("epoch"))
    assert head.split()[-2:] == ["gns", "nsr_batch"]
    line = lines[lines.index(head) + 1]
    assert len(line) == len(head)
    if every == "46":
        assert line.split()[-2:] == ["-", "-"]
    else:
        assert line.split()[-2:] == [f"{row['gns']:.3g}", f"{row['nsr_batch']:.3g}"]
        assert row == of_samples[0]["curves"][0], "the same seed, the same run"


def test_noise_of_samples_has_panels(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: saved.append(self))
    common = {"loss": 1.0, "lr": 0.1, "test_accuracy": 0.5, "angular_update": None, "predicted_angular_update": 0.1}
    sums = [(9.0, 3.0, 1.0), (None, None, None), (4.0, 1.0, -1.0), (6.0, 3.0, 2.0)]
    scales = (9.0, None, -4.0, 3.0)
    curves = [
        {"epoch": i, **common, "gns": scale, "nsr_batch": 0.1, **dict(zip(SampleNoise.SUMS, of, strict=True))}
        for i, (scale, of) in enumerate(zip(scales, sums, strict=True), start=1)
    ]
    plots.plot(tmp_path / "curves.png", "title", curves, [], [])
    panels = {panel.get_title(): panel for panel in saved[0].axes}
    drawn = [line.get_xydata().tolist() for line in panels["Gradient noise scale"].lines]
    assert drawn[0] == [[1, 9], [4, 3]], "what a logarithmic axis can show"
    assert drawn[1][0][1] == settings.BATCH_SIZE
    noise, signal = (line.get_xydata().tolist() for line in panels["Noise of a sample, and signal"].lines)
    assert noise == [[1, 9], [3, 4], [4, 6]]
    assert signal == [[1, 1], [4, 2]]


def noise_of(signal, stderr, trace=4.0):
    """A `normkern.Noise` with these estimates in all."""
    x = normkern.noise_from_pair([torch.ones(1)], [torch.ones(1)])

    def number(value):
        return torch.tensor(value, dtype=torch.float64)

    return dataclasses.replace(
        x, grad_sq_norm_unbiased=number(signal), grad_sq_norm_unbiased_stderr=number(stderr),
        trace_sigma=number(trace), nsr_batch=number(trace / signal), nsr_batch_stderr=number(0.1),
    )  # fmt: skip


@pytest.mark.parametrize(("signal", "stderr"), [(-2.0, 0.5), (-2.0, math.nan), (1.0, 1.5)])
def test_ratio_to_a_signal_that_noise_hides_is_unknown(signal, stderr):
    row = pair_noise(noise_of(signal, stderr))
    assert row["nsr"] is None
    assert row["nsr_stderr"] is None
    assert row["grad_sq_norm_unbiased"] == signal, "the estimate stays in the results"
    assert pair_noise(noise_of(2.0, 1.0))["nsr"] == 2.0
    assert pair_noise(noise_of(2.0, math.nan))["nsr"] == 2.0, "one pair has no standard error"


def epoch_row(**more):
    return {
        "epoch": 3, "loss": 1.0, "test_accuracy": 0.5, "effective_lr": None, "angular_update": None,
        "predicted_angular_update": 0.1, **more,
    }  # fmt: skip


def test_unknown_ratio_is_printed_with_what_to_do():
    pairs = epoch_row(passes=8.0, **pair_noise(noise_of(-2.0, 0.5)))
    assert output.epoch_line(pairs).split()[-2:] == ["unknown", "-"]
    assert output.advice([pairs]).startswith("nsr unknown, average longer: the noise hides the squared norm")
    samples = epoch_row(gns=None, nsr_batch=0.5, trace_sigma=4.0, grad_sq_norm=3.0, grad_sq_norm_unbiased=-1.0)
    assert output.epoch_line(samples).split()[-2:] == ["unknown", "0.5"]
    assert output.advice([samples]).startswith("gns unknown, average longer: ")
    assert "--noise-every" in output.advice([samples])
    nothing = epoch_row(gns=None, nsr_batch=None, trace_sigma=None)
    assert output.epoch_line(nothing).split()[-2:] == ["-", "-"], "nothing was measured in this epoch"
    assert output.advice([nothing, epoch_row(gns=9.0, trace_sigma=1.0), epoch_row()]) is None


def test_sample_noise_with_a_negative_estimate_has_no_scale():
    model = ResNet()
    noise = SampleNoise(model, torch.optim.SGD(model.parameters()), 1)
    noise.measured.append((32, torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64)))
    row = noise.take()
    assert row["gns"] is None
    assert row["nsr_batch"] == pytest.approx(4.0 / 32)
    assert row["grad_sq_norm_unbiased"] == -1.0


def test_batches_of_pairs_are_whole_and_each_pass_is_another_order():
    images, labels = torch.arange(150.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(150)
    batches = data.batches_of_pairs(images, labels, torch.Generator().manual_seed(0))
    first, second, third = (next(batches)[1] for _ in range(3))
    assert [len(x) for x in (first, second, third)] == [64, 64, 64]
    assert not set(first.tolist()) & set(second.tolist())
    assert not torch.equal(first, third)


def test_noise_that_is_no_number_is_none():
    noise = normkern.noise_from_pair([torch.zeros(3)], [torch.zeros(3)])
    told = pair_noise(noise)
    assert told["nsr"] is None
    assert told["nsr_stderr"] is None
    assert told["trace_sigma"] == 0.0


@pytest.mark.parametrize("rows", [[(None, 1.0), (-2.0, -1.0)], [(3.0, 2.0), (None, -1.0)]])
def test_plot_of_noise_that_is_partly_unknown(rows, tmp_path):
    curves = [
        {
            "epoch": i, "loss": 1.0, "lr": 0.1, "test_accuracy": 0.5, "angular_update": None,
            "predicted_angular_update": 0.1, **dict.fromkeys(NOISE), "nsr": nsr, "grad_sq_norm_unbiased": signal,
        }
        for i, (nsr, signal) in enumerate(rows, start=1)
    ]  # fmt: skip
    plots.plot(tmp_path / "curves.png", "title", curves, [], [])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_prediction():
    assert measurements.predicted_angle(0.1) == pytest.approx((2 * 0.1 * settings.WEIGHT_DECAY / 1.9) ** 0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number from 1 to"),
        (["--epochs", "x"], "got 'x'"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0"),
        (["--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["--l", "2"], "argument --l: expected only with --optimizer svag, got --optimizer normkern"),
        (
            ["--optimizer", "torch", "--l", "2"],
            "argument --l: expected only with --optimizer svag, got --optimizer torch",
        ),
        (["--optimizer", "svag", "--l", "0.49"], "argument --l: expected a number of at least 1/2, got '0.49'"),
        (["--optimizer", "svag", "--l", "nan"], "argument --l: expected a number of at least 1/2, got 'nan'"),
        (["--optimizer", "svag", "--l", "inf"], "argument --l: expected a number of at least 1/2, got 'inf'"),
        (["--optimizer", "svag", "--l", "four"], "argument --l: expected a number of at least 1/2, got 'four'"),
        (["--decay", "linear"], "argument --decay: invalid choice: 'linear'"),
        (
            ["--optimizer", "adamw", "--l", "2"],
            "argument --l: expected only with --optimizer svag, got --optimizer adamw",
        ),
        (
            ["--optimizer", "adamw", "--decay", "exponential"],
            "argument --decay: exponential expected --optimizer normkern or svag, got --optimizer adamw",
        ),
        (
            ["--optimizer", "torch", "--decay", "exponential"],
            "argument --decay: exponential expected --optimizer normkern or svag, got --optimizer torch",
        ),
        (["--lr", "0"], "argument --lr: expected a positive number, got '0'"),
        (["--lr", "nan"], "argument --lr: expected a positive number, got 'nan'"),
        (["--lr", "fast"], "argument --lr: expected a positive number, got 'fast'"),
        (
            ["--device", "gpu"],
            "argument --device: expected cpu or a GPU that torch sees, cuda or cuda:<index>, got 'gpu'",
        ),
        (
            ["--device", "meta"],
            "argument --device: expected cpu or a GPU that torch sees, cuda or cuda:<index>, got 'meta'",
        ),
        (["--device", "cuda:99"], "got 'cuda:99', and torch sees "),
        (["--noise-every", "0"], "argument --noise-every: expected a whole number from 1 to"),
        (["--noise-every", "-3"], "argument --noise-every: expected a whole number from 1 to"),
        (["--noise-every", "2.5"], "got '2.5'"),
        (["--noise-every", "often"], "got 'often'"),
        (
            ["--noise-every", "10", "--optimizer", "svag"],
            "argument --noise-every: expected an --optimizer other than svag, which measures the noise itself, "
            "got --optimizer svag",
        ),
        (["--out", __file__], "argument --out: expected a folder that exists or can be made"),
    ],
)
def test_bad_arguments(options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *options])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_learning_rate_and_device(tmp_path):
    result = run(tmp_path, "--lr", "0.02", "--device", "cpu")
    assert result["hyperparameters"]["lr"] == result["curves"][0]["lr"] == 0.02
    assert result["curves"][0]["predicted_angular_update"] == measurements.predicted_angle(0.02)
    assert result["device"].startswith("cpu, ")
    assert settings.Settings("svag", lr=0.02).options == "--optimizer svag --l 4 --lr 0.02"
    assert settings.Settings("adamw").options == "--optimizer adamw"
    assert settings.Settings("adamw", lr=0.05).options == "--optimizer adamw --lr 0.05"


def test_run_that_diverges_is_one_sentence(tmp_path, capsys):
    assert main(["train", "--epochs", "1", "--out", str(tmp_path), "--lr", "1e30"]) == 1
    assert capsys.readouterr().err == "python -m normkern train: the loss of epoch 1 is nan: try an --lr below 1e+30\n"
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"normkern {normkern.__version__}\n"


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("module", list(settings.PACKAGES))
def test_missing_package(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.endswith(f"{settings.PACKAGES[module]} is not installed: pip install {settings.PACKAGES[module]}\n")
