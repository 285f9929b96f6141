"""torch.compile of what uses normkern: the same numbers, no hard error, no graph for each step."""

import warnings

import pytest
import torch
import torch._dynamo
from support import fresh
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import normkern
from normkern import ops

#: Which dynamo raises by itself, and catches unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

INPUTS, LABELS = torch.randn(16, 4), torch.randint(3, (16,))
BACKENDS = ["eager", "aot_eager"]
#: A C++ compiler has to run.
OF_TORCH = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what torch imports with it
INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, OF_TORCH])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Whose forward is not torch's, which compiles none of its own when it is asked for nothing else."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def net():
    torch.manual_seed(1)
    return nn.Sequential(Block(4, 8), Block(8, 3))


def same_bits(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def graphs():
    return counters["stats"]["unique_graphs"]


# --- Training


def train_step(model, opt, x, y):
    loss = cross_entropy(model(x), y)
    loss.backward()
    if isinstance(opt, normkern.SVAG):
        opt.hold()
        cross_entropy(model(x * 1.1), y).backward()
    opt.step()
    opt.zero_grad()
    return loss


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("SGD", {"stats": "tensor", "momentum": 0.9}),
        ("SVAG", {"l": 2.0, "momentum": 0.9}),
        ("AdamW", {"stats": "tensor"}),
    ],
)
def test_a_compiled_train_step(kind, more, backend):
    ours, theirs = net(), net()
    a, b = (getattr(normkern, kind)(m.parameters(), lr=0.1, weight_decay=0.01, **more) for m in (ours, theirs))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20) for opt in (a, b)]
    compiled = torch.compile(train_step, backend=backend)
    after_two = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for t in range(6):
            loss, expected = compiled(ours, a, INPUTS, LABELS), train_step(theirs, b, INPUTS, LABELS)
            torch.testing.assert_close(loss, expected)
            for schedule in schedules:
                schedule.step()
            after_two = graphs() if t == 1 else after_two
    assert graphs() == after_two  # no graph for each learning rate
    assert not [str(w.message) for w in told if "normkern" in str(w.message)]
    if backend == "aot_eager":
        same_bits(ours, theirs)
    else:
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]
    if kind != "SVAG":
        torch.testing.assert_close(a.stats().weight_norm, b.stats().weight_norm)
    else:
        torch.testing.assert_close(a.noise().trace_sigma, b.noise().trace_sigma)


@pytest.mark.parametrize("kind", ["SGD", "SVAG", "AdamW"])
def test_a_compiled_step(kind):
    ours, theirs = net(), net()
    more = {} if kind == "AdamW" else {"momentum": 0.9}
    a, b = (getattr(normkern, kind)(m.parameters(), lr=0.1, **more) for m in (ours, theirs))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in (a, b)]
    compiled = torch.compile(a.step, backend="aot_eager")
    frames = None
    for t in range(6):
        for model in (ours, theirs):
            model.zero_grad()
            cross_entropy(model(INPUTS), LABELS).backward()
        compiled()
        b.step()
        for schedule in schedules:
            schedule.step()
        frames = counters["frames"]["total"] if t == 1 else frames
    assert counters["frames"]["total"] == frames
    same_bits(ours, theirs)


# --- Whole graphs


def moments_of(x):
    return normkern.moments(x)


def step_of(w, g):
    buffers = [None]
    table = ops.sgd_([w], [g], buffers, lr=0.1, momentum=0.9, dampening=0.5, stats="tensor")
    ops.sgd_([w], [g], buffers, lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.01)
    return table, buffers[0]


def adamw_step_of(w, g):
    state = [None], [None], [None]
    table = ops.adamw_([w], [g], *state, lr=0.1, beta1=0.8, stats="tensor")
    ops.adamw_([w], [g], *state, lr=torch.tensor(0.1), weight_decay=0.1, decoupled=False)
    return table, *(entries[0] for entries in state)


def combination_of(a, b):
    normkern.svag_combine_([a, None], [b, None], 3.0)
    return a * 2


def sums_of(x, y):
    means, squares = torch.zeros_like(x), torch.zeros_like(x)
    ops.welford_([means], [y], [squares], n=1)
    total, centred, norms = ops.outer_moments(x[None], y[None], squares=True)
    return means, total, centred, norms, ops.row_sums(x), ops.row_sq_norms(y), ops.pair_sums([x], [y])


