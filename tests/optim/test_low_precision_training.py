"""bfloat16 and float16 weights: coupled decay rounds away, as an exponential learning rate it does not.

At lr * weight_decay = 5e-5 a step of decay is far below half a unit of the last place (bfloat16 2^-9, float16 2^-12, of
the weight), so nothing shrinks that is not moved; the scale of SGD(decay="exponential") is a double.
"""

import functools
import math

import pytest
import torch
from support.invariant_nets import gradient_of_direction
from support.memory import same_bits
from torch import nn

import normkern

LR, DECAY = 0.1, 5e-4
LOW = [torch.bfloat16, torch.float16]
DIM, STEPS = 2000, 6000


def start(dtype, size=1.0):
    make = torch.Generator().manual_seed(0)
    w = torch.randn(DIM, generator=make, dtype=torch.float64).to(torch.bfloat16)  # a number of both types
    return nn.Parameter((size * w).to(dtype))


def exponential(w, **options):
    group = {"params": [w], "norm_buffers": [], "followers": []}
    return normkern.SGD([group], lr=LR, weight_decay=DECAY, decay="exponential", **options)


@functools.cache
def _noise(seed):
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed))


def noise(t):
    return _noise(t % 500)


def true_norm(w, opt):
    scale = opt.true_scale()[0] if isinstance(opt, normkern.SGD) else 1.0
    return scale * float(torch.linalg.vector_norm(w.detach().double()))


@pytest.mark.parametrize("gradient", ["zero", "tiny"])
@pytest.mark.parametrize("optimizer", [normkern.SGD, torch.optim.SGD])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_coupled_decay_never_shrinks_a_weight(dtype, optimizer, gradient):
    w = start(dtype)
    before = w.detach().clone()
    opt = optimizer([w], lr=LR, weight_decay=DECAY, foreach=False)
    for t in range(STEPS // 10):
        w.grad = torch.zeros_like(w) if gradient == "zero" else gradient_of_direction(w, 1e-5 * noise(t)).to(dtype)
        opt.step()
    if gradient == "zero":
        assert same_bits(w, before)
    else:
        # A gradient as large as a small coordinate's last place moves that one; what is larger stays.
        large = before.abs() > 1e-3
        assert large.sum() > 0.99 * DIM
        assert same_bits(w[large], before[large])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_exponential_decay_shrinks_without_any_gradient(dtype):
    """Weights of the given precision are powers of two of what they were; their true norm is the exact one."""
    w = start(dtype)
    norm, opt = true_norm(w, torch.optim.SGD([w])), exponential(w)
    for _ in range(STEPS):
        w.grad = torch.zeros_like(w)
        opt.step()
    assert true_norm(w, opt) / norm == pytest.approx((1 - LR * DECAY) ** STEPS, rel=1e-3)


@functools.cache
def norms(dtype, decay, size, gradient, momentum=0.0):
    """The true norm, every 500 steps, of weights whose gradients are of a direction alone."""
    w, told = start(dtype, size), []
    if decay == "exponential":
        opt = exponential(w, momentum=momentum)
    else:
        opt = torch.optim.SGD([w], lr=LR, weight_decay=DECAY, momentum=momentum, foreach=False)
    for t in range(STEPS):
        w.grad = gradient_of_direction(w, (gradient * noise(t)).to(torch.promote_types(dtype, torch.float32))).to(dtype)
        opt.step()
        if t % 500 == 499:
            told.append(true_norm(w, opt))
    return torch.tensor(told, dtype=torch.float64)


#: Where growth by gradients and decay cancel, of this dimension and noise: |w|^4 = lr |n|^2 / (2 weight_decay).
def equilibrium(gradient, momentum):
    return (LR * gradient**2 * DIM / (2 * DECAY * (1 - momentum))) ** 0.25 / math.sqrt(DIM)


@pytest.mark.pairwise
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("share", [1.0, 1.5])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_exponential_decay_follows_the_norm_of_the_float64_run(dtype, share, momentum):
    """From equilibrium, and from above it."""
    size = share * equilibrium(4.0, momentum)
    ours = norms(dtype, "exponential", size, 4.0, momentum)
    exact = norms(torch.float64, "coupled", size, 4.0, momentum)
    torch.testing.assert_close(ours, exact, rtol=0.035 if dtype == torch.bfloat16 else 0.002, atol=0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_far_above_equilibrium_only_exponential_decay_works(dtype):
    size = 30 * equilibrium(4.0, 0.0)
    ours = norms(dtype, "exponential", size, 4.0)
    exact = norms(torch.float64, "coupled", size, 4.0)
    coupled = norms(dtype, "coupled", size, 4.0)
    assert exact[-1] / exact[0] < 0.8
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=0)
    assert coupled[-1] / coupled[0] > 0.9999
