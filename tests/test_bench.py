"""Check the pieces of bench/. The benchmarks themselves are `make bench`."""

import itertools
import json
import math
import statistics
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("pytest_benchmark")

from bench import compare, gpu_samples, noise_models, noise_right, published, report, right
from bench.arrays import HYPER, Arrays, Step, arrays
from bench.cases import CASES, RESNET50, TRANSFORMER, Case
from bench.jobs import JOBS
from bench.limits import LIMITS, compiler, limit_steps
from bench.measure import LEAST, MOST, fault, interleave, measure, plan
from bench.nets import NETS
from bench.noise_peers import JOBS as NOISE_JOBS
from bench.noise_peers import NOISE_PEERS, PLAIN, NoisePeer, Statistics, Watched, plain, torch_func
from bench.peak import peak_megabytes
from bench.peers import (
    PEERS,
    Peer,
    normkern_measured,
    normkern_moments,
    normkern_pairs,
    normkern_step,
    op_moments,
    reference_pairs,
    torch_moments,
    torch_pairs,
    torch_step,
)
from bench.results import digits, load
from bench.tape import Tape

JOB_OF = {peer.name: peer.job for peer in (*PEERS, *NOISE_PEERS)}
LITTLE = Case("little", ((8, 8), (3,)))


# --- the tables -------------------------------------------------------------------------------------------------------


def test_coordinates():
    assert (len(RESNET50), sum(map(math.prod, RESNET50))) == (161, 25_557_032)
    assert (len(TRANSFORMER), sum(map(math.prod, TRANSFORMER))) == (148, 124_439_808)
    assert CASES["one of 64M, bfloat16"].array_bytes == 2 * 64 * 2**20


def test_tables_fit_together():
    assert all(case.key == key and set(case.jobs) <= set(JOBS) for key, case in CASES.items())
    assert all(peer.job in JOBS for peer in PEERS)
    assert all(peer.job in NOISE_JOBS for peer in NOISE_PEERS)
    everybody = [peer.name for peer in (*PEERS, *NOISE_PEERS)]
    assert len({*everybody, *LIMITS}) == len(everybody) + len(LIMITS)
    assert set(report.NOISE_COLUMNS) | {PLAIN} == {peer.name for peer in NOISE_PEERS}
    assert all(job.limit in LIMITS and job.anchor in {p.name for p in PEERS} for job in JOBS.values())


def test_quick_run_has_the_case_that_shows_wrong_numbers():
    quick = [case for case in CASES.values() if "quick" in case.tags]
    assert torch.bfloat16 in {case.dtype for case in quick}


@pytest.mark.parametrize("op", ["outer_moments", "conv_moments"])
def test_peers_on_a_gpu_sum_the_same(op):
    make = {
        "outer_moments": lambda: gpu_samples.linear(3, 4, 5, 6, torch.float32, device="cpu"),
        "conv_moments": lambda: gpu_samples.conv(3, 2, 4, 5, 3, torch.float32, device="cpu"),
    }
    problem = make[op]()
    ours, no_squares, grad, materialised = problem.peers.values()
    total, centred, sq_norms = ours()
    variance, mean, norms = materialised()
    torch.testing.assert_close(no_squares()[0], total)
    torch.testing.assert_close(grad(), total)
    torch.testing.assert_close(total.view_as(mean) / 3, mean)
    torch.testing.assert_close(centred.view_as(variance) / 2, variance)
    torch.testing.assert_close(sq_norms.float(), norms**2)
    assert problem.flops == 2 * 3 * total.numel() * (4 if op == "outer_moments" else 25)
    assert problem.model_us > 0


# --- time -------------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only steps move, at a speed that drifts: each second of it is slower than the one before."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.ran = 0.0, drift, []

    def __call__(self):
        return self.now

    def step(self, name, seconds):
        def run():
            self.now += seconds * (1 + self.drift * self.now)
            self.ran.append(name)

        return run


