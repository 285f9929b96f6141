"""examples/frameworks/*.py run as they are."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import offline
from .events import read

FOLDER = Path(__file__).parents[2] / "examples" / "frameworks"
NEEDS = {
    "lightning_trainer": ["lightning", "tensorboard"],
    "hf_trainer": ["transformers", "accelerate", "tensorboard"],
    "accelerate_loop": ["accelerate", "tensorboard"],
    "timm_script": ["timm"],
    "ultralytics_trainer": ["ultralytics", "tensorboard"],
    "fsdp2": [],
}
#: timm and Ultralytics import torchvision.
LAUNCH = """
import runpy, sys
sys.path.insert(0, {tests!r})
from integrations.torchvision_stub import import_torchvision
if "timm" in {path!r} or "ultralytics" in {path!r}:
    import_torchvision()
runpy.run_path({path!r}, run_name="__main__")
"""


def run(name, folder):
    path = str(FOLDER / f"{name}.py")
    code = ["-c", LAUNCH.format(path=path, tests=str(Path(__file__).parents[1]))]
    if name == "fsdp2":
        code = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                "localhost:0", path]  # fmt: skip
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        **offline(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.run(
        [sys.executable, *code], cwd=folder, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs_and_logs_numbers_of_every_parameter(name, tmp_path):
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    if "tensorboard" in NEEDS[name]:
        tags = read(tmp_path)
        for quantity in ("effective_lr/", "angular_update/", "noise/trace_sigma/"):
            assert len([tag for tag in tags if quantity in tag]) >= 4, (quantity, sorted(tags))
        assert [tag for tag in tags if tag.endswith("noise/nsr_batch/all")]
        assert "steps: " in done.stdout
    else:
        assert "0.weight" in done.stdout


@pytest.mark.parametrize("name", NEEDS)
def test_example_is_in_the_guide(name):
    assert f"examples/frameworks/{name}.py" in (FOLDER.parents[1] / "docs" / "guide" / "frameworks.md").read_text()
