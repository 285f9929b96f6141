"""Check experiments/: claims' lines, runs that are not repeated, reports, statistics with known answers, bfloat16 training."""

import argparse
import base64
import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from rich.console import Console
from support import fresh

import normkern
from experiments import low_precision
from experiments.papers import auto_rate, branched, exponential, intrinsic, report, statistics, svag
from experiments.papers.claims import Claim
from experiments.papers.data import batches, for_all, load, loss_of, losses_of
from experiments.papers.figures import Figures, label
from experiments.papers.nets import Ensemble, by_member
from experiments.papers.paper import Paper, Scale, Table, reproduce
from experiments.papers.runs import Results, Run, append, read, run_all, source_digest
from experiments.papers.training import cosine, log_steps, step_decay, take_step

ROOT = Path(__file__).parent.parent
PAPERS = [m.PAPER for m in (auto_rate, exponential, intrinsic, svag)]


def claim(**given):
    fields = {"arxiv": "1234.56789", "number": 1, "where": "section 1", "paper": "it is so", "here": "1 [0, 2]",
              "criterion": "it is", "passed": True, "seeds": 3, "differs": "nothing"}  # fmt: skip
    return Claim(**(fields | given))


# Claims


def test_claim_line():
    assert str(claim()) == "CLAIM 1234.56789 1: paper it is so | here 1 [0, 2] | PASS"
    assert str(claim(passed=False)).endswith(" | FAIL")


# Statistics


def test_mean_has_students_interval():
    # t with 3 degrees of freedom at 97.5 %: 3.1824; standard deviation of 1, 2, 3, 4: 1.2910.
    x = statistics.mean([1.0, 2.0, 3.0, 4.0])
    assert x.estimate == 2.5
    assert x.half_width == pytest.approx(3.18245 * 1.29099 / 2, rel=1e-5)


def test_mean_of_one_says_nothing_of_its_spread():
    assert statistics.mean([3.0]) == (3.0, -math.inf, math.inf)


def test_slope_of_a_line_with_known_residuals():
    # y = 2x + 1 + (1, -1, -1, 1)/10: the residuals are orthogonal to 1 and x; standard error sqrt(0.04/2/5).
    x = statistics.slope([0.0, 1.0, 2.0, 3.0], [1.1, 2.9, 4.9, 7.1])
    assert x.estimate == pytest.approx(2.0)
    assert x.half_width == pytest.approx(4.30265 * math.sqrt(0.04 / 2 / 5), rel=1e-5)


def test_welchs_difference():
    x = statistics.difference([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0])
    assert x.estimate == -2.5
    # Standard error sqrt(5/12 + 20/12), Satterthwaite's degrees of freedom 4.4118, t 2.6748.
    assert x.half_width == pytest.approx(2.6775 * math.sqrt(25 / 12), rel=2e-3)


def test_intervals_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 5, generator=generator).tolist()
    covered = sum(statistics.mean(x).low <= 0 <= statistics.mean(x).high for x in samples) / 2000
    assert abs(covered - 0.95) < 0.02


def test_ratio_of_geometric_means():
    assert statistics.log_ratio([2.0, 8.0], [1.0, 4.0]).estimate == pytest.approx(2.0)


# Data and networks


def test_digits_are_normalised():
    data = load(None)
    assert data.images.shape == (1437, 1, 8, 8)
    assert abs(data.images.mean()) < 1e-5
    assert data.images.std() == pytest.approx(1, abs=1e-4)


def test_cifar10_in_torchvisions_layout(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = torch.randint(256, (4, 3072), dtype=torch.uint8).numpy()
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [0, 1, 2, 3]}))
    data = load(str(tmp_path))
    assert data.images.shape == (20, 3, 32, 32)
    assert data.test_images.shape == (4, 3, 32, 32)
    assert data.labels.tolist() == [0, 1, 2, 3] * 5
    net = Ensemble(2, 3, torch.Generator().manual_seed(0))
    assert net(for_all(data.images, 2)).shape == (20, 2, 10)


def test_fixed_wrong_labels_stay_the_same():
    data = load(None)
    wrong = data.with_wrong_labels(0.2)
    assert torch.equal(wrong.labels, data.with_wrong_labels(0.2).labels)
    assert float((wrong.labels != data.labels).double().mean()) == pytest.approx(0.18, abs=0.03)