def test_plan_spreads_turns_evenly_and_shuffles():
    rounds = plan({"fast": 0.01, "other": 0.01, "slow": 0.1}, seconds=3.0)
    turns = {name: [r for r, order in enumerate(rounds) if name in order] for name in ("fast", "other", "slow")}
    assert len(turns["fast"]) == len(turns["other"]) == 100
    gaps = [b - a for a, b in itertools.pairwise(turns["slow"])]
    assert len(turns["slow"]) == 10
    assert set(gaps) == {10}
    assert {order[0] for order in rounds if len(order) == 2} == {"fast", "other"}


def test_slow_peer_has_its_five_turns_and_starves_nobody():
    rounds = plan({"fast": 0.01, "slow": 50.0}, seconds=1.0)
    turns = [sum(name in order for order in rounds) for name in ("fast", "slow")]
    assert turns == [50, LEAST]
    assert len(plan({"instant": 1e-6}, seconds=60.0)) == MOST


def test_drift_of_the_machine_leaves_the_ratio_alone():
    clock = FakeTime(drift=0.5)  # within this run the machine gets several times slower
    times, _ = interleave({"one": clock.step("one", 0.01), "two": clock.step("two", 0.02)}, 4.0, clock)
    assert max(times["one"]) > 2 * min(times["one"])
    ratio = statistics.median(times["two"]) / statistics.median(times["one"])
    assert ratio == pytest.approx(2, rel=0.15)


def test_turns_of_short_steps_are_longer_than_the_clock_is_coarse():
    clock = FakeTime()
    times, repeats = interleave({"short": clock.step("short", 1e-5)}, 0.1, clock)
    assert repeats["short"] == 200
    assert times["short"] == pytest.approx([1e-5] * len(times["short"]))


def test_tape_replays_durations_exactly():
    tape, durations = Tape(), [0.1, 1e-9, 3.3333333333333335]
    tape.load(durations)
    assert [-tape() + tape() for _ in durations] == durations


# --- right and wrong --------------------------------------------------------------------------------------------------


def forgetful(given, **choice):
    """A step that never stores its last coordinate."""
    step = torch_step(given)

    def run():
        last = [p.detach().view(-1)[-1:].clone() for p in given.params]
        step.run()
        for p, value in zip(given.params, last, strict=True):
            p.detach().view(-1)[-1:] = value

    return Step(run)


def deluded(given):
    """A right step with a wrong sum."""
    step = normkern_measured(given, stats="tensor")
    return Step(step.run, lambda: step.sums() * torch.tensor([1.0, 1.01, 1.0]))


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maker", [normkern_step, torch_step])
def test_right_steps_are_found_right(maker, dtype):
    assert right.sgd_fault(maker, dtype) == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_sums_are_found_right(dtype):
    for stats in ("tensor", "row"):
        assert right.sgd_statistics_fault(lambda given, stats=stats: normkern_measured(given, stats), dtype) == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_step_is_found_wrong(dtype):
    assert right.sgd_fault(forgetful, dtype).startswith("wrong: ")


def test_wrong_sum_is_found_wrong():
    assert right.sgd_statistics_fault(deluded, torch.float32).startswith("wrong: its sums")
    assert right.sgd_statistics_fault(normkern_step, torch.float32) == "wrong: it measures nothing"


PAIRS = {
    "normkern": normkern_pairs,
    "reference": reference_pairs,
    "combine": torch_pairs,
    "lerp": lambda given: torch_pairs(given, in_place=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PAIRS)
def test_right_steps_from_pairs_are_found_right(name, dtype):
    assert right.svag_fault(PAIRS[name], dtype) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_step_from_pairs_is_right_in_low_precision(dtype):
    assert right.svag_fault(normkern_pairs, dtype) == ""


def swapped(given):
    """A step whose first gradients are the second ones."""
    other = Arrays(given.params, given.momentum_buffers, given.hyper, given.graph)
    other.held[:] = [g.clone() for g in given.grads]
    for p, g in zip(given.params, given.held, strict=True):
        p.grad = g
    return normkern_pairs(other)


def deluded_of_pairs(given):
    step = normkern_pairs(given)
    return Step(step.run, lambda: step.sums() * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.01]))


