"""A binary with kernels for every architecture, on a machine with no driver: `make cuda` builds and names it."""

import os
import subprocess
import sys

import pytest

BINARY = os.environ.get("NORMKERN_CUDA_BINARY")
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="NORMKERN_CUDA_BINARY names no binary that was built with NORMKERN_CUDA=ON; make cuda does"
)

BEGIN = f"""
import importlib.machinery, importlib.util, sys
import torch
loader = importlib.machinery.ExtensionFileLoader("normkern._C", {BINARY!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("normkern._C", loader))
sys.modules["normkern._C"] = module
loader.exec_module(module)
import normkern
normkern._C = module
from normkern import ops
assert ops.binary is module
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_architectures():
    assert python("print(*ops.cuda_architectures())") == ["75", "80", "86", "89", "90", "100", "120"]


def test_the_cpu_part_works_without_a_driver():
    said = python("""
w = torch.tensor([3.0, 4.0])
print(ops.sgd_([w], [torch.tensor([1.0, 2.0])], lr=0.1, weight_decay=0.5, stats="tensor")[0, 0].item(), *w.tolist())
""")
    assert said == ["25.0", "2.75", "3.5999999046325684"]


def test_a_tensor_that_only_looks_like_a_gpus_is_refused():
    said = python("""
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    w = torch.ones(3, device="cuda:0")
try:
    ops.sgd_([w], [w], lr=0.1)
except TypeError as error:
    print(error)
""")
    assert "FakeTensor" in " ".join(said)
    assert " ".join(said).endswith("on cpu or cuda")
