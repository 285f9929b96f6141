"""`python -m normkern doctor` passes where all is well, and names what is broken where it was broken on purpose."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support import fresh

import normkern
from normkern import doctor, ops
from normkern.__main__ import main
from normkern.doctor import (
    differences,
    environment,
    examination,
    gpu,
    machine,
    numbers,
    output,
    samples,
    threads,
    torch_sgd,
)
from normkern.doctor.finding import Check, failed, note, ok, skipped

OPS = {op.name: op for op in numbers.OPS}
SGD = OPS["sgd_"]
BEST, OTHER = ops.supported_isas()[0], ops.supported_isas()[-1]
INSTALL = "`pip install --force-reinstall --no-deps .` in normkern's source folder"
needs_two_levels = pytest.mark.skipif(BEST == OTHER, reason="this machine runs one level; two are needed")


def command(*arguments, setup):
    """Run `python -m normkern ...` in a fork that has torch, in which `setup` ran first."""
    code = (
        f"import runpy, sys; {setup}\n"
        "sys.argv[0], sys.orig_argv[1:3] = '-m', ['-m', 'normkern']\n"  # as it is while Python looks for the module
        "runpy.run_module('normkern', run_name='__main__', alter_sys=True)"
    )
    return fresh.python("-c", code, *arguments)


# ---- The numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def breakage(monkeypatch):
    """breakage(harm, where): from now on `harm(params, grads, buffers, table)` follows a step wherever `where()` holds.

    Of one gradient; or of pairs alone, whose `harm` is given the held ones too.
    """
    right = ops.sgd_

    def install(harm, where=lambda params: True, pairs=False):
        def wrong(params, grads, momentum_buffers=None, *, held=None, **options):
            table = right(params, grads, momentum_buffers, held=held, **options)
            if where(params) and (held is not None) == pairs and "gauge" not in options:
                harm(params, grads, momentum_buffers, table, *([held] if pairs else []))
            return table

        monkeypatch.setattr(ops, "sgd_", wrong)

    return install


def test_every_op_isa_and_dtype_has_a_line():
    names = [check.name for check in [*numbers.checks(), *numbers.bits()]]
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        for op in ("sgd_", "sgd_ of pairs", "sgd_ of gauges", "adamw_", "svag_combine_", "pair_sums", "welford_"):
            assert f"{op} bits {dtype}" in names
            for isa in ops.supported_isas():
                assert f"{op} {isa} {dtype}" in names
    assert len(names) == len(set(names))


@needs_two_levels
def test_one_wrong_dtype_on_one_level_is_found_and_no_other(breakage):
    def one_coordinate(params, grads, buffers, table):
        params[10][2 * ops.CHUNK + 4] *= 1 + 2**-9  # one unit of float16, in the last of all chunks

    breakage(one_coordinate, lambda params: ops.isa() == OTHER and params[0].dtype == torch.float16)
    checks = [check for check in numbers.checks() if re.match(r"(sgd_|pair_sums) v", check.name)]
    assert len(checks) == 2 * len(numbers.DTYPES) * len(ops.supported_isas())
    found = {check.name: f for check, f in doctor.examine(checks) if f.verdict == "failed"}
    assert list(found) == [f"sgd_ {OTHER} float16"]
    finding = found[f"sgd_ {OTHER} float16"]
    assert f"plain: w[{2 * ops.CHUNK + 4}] of shape ({2 * ops.CHUNK + 5},) is" in finding.measured
    assert "(1 of " in finding.measured
    assert f"export NORMKERN_ISA={BEST}, which is right here" in finding.cure


def test_wrong_everywhere_sends_to_torch(breakage):
    breakage(lambda params, grads, buffers, table: params[3].neg_())
    finding = numbers.against_reference(SGD, BEST, torch.float32)
    assert finding.verdict == "failed"
    assert "w[" in finding.measured
    assert "torch.optim.SGD" in finding.cure


@pytest.mark.parametrize("dtype", numbers.DTYPES, ids=str)
def test_another_gauge_is_found(monkeypatch, dtype):
    right = ops.gauge_step

    def other(gauge, lr, *rest):
        return right(gauge, lr * 1.02, *rest)  # than the reference steps with

    monkeypatch.setattr(ops, "gauge_step", other)
    finding = numbers.against_reference(OPS["sgd_ of gauges"], BEST, dtype)
    assert finding.verdict == "failed"
    assert "torch.optim.SGD" in finding.cure


@pytest.mark.parametrize("dtype", numbers.DTYPES, ids=str)
@pytest.mark.parametrize("wrong", ["weight", "average", "sum", "beside", "lr"])
def test_a_wrong_step_of_adam_is_found(monkeypatch, wrong, dtype):
    right = ops.adamw_
    assert numbers.against_reference(OPS["adamw_"], BEST, dtype).verdict == "ok"

    def other(params, grads, exp_avgs, exp_avg_sqs, steps, *, lr, **options):
        lr = lr * 1.05 if wrong == "lr" else lr
        table = right(params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, **options)
        if wrong == "sum":
            set_row(params, grads, exp_avgs, table)
        if wrong == "beside":
            write_beside(exp_avg_sqs, grads, exp_avgs, table)
        if wrong in ("weight", "average"):
            (params if wrong == "weight" else exp_avg_sqs)[4][2] = torch.nan
        return table

    monkeypatch.setattr(ops, "adamw_", other)
    finding = numbers.against_reference(OPS["adamw_"], BEST, dtype)
    assert finding.verdict == "failed"
    assert "torch.optim.AdamW" in finding.cure


def set_row(params, grads, buffers, table):
    table[8, 2] *= 1 + 1e-9


def write_beside(params, grads, buffers, table):
    torch.as_strided(params[6], (1,), (1,), params[6].storage_offset() + params[6].numel()).fill_(0)


def nan_buffer(params, grads, buffers, table):
    if buffers is not None:
        buffers[4][2] = torch.nan


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (set_row, f"plain: weight_grad_dot of shape ({ops.CHUNK - 1},) is"),
        (write_beside, "plain: memory beside w was written"),
        (lambda p, g, v, t: g[5].neg_(), "plain: the gradients were written"),
        (nan_buffer, "momentum: v[2] of shape (8,) is nan, expected"),
        (lambda p, g, v, t: p[0].nan_to_num_(), "plain: w[0] of shape (19,) is 3.40282347e+38, expected inf (10 of "),
        (lambda p, g, v, t: p[11].add_(1e-3), "plain: w["),  # every second element
        (lambda p, g, v, t: p[12].copy_(p[12].flip(0)), "of shape (37, 113) is"),  # transposed
    ],
    ids=["sum", "beside", "gradients", "buffer", "infinities", "gaps", "transposed"],
)
def test_each_kind_of_wrong(breakage, harm, sentence):
    breakage(harm)
    finding = numbers.against_reference(SGD, BEST, torch.float32)
    assert finding.verdict == "failed"
    assert sentence in finding.measured
    assert finding.cure


def pair_column(i):
    def harm(params, grads, buffers, table, held):
        table[8, i] *= 1 + 1e-9

    return harm


@pytest.mark.parametrize("dtype", numbers.DTYPES)
@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda p, g, v, t, h: p[10][-1:].mul_(1.01), "l = 1/2, plain: w["),
        (lambda p, g, v, t, h: v and v[4][2:3].neg_(), "momentum: v[2] of shape (8,) is"),
        (lambda p, g, v, t, h: h[12][0, :1].neg_(), "l = 1/2, plain: the held gradients were written"),
        (lambda p, g, v, t, h: g[12][0, :1].neg_(), "l = 1/2, plain: the gradients were written"),
        (pair_column(5), f"l = 1/2, plain: pair_dot of shape ({ops.CHUNK - 1},) is"),
        (pair_column(6), f"pair_difference_sq of shape ({ops.CHUNK - 1},) is"),
        (pair_column(7), f"first_sq of shape ({ops.CHUNK - 1},) is"),
        (pair_column(8), f"second_sq of shape ({ops.CHUNK - 1},) is"),
    ],
    ids=["weight", "buffer", "held", "gradients", "dot", "difference", "first", "second"],
)
def test_wrong_step_of_pairs(breakage, harm, sentence, dtype):
    breakage(harm, pairs=True)
    finding = numbers.against_reference(OPS["sgd_ of pairs"], BEST, dtype)
    assert finding.verdict == "failed"
    assert sentence in finding.measured
    assert "normkern.reference" in finding.cure
    assert numbers.against_reference(SGD, BEST, dtype).verdict == "ok"


@pytest.mark.parametrize(
    ("l", "rule"), [(0.5, "l = 1/2, plain"), (1, "l = 1, momentum"), (4, "l = 4, "), (8, "l = 8, ")]
)
def test_another_l_is_found(monkeypatch, l, rule):
    right = ops.sgd_
    wrong = {"l": l * 1.001 if l != 1 else 1.001}

    def other(*args, **options):
        return right(*args, **{**options, **(wrong if options.get("l") == l else {})})

    monkeypatch.setattr(ops, "sgd_", other)
    finding = numbers.against_reference(OPS["sgd_ of pairs"], BEST, torch.float32)
    assert finding.verdict == "failed"
    assert finding.measured.startswith(rule)


def test_swapped_pair_is_found(monkeypatch):
    right = ops.svag_combine_

    def swapped(a, b, l):
        kept = [x.clone() for x in b]
        right(kept, a, l)
        for x, y in zip(a, kept, strict=True):
            x.copy_(y)

    monkeypatch.setattr(ops, "svag_combine_", swapped)
    assert "l = 1: a[" in numbers.against_reference(OPS["svag_combine_"], BEST, torch.float32).measured


@pytest.mark.parametrize("dtype", numbers.DTYPES)
@pytest.mark.parametrize(
    ("op", "harm", "sentence"),
    [
        ("svag_combine_", lambda t, a, b: a[11][-1:].mul_(1.01), "l = 1/2: a["),
        ("svag_combine_", lambda t, a, b: b[2].neg_(), "l = 1/2: the second gradients were written"),
        (
            "svag_combine_",
            lambda t, a, b: torch.as_strided(a[6], (1,), (1,), a[6].storage_offset() + a[6].numel()).fill_(0),
            "l = 1/2: memory beside a was written",
        ),
        ("pair_sums", lambda t, a, b: t[8].mul_(1 + 1e-9), f"pairs: pair_dot of shape ({ops.CHUNK - 1},) is"),
        ("pair_sums", lambda t, a, b: t[:, 1].mul_(0.5), "pair_difference_sq of shape (1,) is"),
        ("pair_sums", lambda t, a, b: a[2].neg_(), "pairs: the first gradients were written"),
        ("welford_", lambda t, m, x, s: m[10][-1:].mul_(1.01), "first sample: m["),
        ("welford_", lambda t, m, x, s: s[10][-1:].mul_(1.01), "first sample: s["),
        ("welford_", lambda t, m, x, s: x[2].neg_(), "first sample: the samples were written"),
        ("welford_", lambda t, m, x, s: t[9, 3:4].mul_(1.001), f"update_sq of shape ({ops.CHUNK + 1},) is"),
    ],
)
def test_other_ops_that_are_wrong(monkeypatch, op, harm, sentence, dtype):
    right = getattr(ops, op)

    def wrong(*tensors, **options):
        table = right(*tensors, **options)
        harm(table, *tensors)
        return table

    assert numbers.against_reference(OPS[op], BEST, dtype).verdict == "ok"
    monkeypatch.setattr(ops, op, wrong)
    finding = numbers.against_reference(OPS[op], BEST, dtype)
    assert finding.verdict == "failed"
    assert sentence in finding.measured
    assert "install anew" in finding.cure


@pytest.mark.parametrize("op", ["svag_combine_", "welford_"])
def test_bits_of_other_ops_that_depend_on_the_threads(monkeypatch, op):
    right = getattr(ops, op)

    def wrong(written, *others, **options):
        table = right(written, *others, **options)
        if torch.get_num_threads() == 3:
            written[7].view(torch.int32)[:1].add_(1)
        return table

    monkeypatch.setattr(ops, op, wrong)
    finding = numbers.same_bits(OPS[op], torch.float32)
    assert f"{BEST} on 3 threads and {BEST} on 1 thread differ in their bits" in finding.measured


def test_budget_is_tight_and_fair():
    """Four roundings pass and six do not; the one to a narrow type is free, a second is not."""
    size, exact = torch.ones(30, dtype=torch.float64), torch.ones(30, dtype=torch.float64)
    half_unit = 2.0**-24  # of float32 at 1

    def verdict(steps, dtype=torch.float32):
        got = exact.clone()
        got[20] += steps * half_unit
        got = got.to(dtype)
        return differences.difference("w", got, exact, size, differences.roundings_allowed("v4", dtype)).fault

    assert verdict(4) is None
    assert "w[0] of shape (7,)" in verdict(6)  # the tensors are of 19, 0, 1, 7, ...
    assert verdict(0, torch.bfloat16) is None
    assert "(1 of 30 are wrong)" in verdict(2**17, torch.bfloat16), "one unit of bfloat16 is no rounding"


def test_bits_that_depend_on_the_threads(breakage):
    breakage(lambda p, g, v, t: p[7].view(torch.int32)[:1].add_(1), lambda p: torch.get_num_threads() == 3)
    finding = numbers.same_bits(SGD, torch.float32)
    assert finding.verdict == "failed"
    assert f"plain: {BEST} on 3 threads and {BEST} on 1 thread differ in their bits" in finding.measured


def test_bits_that_depend_on_the_level(breakage):
    with_fma = [isa for isa in ops.supported_isas() if isa != "v2"]
    if len(with_fma) < 2:
        pytest.skip("this machine runs one level with FMA hardware; two are needed")
    breakage(lambda p, g, v, t: t[7].view(torch.int64)[3:].add_(1), lambda p: ops.isa() == with_fma[1])
    finding = numbers.same_bits(SGD, torch.float64)
    assert finding.verdict == "failed"
    assert f"{with_fma[1]} on 1 thread and {with_fma[0]} on 1 thread" in finding.measured


# ---- The environment ------------------------------------------------------------------------------------------------


def assert_failed(finding, measured, cure):
    assert finding.verdict == "failed"
    assert measured in finding.measured
    assert cure in finding.cure
    assert "\n" not in finding.measured + finding.cure


def test_versions(monkeypatch):
    assert environment.versions().verdict == "ok"
    with monkeypatch.context() as m:
        m.setattr(normkern, "TORCH_FLOOR", (3, 99))
        assert_failed(
            environment.versions(), f"torch {torch.__version__}, expected >= 3.99", "pip install 'torch>=3.99'"
        )
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "2.9.1+cu128")
        assert_failed(environment.versions(), "torch 2.9.1+cu128, expected >= 2.10", "pip install 'torch>=2.10'")
    with monkeypatch.context() as m:
        m.setattr(environment, "_python_floor", lambda: (4, 2))
        assert_failed(environment.versions(), "expected >= 4.2", "Python >= 4.2")
    with monkeypatch.context() as m:  # a source tree on the path, which pip did not install
        m.setattr(environment.metadata, "metadata", Mock(side_effect=environment.metadata.PackageNotFoundError))
        assert environment.versions().measured.endswith(f"Python {sys.version_info[0]}.{sys.version_info[1]}")
    for version, text in ((None, "no DLPack exchange API"), ((2, 0), "DLPack 2.0")):
        monkeypatch.setattr(environment, "dlpack_version", lambda version=version: version)
        assert_failed(environment.versions(), text, f"and install them: {INSTALL}")


def test_python_floor_is_the_packages():
    assert environment._python_floor() == (3, 10)


def test_binary_that_is_older_than_its_sources(monkeypatch):
    assert environment.binary().verdict == "ok"
    old = SimpleNamespace(**{k: v for k, v in vars(ops.binary).items() if k not in ("gather", "Pass")})
    old.Pass = SimpleNamespace(begin=None)
    monkeypatch.setattr(ops, "binary", old)
    finding = environment.binary()
    assert_failed(finding, "the binary lacks Pass.add, Pass.add_whole, ", INSTALL)
    assert "Pass.begin" not in finding.measured


def test_binary_of_another_version(monkeypatch):
    monkeypatch.setattr(normkern, "__version__", "99.1")
    assert_failed(environment.binary(), "normkern 99.1 over an installed ", INSTALL)


@needs_two_levels
def test_level_that_is_not_the_best(monkeypatch):
    ops.select_isa(OTHER)
    try:
        monkeypatch.setenv("NORMKERN_ISA", OTHER)
        assert environment.level() == note(f"{OTHER}, chosen by NORMKERN_ISA={OTHER}; this machine runs {BEST}")
        monkeypatch.delenv("NORMKERN_ISA")
        assert "chosen by select_isa" in environment.level().measured
    finally:
        ops.select_isa(BEST)
    assert environment.level().verdict == "ok"


@pytest.fixture
def maps(tmp_path, monkeypatch):
    """maps(file, ...): this process has them mapped."""
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.delenv("LD_PRELOAD", raising=False)

    def write(*files):
        lines = [f"7f00-7f01 r-xp 00000000 fe:00 42   {file}" for file in ("/usr/lib/libc.so.6", *files)]
        (tmp_path / "self" / "maps").write_text("\n".join(lines))

    return write


TORCHS = "/env/lib/python3.11/site-packages/torch/lib/libgomp.so.1"
SKLEARNS = "/env/lib/python3.11/site-packages/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0"
SYSTEMS = "/usr/lib/llvm/libomp.so.5"


def test_openmp_runtimes(maps, monkeypatch):
    assert environment.openmp({}) == skipped("this system does not list the loaded libraries")
    maps()
    assert environment.openmp({}) == ok("none is loaded")
    maps(TORCHS, TORCHS)
    assert environment.openmp({}) == ok("one: libgomp.so.1, of torch")
    maps(TORCHS, SKLEARNS)
    two = "2: libgomp-e985bcbb.so.1.0.0 of scikit_learn and libgomp.so.1 of torch"
    assert_failed(environment.openmp({}), two, f"{SKLEARNS} came with scikit_learn, beside {TORCHS}: ")
    assert_failed(environment.openmp({SKLEARNS: "my.module"}), two, f"{SKLEARNS} came with `import my.module`, beside")
    maps(SYSTEMS, TORCHS)
    assert_failed(environment.openmp({}), "libomp.so.5 of the system", f"{SYSTEMS} came with the system")
    monkeypatch.setenv("LD_PRELOAD", f"/lib/other.so:{SYSTEMS}")
    assert_failed(environment.openmp({}), "libomp.so.5 of the system", f"take {SYSTEMS} out of LD_PRELOAD")


def test_imported_modules_answer_for_what_they_load(maps, tmp_path, monkeypatch):
    maps(TORCHS)
    (tmp_path / "guilty_of_openmp.py").write_text(
        f"from pathlib import Path\nfile = Path({str(tmp_path / 'self' / 'maps')!r})\n"
        f"file.write_text(file.read_text() + '\\n7f00-7f01 r-xp 00000000 fe:00 42 {SKLEARNS}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.import_modules(["json", "guilty_of_openmp"]) == {SKLEARNS: "guilty_of_openmp"}


def test_module_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--import", "json", "broken_module"])
    assert stop.value.code == 2
    assert (
        "argument --import: expected a module that can be imported, got 'broken_module' (ZeroDivisionError: "
        in capsys.readouterr().err
    )


def test_devices(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(ops, "cuda_architectures", list)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.devices() == ok("kernels for CPUs; this torch was built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu.devices() == ok(
        "kernels for CPUs; torch sees no GPU (built for CUDA 13.0; `nvidia-smi` prints what the driver runs)"
    )
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "Some GPU", "capability": "9.0"}])
    assert gpu.devices() == note(
        "kernels for CPUs only: torch's own loop steps tensors on Some GPU. To have kernels for GPUs: "
        "`NORMKERN_CUDA=ON pip install --force-reinstall --no-deps .` in normkern's source folder"
    )
    assert gpu.same_as_cpu().verdict == "skipped"
    monkeypatch.setattr(ops, "cuda_architectures", lambda: [80, 90])
    assert gpu.devices() == ok("kernels for CPUs and compute capability 8.0, 9.0; torch sees Some GPU (9.0)")


def test_gpu_that_is_older_than_all_kernels(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "Old GPU", "capability": "7.0"}])
    monkeypatch.setattr(ops, "cuda_architectures", lambda: [75, 80])
    assert_failed(
        gpu.devices(),
        "kernels for CPUs and compute capability 7.5, 8.0; torch sees Old GPU, which has 7.0",
        "build the binary on this machine, for the GPU that it has",
    )


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        ("no kernel image is available for execution on the device", "`NORMKERN_CUDA=AUTO pip install"),
        ("CUDA driver version is insufficient for CUDA runtime version", "update the NVIDIA driver"),
        ("the provided PTX was compiled with an unsupported toolchain.", "update the NVIDIA driver"),
        ("an illegal memory access was encountered", "`torch.ones(1, device='cuda') + 1`"),
    ],
)
def test_gpu_on_which_no_kernel_starts(error, cure, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "Some GPU", "capability": "9.0"}])
    monkeypatch.setattr(ops, "cuda_architectures", lambda: [80])

    def launch(*arguments, **options):
        raise RuntimeError(f"sgd_: a kernel could not be launched on cuda:0, for compute capabilities 8.0: {error}")

    monkeypatch.setattr(gpu, "_difference", launch)
    assert_failed(gpu.same_as_cpu(), error, cure)
    monkeypatch.setattr(samples, "off", launch)
    monkeypatch.setattr(samples, "_places", lambda: [("cuda:0", "cuda:0")])
    assert_failed(samples.against_reference("moments"), error, cure)


def test_gpu_kernels_that_are_wrong(monkeypatch):
    """The comparison, with the CPU in the GPU's place, finds one coordinate that is off."""
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "Some GPU", "capability": "9.0"}])
    monkeypatch.setattr(ops, "cuda_architectures", lambda: [90])
    compare = gpu._difference
    monkeypatch.setattr(gpu, "_difference", lambda device, *rest: compare("cpu", *rest))
    assert gpu.same_as_cpu().verdict == "ok"
    right, calls = ops.sgd_, []

    def wrong(params, *arguments, **options):
        sums = right(params, *arguments, **options)
        calls.append(0)
        if len(calls) % 2 == 0:  # every second call is the GPU's
            params[1][20000] *= 1.01
        return sums

    monkeypatch.setattr(ops, "sgd_", wrong)
    found = gpu.same_as_cpu()
    assert found.verdict == "failed"
    assert found.measured.startswith("cuda:0, plain, float64, stats='tensor': tensor of shape (20011,) differs by")


