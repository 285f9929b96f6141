"""Is what was installed whole, and does each part of it work? A minute at most; `pytest tests/smoke` from any folder."""

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from torch import nn

import normkern
from normkern import ops

PACKAGE = Path(normkern.__file__).parent


def python(*arguments):
    """In this folder: `python -c` and `-m` would find the package of a checkout first.

    On one thread, since the doctor also judges how busy the machine is; the number matters to no other line.
    """
    return subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers)


def loss(model, step, samples=8):
    torch.manual_seed(step)
    images, labels = torch.randn(samples, 3, 8, 8), torch.randint(5, (samples,))
    return nn.functional.cross_entropy(model(images), labels)


def train(opt, model, steps=3):
    for step in range(steps):
        opt.zero_grad()
        loss(model, step).backward()
        opt.step()


def test_what_runs_is_what_was_installed():
    installed = distribution("normkern")
    assert installed.version == normkern.__version__
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        assert Path(installed.locate_file("normkern")).resolve() == PACKAGE


def test_types_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def test_licenses_are_told():
    assert {"LICENSE", "licenses/pybind11.txt"} <= set(distribution("normkern").metadata.get_all("License-File"))


def test_every_public_name_is_there():
    assert all(hasattr(normkern, name) for name in normkern.__all__)


def test_import_warns_of_nothing():
    done = python("-c", "import torch, warnings; warnings.simplefilter('error'); import normkern")  # torch's own aside
    assert done.returncode == 0, done.stderr


def test_import_needs_no_numpy():
    done = python("-c", "import sys; sys.modules['numpy'] = None; import normkern")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ops.supported_isas())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_those_of_torch(isa, dtype):
    torch.manual_seed(0)
    ours = [torch.randn(n).to(dtype).requires_grad_() for n in (1, 15, 16, 17, 1000)]
    theirs = [w.detach().clone().requires_grad_() for w in ours]
    before = ops.isa()
    ops.select_isa(isa)
    try:
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
        opts = normkern.SGD(ours, stats="tensor", **settings), torch.optim.SGD(theirs, foreach=False, **settings)
        for _ in range(3):
            for w, v in zip(ours, theirs, strict=True):
                w.grad = torch.randn_like(w)
                v.grad = w.grad.clone()
            for opt in opts:
                opt.step()
    finally:
        ops.select_isa(before)
    close = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)  # torch rounds in between
    for w, v in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, v, rtol=close, atol=close)
    stats = opts[0].stats()
    grads = torch.stack([w.grad.double().norm() for w in ours])
    torch.testing.assert_close(stats.grad_norm, grads, rtol=1e-5, atol=0)


def test_exponential_decay_and_schedules():
    model = net()
    conv, *others = model.parameters()
    before_norm = {"params": [conv], "decay": "exponential", "weight_decay": 1e-3}
    opt = normkern.SGD([before_norm, {"params": others}], lr=0.1, momentum=0.9)
    train(opt, model)
    plain = net()
    conv, *others = plain.parameters()
    torch_opt = torch.optim.SGD([{"params": [conv], "weight_decay": 1e-3}, {"params": others}], lr=0.1, momentum=0.9)
    train(torch_opt, plain)
    torch.testing.assert_close(
        opt.true_scale()[0] * next(model.parameters()).double(), conv.double(), rtol=1e-3, atol=1e-5
    )


def test_svag():
    model = net()
    opt = normkern.SVAG(model.named_parameters(), lr=0.1, l=4)
    for step in range(2):
        opt.zero_grad()
        loss(model, 2 * step).backward()
        opt.hold()
        loss(model, 2 * step + 1).backward()
        opt.step()
    assert opt.noise().trace_sigma > 0


def test_noise_of_single_gradients():
    model = net()
    noise = normkern.GradientNoise(model, stats=("nsr", "norms", "variance"))
    with noise:
        loss(model, 0).backward()
    result = noise.result()
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    rows = []
    for b in range(8):
        model.zero_grad()
        nn.functional.cross_entropy(model(images[b : b + 1]), labels[b : b + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    given = normkern.moments(torch.stack(rows))
    torch.testing.assert_close(result.sq_norms, given.sq_norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(result.trace_sigma, given.trace_sigma, rtol=1e-4, atol=0)


def test_invariance():
    batches = []
    for step in range(2):
        torch.manual_seed(step)
        batches.append((torch.randn(8, 3, 8, 8), torch.randint(5, (8,))))
    found = normkern.invariance.find(net(), nn.functional.cross_entropy, batches)
    assert "0.weight" in str(found)


def test_the_doctor_finds_nothing():
    done = python("-m", "normkern", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_info_tells_what_was_installed():
    done = python("-m", "normkern", "info", "--json")
    facts = json.loads(done.stdout)
    assert facts["normkern"] == normkern.__version__
    assert facts["binary"]["file"] == ops.binary.__file__
    assert not [
        name for name in facts["binary"]["libraries"] or () if "torch" in name or "c10" in name or "omp" in name
    ]