@pytest.mark.parametrize("backend", [*BACKENDS, INDUCTOR])
@pytest.mark.parametrize("function", [moments_of, step_of, adamw_step_of, combination_of, sums_of])
def test_whole_graphs(function, backend):
    args = [torch.randn(6, 5) for _ in range(function.__code__.co_argcount)]
    again = [x.clone() for x in args]
    got, expected = torch.compile(function, backend=backend, fullgraph=True)(*args), function(*again)
    if function is moments_of:
        assert isinstance(got, normkern.Moments)
        got, expected = (list(vars(m).values())[1:] for m in (got, expected))
    for a, b in zip([*got, *args], [*expected, *again], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_another_batch_size_is_no_graph_of_its_own():
    compiled = torch.compile(lambda x: normkern.moments(x).gns, backend="aot_eager", fullgraph=True)
    for size in (4, 5, 6, 7, 8):
        x = torch.randn(size, 3)
        assert torch.equal(compiled(x), normkern.moments(x).gns)
    assert graphs() == 2


def test_learning_rates_in_a_tensor_are_no_graphs_of_their_own():
    compiled = torch.compile(lambda w, lr: ops.sgd_([w], [w], lr=lr), backend="aot_eager", fullgraph=True)
    w = torch.ones(3)
    for t in range(4):
        compiled(w, torch.tensor(0.1 * t))
    assert graphs() == 1
    torch.testing.assert_close(w, torch.full((3,), 0.9 * 0.8 * 0.7))


def test_other_functions_break_the_graph_and_are_right():
    def noise(a, b):
        return normkern.noise_from_pair([a], [b]).nsr_batch + 1

    def running(w, g):
        moments = normkern.RunningMoments([w])
        for scale in (1.0, 2.0, 4.0):
            w.grad = g * scale
            moments.update()
        return moments.result().trace_sigma * 2

    a, b = torch.randn(5), torch.randn(5)
    w = torch.zeros(5, requires_grad=True)
    assert torch.equal(torch.compile(noise, backend="aot_eager")(a, b), noise(a, b))
    assert torch.equal(torch.compile(running, backend="aot_eager")(w, b), running(w, b))


def test_a_wrong_call_has_its_sentence():
    def wrong(w, g):
        ops.sgd_([w], [g], lr=0.1)

    w = torch.ones(3)
    with pytest.raises(Exception, match=r"grads\[0\] has shape \(2,\) but params\[0\] has shape \(3,\)"):
        torch.compile(wrong, backend="eager", fullgraph=True)(w, torch.ones(2))
    assert w.eq(1).all()


# --- GradientNoise


def truth(model):
    return measured(model, lambda: cross_entropy(model(INPUTS), LABELS).backward())


def measured(model, run, times=1):
    noise = normkern.GradientNoise(model, stats=("nsr", "norms"))
    for _ in range(times):
        model.zero_grad()
        with noise:
            run()
    return noise.result()


def ways(model):
    """The model that is measured, and a forward and backward of it."""

    def run(call):
        return lambda: cross_entropy(call(INPUTS), LABELS).backward()

    def wrapped():
        compiled = torch.compile(model, backend="aot_eager")
        return compiled, run(compiled)

    def in_place():
        model.compile(backend="aot_eager")
        return model, run(model)

    def a_part():
        model[1].compile(backend="aot_eager")
        return model, run(model)

    def a_wrapped_part():
        whole = nn.Sequential(torch.compile(model[0], backend="aot_eager"), *model[1:])
        return whole, run(whole)

    def measured_by_its_original():
        return model, run(torch.compile(model, backend="aot_eager"))

    def a_function_around_it():
        return model, run(torch.compile(lambda x: model(x) * 1.0, backend="aot_eager"))

    def forward_and_backward():
        return model, torch.compile(run(model), backend="aot_eager")

    return [
        wrapped, in_place, a_part, a_wrapped_part, measured_by_its_original, a_function_around_it, forward_and_backward
    ]  # fmt: skip


@pytest.mark.parametrize("compiled_before", [False, True])
@pytest.mark.parametrize("way", range(7))
def test_gradient_noise_of_compiled_models(way, compiled_before):
    """What is compiled would run no hook and no mode: it runs uncompiled inside, and compiled again afterwards."""
    expected = truth(net())
    model, run = ways(net())[way]()
    if compiled_before:
        run()
    got = measured(model, run, times=2)
    assert len(got.coverage.exact) == 4
    torch.testing.assert_close(got.sq_norms, expected.sq_norms)
    torch.testing.assert_close(got.gns, expected.gns)
    before = graphs()
    run()
    assert graphs() > before or compiled_before
    with torch.compiler.set_stance("fail_on_recompile"):
        run()


def test_gradient_noise_of_a_model_compiled_inside_the_context():
    model = net()

    def run():
        cross_entropy(torch.compile(model, backend="aot_eager")(INPUTS), LABELS).backward()

    torch.testing.assert_close(measured(model, run).gns, truth(net()).gns)


def test_a_context_inside_a_compiled_function_is_refused():
    model = net()
    noise = normkern.GradientNoise(model)

    def run():
        with noise:
            cross_entropy(model(INPUTS), LABELS).backward()

    with pytest.raises(
        RuntimeError, match="entered inside a function that torch.compile compiles; expected the context"
    ):
        torch.compile(run, backend="aot_eager")()
    run()  # nothing is left behind
    assert noise.result().gns.isfinite()


def test_contexts_of_two_threads_give_the_stance_back():
    from threading import Thread

    from torch._dynamo import eval_frame

    from normkern.tracing import force_eager

    first, second = force_eager(), force_eager()
    first.__enter__()
    thread = Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == "default"


# --- Imports


def test_ops_are_registered_without_a_compiler():
    code = (
        "import sys, torch; before = set(sys.modules); import normkern; new = set(sys.modules) - before;"
        "torch.ops.normkern.moments(torch.ones(3, 2));"
        "print([m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor', 'torch._functorch'))"
        " and m not in before])"
    )
    done = fresh.python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr
