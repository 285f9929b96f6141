"""Sums of a step over the mesh are those of one process, on every rank."""

import functools
import itertools

import pytest
import script
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import normkern
from normkern.ops import SUMS
from normkern.optim.dtensor import sum_over_shards

DERIVED = ("cosine", "next_weight_sq", "effective_lr")
#: Even, uneven, empty on some ranks, of no dimension, a row each.
SHAPES = [(8, 4), (7, 5), (1, 3), (5,), (1,), (3, 2, 2), (2, 40000), (6, 1)]


def same(ours, theirs):
    a, b = ours.stats(), theirs.stats()
    assert a.slots == b.slots
    for column in (*SUMS, *DERIVED):
        torch.testing.assert_close(getattr(a, column), getattr(b, column), rtol=1e-11, atol=1e-13, equal_nan=True)


def follow(mesh, placements, shapes, stats, make=normkern.SGD, **options):
    """Steps of DTensors and of the whole tensors, and their sums."""
    wholes = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    ours = [nn.Parameter(distribute_tensor(w, mesh, place)) for w, place in zip(wholes, placements, strict=True)]
    theirs = [nn.Parameter(w.clone()) for w in wholes]
    a, b = (make(p, lr=0.1, momentum=0.9, weight_decay=0.1, stats=stats, **options) for p in (ours, theirs))
    for t in range(3):
        for i, (p, q, place) in enumerate(zip(ours, theirs, placements, strict=True)):
            q.grad = None if i == t else torch.randn(q.shape, dtype=torch.float64)
            p.grad = None if q.grad is None else distribute_tensor(q.grad, mesh, place)
        a.step()
        b.step()
        same(a, b)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-12, atol=1e-12)
    return a, b


def meshes(world):
    yield init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    if world == 4:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def every_placement(rank, world):
    for mesh, stats in itertools.product(meshes(world), ("tensor", "row")):
        kinds = [Replicate(), Shard(0), Shard(1)]
        cases = [
            (shape, place)
            for shape in SHAPES
            for place in itertools.product(*[kinds] * mesh.ndim)
            if all(not p.is_shard() or p.dim < len(shape) for p in place)
        ]
        follow(mesh, [place for _, place in cases], [shape for shape, _ in cases], stats)


class Counted:
    """How many all_reduces there are while it lasts, and of how many numbers."""

    def __enter__(self):
        self.sizes, self.plain = [], dist.all_reduce
        dist.all_reduce = torch.distributed.all_reduce = self.counted
        return self

    def counted(self, tensor, *args, **kwargs):
        self.sizes.append(tensor.numel())
        return self.plain(tensor, *args, **kwargs)

    def __exit__(self, *_):
        dist.all_reduce = self.plain


def one_small_all_reduce(rank, world):
    """For each mesh dimension that splits anything; none without statistics, nor for what everybody has."""
    for mesh in meshes(world):
        last = [Replicate()] * (mesh.ndim - 1)  # over the outer dimension: replicas, as in HSDP
        for placement, stats, expected in (
            ([*last, Shard(0)], "tensor", [15]), ([*last, Replicate()], "tensor", []), ([*last, Shard(0)], None, []),
        ):  # fmt: skip
            ours = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, placement)) for _ in range(3)]
            opt = normkern.SGD(ours, lr=0.1, stats=stats)
            for p in ours:
                p.grad = p.detach().clone()
            with Counted() as counted:
                opt.step()
            assert counted.sizes == expected, (counted.sizes, expected)
            if rank == 0 and stats:  # alone: nothing waits for anybody
                opt.stats().to_dict()


def net():
    return nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3, bias=False), nn.Linear(3, 1)
    ).double()


def sharded_and_whole(mesh):
    torch.manual_seed(1)
    ours, theirs = net(), net()
    theirs.load_state_dict(ours.state_dict())
    for layer in ours:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(ours, mesh=mesh), theirs


