"""Closeness of runs, from numbers logged for several seeds."""

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkern import compare_runs


def run(R=4.0, G=1.0, N=2.0, seeds=8, spread=0.02, accuracy=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {"R": R, "G": G, "N": N} | ({} if accuracy is None else {"accuracy": accuracy})
    return {
        k: x * (1 + spread * torch.randn(seeds, generator=generator, dtype=torch.float64)) for k, x in values.items()
    }


def test_verdicts():
    runs = {1: run(), 2: run(R=4.2, seed=1), 4: run(N=3.5, seed=2), 8: run(G=1.4, seed=3, spread=0.05)}
    compared = compare_runs(runs)
    assert {l: x.verdict for l, x in compared.runs.items()} == {2: "close", 4: "not close", 8: "undecided"}
    assert compared.runs[4].ratios["N"].low > math.sqrt(2)
    assert compared.runs[2].ratios["R"].estimate == pytest.approx(float(runs[2]["R"].mean() / runs[1]["R"].mean()))
    assert compared.runs[2].seeds == (8, 8)
    assert compare_runs(runs, C=2.5).runs[4].verdict == "close"


def test_reference_may_be_any_key_and_accuracy_is_a_difference():
    compared = compare_runs({"sgd": run(accuracy=0.9), "svag": run(accuracy=0.8, seed=1)}, reference="sgd")
    x = compared.runs["svag"].accuracy
    assert x.low < -0.09 < x.high + 0.03
    assert x.estimate == pytest.approx(-0.1, abs=0.03)
    assert compared.runs["svag"].verdict == "close", "accuracy has no part in the verdict"
    assert compare_runs({1: run(accuracy=0.9), 2: run()}).runs[2].accuracy is None


def test_lost_signal_is_undecided():
    noisy = run() | {"G": torch.tensor([-1.0, 2.0, -0.5, 1.0, 0.3, -2.0, 1.5, 0.1])}
    compared = compare_runs({1: noisy, 2: run(seed=1)})
    assert compared.runs[2].verdict == "undecided"
    assert math.isinf(compared.runs[2].ratios["G"].high)
    assert compared.to_dict()["runs"]["l = 2"]["ratios"]["G"]["high"] is None
    assert json.dumps(compared.to_dict(), allow_nan=False)


def test_verdicts_are_wrong_as_seldom_as_they_say():
    """At the edge of closeness, where every verdict but "undecided" is wrong half of the time at worst."""
    edge = math.sqrt(2)
    wrong = {"close": 0, "not close": 0}
    missed = 0
    for seed in range(300):
        outside = compare_runs({1: run(seeds=5, spread=0.1, seed=3 * seed),
                                2: run(R=4 * edge, seeds=6, spread=0.2, seed=3 * seed + 1)})  # fmt: skip
        verdict = outside.runs[2].verdict
        wrong[verdict] = wrong.get(verdict, 0) + 1
        truth = {"R": edge, "G": 1.0, "N": 1.0}
        missed += not all(x.low <= truth[k] <= x.high for k, x in outside.runs[2].ratios.items())
    assert wrong["close"] / 300 <= 0.05
    assert wrong["not close"] / 300 <= 0.07
    assert missed / 300 <= 0.09  # 5 %, and three standard errors


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.floats(0.2, 5), st.floats(0.01, 0.2), st.integers(0, 1000))
def test_verdict_is_what_the_intervals_say(m, n, factor, spread, seed):
    compared = compare_runs({1: run(seeds=m, spread=spread, seed=seed), 2: run(R=4 * factor, seeds=n, seed=seed + 1)})
    x = compared.runs[2]
    inside = [i.low >= 1 / compared.C and i.high <= compared.C for i in x.ratios.values()]
    outside = [i.high < 1 / compared.C or i.low > compared.C for i in x.ratios.values()]
    assert x.verdict == ("close" if all(inside) else "not close" if any(outside) else "undecided")


def test_table_json_and_pickle():
    compared = compare_runs({1: run(accuracy=0.9), 2: run(R=4.2, seed=1, accuracy=0.9)})
    assert pickle.loads(pickle.dumps(compared)) == compared
    lines = str(compared).splitlines()
    assert lines[0].split("  ")[0] == "over l = 1"
    assert lines[1].startswith("l = 2")
    assert lines[1].endswith("close")
    assert len(compared.rows()) == 2


GOOD = {"R": [1.0, 2.0], "G": [1.0, 2.0], "N": [1.0, 2.0]}
REFUSED = {
    "no mapping": ([GOOD], {}, TypeError, "runs expected a mapping"),
    "no mapping inside": ({1: [1.0], 2: GOOD}, {}, TypeError, "runs expected a mapping"),
    "no reference": ({2: GOOD, 4: GOOD}, {}, ValueError, r"expected the reference 1 and at least one other.*\[2, 4\]"),
    "nothing to compare": ({1: GOOD}, {}, ValueError, "at least one other"),
    "no measure": (
        {1: GOOD, 2: {"R": [1.0, 2.0]}},
        {},
        ValueError,
        r"runs\[2\] expected the measures R, G, N, got \['R'\]",
    ),
    "one seed": ({1: GOOD, 2: GOOD | {"G": [1.0]}}, {}, ValueError, "at least 2 seeds, got 1"),
    "not finite": ({1: GOOD, 2: GOOD | {"G": [1.0, math.nan]}}, {}, ValueError, r"finite numbers, got \[1.0, nan\]"),
    "a number": ({1: GOOD, 2: GOOD | {"G": 1.0}}, {}, TypeError, "a number for each seed"),
    "text": ({1: GOOD, 2: GOOD | {"G": "abc"}}, {}, TypeError, "a number for each seed"),
    "negative": ({1: GOOD, 2: GOOD | {"R": [1.0, -1.0]}}, {}, ValueError, "numbers >= 0"),
    "C": ({1: GOOD, 2: GOOD}, {"C": 1}, ValueError, "C expected a finite number > 1"),
    "confidence": ({1: GOOD, 2: GOOD}, {"confidence": 2}, ValueError, "confidence expected a number in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_was_expected(case):
    runs, given_, error, text = REFUSED[case]
    with pytest.raises(error, match=f"compare_runs: .*{text}"):
        compare_runs(runs, **given_)
