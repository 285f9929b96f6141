"""DTensor parameters step through their local shards: equal to torch's for-loop, in 1 and 2 gloo processes."""

import pytest
import torch
from support.gloo import leave, run, start
from torch import nn

import normkern

OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
}


def worker(rank, world, rendezvous, stats, kind):
    start(rank, world, rendezvous)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    wholes = [torch.linspace(-1, 1, 35).view(7, 5), torch.linspace(0, 1, 5), torch.ones(1, 3)]
    placements = [[Shard(0)], [Replicate()], [Shard(0)]]  # the last one leaves a rank without rows
    ours = [nn.Parameter(distribute_tensor(w, mesh, p)) for w, p in zip(wholes, placements, strict=True)]
    theirs = [nn.Parameter(w.clone()) for w in wholes]
    a = getattr(normkern, kind)(ours, stats=stats, **OPTIONS[kind])
    b = getattr(torch.optim, kind)(theirs, foreach=False, **OPTIONS[kind])
    for t in range(3):
        before = [w.detach().clone() for w in theirs]
        for p, q, place in zip(ours, theirs, placements, strict=True):
            q.grad = torch.sin(q.detach() + t)
            p.grad = distribute_tensor(q.grad, mesh, place)
        versions = [p._version for p in ours]
        a.step()
        b.step()
        assert all(p._version > v for p, v in zip(ours, versions, strict=True))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach())
        assert a.state[p].keys() == b.state[q].keys()
        for key, entry in b.state[q].items():
            assert isinstance(a.state[p][key], DTensor) == (key != "step")
            torch.testing.assert_close(a.state[p][key] if key == "step" else a.state[p][key].full_tensor(), entry)
    if stats:
        s = a.stats()
        rows = before[0].double().square().sum(1)  # of all ranks; tests/ranks/sums.py has the rest
        torch.testing.assert_close(s.weight_sq[s.slots["0.0"]], rows if stats == "row" else rows.sum(0, keepdim=True))
        torch.testing.assert_close(s.weight_sq[s.slots["0.1"]], before[1].double().square().sum(0, keepdim=True))
    kept = getattr(normkern, kind)(ours, norm="keep", **OPTIONS[kind])
    with pytest.raises(ValueError, match=r"params\[0\] is a DTensor; norm='keep' expected whole parameters"):
        kept.step()
    with pytest.raises(TypeError, match=r"apply_updates_: params\[0\] is DTensor"):
        normkern.apply_updates_(ours, [p.grad for p in ours], lr=0.1)
    leave()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("stats", [None, "row"])  # tests/ranks/sums.py has "tensor" too
@pytest.mark.parametrize(("world", "kind"), [(1, "SGD"), (2, "SGD"), (2, "AdamW")])
def test_shards(world, kind, stats, tmp_path):
    run(worker, str(tmp_path / "rendezvous"), stats, kind, processes=world)
