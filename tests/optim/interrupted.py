"""Three small trainings that save themselves every few steps and go on where they were, if they are started again."""

import os
from pathlib import Path

import torch
from torch import nn

import normkern

STEPS, EVERY = 300, 3


def trainings():
    """Parameters and optimizers: bfloat16 rounded at random, pairs of gradients, decay as a growing learning rate."""
    make = torch.Generator().manual_seed(0)
    lists = [
        [nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in [(40,), (6, 5)]]
        for dtype in (torch.bfloat16, torch.float32, torch.float32)
    ]
    return list(
        zip(
            lists,
            [
                normkern.SGD(lists[0], lr=0.01, momentum=0.9, state_dtype=torch.float32, stochastic_rounding=True),
                normkern.SVAG(lists[1], lr=0.01, momentum=0.9, weight_decay=0.01, l=4),
                normkern.SGD(
                    [{"params": lists[2], "scale_invariant": True, "norm_buffers": [], "followers": []}],
                    lr=0.05, momentum=0.9, weight_decay=0.05, decay="exponential",
                ),
            ],
            strict=True,
        )
    )  # fmt: skip


def step(params, opt, t):
    def give(seed):
        make = torch.Generator().manual_seed(seed)
        for p in params:
            noise = torch.randn(p.shape, generator=make).to(p.dtype)
            p.grad = (
                noise
                if opt.defaults["decay"] == "coupled"
                else noise - p.detach() * (p * noise).sum().detach() / (p * p).sum().detach()
            )

    give(2 * t)
    if isinstance(opt, normkern.SVAG):
        opt.hold()
        give(2 * t + 1)
    opt.step()


def train(folder, steps=STEPS):
    """To the end; what the last checkpoint holds."""
    all_of_them, path = trainings(), Path(folder) / "checkpoint.pt"
    begin = 0
    if path.exists():
        saved = torch.load(path)
        begin = saved["step"]
        for (params, opt), values, state in zip(all_of_them, saved["params"], saved["optimizers"], strict=True):
            for p, x in zip(params, values, strict=True):
                p.data.copy_(x)
            opt.load_state_dict(state)
    for t in range(begin, steps):
        for params, opt in all_of_them:
            step(params, opt, t)
        if (t + 1) % EVERY == 0:
            new = path.with_suffix(".new")
            now = {
                "step": t + 1,
                "params": [[p.detach() for p in params] for params, _ in all_of_them],
                "optimizers": [opt.state_dict() for _, opt in all_of_them],
            }
            torch.save(now, new)
            os.replace(new, path)  # whoever is killed leaves the old one, or this one
    return torch.load(path)


def train_alone(folder):
    """In a process of its own."""
    torch.set_num_threads(1)
    train(folder)