@pytest.mark.parametrize("norm", exponential.NORMS)
def test_members_are_networks_of_their_own(norm):
    """What one member computes and learns does not depend on the others; every weight is scale-invariant."""
    data = load(None).to(torch.float64)
    both = Ensemble(2, 1, torch.Generator().manual_seed(0), norm=norm).double()
    alone = Ensemble(1, 1, torch.Generator().manual_seed(1), norm=norm).double()
    with torch.no_grad():
        for (_, a), (_, b) in zip(both.named_parameters(), alone.named_parameters(), strict=True):
            b.copy_(a[1:])
    batch = next(batches(data, 2, 16, torch.Generator().manual_seed(2)))
    logits = both(batch.images)
    torch.testing.assert_close(logits[:, 1:], alone(batch.images[:, 1:]))
    loss_of(logits, batch.labels).backward()
    loss_of(alone(batch.images[:, 1:]), batch.labels[:, 1:]).backward()
    for (name, a), (_, b) in zip(both.scale_invariant(), alone.scale_invariant(), strict=True):
        torch.testing.assert_close(a.grad[1:], b.grad, msg=name)
        cosine = (a * a.grad).sum() / (a.norm() * a.grad.norm())
        assert abs(cosine) < 1e-10, name


def test_networks_of_other_seeds_have_the_same_last_layer():
    """Else two ensembles with the same law of training would predict differently for ever."""
    one, other = (Ensemble(2, 1, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(one.head, other.head)
    assert not torch.equal(one.stem, other.stem)
    assert not torch.equal(one.stem[0], one.stem[1])


def test_losses_by_member():
    logits, labels = torch.randn(5, 3, 10), torch.randint(10, (5, 3))
    expected = [torch.nn.functional.cross_entropy(logits[:, m], labels[:, m]) for m in range(3)]
    torch.testing.assert_close(losses_of(logits, labels), torch.stack(expected))


def test_recalibrated_statistics_know_the_weights_length():
    """Test accuracy after all weights were made longer: the same logits, from statistics of the weights as they are."""
    data = load(None)
    net = Ensemble(2, 1, torch.Generator().manual_seed(0))
    before = net.logits(data, data.test_images[:50])
    with torch.no_grad():
        for _, w in net.scale_invariant():
            w *= 1000
    torch.testing.assert_close(net.logits(data, data.test_images[:50]), before, rtol=1e-3, atol=1e-3)
    # With the statistics of training images: a test image's logits do not depend on its company.
    torch.testing.assert_close(net.logits(data, data.test_images[:5]), before[:5], rtol=1e-3, atol=1e-3)


def test_statistics_by_row_are_by_member():
    net = Ensemble(3, 1, torch.Generator().manual_seed(0))
    optimizer = normkern.SGD(net.scale_invariant(), lr=0.1, stats="row")
    expected = net.weight_sq()
    take_step(net, optimizer, next(batches(load(None), 3, 8, torch.Generator().manual_seed(1))))
    torch.testing.assert_close(by_member(optimizer.stats().weight_sq, 3).sum(0), expected)


def test_schedules_and_looks():
    assert [round(step_decay(1.0, [2, 3])(s), 6) for s in range(4)] == [1.0, 1.0, 0.1, 0.01]
    assert cosine(1.0, 10)(0) == 1.0
    assert cosine(1.0, 10)(10) == pytest.approx(0.01)
    assert log_steps(8, 1) == [1, 2, 4, 8]


def test_bursts_begin_where_the_loss_returns():
    assert exponential.burst_begins([0.5, 0.005, 0.2, 0.05, 0.3, 0.001, 0.15]) == [2, 6]


def test_quadratic_follows_its_recursion():
    """E x^2 of SVAG on a quadratic is known exactly (l = 2, ten steps of lr 0.4)."""
    told = svag.quadratic(2.0, 0, 200_000)
    a, l, lr, steps = 1 - svag.TOY_LR / 2, 2, svag.TOY_LR, 10
    exact = a ** (2 * steps) * svag.TOY_BEGIN**2 + lr**2 / l * (1 - a ** (2 * steps)) / (1 - a * a)
    decayed = math.exp(-2 * svag.TOY_TIME)
    sde = svag.TOY_BEGIN**2 * decayed + lr / 2 * (1 - decayed)
    assert abs(told["error"] - (exact - sde)) < 5 * told["standard_error"]


# Runs


def double(x):
    return {"twice": 2 * x}


def test_runs_are_appended_and_not_made_twice(tmp_path):
    path, console = tmp_path / "runs.jsonl", Console(file=io.StringIO())
    runs = [Run(double, {"x": x}) for x in (1, 2)]
    first = run_all(runs, path, workers=0, console=console)
    assert first.one(double, x=2) == {"twice": 4}
    written = path.read_bytes()
    again = run_all([*runs, Run(double, {"x": 3})], path, workers=0, console=console)
    assert path.read_bytes().startswith(written)
    assert len(path.read_text().splitlines()) == 3
    assert [r["twice"] for _, r in again.of(double)] == [2, 4, 6]


def test_a_torn_last_line_is_no_result_and_spoils_none(tmp_path):
    path = tmp_path / "runs.jsonl"
    append(path, {"key": "a", "result": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "resu')
    append(path, {"key": "c", "result": 3})
    assert sorted(read(path)) == ["a", "c"]


SOURCE = """
from typing import NamedTuple
CONSTANT = 3
class Pair(NamedTuple):
    a: int
    b: int
def used():
    return Pair({}, CONSTANT)
def run():
    return used() + CONSTANT
"""


def digest_of(folder, package, value):
    """Return the digest of a run in another process, whose source is a file with the package's name."""
    (folder / f"{package}.py").write_text(SOURCE.format(value))
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from experiments.papers import runs; "
        f"runs.PACKAGE = {package!r}; import {package} as m; print(runs.source_digest(m.run))"
    )
    done = fresh.python("-c", f"import sys; sys.dont_write_bytecode = True; {code}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_results_of_other_source_are_not_reused(tmp_path):
    first = digest_of(tmp_path, "papers_source", 1)
    assert digest_of(tmp_path, "papers_source", 1) == first
    assert digest_of(tmp_path, "papers_source", 2) != first
    assert source_digest(auto_rate.tuned) != source_digest(auto_rate.descent)


def test_results_outlive_a_move_of_the_package(tmp_path):
    # The methods of a NamedTuple belong to the module `collections`, which stands between these two in the alphabet.
    assert digest_of(tmp_path, "before", 1) == digest_of(tmp_path, "moved", 1)


KILLED = """
import sys, time
from pathlib import Path
from rich.console import Console
from experiments.papers.runs import Run, run_all
from {module} import slow

if __name__ == "__main__":
    runs = [Run(slow, {{"x": x, "begun": {begun!r}}}, cost=9 - x) for x in range(6)]
    results = run_all(runs, Path({path!r}), workers=2, title="killed", console=Console())
    print("sum", sum(r["x"] for _, r in results.of(slow)))
"""
SLOW = """
import os, time
def slow(x, begun):
    with open(begun, "a") as file:
        file.write(f"{x} {os.getpid()}\\n")
    time.sleep(0.05 if x < 2 else 1.0)
    return {"x": x}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_a_killed_run_continues_where_it_stopped(tmp_path):
    path, begun = tmp_path / "runs.jsonl", tmp_path / "begun"
    (tmp_path / "papers_slow.py").write_text(SLOW)
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(module="papers_slow", path=str(path), begun=str(begun)))
    command, env = [sys.executable, str(script)], {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read(path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    survived = len(read(path))
    assert 2 <= survived < 6
    workers = {int(line.split()[1]) for line in begun.read_text().splitlines()}
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers)), "workers outlived the run"

    made_before = len(begun.read_text().splitlines())
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert "sum 15" in done.stdout
    assert f"{survived} of 6 runs are in" in done.stdout.replace("\n", " ")
    assert path.read_bytes().startswith(kept)
    assert len(begun.read_text().splitlines()) - made_before == 6 - survived


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return status != "Z"


# The advisor beside branches


def test_branches_begin_at_the_same_weights_and_measure_noise():
    told = branched.branches("sgd", steps=2, ks=[1, 2], samples=64, members=2, seed=0, data=None)
    assert {k: len(x) for k, x in told["loss"].items()} == {"1": 2, "2": 2}
    assert len(told["trace_sigma"]) == len(told["grad_sq_norm_unbiased"]) == 4
    assert min(told["trace_sigma"]) > 0
    again = branched.branches("sgd", steps=2, ks=[2, 1], samples=64, members=2, seed=0, data=None)
    assert again["loss"] == told["loss"], "a branch does not depend on those before it"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_branch_has_the_state_of_the_trunk_and_its_own_hyperparameters(name):
    data = load(None)
    net = Ensemble(1, 1, torch.Generator().manual_seed(0))
    trunk = branched._optimizer(name, net, 1)
    take_step(net, trunk, next(batches(data, 1, 8, torch.Generator().manual_seed(1))))
    branch = branched._continued(name, net, 4, trunk.state_dict())
    scaled = 4 if name == "sgd" else 2
    assert branch.param_groups[0]["lr"] == pytest.approx(branched.LR[name] * scaled)
    assert branch.param_groups[0]["weight_decay"] == branched.WEIGHT_DECAY[name] * (1 if name == "sgd" else 2)
    if name == "adamw":
        assert branch.param_groups[0]["betas"] == (0.6, 0.96)
        for p in net.parameters():
            if p.requires_grad:
                assert torch.equal(branch.state[p]["exp_avg"], trunk.state[p]["exp_avg"])
                assert branch.state[p]["exp_avg"].any()


def test_branched_k_lies_between_the_last_in_and_the_first_out():
    def of(**verdicts):
        return branched.critical({int(k[1:]): (statistics.Interval(1, 1, 1), v) for k, v in verdicts.items()})

    assert of(k2="in", k4="open", k8="out", k16="out") == (2, 8)
    assert of(k2="open", k4="in", k8="in") == (1, math.inf)
    assert of(k2="out", k4="out") == (1, 2)
    assert of(k2="in", k4="out", k8="open") == (2, math.inf)
    found = branched.verdicts({"1": [1.0, 1.1, 0.9], "2": [1.0, 1.1, 0.9], "8": [2.0, 2.2, 1.8], "4": [1.0, 1.5, 1.0]})
    assert {k: verdict for k, (_, verdict) in found.items()} == {2: "in", 4: "open", 8: "out"}


# Reports


def small_paper(passed=True):
    def judge(results: Results, figures: Figures):
        with figures.draw("line", 1) as (axis,):
            axis.plot([0, 1], [0, 1])
            label(axis, "time, s", "length, m")
        numbers = {"twice": [r["twice"] for _, r in results.of(double)], "slope": statistics.mean([1.0, 2.0])._asdict()}
        return [claim(passed=passed, here="<1 & 2> a|b", numbers=numbers, figures=(figures.file("line"),))]

    return Paper(
        "1234.56789", "auto_rate", "A Title", "Some Body", "Claims.", lambda scale: [Run(double, {"x": 1})], judge,
        lambda results: [Table("Runs <beside> each other", "How to read it.", [("run", "R|G"), ("l = 2", "1 & 2")])],
    )  # fmt: skip


def test_report_is_self_contained(tmp_path, capsys):
    given = argparse.Namespace(quick=True, data=None, out=tmp_path, workers=0)
    assert reproduce([small_paper()], given)
    assert "CLAIM 1234.56789 1: paper it is so | here <1 & 2> a|b | PASS\n" in capsys.readouterr().out
    page, summary = (tmp_path / "report.html").read_text(), (tmp_path / "summary.md").read_text()
    references = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)""", page)
    inside = [r for r in references if r.startswith("#")]  # from the table of verdicts to the claims
    assert inside
    assert all(f" id={r[1:]}>" in page for r in inside)
    images = [r for r in references if r not in inside]
    assert images
    assert all(r.startswith("data:image/png;base64,") for r in images)
    assert page.index("<table>") < page.index("<h2>")
    assert "url(" not in page
    assert "@import" not in page
    figure = base64.b64decode(images[0].split(",", 1)[1])
    assert figure == (tmp_path / "auto_rate_line.png").read_bytes()
    for text in ("&lt;1 &amp; 2&gt; a|b", "section 1", "torch", torch.__version__, "1.5 [", "PASS", "QUICK run"):
        assert text in page, text
    for text in ("### Runs <beside> each other", "| run | R\\|G |\n| --- | --- |\n| l = 2 | 1 & 2 |"):
        assert text in summary, text
    assert "<h3>Runs &lt;beside&gt; each other</h3><p>How to read it.</p>" in page
    assert "<tr><td>l = 2<td>1 &amp; 2" in page
    for text in ("**PASS**", "a\\|b", "![auto_rate_line.png]", "QUICK run", torch.__version__, "1 of 1 claims"):
        assert text in summary, text
    document = json.loads((tmp_path / "auto_rate.json").read_text())
    assert document["claims"][0]["verdict"] == "PASS"
    assert document["runs"] == 1


def test_tables_of_svag_have_a_verdict_for_every_run():
    """From made-up results: l = 4 leaves SGD at the large batch only, and so does k = 64."""
    told = {}
    for run in svag.runs(Scale(quick=False)):
        if run.function is svag.svag:
            l, scale, members = (run.arguments[k] for k in ("l", "scale", "members"))
            wide = 4.0 if scale == svag.LARGE and l > 2 else 1.0
            spread = [1 + 0.01 * i for i in range(members)]
            means = {"weight_sq": [wide * x for x in spread], "signal": spread, "noise": [x / scale for x in spread]}
            told[run.key] = {"result": {"means": means, "accuracy": [spread]}}
    runs = [run for run in svag.runs(Scale(quick=False)) if run.function is svag.svag]
    small, large, scaled = svag.tables(Results([(run, told[run.key]) for run in runs]))
    assert [row[0] for row in small.rows] == ["over l = 1", "l = 2", "l = 4", "l = 8", "l = 16"]
    assert {row[-1] for row in small.rows[1:]} == {"close"}
    assert [row[-1] for row in large.rows[1:]] == ["close", *["not close"] * 3]
    assert [row[0] for row in scaled.rows[1:]] == ["k = 4", "k = 16", "k = 64"]
    assert {row[-1] for row in scaled.rows[1:]} == {"close"}


def test_a_claim_that_fails_is_printed_and_stays(tmp_path, capsys):
    given = argparse.Namespace(quick=False, data=None, out=tmp_path, workers=0)
    assert not reproduce([small_paper(passed=False)], given)
    assert capsys.readouterr().out.count("| FAIL\n") == 1
    assert "**FAIL**" in (tmp_path / "summary.md").read_text()
    assert "QUICK" not in (tmp_path / "summary.md").read_text()


def test_report_of_nothing(tmp_path):
    assert len(report.write(tmp_path)) == 2


# Papers


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
@pytest.mark.parametrize("quick", [True, False])
def test_every_run_is_plain_and_has_its_own_key(paper, quick):
    runs = paper.runs(Scale(quick=quick))
    assert len({run.key for run in runs}) == len(runs)
    assert all(json.loads(json.dumps(run.arguments)) == run.arguments for run in runs)
    assert paper.arxiv in paper.doc
    assert re.search(r"^1\. .*(section|theorem|lemma|abstract)", paper.doc, re.MULTILINE | re.IGNORECASE)


def test_at_least_twelve_claims_over_four_papers():
    assert len({paper.arxiv for paper in PAPERS}) == 4
    assert sum(len(re.findall(r"^\d\. ", paper.doc, re.MULTILINE)) for paper in PAPERS) >= 12


def test_identity_of_auto_rate_tuning_in_a_few_steps():
    told = auto_rate.identity(lr=3.0, seed=0, members=2, steps=5, data=None)
    assert max(told["mismatch"]) < 1e-10
    assert max(told["least_over_bound"]) <= 1


def test_exponential_runs_are_equal_in_a_few_steps():
    told = exponential.side_by_side(norm="layer", schedule="cosine", seed=0, steps=25, data=None)
    assert max(told["growing"] + told["folded"]) < 1e-11


# Training in bfloat16


def test_table_of_low_precision():
    results = {
        "variants": {"float32": [[(0.5, 9.0), (0.9, 2.0)], [(0.5, 9.0), (0.8, 4.0)]], "master weights": [[(1.0, 3.0)]]}
    }
    lines = low_precision.readme_table(results).splitlines()
    assert lines[2:] == [
        "| float32 | 85.00 ± 7.07 | 3.0 ± 1.4 |",
        "| bfloat16, master weights | 100.00 ± 0.00 | 3.0 ± 0.0 |",
    ]


@pytest.mark.slow
def test_run_of_low_precision(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(low_precision.MARKS))
    files = {"--json": tmp_path / "a.json", "--plot": tmp_path / "a.png", "--readme": readme}
    arguments = ["--seeds", "1", "--epochs", "1", *(str(x) for pair in files.items() for x in pair)]
    monkeypatch.setattr("sys.argv", ["low_precision", *arguments])
    low_precision.main()
    ends = {name: runs[0][-1] for name, runs in json.loads(files["--json"].read_text())["variants"].items()}
    assert ends.keys() == low_precision.VARIANTS.keys()
    assert ends["master weights"][1] == pytest.approx(ends["float32"][1], rel=0.01)
    assert files["--plot"].stat().st_size > 10000
    assert readme.read_text().count("|") > 20
