"""SVAG under DDP, in gloo processes: the steps of one process, and a sentence where DDP reuses memory."""

import pytest
import torch
from support.gloo import leave, run, start
from torch import nn

import normkern


def ddp(rank, world, rendezvous, bucket_view, copy):
    start(rank, world, rendezvous)
    torch.manual_seed(0)
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    ours = normkern.SVAG(model.parameters(), lr=0.1, l=4, momentum=0.9)
    theirs = normkern.SVAG(twin.parameters(), lr=0.1, l=4, momentum=0.9)
    refused = False
    for t in range(4):
        x = torch.sin(torch.arange(2 * world * 4 * 5.0) + t).view(2, world * 4, 5)
        for half in range(2):
            wrapped(x[half, 4 * rank : 4 * rank + 4]).square().mean().backward()
            twin(x[half]).square().mean().backward()
            if half == 0:
                ours.hold(copy=copy)
                theirs.hold()
        before = [p.detach().clone() for p in model.parameters()]
        refusal = ""
        try:
            ours.step()
        except RuntimeError as error:
            refusal = str(error)
        if refusal:
            assert "gradient_as_bucket_view=True" in refusal, refusal
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            refused = True
            break
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert refused == (bucket_view and not copy)
    leave()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("bucket_view", "copy"), [(False, False), (True, True), (True, False)])
def test_ddp(bucket_view, copy, tmp_path):
    run(ddp, str(tmp_path / "rendezvous"), bucket_view, copy)
