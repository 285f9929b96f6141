"""What no kernel can take, normkern.SGD leaves to torch's own loop, and says so."""

import pytest
import torch
from support.twins import assert_follow, give_gradients, parameters
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import normkern
from normkern import ops
from normkern.optim import group_step

pytestmark = pytest.mark.usefixtures("device")


class Subclass(torch.Tensor):
    pass


def unusual(kind, seed):
    """A parameter that no kernel takes, and a function that gives it a gradient."""
    torch.manual_seed(seed)
    if kind == "complex":
        p = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        return p, lambda: torch.randn(4, 3, dtype=torch.complex64)
    if kind == "sparse gradient":
        return nn.Parameter(torch.randn(6)), lambda: torch.sparse_coo_tensor(
            [[0, 0, 4]], torch.randn(3), (6,), check_invariants=True
        )
    if kind == "subclass":
        return torch.randn(7).as_subclass(Subclass), lambda: torch.randn(7)
    if kind == "negative bit":
        return nn.Parameter(torch.randn(7)), lambda: torch._neg_view(torch.randn(7))
    if kind == "gradient of another dtype":
        p = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        p.grad_dtype = torch.float32
        return p, lambda: torch.randn(7)
    raise AssertionError(kind)


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", [None, "tensor", "row"])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize(
    "kind", ["complex", "sparse gradient", "subclass", "negative bit", "gradient of another dtype"]
)
def test_torch_steps_what_the_kernel_cannot(kind, momentum, stats, caplog):
    results = []
    for optimizer in (normkern.SGD, torch.optim.SGD):
        p, gradient = unusual(kind, seed=3)
        plain = nn.Parameter(torch.ones(5))
        own = {"stats": stats} if optimizer is normkern.SGD else {"foreach": False}
        opt = optimizer([plain, p], lr=0.1, momentum=momentum, **own)
        with caplog.at_level("DEBUG", logger="normkern"):
            for _ in range(3):
                before = p.detach().clone()
                p.grad, plain.grad = gradient(), torch.ones(5)
                opt.step()
        results.append((p.detach(), plain.detach()))
        if stats and optimizer is normkern.SGD:
            moved = (p.detach() - before).abs().double().square().sum()
            first = opt.stats().slots["0.1"].start
            torch.testing.assert_close(opt.stats().update_sq[first:].sum(), moved, rtol=1e-2, atol=1e-12)
    assert_follow(*[[torch.view_as_real(r[0]) if r[0].is_complex() else r[0], r[1]] for r in results], steps=3)
    assert "params[1]" in caplog.text
    assert "torch's own loop" in caplog.text


def test_differentiable():
    w, lr = (
        torch.randn(5, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    )
    inner = w.clone()
    inner.grad = torch.ones(5, dtype=torch.float64)
    opt = normkern.SGD([inner], lr=lr, momentum=0.9, differentiable=True, stats="tensor")
    opt.step()
    inner.sum().backward()
    torch.testing.assert_close(w.grad, torch.ones(5, dtype=torch.float64))
    assert lr.grad.item() == -5
    assert opt.stats().update_sq.item() == pytest.approx(0.05)


def test_meta_and_fake_parameters():
    w = nn.Parameter(torch.empty(3, device="meta"))
    w.grad = torch.empty(3, device="meta")
    normkern.SGD([w], lr=0.1, momentum=0.9, stats="tensor").step()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        w = nn.Parameter(torch.empty(3))
        w.grad = torch.empty(3)
        normkern.SGD([w], lr=0.1, momentum=0.9).step()
    w = nn.Parameter(torch.empty(3, device="meta"))
    w.grad = torch.empty(3, device="meta")
    fused = normkern.SGD([w], fused=True)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors of supported devices"):
        fused.step()


def test_fused_has_torchs_errors():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        normkern.SGD([w], fused=True).step()
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        normkern.SGD([w], fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        normkern.SGD([w], fused=True, differentiable=True)


def test_dispatch_modes_see_the_step():
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(w, g):
        q = w.clone()
        q.grad = g
        normkern.SGD([q], lr=0.1, stats="row").step()
        return q

    traced = make_fx(step)(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(traced(torch.full((3,), 5.0), torch.full((3,), 2.0)), torch.full((3,), 4.8))
    mapped = torch.func.vmap(step)(torch.ones(2, 3), torch.tensor([[1.0] * 3, [2.0] * 3]))
    torch.testing.assert_close(mapped, torch.tensor([[0.9] * 3, [0.8] * 3]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    ours, theirs = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    a = normkern.SGD(ours, lr=0.1, momentum=0.9, stats="tensor")
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    compiled = torch.compile(a.step, backend=backend)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        compiled()
        b.step()
    assert_follow(ours, theirs, steps=3)
    assert a.stats().weight_norm.isfinite().all()


def test_lazy_modules_before_their_first_forward():
    module = nn.LazyLinear(3)
    opt = normkern.SGD(module.parameters(), lr=0.1, stats="row")
    opt.step()
    module(torch.randn(4, 2)).sum().backward()
    opt.step()
    assert opt.stats().slots == {"0.0": slice(0, 3), "0.1": slice(3, 4)}


def test_negative_bit_at_the_address_of_a_gradient_that_died():
    """New gradients take the addresses of old ones, objects and memory: each is asked for its sign."""
    memory, w = torch.ones(7), nn.Parameter(torch.zeros(7))
    opt = normkern.SGD([w], lr=1.0)
    for t in range(1, 20):
        w.grad = None
        w.grad = memory.detach() if t % 3 else torch._neg_view(memory)
        opt.step()
    w.grad = None
    assert w.tolist() == [-(13.0 - 6.0)] * 7


def test_negative_bit_after_a_gradient_that_stayed():
    """The one gradient is met often enough to be known; the one that comes at its address is not it."""
    memory, w = torch.ones(7), nn.Parameter(torch.zeros(7))
    opt = normkern.SGD([w], lr=1.0)
    w.grad = memory.detach()
    for _ in range(4):
        opt.step()
    w.grad = None
    w.grad = torch._neg_view(memory)
    opt.step()
    assert w.tolist() == [-3.0] * 7


@pytest.mark.skipif(bool(ops.cuda_architectures()), reason="this binary has kernels for GPUs")
def test_a_binary_for_cpus_says_so_when_a_gpus_tensor_arrives():
    group_step._warn_of_gpu.cache_clear()
    with FakeTensorMode():
        w = nn.Parameter(torch.ones(3, device="cuda:0"))
        w.grad = torch.ones(3, device="cuda:0")
    opt = normkern.SGD([w], lr=0.1)
    with pytest.warns(UserWarning, match="this binary was built for CPUs only, .*NORMKERN_CUDA=ON pip install"):
        opt.step()
    opt.step()  # once is enough
    with pytest.raises(
        TypeError, match=r"sgd_: params\[0\] is .*FakeTensor.* cuda:0; expected .* on cpu: this binary was"
    ):
        ops.sgd_([w], [w.grad], lr=0.1)
