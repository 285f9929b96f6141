"""Runs with weight decay and without, and what is shared by the tests of EquivalentExponentialLR."""

import math
import random

import pytest
import torch
from hypothesis import settings
from support.one_weight import gradient, one, the
from torch import nn

import normkern
from normkern import EquivalentExponentialLR

STEPS, DECAY = 400, 0.02


OPTIMIZERS = {"torch": torch.optim.SGD, "ours": normkern.SGD}


both = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)


patient = settings(deadline=None, max_examples=50)


def step_decay(t):
    return 0.1 if t < 150 else 0.01 if t < 300 else 0.001


def cosine(t):
    return 0.05 * (1 + math.cos(math.pi * t / STEPS))


def unsteady(t):
    return 0.1 * random.Random(t).random()


SCHEDULES = {"constant": None, "step": step_decay, "cosine": cosine, "random": unsteady}


def advance(opt, a, scheduler=None):
    p = the(opt)
    p.grad = gradient(p.detach(), a)
    opt.step()
    if scheduler is not None:
        scheduler.step()


def with_decay(loss, schedule=None, weight_decay=DECAY, w=None, change=None, **options):
    """The weights before each step of torch's own run with weight decay, and the norms of nothing else."""
    opt, out = one(w=w, weight_decay=weight_decay, **options), []
    for t, a in enumerate(loss):
        if change is not None:
            opt.param_groups[0].update(change(t))
        opt.param_groups[0]["lr"] = 0.1 if schedule is None else schedule(t)
        out.append(the(opt).detach().clone())
        advance(opt, a)
    return out


def apart(scheduler, w):
    """How far our weights are from w, relative to it, after the scale."""
    (a,) = scheduler.true_scale()
    return float((a * the(scheduler.optimizer).detach() - w).norm() / w.norm())


def two(kind=torch.optim.SGD, **options):
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(3))], "lr": 0.3}]
    return kind(groups, **{"lr": 0.1, **options})


def refuses_twice(call, opt, sentence, scheduler=None):
    """A refusal that changes nothing is made again."""
    opt.step()

    def plain(x):
        return x.tolist() if isinstance(x, torch.Tensor) else x

    def seen():
        return (
            [{k: plain(v) for k, v in group.items()} for group in opt.param_groups],
            [{k: plain(v) for k, v in entry.items()} for entry in opt.state.values()],
            [plain(p) for group in opt.param_groups for p in group["params"]],
            None if scheduler is None else (scheduler.state_dict(), scheduler.get_last_lr()),
        )

    before = seen()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence
        assert seen() == before


def running(opt, weight_decay=DECAY, schedule=None, steps=3, **options):
    scheduler = EquivalentExponentialLR(opt, weight_decay, schedule, **options)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        opt.step()
        scheduler.step()
    return scheduler
