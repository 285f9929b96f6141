"""DDPNoise: its estimates are those of all ranks' gradients, its gradients those of DDP without it."""

import pytest
import script
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import normkern


class Net(nn.Module):
    """With a branch that only some inputs take."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first, self.second, self.branch = nn.Linear(6, 40), nn.Linear(40, 5), nn.Linear(40, 5)
        self.scale = nn.Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, x, branch=False):
        h = torch.relu(self.first(x))
        return self.scale * (self.second(h) + (self.branch(h) if branch else 0))


def batch(rank, t, dtype=torch.float64):
    return torch.sin(torch.arange(4 * 6, dtype=torch.float64) * (1 + t + 10 * rank) + 1).view(4, 6).to(dtype)


def expected(model, world, steps, batches=batch, branch=lambda rank, t: False, scale=1.0, weights=None):
    """RunningMoments over the ranks' local gradients, each computed here, step by step."""
    traces, signals, means, slots = [], [], [], []
    for t in range(steps):
        moments = normkern.RunningMoments(model.named_parameters())
        for r in range(world):
            model.zero_grad()
            loss(model(batches(r, t), branch(r, t))).mul(scale).backward()
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            moments.update()
        result = moments.result()
        traces.append(result.trace_sigma)
        signals.append(result.grad_sq_norm_unbiased)
        means.append(result.grad_sq_norm)
        slots.append(result.slot_trace_sigma)
    model.zero_grad()
    return [torch.stack(x).mean(0) for x in (traces, signals, means, slots)]


def loss(y):
    return y.square().mean() + y.mean()


def on_all_ranks_equal(result):
    own = torch.stack([result.trace_sigma, result.grad_sq_norm_unbiased, result.nsr_batch, result.gns])
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own.nan_to_num(), first.nan_to_num())


def agrees(noise, told, world, rtol=1e-9):
    result = noise.result()
    trace, signal, mean, slots = told
    for ours, theirs in (
        (result.trace_sigma, trace), (result.grad_sq_norm_unbiased, signal), (result.grad_sq_norm, mean),
        (result.slot_trace_sigma, slots), (result.nsr_batch, trace / signal / world), (result.nsr, trace / signal),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(mean))
    on_all_ranks_equal(result)
    return result


def as_ddp_alone(rank, world):
    """Gradients to the last bits that matter, and the estimates; many buckets, views, graphs that never change."""
    for options in (
        {}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 0.0005}, {"static_graph": True},
        {"find_unused_parameters": True, "bucket_cap_mb": 0.0005}, {"process_group": dist.new_group()},
    ):  # fmt: skip
        torch.manual_seed(1)
        plain, watched, alone = Net(), Net(), Net()
        plain.branch = watched.branch = alone.branch = None
        for net in (watched, alone):
            net.load_state_dict(plain.state_dict())
        a, b = (nn.parallel.DistributedDataParallel(m, **options) for m in (plain, watched))
        noise = normkern.DDPNoise(b, batch_size=4)
        for t in range(3):
            for m in (a, b):
                m.zero_grad(set_to_none=t != 1)
                loss(m(batch(rank, t))).backward()
            for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=1e-16)
        result = agrees(noise, expected(alone, world, 3), world)
        assert (result.steps, result.skipped, result.count, result.ranks) == (3, 0, 3 * world, world)
        torch.testing.assert_close(result.gns, result.nsr * 4)
        assert result.names == [name for name, _ in plain.named_parameters()]
        if rank == 0:  # alone: it waits for nobody
            noise.result()
        noise.reset()
        with pytest.raises(RuntimeError, match="expected a backward that averages gradients before it"):
            noise.result()