@pytest.mark.parametrize("name", samples.RUNS)
def test_sums_over_samples_that_are_wrong(monkeypatch, name):
    assert samples.against_reference(name).verdict == "ok"
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        (out if isinstance(out, torch.Tensor) else out[0]).flatten()[-1] += 1.0  # one entry, on one level, in one dtype
        return out

    def sometimes(*arguments, **options):
        dtype = next(x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point())
        return (wrong if ops.isa() == OTHER and dtype == torch.float32 else right)(*arguments, **options)

    monkeypatch.setattr(ops, name, sometimes)
    found = samples.against_reference(name)
    assert found.verdict == "failed"
    assert re.match(rf"{OTHER} float32: off by [\d.e-]+ of the largest entry", found.measured)


def test_torchs_own_sgd_is_no_failure_of_ours(monkeypatch):
    assert torch_sgd.torchs_own().verdict in ("ok", "note")
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    finding = torch_sgd.torchs_own()
    assert finding.verdict == "note"
    assert (
        f"of torch {torch.__version__} is wrong in 7 of 7 cases (bfloat16, float16, gradient in an" in finding.measured
    )


@pytest.mark.parametrize("case", torch_sgd._CASES)
def test_cases_of_torchs_sgd_are_right_with_an_optimizer_that_is(case, monkeypatch):
    monkeypatch.setattr(torch_sgd, "_optimizer", lambda params, **o: normkern.SGD(params, lr=0.5, fused=True, **o))
    assert torch_sgd._CASES[case]()
    monkeypatch.setattr(normkern.SGD, "step", lambda self: None)
    assert not torch_sgd._CASES[case]()


