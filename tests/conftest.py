"""What every test may ask for."""

import contextlib
from pathlib import Path

import pytest
import torch
from simt import build
from simt.backend import Backend
from simt.needs import need
from support.covering import leave_rest_to_slow

from normkern import ops


@pytest.fixture(params=ops.supported_isas())
def isa(request):
    """Each instruction-set level that this machine can run."""
    before = ops.isa()
    ops.select_isa(request.param)
    yield request.param
    ops.select_isa(before)


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels in the emulator, without the checks of every access: see tests/simt."""
    need(build.missing())
    return Backend(checked=False)


#: The longest files, which begin first, so that the processes of `make test` end at about the same time.
LONGEST = (
    "simt/test_launches.py", "test_examples.py", "demo/test_demo.py", "optim/test_exponential_decay.py",
    "doctor/test_doctor.py", "ranks/test_ranks.py", "simt/test_mutants.py", "integrations/test_examples.py",
    "simt/test_products.py", "monitors/test_equilibrium.py", "simt/test_simt.py", "test_experiments.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    leave_rest_to_slow(items)
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def no_gpu():
    """Why the kernels cannot run on a GPU here, and what would help; None if they can."""
    if not ops.cuda_architectures():
        return "this binary was built without CUDA; NORMKERN_CUDA=ON pip install -e . builds it with"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    return None


@contextlib.contextmanager
def on_gpu():
    """Tensors are made on the GPU for as long as this lasts."""
    if reason := no_gpu():
        pytest.skip(reason)
    torch.set_default_device("cuda")
    try:
        yield
    finally:
        torch.set_default_device(None)


_CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
#: The emulator takes minutes to build and to run: `make cuda SWEEP=1` has it.
_SIMT = pytest.param("simt", marks=pytest.mark.slow)


@pytest.fixture(params=["cpu", _CUDA])
def device(request):
    """Where the test makes its tensors."""
    with on_gpu() if request.param == "cuda" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def gpu():
    """The test makes its tensors on the GPU."""
    with on_gpu():
        yield


@pytest.fixture(params=[*ops.supported_isas(), _SIMT, _CUDA])
def backend(request):
    """Whatever runs an op: each instruction-set level that this machine can run, the CUDA kernels in the emulator, a GPU."""
    if request.param == "cuda":
        with on_gpu():
            yield request.param
        return
    if request.param == "simt":
        with request.getfixturevalue("emulated").in_place():
            yield request.param
        return
    before = ops.isa()
    ops.select_isa(request.param)
    yield request.param
    ops.select_isa(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads, isa = torch.get_num_threads(), ops.isa()
    yield
    torch.set_num_threads(threads)
    ops.select_isa(isa)