def accumulated(rank, world):
    """Under no_sync nothing is measured; what adds up is, where it is averaged."""
    torch.manual_seed(1)
    model, alone = Net(), Net()
    model.branch = alone.branch = None
    alone.load_state_dict(model.state_dict())
    ddp = nn.parallel.DistributedDataParallel(model)
    noise = normkern.DDPNoise(ddp)
    for t in range(2):
        ddp.zero_grad()
        with ddp.no_sync():
            loss(ddp(batch(rank, 2 * t))).backward()
        loss(ddp(batch(rank, 2 * t + 1))).backward()
    both = lambda r, t: torch.cat([batch(r, 2 * t), batch(r, 2 * t + 1)])  # noqa: E731
    # The sum of two batches' gradients is twice that of the mean over both: the loss has a mean of squares.
    result = agrees(noise, expected(alone, world, 2, both, scale=2.0), world)
    assert result.steps == 2
    assert torch.isnan(result.gns)


def unused(rank, world):
    """A branch of one rank only: the others count as zeros there."""
    torch.manual_seed(1)
    model, alone = Net(), Net()
    alone.load_state_dict(model.state_dict())
    noise = normkern.DDPNoise(ddp := nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))
    takes = lambda r, t: r == 0 and t < 2  # noqa: E731
    for t in range(3):
        ddp.zero_grad()
        loss(ddp(batch(rank, t), takes(rank, t))).backward()
    result = agrees(noise, expected(alone, world, 3, branch=takes), world)
    assert result.slot_trace_sigma[result.slots["branch.weight"]] > 0


def inner_hooks(rank, world):
    torch.manual_seed(1)
    whole = Net(torch.float32)
    whole.branch = None
    told = expected(whole, world, 2, lambda r, t: batch(r, t, torch.float32))
    seen = []

    def own(state, bucket):
        seen.append(state)
        return default_hooks.allreduce_hook(None, bucket)

    for inner, rtol in (
        (default_hooks.allreduce_hook, 1e-5), ((None, default_hooks.allreduce_hook), 1e-5), (("mine", own), 1e-5),
        (default_hooks.fp16_compress_hook, 1e-2), (default_hooks.bf16_compress_hook, 5e-2),
    ):  # fmt: skip
        model = Net(torch.float32)
        model.branch = None
        model.load_state_dict(whole.state_dict())
        noise = normkern.DDPNoise(ddp := nn.parallel.DistributedDataParallel(model), inner)
        for t in range(2):
            ddp.zero_grad()
            loss(ddp(batch(rank, t, torch.float32))).backward()
        agrees(noise, told, world, rtol)
    assert set(seen) == {"mine"}


def low_precision(rank, world):
    torch.manual_seed(1)
    whole = Net(torch.bfloat16)
    whole.branch = None
    told = expected(whole, world, 2, lambda r, t: batch(r, t, torch.bfloat16))
    model = Net(torch.bfloat16)
    model.branch = None
    model.load_state_dict(whole.state_dict())
    noise = normkern.DDPNoise(ddp := nn.parallel.DistributedDataParallel(model))
    for t in range(2):
        ddp.zero_grad()
        loss(ddp(batch(rank, t, torch.bfloat16))).backward()
    agrees(noise, told, world, 3e-2)


def scaled(rank, world):
    """A scale is divided out, and what the scaler skips is left out."""
    torch.manual_seed(1)
    model, alone = Net(), Net()
    model.branch = alone.branch = None
    alone.load_state_dict(model.state_dict())
    ddp = nn.parallel.DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    noise = normkern.DDPNoise(ddp, grad_scale=scaler.get_scale)
    opt = normkern.SGD(model.parameters(), lr=0.0, fused=True)
    for t in range(3):
        opt.zero_grad()
        x = batch(rank, 0 if t < 2 else 1)
        scaler.scale(loss(ddp(x * torch.inf if t == 1 and rank == 1 else x))).backward()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 4.0
    result = agrees(noise, expected(alone, world, 2), world)
    assert (result.steps, result.skipped) == (2, 1)