def halves(rank, world, t):
    """Two batches, and this rank's part of each."""
    x = torch.sin(torch.arange(2 * world * 3 * 5, dtype=torch.float64) * (t + 1)).view(2, world * 3, 5)
    return x, x[:, 3 * rank : 3 * rank + 3]


def fully_sharded(rank, world):
    """FSDP2, and on two dimensions HSDP."""
    optimizers = (functools.partial(normkern.SGD, momentum=0.9), normkern.AdamW)
    for mesh, stats, make in itertools.product(meshes(world), ("tensor", "row"), optimizers):
        ours, theirs = sharded_and_whole(mesh)
        a, b = (make(m.named_parameters(), lr=0.1, weight_decay=0.1, stats=stats) for m in (ours, theirs))
        for t in range(3):
            (whole, _), (part, _) = halves(rank, world, t)
            a.zero_grad()
            b.zero_grad()
            ours(part).square().mean().backward()
            theirs(whole).square().mean().backward()
            a.step()
            b.step()
            same(a, b)
        assert all(isinstance(p, DTensor) for p in ours.parameters())
        # What one shard has that is no number, all ranks hear of.
        for p in ours.parameters():
            p.grad = torch.zeros_like(p)
            if mesh.get_local_rank(mesh.ndim - 1) == 0 and p.grad.to_local().numel():
                p.grad.to_local().fill_(torch.nan)
        a.step()
        told = a.stats()
        assert told.weight_sq.isfinite().all()
        assert torch.stack([told.grad_sq[s].isnan().any() for s in told.slots.values()]).all()


def tensor_parallel(rank, world):
    """Two mesh dimensions that both split: rows twice, or rows and columns."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    for stats in ("tensor", "row"):
        torch.manual_seed(1)
        ours, theirs = (nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4)).double() for _ in range(2))
        theirs.load_state_dict(ours.state_dict())
        parallelize_module(ours, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(ours, mesh=mesh["data"])
        a, b = (normkern.SGD(m.named_parameters(), lr=0.1, momentum=0.9, stats=stats) for m in (ours, theirs))
        for t in range(3):
            x = torch.sin(torch.arange(6 * 5, dtype=torch.float64) * (t + 1)).view(6, 5)
            each = 6 // (world // 2)
            ours(x[each * (rank // 2) :][:each]).square().mean().backward()
            theirs(x).square().mean().backward()
            a.step()
            b.step()
            a.zero_grad()
            b.zero_grad()
            same(a, b)


def two_gradients(rank, world):
    """SVAG's noise under FSDP2, and that of what it holds a scaler hears of everybody's."""
    ours, theirs = sharded_and_whole(next(meshes(world)))
    a, b = (normkern.SVAG(m.named_parameters(), lr=0.1, l=4, momentum=0.9) for m in (ours, theirs))
    for t in range(4):
        (first, second), (own_first, own_second) = halves(rank, world, t)
        for model, opt, x, y in ((ours, a, own_first, own_second), (theirs, b, first, second)):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.hold()
            model(y).square().mean().backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-11, atol=1e-12)
    x, y = a.noise(), b.noise()
    for field in (
        "trace_sigma",
        "grad_sq_norm_unbiased",
        "nsr_batch",
        "nsr_batch_stderr",
        "slot_trace_sigma",
        "slot_nsr_batch",
    ):
        torch.testing.assert_close(getattr(x, field), getattr(y, field), rtol=1e-9, atol=1e-15)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.full_tensor().clone() for p in ours.parameters()]
    scaler.scale(ours(own_first).square().mean()).backward()
    first = next(ours.parameters()).grad.to_local()
    if rank == 0:
        first.view(-1)[0] = torch.inf
    a.hold()
    scaler.scale(ours(own_second).square().mean()).backward()
    scaler.step(a)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p.full_tensor(), w) for p, w in zip(ours.parameters(), before, strict=True))


def a_scaler_skips_everywhere(rank, world):
    for fused in (None, True):
        ours, _ = sharded_and_whole(next(meshes(world)))
        opt = normkern.SGD(ours.parameters(), lr=0.1, momentum=0.9, stats="tensor", fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for bad in (False, True, False):
            opt.zero_grad()
            scaler.scale(ours(torch.ones(3, 5, dtype=torch.float64) + rank).square().mean()).backward()
            if bad and rank == world - 1:
                next(ours.parameters()).grad.to_local().fill_(torch.nan)
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 2.0
        assert all(p.full_tensor().isfinite().all() for p in ours.parameters())
        assert opt.stats().grad_sq.isfinite().all()


def what_torch_steps(rank, world):
    """`differentiable` takes torch's loop, on DTensors as they are."""
    for mesh in meshes(world):
        place = [Shard(0)] * mesh.ndim
        for stats in ("tensor", "row"):
            wholes = [torch.randn(7, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
            ours = [distribute_tensor(w, mesh, place) for w in wholes]
            theirs = [w.clone() for w in wholes]
            a, b = (normkern.SGD(p, lr=0.1, stats=stats, differentiable=True) for p in (ours, theirs))
            for p, q in zip(ours, theirs, strict=True):
                q.grad = q.square()
                p.grad = distribute_tensor(q.grad, mesh, place)
            a.step()
            b.step()
            same(a, b)


def refused(rank, world):
    mesh = next(meshes(world))
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    opt = normkern.SGD([p], lr=0.1, stats="tensor")
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: params\[0\] has placements \(.*\); expected Shard or Replicate"
    ):
        opt.step()
    assert torch.equal(p.to_local(), torch.ones(4, 3))
    normkern.SGD([p], lr=0.1).step()  # a step is linear: without sums it is right
    torch.testing.assert_close(p.full_tensor(), torch.full((4, 3), 0.9 * world))
    q = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    q.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])  # a gradient is laid out as its parameter
    opt = normkern.SGD([q], lr=0.1, stats="tensor")
    opt.step()
    assert opt.stats().grad_sq.item() == 12 * world**2


