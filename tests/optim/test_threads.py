"""normkern.SGD in several Python threads: one optimizer each, or one for all."""

import threading

import pytest
import torch
from support.memory import same_bits
from support.twins import give_gradients, parameters
from torch import nn

import normkern


def test_two_threads_step_two_optimizers():
    results = []

    def train():
        params, opt = parameters([(200_000,), (300, 300)]), None
        opt = normkern.SGD(params, lr=0.01, momentum=0.9, stats="tensor")
        for t in range(20):
            give_gradients(params, seed=t)
            opt.step()
        results.append([*params, opt.stats().update_sq])

    threads = [threading.Thread(target=train) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    train()
    assert len(results) == 3
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(8,), (300_000,)], ids=str)
def test_one_optimizer_in_four_threads_takes_every_step(shape):
    params = [nn.Parameter(torch.zeros(shape)) for _ in range(6)]
    opt = normkern.SGD(params, lr=1.0, stats="tensor")
    for p in params:
        p.grad = torch.full(shape, -1.0)
    steps = 400 if shape == (8,) else 20

    def train():
        for _ in range(steps):
            opt.step()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((p == 4 * steps).all() for p in params)
