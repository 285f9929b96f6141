"""normkern.SGD and UltralyticsCallback in a real Ultralytics trainer."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normkern.integrations import UltralyticsCallback

from . import offline

SCRIPT = Path(__file__).with_name("ultralytics_runs.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("no ultralytics")
    folder = tmp_path_factory.mktemp("ultralytics")
    path = os.pathsep.join([str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300, check=False, cwd=folder,
        env={**os.environ, **offline(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "runs.pt")


def distance(run, other, what):
    """Return the largest relative distance of two state dicts, over their tensors of floats."""
    pairs = [(x.double(), other[what][name].double()) for name, x in run[what].items() if x.is_floating_point()]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs)


@pytest.mark.parametrize("kind", ["", " resumed", " scaled"])
@pytest.mark.parametrize("what", ["weights", "average"])
def test_training_agrees_with_torchs_sgd(found, kind, what):
    ours, theirs = (found["runs"][name + kind] for name in ("normkern", "torch"))
    assert ours["type"].startswith("normkern.")
    assert theirs["type"].startswith("torch.")
    assert distance(ours, theirs, what) < 1e-5
    assert ours["scale"] == theirs["scale"] == (256 if kind == " scaled" else 1)


def test_the_runs_have_groups_warmup_accumulation_and_clipping(found):
    ours, theirs = (found["runs"][name] for name in ("normkern", "torch"))
    for key in ("groups", "moving", "steps"):
        assert ours[key] == theirs[key], key
    assert [kind for _, _, kind in ours["groups"]] == ["weight", "bn", "bias"]
    rates, momenta = zip(*(groups[2] for groups in ours["moving"]), strict=True)
    assert len(set(rates)) > 4
    assert len(set(momenta)) > 3
    assert ours["steps"][-1] < len(ours["steps"])
    assert max(ours["grad_norms"]) > 10 > min(ours["grad_norms"])  # Ultralytics clips to 10


def test_callback_logs_steps_and_noise_of_every_parameter_and_changes_no_bit(found):
    plain, logged = found["runs"]["normkern"], found["runs"]["normkern logged"]
    for what in ("weights", "average"):
        assert all(torch.equal(x, plain[what][name]) for name, x in logged[what].items()), what
    count = logged["steps"][-1]
    of_steps = [step for step, values in found["logged"] if "effective_lr/model.0.conv.weight" in values]
    of_noise = [step for step, values in found["logged"] if "noise/batch_size" in values]
    assert of_steps == list(range(2, count + 1, 2))
    assert of_noise == list(range(1, count + 1, 3))
    names = [name for name in plain["weights"] if name.endswith(("weight", "bias"))]
    last = next(values for step, values in reversed(found["logged"]) if step == of_steps[-1])
    assert {f"angular_update/{name}" for name in names} <= set(last)
    values = next(values for step, values in found["logged"] if step == of_noise[-1])
    assert {f"noise/trace_sigma/{name}" for name in names} <= set(values)
    assert values["noise/batch_size"] == 8  # of both batches that the step accumulates
    assert all(math.isfinite(x) for _, values in found["logged"] for x in values.values())


def test_noise_is_that_of_a_backward_for_each_image_whatever_boxes_it_has(found):
    for measured, expected in found["noise"]:
        assert measured == pytest.approx(expected, rel=1e-5)


def test_optimizer_that_measures_nothing_is_refused(found):
    assert found["runs"]["error"].startswith(
        'UltralyticsCallback: expected an optimizer such as normkern.SGD(..., stats="tensor"), whose steps are measured, '
        "got SGD; or every=None"
    )


def test_refusals_are_sentences():
    with pytest.raises(
        TypeError,
        match=r"^UltralyticsCallback: log expected a function log\(values, step\), got dict; for example lambda",
    ):
        UltralyticsCallback({})
    with pytest.raises(ValueError, match=r"^UltralyticsCallback: expected every= or noise_every=, got neither"):
        UltralyticsCallback(print, None)
    with pytest.raises(
        TypeError, match=r"^UltralyticsCallback: attach expected a trainer of Ultralytics, got Linear; for"
    ):
        UltralyticsCallback(print).attach(torch.nn.Linear(2, 2))