def plain_numbers(rank, world):
    """`sum_over_shards` alone, as others call it: one column, some of the tensors split, in any order."""
    mesh = next(meshes(world))
    split, whole = (nn.Parameter(distribute_tensor(torch.ones(5, 2), mesh, [p])) for p in (Shard(0), Replicate()))
    table = torch.full((4, 1), rank + 1.0, dtype=torch.float64)
    params = [split, nn.Parameter(torch.ones(3)), whole, split]
    sum_over_shards(table, [(slice(i, i + 1), p) for i, p in enumerate(params)])
    total = world * (world + 1) / 2
    assert table.flatten().tolist() == [total, rank + 1.0, rank + 1.0, total]
    sum_over_shards(table, [])


def judged_as_a_whole(rank, world):
    """decay="exponential": a shard alone is not at right angles to its gradient, the whole is."""
    mesh = next(meshes(world))
    w = torch.randn(6, 5, dtype=torch.float64)
    g = torch.randn(6, 5, dtype=torch.float64)
    for grad, says in ((g - w * (g * w).sum() / w.square().sum(), ""), (g, "is not scale-invariant")):
        p = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
        q = nn.Parameter(w.clone())
        p.grad, q.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad.clone()
        told = []
        for x in (p, q):
            opt = normkern.SGD(
                [{"params": [x], "norm_buffers": [], "followers": []}],
                lr=0.5,
                weight_decay=0.1,
                decay="exponential",
                stats="row",
            )
            try:
                opt.step()
            except ValueError as error:
                told.append(str(error))
        assert len(told) == (2 if says else 0), told
        if says:
            assert told[0] == told[1]
            assert says in told[0]
        else:
            torch.testing.assert_close(p.full_tensor(), q.detach())


if __name__ == "__main__":
    script.run(
        every_placement, one_small_all_reduce, fully_sharded, tensor_parallel, two_gradients, a_scaler_skips_everywhere, what_torch_steps,
        refused, plain_numbers, judged_as_a_whole,
    )  # fmt: skip
