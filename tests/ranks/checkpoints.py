"""Checkpoints under FSDP2 and DDP: saved and loaded, whole and in shards, from and to torch's SGD, in other worlds."""

import copy
import sys
import warnings
from pathlib import Path

import script
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import normkern

NUMBERS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
FULL = StateDictOptions(full_state_dict=True)
OF_RANK_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def ours(params, **options):
    return normkern.SGD(params, stats="row", **(NUMBERS | options))


def theirs(params):
    return torch.optim.SGD(params, **NUMBERS)


def svag(params):
    return normkern.SVAG(params, l=4, **NUMBERS)


def invariant(params):
    groups = [{"params": [p], "decay": "exponential", "scale_invariant": True} for p in params]
    return normkern.SGD(
        [g | {"norm_buffers": [], "followers": []} for g in groups],
        **(NUMBERS | {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.15}),
    )


def train(model, opt, steps):
    """The gradients of a rank do not depend on how many there are."""
    for t in steps:
        for half in range(2 if isinstance(opt, normkern.SVAG) else 1):
            x = torch.sin(torch.arange(4 * 5, dtype=torch.float64) * (t + 1) + 10 * half).view(4, 5)
            if half:
                opt.hold()
            model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()


def whole(model):
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in model.state_dict().items()}


def alone(make):
    """Ten steps of one process."""
    model = net()
    train(model, make(model.parameters()), range(10))
    return whole(model)


def sharded(make):
    model = fully_shard(net(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, make(model.parameters())


def goes_on(model, opt, make):
    train(model, opt, range(5, 10))
    told = alone(make)
    for n, x in whole(model).items():
        torch.testing.assert_close(x, told[n], rtol=1e-10, atol=1e-12)


def between_optimizers(rank, world):
    """get_ and set_optimizer_state_dict in every form, to a fresh model and optimizer."""
    for options, (first, second) in (
        (o, pair)
        for o in (None, FULL, BROADCAST, FLAT)
        for pair in ((ours, ours), (ours, theirs), (theirs, ours), (svag, svag), (invariant, invariant))
        if o is not FLAT or pair[1] is theirs or pair in ((ours, ours), (svag, svag))  # else keys are missing to torch
    ):
        model, opt = sharded(first)
        train(model, opt, range(5))
        get = OF_RANK_0 if options is BROADCAST else options
        weights = get_model_state_dict(model, options=get)
        state = get_optimizer_state_dict(model, opt, options=get)
        if get is FULL or (get is OF_RANK_0 and rank == 0):
            buffers = [s["momentum_buffer"] for s in state["state"].values()]
            assert [b.shape for b in buffers] == [p.shape for p in net().parameters()]
        if second is theirs and options in (FULL, BROADCAST):  # torch stumbles over keys that its own groups lack
            for group in state.get("param_groups", []):
                for key in set(group) - set(torch.optim.SGD([nn.Parameter(torch.ones(1))]).param_groups[0]):
                    group.pop(key)
        kept = copy.deepcopy((weights, state))  # what is loaded may share its memory
        model, opt = sharded(second)
        train(model, opt, range(2))  # something to be overwritten
        set_model_state_dict(model, weights, options=options if options is not FLAT else None)
        set_optimizer_state_dict(model, opt, state, options=options)
        assert all(isinstance(opt.state[p]["momentum_buffer"], DTensor) for p in model.parameters())
        if isinstance(opt, normkern.SGD):
            assert all(g["stats"] == ("row" if second is ours else None) for g in opt.param_groups)
        goes_on(model, opt, first)

        weights, state = kept
        fresh, opt = sharded(second)  # and to one that has not stepped
        set_model_state_dict(fresh, weights, options=options if options is not FLAT else None)
        set_optimizer_state_dict(fresh, opt, state, options=options)
        goes_on(fresh, opt, first)


def before_a_step(rank, world):
    """torch makes the state by a step with lr 0: nothing moves, and what SVAG holds is no matter."""
    for make in (ours, svag, invariant):
        model, opt = sharded(make)
        before = whole(model)
        state = get_optimizer_state_dict(model, opt)
        assert len(state["state"]) == 4
        for n, x in whole(model).items():
            assert torch.equal(x, before[n])


def through_ddp(rank, world):
    """From the state of a DDP model, whole, to shards, and back."""
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = ours(ddp.parameters())
    train(ddp, opt, range(5))
    weights, state = (get(ddp, *o) for get, o in ((get_model_state_dict, ()), (get_optimizer_state_dict, (opt,))))
    shards, into = sharded(ours)
    set_model_state_dict(shards, weights, options=FULL)
    set_optimizer_state_dict(shards, into, state, options=FULL)
    goes_on(shards, into, ours)
    train(ddp, opt, range(5, 10))
    for n, x in whole(shards).items():
        torch.testing.assert_close(x, model.state_dict()[n], rtol=1e-10, atol=1e-12)


KINDS = {"ours": ours, "theirs": theirs, "svag": svag, "invariant": invariant}


def saved(rank, world):
    """To a folder, for this and for another number of processes."""
    for kind, make in KINDS.items():
        model, opt = sharded(make)
        train(model, opt, range(5))
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
        dcp.save(state, checkpoint_id=str(folder / kind))


def loaded(rank, world):
    for kind, make in (*KINDS.items(), ("theirs", ours), ("ours", theirs)):
        model, opt = sharded(make)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
        # The options that torch's SGD does not have are not in its checkpoints.
        planner = DefaultLoadPlanner(allow_partial_load=kind == "theirs" and make is ours)
        dcp.load(state, checkpoint_id=str(folder / kind), planner=planner)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, opt, state["optimizer"])
        goes_on(model, opt, KINDS[kind])


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "alone":  # one process, without torchrun: what the others left, on whole tensors
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        for kind, make in KINDS.items():
            model = net()
            opt = make(model.parameters())
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
            dcp.load(state, checkpoint_id=str(folder / kind), no_dist=True)
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, opt, state["optimizer"])
            goes_on(model, opt, make)
        print("holds: alone")
    elif what == "save":
        script.run(between_optimizers, before_a_step, through_ddp, saved, loaded)
    else:
        script.run(loaded)