def test_wrong_steps_from_pairs_are_found_wrong():
    assert "eps of float32 off after 3 steps" in right.svag_fault(swapped, torch.float32)
    assert right.svag_fault(deluded_of_pairs, torch.float32).startswith("wrong: its sums")
    assert right.svag_fault(normkern_step, torch.float32).startswith("wrong: ")


def test_peers_of_pairs_leave_the_gradients_where_others_find_them():
    given = arrays([(8, 8), (5,)], torch.float32)
    before = given.grads
    for maker in PAIRS.values():
        maker(given).run()
        assert all(a is b for a, b in zip(given.grads, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_moments_are_found_right(dtype):
    assert right.moments_fault(normkern_moments, dtype) == ""
    for through_torch in (False, True):
        assert right.moments_fault(lambda given, way=through_torch: op_moments(given, way), dtype) == ""
    assert right.moments_fault(lambda given: torch_moments(given, "var_mean"), dtype) == ""
    assert right.moments_fault(lambda given: torch_moments(given, "squares"), dtype) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrong_moments_are_found_wrong(dtype):
    def difference_of_squares(given):
        x = given.x

        def sums():
            variance = ((x * x).mean(0) - x.mean(0) ** 2) * len(x) / (len(x) - 1)
            return torch.cat([x.double().mean(0), variance.double(), x.double().square().sum(1)])

        return Step(lambda: None, sums)

    assert right.moments_fault(difference_of_squares, dtype).startswith("wrong: ")


def noise_peer(job, make):
    return NoisePeer("somebody", job, make)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch.func
@pytest.mark.parametrize("net", NETS)
def test_right_noise_is_found_right(net):
    torch.set_num_threads(1)  # tensors of a few numbers
    for peer in NOISE_PEERS:
        if not peer.needs:
            assert noise_right.fault(peer, net) == "", peer.name


def biased(task):
    """A variance divided by B."""
    watched = torch_func(task)

    def statistics():
        said = watched.statistics()
        batch = len(task.inputs)
        return Statistics(None, said.sq_norms, {n: v * (batch - 1) / batch for n, v in said.variance.items()})

    return Watched(watched.run, statistics)


def partial(task):
    """One that does not see biases."""
    watched = torch_func(task)

    def statistics():
        said = watched.statistics()
        return Statistics(None, said.sq_norms, {n: v for n, v in said.variance.items() if n.endswith("weight")})

    return Watched(watched.run, statistics)


def test_wrong_noise_is_found_wrong():
    net = "MLP, B=128"
    assert noise_right.fault(noise_peer("norms + variance", biased), net).startswith("wrong: variance is off by")
    assert noise_right.fault(noise_peer("norms + variance", partial), net).startswith("wrong: variance of 3 parameters")
    assert noise_right.fault(noise_peer("norms", plain), net) == "wrong: it does not tell sq_norms"
    assert noise_right.fault(noise_peer("norms", lambda task: 1 / 0), net).startswith("fails: ZeroDivisionError")
    scaled = noise_peer("noise scale", lambda task: Watched(lambda: None, lambda: Statistics(torch.tensor(1.0))))
    assert noise_right.fault(scaled, net).startswith("wrong: trace_sigma is off by")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_is_that_of_the_step():
    """torch.func has all gradients in memory, B P numbers; ours has not."""
    theirs = peak_megabytes("Linear stack, B=32, T=16", "torch.func", 2)
    mine = peak_megabytes("Linear stack, B=32, T=16", "normkern norms + variance", 2)
    parameters = 4 * 4_199_424 / 2**20
    assert theirs > 32 * parameters
    assert 2 * parameters < mine < 16 * parameters
    with pytest.raises(RuntimeError, match=r"nobody on Linear stack.*StopIteration"):
        peak_megabytes("Linear stack, B=32, T=16", "nobody", 2)


def test_peer_that_raises_or_is_missing_is_reported_not_run():
    raising = Peer("raising", "step", lambda given: 1 / 0)
    assert fault(raising, torch.float32) == "fails: ZeroDivisionError: division by zero"
    missing = Peer("missing", "step", torch_step, needs=(("no_such_module", "no-such-package"),))
    assert fault(missing, torch.float32) == "not installed: no-such-package"


def test_measure_times_the_right_and_leaves_out_the_wrong():
    ours = Peer("normkern", "step", normkern_step)
    result = measure(LITTLE, 0.05, [ours, Peer("default", "step", torch_step), Peer("bad", "step", forgetful)])
    assert list(result.left_out) == ["bad"]
    assert {"normkern", "default"} <= set(result.samples)
    assert "bad" not in result.samples
    assert all(len(samples) >= LEAST for samples in result.samples.values())
    info = result.info("default")
    seconds = {name: statistics.median(result.samples[name]) for name in ("default", "normkern")}
    assert info["bytes_moved"] == 5 * 67 * 4
    assert info["times_of_anchor"] == seconds["default"] / seconds["normkern"]
    assert info["gigabytes_per_second"] == info["bytes_moved"] / seconds["default"] / 1e9


@pytest.mark.skipif(compiler() is None, reason="limits need a C++ compiler")
def test_limits_run_on_as_many_bytes_as_the_case_has():
    steps = limit_steps(4 * 100_003)
    assert list(steps) == list(LIMITS)
    for step in steps.values():
        step()


def test_arrays_are_shared_and_the_steps_use_them():
    given = arrays([(4, 5)], torch.float32)
    normkern_step(given).run()
    w, g = given.params[0].detach(), given.params[0].grad
    assert torch.allclose(given.momentum_buffers[0], g + HYPER["weight_decay"] * w, atol=1e-5)


# --- results ----------------------------------------------------------------------------------------------------------


def results_file(path, seconds, left_out=(), cpu="some", commit="0123456789abcdef", peaks=None):
    """What a run would have written: {peer: median or (q1, median, q3)} on one case; with peaks that of a network."""
    entries = []
    for peer, t in seconds.items():
        low, median, high = t if isinstance(t, tuple) else (0.99 * t, t, 1.01 * t)
        job = "limit" if peer in LIMITS else JOB_OF.get(peer, "step")
        info = {"job": job, "peer": peer, "gigabytes_per_second": 1.0, "tensors": 1, "coordinates": 4}
        info |= {"dtype": "float32", "tags": ["plot"]}
        if peaks is not None:
            del info["gigabytes_per_second"]
            info["peak_megabytes"] = peaks.get(peer)
        stats = {"median": median, "q1": low, "q3": high, "rounds": 9}
        entries.append({"group": "a case, float32", "stats": stats, "extra_info": info})
    document = {
        "machine_info": {"cpu": cpu, "cores": 2, "threads": 2, "isa": "v4", "torch": "2.13.0"},
        "commit_info": {"id": commit, "dirty": False},
        "datetime": "2026-01-01T00:00:00+00:00",
        "benchmarks": entries,
        "normkern": {
            "quick": False,
            "left_out": [
                {"group": "a case, float32", "peer": p, "job": JOB_OF.get(p, "step"), "reason": r} for p, r in left_out
            ],
        },
    }
    path.write_text(json.dumps(document))
    return path


BEFORE = {"five-stream loop": 1.0, "normkern": 1.0, "normkern row": 1.0, "torch default": 3.0, "torch fused": 1.1}


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        (BEFORE, 0, "0 of normkern's slower"),
        ({name: 2 * t for name, t in BEFORE.items()}, 0, "0 of normkern's slower"),  # a slower machine
        ({**BEFORE, "normkern": 1.05}, 0, "0 of normkern's slower"),  # below the threshold
        ({**BEFORE, "normkern": 1.3}, 1, "1 of normkern's slower"),
        ({name: (2.6 if name == "normkern" else 2 * t) for name, t in BEFORE.items()}, 1, "1 of normkern's slower"),
        ({**BEFORE, "normkern": (0.9, 1.3, 1.9)}, 0, "noise"),  # its quartiles touch
        ({**BEFORE, "normkern": 1.3, "torch default": 4.5, "torch fused": 1.2}, 0, "noise"),  # others changed as much
        ({**BEFORE, "normkern": 0.7}, 0, "faster"),
        ({**BEFORE, "torch default": 9.0}, 0, "slower"),  # reported, and no failure
    ],
)
def test_compare_takes_the_machine_out(tmp_path, capsys, after, code, said):
    old, new = results_file(tmp_path / "old", BEFORE), results_file(tmp_path / "new", after)
    assert compare.main([str(old), str(new)]) == code
    assert said in capsys.readouterr().out


