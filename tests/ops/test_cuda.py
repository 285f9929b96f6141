"""What only a GPU shows: the CPU's bits, streams, graphs, scalers, sizes beyond 2^31, several devices, refusals."""

import contextlib
import copy
import warnings

import pytest
import torch
from support.memory import same_bits
from support.twins import DTYPES, assert_follow, give_gradients, parameters
from torch import nn

import normkern
from normkern import ops, reference

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

SHAPES = [(1,), (7,), (2047,), (2049,), (8192,), (8193,), (64, 27), (33, 2048), (3, 20011), (5, 3, 40, 41), (300_007,)]
OPTIONS = {
    "plain": {"lr": 0.1, "weight_decay": 0.01},
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "grad_scale": 3.0},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
}


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not see every operation that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on(device, shapes, dtype, seed):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=make, device="cpu").to(dtype).to(device) for s in shapes]


@pytest.mark.parametrize("stats", [None, "tensor", "row"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_the_cpus(dtype, options, stats):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("the CPU has no FMA hardware")
    runs = []
    for device in ("cpu", "cuda"):
        w, v = on(device, SHAPES, dtype, 1), [None] * len(SHAPES)
        for t in range(3):
            table = ops.sgd_(w, on(device, SHAPES, dtype, 2 + t), v, stats=stats, **OPTIONS[options])
        runs.append(([*w, *(x for x in v if x is not None)], table))
    (cpu, cpu_sums), (cuda, cuda_sums) = runs
    assert all(same_bits(a, b.cpu()) for a, b in zip(cpu, cuda, strict=True))
    if stats:
        assert cuda_sums.is_cuda
        torch.testing.assert_close(cuda_sums.cpu(), cpu_sums, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_sums_are_the_same_every_time(stats):
    grads = on("cuda", SHAPES, torch.float32, 2)
    tables = [ops.sgd_(on("cuda", SHAPES, torch.float32, 1), grads, lr=0.1, stats=stats) for _ in range(20)]
    assert all(same_bits(t, tables[0]) for t in tables)


def test_more_tensors_than_a_table_has():
    params, grads = ([torch.randn(5 + i % 40) for i in range(1100)] for _ in range(2))
    grads[3] = grads[600] = None
    expected = [p.clone() for p in params]
    with no_waiting():
        table = ops.sgd_(params, grads, [None] * 1100, lr=0.1, momentum=0.9, stats="tensor")
    for p, e, g in zip(params, expected, grads, strict=True):
        torch.testing.assert_close(p, e if g is None else e - 0.1 * g)
    assert table.isnan().any(1).nonzero().flatten().tolist() == [3, 600]


def test_a_step_waits_for_nothing():
    ours = [nn.Parameter(torch.randn(s)) for s in SHAPES]
    for p in ours:
        p.grad = torch.randn_like(p)
    opt = normkern.SGD(ours, lr=torch.full((), 0.1), momentum=0.9, weight_decay=0.01, stats="row")
    for _ in range(3):
        with no_waiting():
            opt.step()
            opt.stats().angular_update  # noqa: B018
            opt.stats().effective_lr  # noqa: B018
    pairs = [p.detach() for p in ours], [p.grad for p in ours]
    with no_waiting():
        ops.pair_sums(*pairs)
        ops.svag_combine_(*pairs, l=4)
        ops.welford_(*pairs, [torch.zeros_like(p) for p in ours], n=3, stats="row")


@pytest.mark.parametrize("kind", [normkern.SGD, normkern.SVAG])
def test_a_clipped_step_waits_for_nothing(kind):
    multipliers = torch.linspace(0, 2, len(SHAPES))
    runs = []
    for device in ("cpu", "cuda"):
        ours = [nn.Parameter(x) for x in on(device, SHAPES, torch.float32, 1)]
        for p, g in zip(ours, on(device, SHAPES, torch.float32, 2), strict=True):
            p.grad = g
        groups = [{"params": ours, "lr_multipliers": multipliers.to(device)}]
        opt = kind(groups, lr=torch.full((), 0.1, device=device), momentum=0.9, stats="tensor")
        opt.step(max_norm=10.0)  # SVAG reads lr, and waits for it
        opt.param_groups[0]["lr"] = 0.1
        with no_waiting():
            norm = opt.step(max_norm=10.0)
            opt.stats().effective_lr  # noqa: B018
        runs.append([norm.cpu(), *(p.detach().cpu() for p in ours), opt.stats().effective_lr.cpu()])
        assert norm.device.type == device
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def samples(dtype, device):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.arange(600, device=device).view(4, 150) * 7 % 90
    return (
        on(device, [(140, 1000), (140, 6, 5), (140,)], dtype, 1),
        on(device, [(4, 150, 300)] * 2, dtype, 2),
        on(device, [(4, 150)] * 2, real, 3),
        ids,
    )


def over_samples(x, tensors, rows, ids):
    """Every op over samples: what has the CPU's bits, and sums that are near."""
    g, y = tensors
    totals = torch.empty(2, dtype=torch.float64, device=g.device)
    means, centred, norms = ops.moments(x, totals=totals)
    last = ops.norm_sums(g, y, *rows, channels="last")
    first = ops.norm_sums(g, y, None, rows[1], channels="first")
    total, spread, of_samples = ops.embedding_moments(ids, g, 91, padding_idx=3, squares=True)
    near = [norms, totals, *first, of_samples, ops.row_sums(x[0]), ops.row_sq_norms(x[0])]
    return [*means, *centred, *last, total, spread], near


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_over_samples(dtype):
    if ops.isa() in ("v2", "portable"):
        pytest.skip("the CPU has no FMA hardware")
    exact, near = over_samples(*samples(dtype, "cpu"))
    given = samples(dtype, "cuda")
    over_samples(*given)  # the device has the code of every kernel
    with no_waiting():
        got, sums = over_samples(*given)
    assert all(x.is_cuda for x in (*got, *sums))
    assert all(same_bits(a.cpu(), b) for a, b in zip(got, exact, strict=True))
    for a, b in zip(sums, near, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)
    again = over_samples(*given)
    assert all(same_bits(a, b) for a, b in zip((*again[0], *again[1]), (*got, *sums), strict=True))


def test_ops_over_samples_in_a_graph():
    given = samples(torch.float32, "cuda")
    expected = over_samples(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = over_samples(*given)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(got, expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_id_that_is_none_leaves_nan():
    ids, g = torch.tensor([[0, 1], [2, 9], [-1, 0]]), torch.ones(3, 2, 5)
    total, _, norms = ops.embedding_moments(ids, g, 3, squares=True)
    assert norms.isnan().tolist() == [False, True, True]
    assert total.sum(1).tolist() == [10.0, 5.0, 5.0]


def test_on_the_current_stream():
    """A step behind a long kernel on a side stream sees what that kernel writes."""
    side = torch.cuda.Stream()
    w, g = torch.zeros(1_000_000), torch.zeros(1_000_000)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        g.fill_(1.0)
        table = ops.sgd_([w], [g], lr=1.0, stats="tensor")
        after = w.clone()
    assert w.is_cuda
    side.synchronize()
    assert (after == -1).all()
    assert table[0, 1].item() == 1_000_000


@pytest.mark.parametrize("stats", [None, "tensor"])
def test_adamw_in_a_graph_counts_its_steps(stats):
    ours, theirs = parameters(), parameters()
    lr, betas = torch.full((), 0.02, dtype=torch.float64), tuple(torch.tensor([0.8, 0.9], dtype=torch.float64))
    a = normkern.AdamW(ours, lr=lr, betas=betas, capturable=True, stats=stats)
    b = normkern.AdamW(theirs, lr=0.02, betas=(0.8, 0.9), stats=stats)
    give_gradients(ours, theirs, seed=0)
    a.step()
    b.step()
    graph, grads = torch.cuda.CUDAGraph(), [p.grad for p in ours]
    with torch.cuda.graph(graph):
        a.step()
    for t in range(1, 4):
        give_gradients(ours, theirs, seed=t)
        for p, g in zip(ours, grads, strict=True):
            g.copy_(p.grad)
        graph.replay()
        b.step()
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
    assert all(a.state[p]["step"].is_cuda and a.state[p]["step"] == 4 for p in ours)
    refused = pytest.raises(RuntimeError, match="AdamW.step: .*expected capturable=True or fused=True in a CUDA graph")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        b.step()


@pytest.mark.parametrize("stats", [None, "tensor", "row"])
def test_in_a_graph_with_a_learning_rate_that_changes(stats):
    ours, theirs = parameters(), parameters()
    lr, decay = torch.full((), 0.1, dtype=torch.float64), torch.full((), 0.01)
    a = normkern.SGD(ours, lr=lr, momentum=0.9, weight_decay=decay, stats=stats)
    b = normkern.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=decay.item(), stats=stats)
    give_gradients(ours, theirs, seed=0)
    a.step()
    b.step()
    graph = torch.cuda.CUDAGraph()
    grads = [p.grad for p in ours]
    with torch.cuda.graph(graph):
        a.step()
    for t in range(1, 4):
        give_gradients(ours, theirs, seed=t)
        for p, g in zip(ours, grads, strict=True):
            g.copy_(p.grad)
        lr.fill_(0.1 / t)
        b.param_groups[0]["lr"] = 0.1 / t
        graph.replay()
        b.step()
        torch.cuda.synchronize()
        assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True)), t
        if stats:
            assert same_bits(a.stats().update_sq, b.stats().update_sq)


@pytest.mark.parametrize(
    "variant", [{}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "decay": "exponential"}]
)
def test_grad_scaler(variant):
    """fused=True: what the scaler found is read by the kernel; a skipped step leaves no trace."""
    ours, theirs = parameters(), parameters()
    exponential = "decay" in variant
    options = {"lr": 0.1, "weight_decay": 0.01 if exponential else 0.0, **variant}
    groups = [{"params": ours, "scale_invariant": True, "norm_buffers": [], "followers": []}]
    a = normkern.SGD(groups, fused=True, stats="tensor", **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=1)
    options.pop("decay", None)
    b = torch.optim.SGD(theirs, foreach=False, **options)
    for t in range(6):
        give_gradients(ours, theirs, seed=t)
        scale = scaler.get_scale()
        scaler.scale(torch.ones(()))
        bad = t in (0, 3)  # the very first step, and a later one
        for i, p in enumerate(ours):
            p.grad.mul_(scale)
            if bad and i == 6:
                p.grad[0] = torch.inf
        before = [p.detach().clone() for p in ours], copy.deepcopy(a.state_dict()), a.stats() if t > 1 else None
        scaler.step(a)
        scaler.update()
        if bad:
            assert all(same_bits(p, q) for p, q in zip(ours, before[0], strict=True))
            state = a.state_dict()["state"]
            assert before[1]["state"].keys() == state.keys(), "a skipped step made a buffer"
            for key, entry in state.items():
                assert same_bits(entry["momentum_buffer"], before[1]["state"][key]["momentum_buffer"])
            assert t == 0 or same_bits(a.stats().grad_sq, before[2].grad_sq)
        else:
            b.step()
        if not exponential:
            assert_follow(ours, theirs, steps=t + 1)


def test_a_scaled_step_does_not_wait():
    ours = parameters()
    opt = normkern.SGD(ours, lr=0.1, momentum=0.9, fused=True, stats="tensor")
    give_gradients(ours, seed=0)
    opt.step()
    opt.found_inf, opt.grad_scale = torch.zeros(1), torch.full((1,), 4.0)
    with no_waiting():
        opt.step()


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_of_the_bare_op(found):
    options = {"lr": 0.1, "momentum": 0.9, "stats": "row"}
    w, g = on("cuda", SHAPES, torch.float32, 1), on("cuda", SHAPES, torch.float32, 2)
    exact, v, exact_v = [x.double() for x in w], [None] * len(w), [None] * len(w)
    scale, found_inf = torch.full((1,), 4.0), torch.full((1,), found)
    table = ops.sgd_(w, g, v, grad_scale=scale, found_inf=found_inf, **options)
    sums = reference.sgd_(exact, [x.double() for x in g], exact_v, grad_scale=scale, found_inf=found_inf, **options)
    torch.testing.assert_close(table, sums, rtol=1e-5, atol=1e-5, equal_nan=True)
    for a, b in zip(w, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    assert all((x == 0).all() == bool(found) for x in v)


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["tensor", "row"])
def test_more_than_2_31_coordinates(stats):
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 4.5 * n:
        pytest.skip("needs 9 GB of the GPU's memory")
    w = torch.zeros(n, dtype=torch.bfloat16)
    g = torch.ones(n, dtype=torch.bfloat16)
    if stats == "row":
        w, g = (x[: 2**31].view(2**20, 2**11) for x in (w, g))
    table = ops.sgd_([w], [g], lr=0.5, stats=stats)
    assert (w == -0.5).all()
    assert (table[:, 1] == (n if stats == "tensor" else 2**11)).all()
    assert table.shape == ((1 if stats == "tensor" else 2**20), 5)


@pytest.mark.slow
def test_strides_beyond_2_31():
    base = torch.zeros(2**20, 2200, dtype=torch.bfloat16)
    w = base[:, ::1100]
    ops.sgd_([w], [torch.ones(2**20, 2, dtype=torch.bfloat16)], lr=0.5)
    assert (w == -0.5).all()
    assert base.count_nonzero().item() == 2**21


def test_refuses_two_devices():
    w, g = torch.ones(3), torch.ones(3, device="cpu")
    with pytest.raises(
        TypeError, match=r"grads\[0\] is torch.float32 on cpu but params\[0\] is torch.float32 on cuda:0"
    ):
        ops.sgd_([w], [g], lr=0.1)
    assert (w == 1).all()
    mixed = [torch.ones(3), torch.ones(3, device="cpu")]
    with pytest.raises(TypeError, match=r"params\[1\] is torch.float32 on cpu but others, or .* expected one device"):
        ops.sgd_(mixed, [x.clone() for x in mixed], lr=0.1, stats="tensor")
    assert all((x == 1).all() for x in mixed)


def test_cpu_and_gpu_in_one_step():
    mixed = [torch.ones(3), torch.ones(4, device="cpu")]
    ops.sgd_(mixed, [x.clone() for x in mixed], lr=0.5)
    assert all((x == 0.5).all() for x in mixed)
    params = [nn.Parameter(x) for x in mixed]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = normkern.SGD(params, lr=0.25, stats="tensor")
    opt.step()
    assert all((p == 0.25).all() for p in params)
    assert opt.stats().grad_sq.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("found", [torch.ones(1, device="cpu"), None])
def test_refuses_numbers_on_another_device(found):
    numbers = {"found_inf": found} if found is not None else {"lr": torch.ones(1), "grad_scale": torch.ones(1)}
    w = torch.ones(3) if found is not None else torch.ones(3, device="cpu")
    with pytest.raises(
        (ValueError, TypeError), match=r"found_inf on a device expected one float32|expected one device"
    ):
        ops.sgd_([w], [torch.ones_like(w)], **{"lr": 0.1, **numbers})
    assert (w == 1).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    params = [nn.Parameter(torch.ones(5000, device=f"cuda:{i}")) for i in (0, 1)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = normkern.SGD(params, lr=0.5, momentum=0.9)
    with torch.cuda.device(1):
        opt.step()
        assert torch.cuda.current_device() == 1
    assert all((p == 0.5).all() for p in params)
    measured = normkern.SGD(params, lr=0.5, stats="tensor")
    measured.step()
    assert measured.stats().grad_sq.tolist() == [5000.0, 5000.0]
    assert all((p == 0).all() for p in params)


def test_the_binary_has_code_for_this_gpu():
    major, minor = torch.cuda.get_device_capability()
    assert any(a // 10 == major and a % 10 <= minor for a in ops.cuda_architectures())