# ---- Threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def timings(monkeypatch):
    """timings(threads, cpus, seconds, ...): what torch has, what the machine gives, what each measurement says."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def install(count, cpus, *measurements):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        monkeypatch.setattr(machine, "cpus", lambda: machine.Cpus(64, cpus, None))
        left = [{n: [s, 9 * s, s] for n, s in seconds.items()} for seconds in measurements]
        monkeypatch.setattr(threads, "step_times", lambda counts: left.pop(0))
        monkeypatch.setattr(threads._Load, "of_others", lambda self: 0.0)
        return left

    return install


SLOW = {1: 100e-6, 16: 300e-6}


def test_more_threads_than_cpus_made_slow(timings):
    left = timings(16, 2, SLOW, SLOW, SLOW)
    assert_failed(
        threads.scaling(),
        "16 threads on 2 CPUs: a step takes 300 us, on 1 thread 100 us",
        "more threads than CPUs that the affinity mask and the cgroup quota give: export OMP_NUM_THREADS=2,",
    )
    assert not left, "three attempts"


def test_one_slow_measurement_is_noise(timings):
    left = timings(16, 16, SLOW, SLOW, {1: 100e-6, 16: 20e-6})
    assert threads.scaling() == ok("16 threads on 16 CPUs: a step takes 20 us, on 1 thread 100 us")
    assert not left


def test_saturated_bandwidth_is_no_failure(timings):
    timings(16, 16, {1: 100e-6, 16: 110e-6})
    assert threads.scaling().verdict == "ok"


def test_slow_threads_on_enough_cpus(timings):
    timings(16, 16, SLOW, SLOW, SLOW, {1: 100e-6, 2: 60e-6, 4: 40e-6, 8: 90e-6})
    assert_failed(threads.scaling(), "16 threads on 16 CPUs", "4 was the fastest count: export OMP_NUM_THREADS=4;")


def test_slow_threads_beside_other_programs_are_no_failure(timings, monkeypatch):
    timings(16, 16, SLOW, SLOW, SLOW)
    monkeypatch.setattr(threads._Load, "of_others", lambda self: 7.3)
    finding = threads.scaling()
    assert finding.verdict == "note"
    assert "on 1 thread 100 us, while other programs used 7.3 CPUs; export OMP_NUM_THREADS=1" in finding.measured


def test_load_of_others_is_without_this_process(monkeypatch):
    clock = iter([100.0, 110.0])
    busy = iter([1000.0, 1030.0])
    own = iter([5.0, 15.0])
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(threads.time, "process_time", lambda: next(own))
    monkeypatch.setattr(machine, "busy_seconds", lambda: next(busy))
    assert threads._Load().of_others() == pytest.approx(2.0)


def test_load_of_others_where_the_system_does_not_count_it(monkeypatch):
    monkeypatch.setattr(machine, "busy_seconds", lambda: None)
    assert threads._Load().of_others() == 0.0


def test_more_threads_than_cpus_that_are_not_slow(timings):
    timings(16, 2, {1: 100e-6, 16: 60e-6})
    finding = threads.scaling()
    assert finding.verdict == "note"
    assert "OMP_NUM_THREADS=2 suffices" in finding.measured


def test_one_thread(timings):
    timings(1, 2)
    assert threads.scaling() == ok("1 thread on 2 CPUs: nothing to compare")


def test_step_times():
    times = threads.step_times((1, 2))
    assert set(times) == {1, 2}
    assert all(len(seconds) >= 5 and 0 < min(seconds) < 1 for seconds in times.values())


# ---- The command ----------------------------------------------------------------------------------------------------


def raise_error():
    raise ValueError("first line\nsecond line")


def select_another():
    torch.set_num_threads(5)
    ops.select_isa(OTHER)
    raise_error()


LINES = [
    Check("good", lambda: ok("as it should be")),
    Check("bad", lambda: failed("very [bold]wrong", "take a " + "very " * 40 + "long rest")),
    Check("broken", raise_error),
    Check("worse", lambda: failed("wrong", "take a " + "very " * 40 + "long rest")),
    Check("else", lambda: skipped("not here")),
]


def test_check_that_raises_is_a_failed_line():
    findings = {check.name: f for check, f in doctor.examine(LINES)}
    assert_failed(findings["broken"], "ValueError: first line second line", "doctor --json")
    assert findings["good"].verdict == "ok"


def test_level_and_threads_are_put_back():
    before = ops.isa(), torch.get_num_threads()
    for _ in doctor.examine([Check("rude", select_another), numbers.checks()[0], numbers.checks()[-1]]):
        assert (ops.isa(), torch.get_num_threads()) == before


def test_interrupt_passes():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(doctor.examine([Check("long", interrupt)]))


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(examination, "checks", lambda brought_by: LINES)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines()]
    assert "good    ok       as it should be" in lines
    assert "bad     failed   very [bold]wrong" in lines
    assert "else    skipped  not here" in lines
    assert "bad, worse: take a " + "very " * 40 + "long rest" in lines, "a cure is one line, and printed once"
    assert lines[-1].startswith("5 checks: 1 ok, 1 skipped, 3 failed, in ")
    assert "\x1b" not in printed
    monkeypatch.setattr(examination, "checks", lambda brought_by: LINES[:1])
    assert main(["doctor"]) == 0


def of_a_group(*findings):
    return [Check(f"part {i}", lambda f=f: f, "whole") for i, f in enumerate(findings)]


def test_checks_of_a_group_share_a_line_unless_verbose(monkeypatch, capsys):
    lines = [LINES[0], *of_a_group(ok("a"), ok("b"), ok("c"))]
    monkeypatch.setattr(examination, "checks", lambda brought_by: lines)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["good   ok       as it should be", "whole  ok       all 3 checks are right"]
    assert printed[-1].startswith("4 checks: 4 ok, in ")
    for option in ("-v", "--verbose"):
        assert main(["doctor", option]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[1:4] == ["part 0  ok       a", "part 1  ok       b", "part 2  ok       c"]


def test_what_failed_in_a_group_has_its_own_line(monkeypatch, capsys):
    lines = of_a_group(ok("a"), failed("wrong", "rest"), note("odd"))
    monkeypatch.setattr(examination, "checks", lambda brought_by: lines)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "whole  failed   1 of 3 checks are right",
        "  part 1  failed   wrong",
        "  part 2  note     odd",
    ]
    assert "part 1: rest" in printed


def test_groups_are_skipped_when_time_is_out(monkeypatch, capsys):
    lines = [LINES[0], *of_a_group(ok("a"), ok("b"), ok("c"))]
    monkeypatch.setattr(examination, "checks", lambda brought_by: lines)
    monkeypatch.setattr(output, "_SECONDS", -1.0)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "good   ok       as it should be", "a check with its own line is never skipped"
    assert printed[1].startswith("whole  skipped  0 of 3 checks are right, 3 skipped because the machine is busy (-v ")
    assert main(["doctor", "-v"]) == 0
    assert "4 checks: 4 ok" in capsys.readouterr().out


def test_lines_are_printed_as_the_checks_finish(monkeypatch, capsys):
    seen = []
    lines = [Check(name, lambda: ok(str(seen.append(capsys.readouterr().out)))) for name in ("one", "two")]
    monkeypatch.setattr(examination, "checks", lambda brought_by: lines)
    main(["doctor"])
    assert seen == ["one  ", "ok       None\ntwo  "]


def test_terminal_has_colours_and_whole_words(monkeypatch, capsys):
    monkeypatch.setattr(examination, "checks", lambda brought_by: [Check("good", lambda: ok("word " * 30))])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["doctor"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("good  \x1b[32mok     \x1b[0m  word word")
    assert len(first) <= 80 + len("\x1b[32m\x1b[0m")
    assert second.startswith(" " * 15 + "word word")
    monkeypatch.setenv("NO_COLOR", "1")
    main(["doctor"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(("lines", "status"), [(LINES, 1), (LINES[:1], 0)])
def test_json(lines, status, monkeypatch, capsys):
    monkeypatch.setattr(examination, "checks", lambda brought_by: lines)
    assert main(["doctor", "--json"]) == status
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"passed", "seconds", "checks", "info"}
    assert result["passed"] is (status == 0)
    assert result["checks"][0] == {"name": "good", "verdict": "ok", "measured": "as it should be", "cure": None}
    assert result["info"]["normkern"] == normkern.__version__


#: Of all that `pip install ".[demo]"` brings, an environment with torch alone has nothing.
BARE = "import sys; sys.modules.update(dict.fromkeys(('rich', 'numpy', 'scipy', 'sklearn', 'matplotlib')))"
#: Runs command lines one after the other, each check of the doctor once, and prints what each line gave.
COMMAND_LINES = """
import contextlib, dataclasses, functools, io, json, runpy, sys
from normkern.doctor import examination
checks = [dataclasses.replace(c, examine=functools.cache(c.examine)) for c in examination.checks({})]
examination.checks = lambda brought_by: checks
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, code = ["normkern", *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module("normkern", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""
EVERY_COMMAND = [
    ("doctor",),
    ("doctor", "--json"),
    ("info",),
    ("--version",),
    ("train", "-h"),
    ("train", "--out", "out"),
]


@pytest.fixture(scope="module")
def in_a_bare_environment(tmp_path_factory):
    """{command line: exit code, stdout, stderr}, of one process with torch alone."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINES, json.dumps(EVERY_COMMAND)], cwd=folder,
        capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(EVERY_COMMAND, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command_line", EVERY_COMMAND[:-1])
def test_torch_alone_is_enough(command_line, in_a_bare_environment):
    code, out, err = in_a_bare_environment[command_line]
    assert code == 0, out + err
    assert "Traceback" not in err
    if command_line == ("doctor",):
        *lines, _, count = out.splitlines()
        assert 6 <= len(lines) <= 10
        assert re.fullmatch(r"\d+ checks: \d+ ok, .* in [\d.]+ s \(-v prints every check\)", count)


def test_demo_says_what_to_install(in_a_bare_environment):
    code, _, err = in_a_bare_environment[EVERY_COMMAND[-1]]
    assert code == 1
    assert err.splitlines()[-1] == (
        "python -m normkern train: scikit-learn, matplotlib, rich are not installed: "
        "pip install scikit-learn matplotlib rich"
    )
    assert "Traceback" not in err


def test_interrupted_command_has_no_traceback(monkeypatch):
    def interrupt(brought_by):
        raise KeyboardInterrupt

    monkeypatch.setattr(examination, "checks", interrupt)
    assert main(["doctor"]) == 130


def test_all_is_well_here(in_a_bare_environment):
    code, out, err = in_a_bare_environment["doctor", "--json"]
    result = json.loads(out)
    assert [c for c in result["checks"] if c["verdict"] == "failed"] == []
    assert code == 0, err
    assert result["seconds"] > 0
    names = [c["name"] for c in result["checks"]]
    assert {"versions", "binary", "ISA level", "OpenMP runtimes", "devices", "thread scaling"} < set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("setup", "sentence", "cure"),
    [
        (
            "import sys; sys.modules['normkern._C'] = None",
            "normkern's binary could not be loaded",
            "`pip install -e .`",
        ),
        (
            "import sys, types; sys.modules['normkern._C'] = types.ModuleType('normkern._C')",
            "has no attribute 'CHUNK'",
            INSTALL,
        ),
        ("import torch; torch.__version__ = '2.9.1'", "found torch 2.9.1", "pip install 'torch>=2.10'"),
        ("import sys; sys.modules['torch'] = None", "torch", "pip install 'torch>=2.10'"),
    ],
    ids=["no binary", "stale binary", "old torch", "no torch"],
)
def test_what_cannot_be_imported_is_one_line(setup, sentence, cure):
    done = command("doctor", setup=setup)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m normkern: ")
    assert sentence in line
    assert cure in line


def test_other_programs_get_the_exception(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import sys; sys.modules['normkern._C'] = None; import normkern")
    (tmp_path / "mine" / "__main__.py").write_text("")
    done = fresh.python("-m", "mine", "normkern", path=[tmp_path])
    assert "Traceback" in done.stderr
    assert "ImportError: normkern's binary could not be loaded" in done.stderr


def test_unknown_level_is_one_line():
    done = fresh.python("-m", "normkern", "doctor", env={"NORMKERN_ISA": "v9"})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m normkern: NORMKERN_ISA: select_isa: expected one of ")