def test_compare_refuses_other_machines(tmp_path, capsys):
    old, new = results_file(tmp_path / "old", BEFORE), results_file(tmp_path / "new", BEFORE, cpu="another")
    assert compare.main([str(old), str(new)]) == 2
    assert "cpu: some -> another" in capsys.readouterr().out
    assert compare.main([str(old), str(new), "--across-machines"]) == 0


def test_compare_fails_when_ours_is_no_longer_right(tmp_path, capsys):
    after = {name: t for name, t in BEFORE.items() if name != "normkern"}
    old = results_file(tmp_path / "old", BEFORE)
    new = results_file(tmp_path / "new", after, left_out=[("normkern", "wrong: 99 eps")])
    assert compare.main([str(old), str(new)]) == 1
    assert "was right and is not" in capsys.readouterr().out


def test_readme_gets_the_table_between_its_marks(tmp_path):
    seconds = {"five-stream loop": 0.01, "normkern": 0.01, "torch default": 0.025}
    out = [("torch fused", "wrong: 137 eps"), ("optimi", "not installed: torch-optimi")]
    table = report.readme_table(load(results_file(tmp_path / "json", seconds, out)))
    lines = table.splitlines()
    assert lines[2].startswith("| a case, float32 | 10.0 ms |")
    cells = dict(zip(lines[0].split("|"), lines[2].split("|"), strict=True))
    assert cells[" torch default "] == " 2.50 "
    assert cells[" torch fused "] == " wrong "
    assert cells[" torch compile "] == " - "
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    report.write_between_marks(readme, table)
    assert readme.read_text() == f"before\n<!-- bench:begin -->\n{table}\n<!-- bench:end -->\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="expected one <!-- bench:begin -->"):
        report.write_between_marks(readme, table)


def test_adamw_table_has_its_peers_as_multiples(tmp_path):
    seconds = {"seven-stream loop": 0.019, "normkern AdamW": 0.020, "torch AdamW fused": 0.025}
    lines = report.adamw_table(load(results_file(tmp_path / "json", seconds))).splitlines()
    assert lines[2] == "| a case, float32 | 20.0 ms | - | 1.25 | - | - | 0.950 |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert report.adamw_table(load(results_file(tmp_path / "none", BEFORE))) == ""


def test_svag_has_a_table_of_its_own(tmp_path, monkeypatch):
    seconds = {"six-stream loop": 0.01, "normkern": 0.01, "normkern SVAG": 0.0125, "lerp + torch fused + sums": 0.05}
    out = [("combine + torch fused + sums", "wrong: 137 eps")]
    file = results_file(tmp_path / "json", seconds, out)
    table = report.svag_table(load(file))
    lines = table.splitlines()
    assert lines[2] == "| a case, float32 | 12.5 ms | 1.25 | wrong | 4.00 | - | - | 0.800 |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert report.svag_table(load(results_file(tmp_path / "none", BEFORE))) == ""
    readme = tmp_path / "README.md"
    one = "<!-- bench:begin -->\n<!-- bench:end -->\n"
    for marks in ("", "<!-- bench-svag:begin -->\n<!-- bench-svag:end -->\n"):
        readme.write_text(one + marks)
        monkeypatch.setattr("sys.argv", ["report", str(file), "--readme", str(readme)])
        report.main()
        assert (table in readme.read_text()) == bool(marks)


