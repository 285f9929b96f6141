"""Clipping under DistributedDataParallel, in gloo processes: the run of one process with torch's clip and step."""

import pytest
import torch
import torch.multiprocessing as mp
from gloo import leave, start
from torch import nn
from torch.nn.utils import clip_grad_norm_

import normkern


def ddp(rank, world, rendezvous):
    start(rank, world, rendezvous)
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    ours = normkern.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    clipped = 0
    for t in range(6):
        x = torch.sin(torch.arange(world * 4 * 5.0).double() + t).view(world * 4, 5)
        ours.zero_grad()
        theirs.zero_grad()
        wrapped(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        twin(x).square().mean().backward()
        norm, expected = ours.step(max_norm=0.1), clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step()
        torch.testing.assert_close(norm, expected)
        clipped += expected > 0.1
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert clipped
    leave()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_ddp(tmp_path):
    mp.spawn(ddp, (2, str(tmp_path / "rendezvous")), nprocs=2)