def sparse(rank, world):
    model, alone = (nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2)).double() for _ in range(2))
    alone.load_state_dict(model.state_dict())
    noise = normkern.DDPNoise(ddp := nn.parallel.DistributedDataParallel(model))
    ids = lambda r, t: torch.tensor([[0, 1 + r, 2], [1 + r, 1 + r, t]])  # noqa: E731
    loss(ddp(ids(rank, 0))).backward()
    moments = normkern.RunningMoments(alone.parameters())
    for r in range(world):
        alone.zero_grad()
        loss(alone(ids(r, 0))).backward()
        moments.update()
    torch.testing.assert_close(noise.result().trace_sigma, moments.result().trace_sigma, rtol=1e-5, atol=1e-12)


def an_error_in_the_middle(rank, world):
    """A step that was cut short is forgotten, and one that is under way not told of yet."""
    torch.manual_seed(1)
    model, alone = Net(), Net()
    model.branch = alone.branch = None
    alone.load_state_dict(model.state_dict())
    fails = []

    def failing(state, bucket):
        if fails and bucket.is_last():
            assert noise.result().steps == 1
            if fails == ["at once"]:
                raise RuntimeError("no network")
            return default_hooks.allreduce_hook(state, bucket).then(lost)
        return default_hooks.allreduce_hook(state, bucket)

    def lost(future):
        raise RuntimeError("no network")

    told = expected(alone, world, 1)
    for how in ("at once", "later"):
        model.load_state_dict(alone.state_dict())
        noise = normkern.DDPNoise(ddp := nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.0005), failing)
        fails.clear()
        ddp.zero_grad()
        loss(ddp(batch(rank, 0))).backward()
        fails.append(how)
        with pytest.raises(RuntimeError, match="no network"):
            loss(ddp(batch(rank, 1))).backward()
        agrees(noise, told, world)


def refused(rank, world):
    model = nn.Linear(3, 2)
    with pytest.raises(
        TypeError, match=r"DDPNoise: ddp_model expected a torch.nn.parallel.DistributedDataParallel, got Linear"
    ):
        normkern.DDPNoise(model)
    groups = [dist.new_group([r]) for r in range(world)]
    single = nn.parallel.DistributedDataParallel(model, process_group=groups[rank])
    with pytest.raises(
        ValueError, match="expected a process group of at least 2 ranks, .*, got 1; normkern.GradientNoise"
    ):
        normkern.DDPNoise(single)
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(TypeError, match=r"inner expected a hook or a pair \(state, hook\), got "):
        normkern.DDPNoise(ddp, inner=3)
    for bad, kind in ((0, ValueError), (True, TypeError), (2.5, TypeError)):
        with pytest.raises(kind, match="DDPNoise: batch_size expected"):
            normkern.DDPNoise(ddp, batch_size=bad)
    for bad in (0.0, -1, "8", float("inf")):
        with pytest.raises(ValueError, match="grad_scale expected a positive number or a function"):
            normkern.DDPNoise(ddp, grad_scale=bad)
    noise = normkern.DDPNoise(ddp)
    assert repr(noise) == f"DDPNoise(2 parameters, {world} ranks, 0 steps)"
    with pytest.raises(RuntimeError, match="has a communication hook already, .*measured.*expected a model without"):
        normkern.DDPNoise(ddp)
    other = nn.parallel.DistributedDataParallel(model)
    other._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    with pytest.raises(RuntimeError, match="has a communication hook already, and takes one"):
        normkern.DDPNoise(other)
    careless = nn.parallel.DistributedDataParallel(model)
    normkern.DDPNoise(careless, lambda state, bucket: bucket.buffer())
    with pytest.raises(TypeError, match=r"inner expected to return a torch.futures.Future, got Tensor"):
        careless(torch.ones(1, 3)).sum().backward()


if __name__ == "__main__":
    script.run(
        as_ddp_alone, accumulated, unused, inner_hooks, low_precision, scaled, sparse, refused, an_error_in_the_middle,
    )  # fmt: skip