def test_noise_has_a_table_of_its_own(tmp_path):
    seconds = {PLAIN: 0.1, "normkern nsr": 0.105, "Opacus ghost": 0.2}
    out = [("BackPACK L2", "fails: AttributeError: no attribute"), ("torch.func", "not installed: torch")]
    file = results_file(tmp_path / "json", seconds, out, peaks={PLAIN: 50.0, "normkern nsr": 51.25})
    lines = report.noise_table(load(file)).splitlines()
    assert lines[2] == (
        "| a case, float32 | 100 ms (50.0 MB) | 1.05 (51.2 MB) | - | - | 2.00 | fails | - | - | not installed |"
    )
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert report.noise_table(load(results_file(tmp_path / "none", BEFORE))) == ""


def test_report_shows_networks_without_rates(tmp_path, capsys):
    file = results_file(tmp_path / "json", {PLAIN: 0.1, "normkern nsr": 0.105}, peaks={PLAIN: 50.0})
    report.show(report.Console(width=120), load(file))
    printed = capsys.readouterr().out
    assert "peak MB" in printed
    assert "GB/s" not in printed
    assert "50.0" in printed


def test_report_shows_everybody_and_why_some_are_missing(tmp_path, capsys):
    out = [("torch fused", "wrong: 137 eps of bfloat16 off")]
    report.show(report.Console(width=120), load(results_file(tmp_path / "json", BEFORE, out)))
    printed = capsys.readouterr().out
    assert all(peer in printed for peer in BEFORE)
    assert "torch fused, a case, float32: wrong: 137 eps of bfloat16 off" in printed


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plot import plot

    seconds = {**BEFORE, "six-stream loop": 1.2, "normkern SVAG": 1.3, "reference SVAG": 50.0}
    left_out = [("torch fused", "wrong: 137 eps"), ("lerp + torch fused + sums", "wrong: 137 eps")]
    results = load(results_file(tmp_path / "json", seconds, left_out))
    assert results.jobs["lerp + torch fused + sums"] == "SVAG step"
    plot(replace(results, quick=True), tmp_path / "docs" / "bench.png")
    assert (tmp_path / "docs" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("x", "text"), [(0.44, "0.440"), (7.8, "7.80"), (318.4, "318"), (999.7, "1000"), (1290, "1290")]
)
def test_digits(x, text):
    assert digits(x) == text


# --- networks that people train ---------------------------------------------------------------------------------------


def test_published_networks_of_a_missing_library_are_left_out_of_the_table():
    found = noise_models.measure(published.Published("cells", small_cells), 0.0, "process")
    assert set(found["times_of_plain"]) == {"plain", "nsr", "norms + variance"}
    assert found["times_of_plain"]["plain"] == 1
    assert min(found["turns"].values()) >= noise_models.LEAST
    machine = {"cpu": "a CPU", "isa": "v3", "torch": "2"}
    table = noise_models.table(
        {"machine_info": machine, "clock": "process", "cases": [found], "left_out": {"another": "timm"}}
    ).splitlines()
    assert table[2].startswith("| cells | ")
    assert table[3] == "| another | - | needs timm | - | - |"
    assert published.Published("another", small_cells, "no_such_library").missing() == "no_such_library"


def small_cells():
    model, x = torch.nn.Linear(4, 4), torch.randn(6, 4)
    return model, lambda: model(x).square().mean()


def test_published_networks_begin_without_zeros():
    own = [net for net in published.PUBLISHED if not net.library]
    assert own
    for net in own:
        model, loss = published.made(net)
        assert all(bool(p.any()) for p in model.parameters())
        assert bool(loss().isfinite())
