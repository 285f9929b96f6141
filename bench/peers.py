"""The table of peers: which package does a job, and on which cases. A new peer is a maker and one line of `PEERS`.

A maker takes what its job prepares and returns a `Step`; right.py checks it before it is timed.

Looked at on the package index in November 2026 and left out. Their code was read or run:
- another rule (the decay is decoupled, not part of the gradient): heavyball 3.2 SGD, timm 1.0 SGDW;
- no kernel for the CPU: flashoptim 0.1, which is Triton;
- no torch of today: intel-extension-for-pytorch 2.8, its last, which refuses any torch but 2.8;
- torchopt 0.7: the rule in several eager operations, made for differentiating through it; its C++ is Adam's alone.
By their listing or documentation only:
- other rules: torch_optimizer (SGDW, SGDP, AccSGD), schedulefree, dadaptation, madgrad;
- no plain SGD of their own for the CPU: deepspeed, colossalai, torchao;
- frameworks with arrays of their own (TensorFlow, Keras, Paddle, MLX): JAX with optax stands for them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import normkern
from normkern import reference

from .arrays import MAX_NORM, SVAG_L, AdamArrays, AdamMaker, Arrays, Maker, Matrix, MatrixMaker, Step
from .cases import Case
from .limits import compiler

M = 1 << 20


# --- makers: torch.optim.SGD and its drop-ins -------------------------------------------------------------------------


def shared(optimizer: torch.optim.Optimizer, arrays: Arrays, key: str = "momentum_buffer", **more: Any) -> Any:
    """The optimizer, with the common momentum buffers in its state."""
    for p, buffer in zip(arrays.params, arrays.momentum_buffers, strict=True):
        optimizer.state[p].update({key: buffer}, **more)
    return optimizer


def torch_step(arrays: Arrays, **choice: bool) -> Step:
    return Step(shared(torch.optim.SGD(arrays.params, **arrays.hyper, **choice), arrays).step)


def torch_compiled(arrays: Arrays) -> Step:
    """As torch documents it: the step of a default optimizer, compiled."""
    return Step(torch.compile(torch_step(arrays).run))


def normkern_step(arrays: Arrays) -> Step:
    return Step(shared(normkern.SGD(arrays.params, **arrays.hyper), arrays).step)


def normkern_exponential(arrays: Arrays) -> Step:
    groups = [{"params": arrays.params, "scale_invariant": True, "norm_buffers": [], "followers": []}]
    optimizer = shared(normkern.SGD(groups, decay="exponential", **arrays.hyper), arrays)
    return Step(optimizer.step, true_scale=lambda: optimizer.true_scale()[0])


def normkern_stored(arrays: Arrays, **choice: Any) -> Step:
    """Buffers of another dtype are made anew at the first step."""
    return Step(shared(normkern.SGD(arrays.params, **arrays.hyper, **choice), arrays).step)


def reference_step(arrays: Arrays) -> Step:
    return Step(lambda: reference.sgd_(arrays.params, arrays.grads, list(arrays.momentum_buffers), **arrays.hyper))


def optimi_step(arrays: Arrays) -> Step:
    import optimi

    # kahan_sum would add a stream in low precision. Its decay is added to the user's gradients, in place.
    optimizer = optimi.SGD(arrays.params, kahan_sum=False, **arrays.hyper)
    return Step(shared(optimizer, arrays, "exp_avg", kahan_comp=None).step)


def pytorch_optimizer_step(arrays: Arrays) -> Step:
    import pytorch_optimizer

    # Its decay, too, is added to the user's gradients, in place.
    return Step(shared(pytorch_optimizer.SGDW(arrays.params, weight_decouple=False, **arrays.hyper), arrays).step)


def bitsandbytes_step(arrays: Arrays) -> Step:
    import bitsandbytes

    return Step(bitsandbytes.optim.SGD32bit(arrays.params, **arrays.hyper).step)  # its buffers are float32


# --- makers: step + statistics ----------------------------------------------------------------------------------------


def normkern_measured(arrays: Arrays, stats: Any) -> Step:
    optimizer = shared(normkern.SGD(arrays.params, stats=stats, **arrays.hyper), arrays)

    def sums() -> Tensor:
        last = optimizer.stats()
        columns = torch.stack([last.weight_sq, last.grad_sq, last.weight_grad_dot], dim=1)
        return torch.stack([columns[last.slots[name]].sum(0) for name in last.names])

    return Step(optimizer.step, sums)


def reference_measured(arrays: Arrays) -> Step:
    last: list[Tensor | None] = [None]

    def step() -> None:
        buffers: list[Tensor | None] = list(arrays.momentum_buffers)
        last[0] = reference.sgd_(arrays.params, arrays.grads, buffers, stats="tensor", **arrays.hyper)

    return Step(step, lambda: last[0][:, :3])  # type: ignore[index]


def torch_measured(arrays: Arrays, compiled: bool = False, **choice: bool) -> Step:
    """torch's step with |w|, |g| and <w,g>; without |u| and <w,u>, which would cost a copy."""
    step, last = torch_step(arrays, **choice).run, []

    def norms_and_step() -> tuple[Any, Any, list[Tensor]]:
        params, grads = arrays.params, [p.grad for p in arrays.params]
        with torch.no_grad():
            w, g = torch._foreach_norm(params), torch._foreach_norm(grads)
            dots = [torch.dot(p.view(-1), g.view(-1)) for p, g in zip(params, grads, strict=True) if g is not None]
        step()
        return w, g, dots

    run = torch.compile(norms_and_step) if compiled else norms_and_step

    def measured() -> None:
        last[:] = run()

    def sums() -> Tensor:
        w, g, dots = (torch.stack(list(x)).double() for x in last)
        return torch.stack([w**2, g**2, dots], dim=1)

    return Step(measured, sums)


# --- makers: clipped step ---------------------------------------------------------------------------------------------


def normkern_clipped(arrays: Arrays) -> Step:
    optimizer = shared(normkern.SGD(arrays.params, **arrays.hyper), arrays)
    return Step(lambda: optimizer.step(max_norm=MAX_NORM))


def torch_clipped(arrays: Arrays, **choice: bool) -> Step:
    step = torch_step(arrays, **choice).run

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(arrays.params, MAX_NORM)
        step()

    return Step(run)


# --- makers: SVAG step ------------------------------------------------------------------------------------------------
#
# Two backwards leave their gradients in `.grad`, one after the other, and that is how every peer gets them: Python
# assigns them in place of C, within the time of every peer.


def arrive(arrays: Arrays, grads: list[Any]) -> None:
    """Assign the gradients, as a backward does last."""
    for p, g in zip(arrays.params, grads, strict=True):
        p.grad = g


def both(arrays: Arrays, second: list[Any]) -> list[Any]:
    """Assign the gradients of two backwards; return the first ones, which were put aside."""
    arrive(arrays, arrays.held)
    first = arrays.grads
    arrive(arrays, second)
    return first


def normkern_pairs(arrays: Arrays) -> Step:
    optimizer = shared(normkern.SVAG(arrays.params, l=SVAG_L, stats="tensor", **arrays.hyper), arrays)
    first, second = arrays.held, arrays.grads

    def step() -> None:
        arrive(arrays, first)
        optimizer.hold()
        arrive(arrays, second)
        optimizer.step()

    def sums() -> Tensor:  # an average of the noise over equal steps is that of the last
        last, noise = optimizer.stats(), optimizer.noise()
        of_pairs = noise.slot_grad_sq_norm_unbiased, 2 * noise.slot_trace_sigma
        return torch.stack([last.weight_sq, last.grad_sq, last.weight_grad_dot, *of_pairs], dim=1)

    return Step(step, sums)


def reference_pairs(arrays: Arrays) -> Step:
    last: list[Any] = []
    second = arrays.grads
    hyper: dict[str, Any] = {**arrays.hyper, "lr": arrays.hyper["lr"] / SVAG_L}

    def step() -> None:
        first, buffers = both(arrays, second), list(arrays.momentum_buffers)
        last[:] = [reference.sgd_(arrays.params, second, buffers, held=first, l=SVAG_L, stats="tensor", **hyper)]

    return Step(step, lambda: last[0][:, [0, 1, 2, 5, 6]])


def torch_pairs(arrays: Arrays, compiled: bool = False, in_place: bool = False, **choice: bool) -> Step:
    """Combine, step, and the sums; not |u| and <w,u>, which would cost a copy.

    in_place: into the second gradients, by the one operation of torch that does it all. Otherwise into memory that is
    kept for it, by those that one thinks of first.
    """
    second, spread = arrays.grads, (2 * SVAG_L - 1) ** 0.5 / 2
    last: list[Any] = []
    # The same weights under another name, which has the combined gradients for good.
    params: list[Any] = [torch.nn.Parameter(p.detach()) for p in arrays.params]
    mixed: list[Any] = second if in_place else [torch.empty_like(p, requires_grad=False) for p in params]
    for p, g in zip(params, mixed, strict=True):
        p.grad = g
    hyper = {**arrays.hyper, "lr": arrays.hyper["lr"] / SVAG_L}
    graph = [p.view_as(p) for p in params]
    step = torch_step(Arrays(params, arrays.momentum_buffers, hyper, graph), **choice).run

    def combine(first: list[Any], second: list[Any]) -> None:
        if in_place:
            torch._foreach_lerp_(mixed, first, 0.5 + spread)
        else:
            torch._foreach_copy_(mixed, first)
            torch._foreach_mul_(mixed, 0.5 + spread)
            torch._foreach_add_(mixed, second, alpha=0.5 - spread)

    def sums_and_step(first: list[Any], second: list[Any]) -> list[Any]:
        with torch.no_grad():
            norms = [torch._foreach_norm(x) for x in (params, first, second)]
            pair_dots = dots(first, second)
            combine(first, second)
            more = [torch._foreach_norm(mixed), dots(params, mixed)]
        step()
        return [*norms, pair_dots, *more]

    run = torch.compile(sums_and_step) if compiled else sums_and_step

    def measured() -> None:
        first = both(arrays, second)
        last[:] = run(first, arrays.grads)

    def sums(graph: list[Tensor] = graph) -> Tensor:  # keeps it alive
        w, a, b, ab, g, wg = (torch.stack(list(x)).double() for x in last)
        return torch.stack([w**2, g**2, wg, ab, a**2 + b**2 - 2 * ab], dim=1)

    return Step(measured, sums)


def compiled_by_hand(arrays: Arrays) -> Step:
    """The best that torch.compile can be given: no optimizer, whose step is never one graph; combination, rule and sums
    written out, so that no combined gradient is ever stored.
    """
    second, to_first = arrays.grads, 0.5 + (2 * SVAG_L - 1) ** 0.5 / 2
    lr, momentum, decay = arrays.hyper["lr"] / SVAG_L, arrays.hyper["momentum"], arrays.hyper["weight_decay"]
    params = [p.detach() for p in arrays.params]
    last: list[Any] = []

    @torch.compile
    def run(first: list[Any], second: list[Any]) -> list[Any]:
        sums = []
        for w, v, a, b in zip(params, arrays.momentum_buffers, first, second, strict=True):
            g, d = torch.lerp(b, a, to_first), a - b
            sums.append([(w * w).sum(), (g * g).sum(), (w * g).sum(), (a * b).sum(), (d * d).sum()])
            v.mul_(momentum).add_(g + decay * w)
            w.sub_(lr * v)
        return sums

    def measured() -> None:
        first = both(arrays, second)
        last[:] = run(first, arrays.grads)

    return Step(measured, lambda: torch.stack([torch.stack(row) for row in last]).double())


def dots(xs: list[Any], ys: list[Any]) -> list[Tensor]:
    return [torch.dot(x.view(-1), y.view(-1)) for x, y in zip(xs, ys, strict=True)]


# --- makers: AdamW step -----------------------------------------------------------------------------------------------


def adamw_step(arrays: AdamArrays, kind: type[torch.optim.AdamW] = torch.optim.AdamW, **choice: Any) -> Step:
    optimizer = kind(arrays.params, **arrays.hyper, **choice)
    for p, m, v in zip(arrays.params, arrays.exp_avgs, arrays.exp_avg_sqs, strict=True):
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": m, "exp_avg_sq": v}
    return Step(optimizer.step)


def adamw_compiled(arrays: AdamArrays) -> Step:
    return Step(torch.compile(adamw_step(arrays).run))


# --- makers: moments --------------------------------------------------------------------------------------------------


def normkern_moments(matrix: Matrix) -> Step:
    last: list[Any] = []

    def run() -> None:
        last[:] = [normkern.moments(matrix.x)]

    return Step(run, lambda: torch.cat([last[0].mean.double(), last[0].variance.double(), last[0].sq_norms]))


def op_moments(matrix: Matrix, through_torch: bool) -> Step:
    """The op through torch's dispatcher, for what that costs besides the kernel."""
    last: list[Any] = []
    op = torch.ops.normkern.moments.default if through_torch else normkern.ops.moments
    factor = 1 / (len(matrix.x) - 1)

    def run() -> None:
        last[:] = op(matrix.x, factor=factor)

    return Step(run, lambda: torch.cat([x.double() for x in last[:3]]))


def torch_moments(matrix: Matrix, how: str, compiled: bool = False) -> Step:
    """Welford's algorithm as torch has it, or its vectorised operations, one after the other over a copy."""
    last: list[Any] = []

    def every(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        if how == "var_mean":
            variance, mean = torch.var_mean(x, dim=0)
        else:
            mean = x.mean(0)
            variance = (x - mean).square_().sum(0) / (len(x) - 1)
        return mean, variance, norms

    every = torch.compile(every) if compiled else every

    def run() -> None:
        last[:] = every(matrix.x)

    return Step(run, lambda: torch.cat([last[0].double(), last[1].double(), last[2].double() ** 2]))


# --- makers: JAX ------------------------------------------------------------------------------------------------------


def optax_step(arrays: Arrays, measured: bool = False) -> Step:
    """optax's chain as one jitted function that may write over its inputs; JAX has its own arrays and threads."""
    import jax
    import optax

    decay, rest = arrays.hyper["weight_decay"], (arrays.hyper["lr"], arrays.hyper["momentum"])
    rule = optax.chain(optax.add_decayed_weights(decay), optax.sgd(*rest))

    def to_jax(tensors: list[Any]) -> list[Any]:
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        return [jax.numpy.array(t.detach().float().numpy(), dtype=dtype) for t in tensors]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(params: Any, state: Any, grads: Any) -> Any:
        pairs = [(p.ravel().astype("float32"), g.ravel().astype("float32")) for p, g in zip(params, grads, strict=True)]
        sums = [(p @ p, g @ g, p @ g) for p, g in pairs] if measured else []
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, sums

    params, grads, last = to_jax(list(arrays.params)), to_jax(arrays.grads), []
    state = rule.init(params)

    def step() -> None:
        nonlocal params, state, last
        params, state, last = apply(params, state, grads)
        jax.block_until_ready((params, state, last))

    def write_back() -> None:
        with torch.no_grad():
            for p, w in zip(arrays.params, params, strict=True):
                p.copy_(torch.tensor(jax.numpy.asarray(w, dtype="float32").tolist()))

    def sums() -> Tensor:
        return torch.tensor([[float(x) for x in row] for row in last], dtype=torch.float64)

    return Step(step, sums if measured else None, write_back)


# --- the table --------------------------------------------------------------------------------------------------------


def anything(case: Case) -> bool:
    return True


def up_to(coordinates: int) -> Callable[[Case], bool]:
    return lambda case: case.coordinates <= coordinates


def compiles_soon(case: Case) -> bool:
    """Whether to time torch.compile: a list of 150 tensors compiles for 15 seconds, so not in a quick run."""
    return few(case) or (case.dtype == torch.float32 and case.name != "161 of 32x32")


def in_bfloat16(case: Case) -> bool:
    return case.dtype == torch.bfloat16


def nothing(case: Case) -> bool:
    return False


def few(case: Case) -> bool:
    return len(case.shapes) <= 20


def on_the_index(case: Case) -> bool:
    """Whether to time other packages: not on the largest list, which takes too much memory and time."""
    return case.coordinates <= 64 * M and case.dtype != torch.float64


@dataclass(frozen=True)
class Peer:
    """One peer in one job.

    fits: is it worth its time and memory on this case?
    quick: and in a quick run?
    needs: packages to import, as (module, name on the index), and ("c++", "") for a compiler.
    """

    name: str
    job: str
    make: Maker | MatrixMaker | AdamMaker
    fits: Callable[[Case], bool] = anything
    needs: tuple[tuple[str, str], ...] = ()
    quick: Callable[[Case], bool] = anything

    def missing(self) -> str:
        """Return what must be installed first, or ""."""
        for module, package in self.needs:
            if module == "c++" and compiler() is None:
                return "not installed: a C++ compiler"
            if module != "c++" and importlib.util.find_spec(module) is None:
                return f"not installed: {package}"
        return ""


CXX = (("c++", ""),)
OPTIMI, PYTORCH_OPTIMIZER = (("optimi", "torch-optimi"),), (("pytorch_optimizer", "pytorch-optimizer"),)
BITSANDBYTES, JAX = (("bitsandbytes", "bitsandbytes"),), (("jax", "jax"), ("optax", "optax"))
part = functools.partial

PEERS: tuple[Peer, ...] = (
    Peer("normkern", "step", normkern_step),
    Peer("normkern exponential", "step", normkern_exponential),
    Peer("normkern at random", "step", part(normkern_stored, stochastic_rounding=True), in_bfloat16),
    Peer("normkern float32 momentum", "step", part(normkern_stored, state_dtype=torch.float32), in_bfloat16),
    Peer("normkern master", "step", part(normkern_stored, master_weights=True), in_bfloat16),
    Peer("reference", "step", reference_step, quick=up_to(M)),
    Peer("torch default", "step", torch_step),
    Peer("torch foreach", "step", part(torch_step, foreach=True)),
    Peer("torch fused", "step", part(torch_step, fused=True)),
    Peer("torch compile", "step", torch_compiled, compiles_soon, CXX, few),
    Peer("optimi", "step", optimi_step, on_the_index, OPTIMI, up_to(32 * M)),
    Peer("pytorch_optimizer", "step", pytorch_optimizer_step, on_the_index, PYTORCH_OPTIMIZER, up_to(32 * M)),
    Peer("bitsandbytes", "step", bitsandbytes_step, on_the_index, BITSANDBYTES, up_to(32 * M)),
    Peer("optax jit", "step", optax_step, on_the_index, JAX, up_to(32 * M)),
    Peer("normkern tensor", "step + statistics", part(normkern_measured, stats="tensor")),
    Peer("normkern row", "step + statistics", part(normkern_measured, stats="row")),
    Peer("reference tensor", "step + statistics", reference_measured, up_to(32 * M), quick=up_to(M)),
    Peer("torch foreach + norms", "step + statistics", part(torch_measured, foreach=True)),
    Peer("torch fused + norms", "step + statistics", part(torch_measured, fused=True)),
    Peer("torch compile + norms", "step + statistics", part(torch_measured, compiled=True), compiles_soon, CXX, few),
    Peer("normkern clipped", "clipped step", normkern_clipped),
    Peer("clip_grad_norm_ + torch fused", "clipped step", part(torch_clipped, fused=True)),
    Peer("clip_grad_norm_ + torch default", "clipped step", torch_clipped),
    Peer("normkern SVAG", "SVAG step", normkern_pairs),
    Peer("reference SVAG", "SVAG step", reference_pairs, up_to(32 * M), quick=up_to(M)),
    Peer("combine + torch fused + sums", "SVAG step", part(torch_pairs, fused=True)),
    Peer("lerp + torch fused + sums", "SVAG step", part(torch_pairs, in_place=True, fused=True)),
    Peer("combine + torch compile + sums", "SVAG step", part(torch_pairs, compiled=True), compiles_soon, CXX, nothing),
    Peer("torch compile by hand + sums", "SVAG step", compiled_by_hand, compiles_soon, CXX, nothing),
    Peer("normkern AdamW", "AdamW step", part(adamw_step, kind=normkern.AdamW)),
    Peer("normkern AdamW tensor", "AdamW step", part(adamw_step, kind=normkern.AdamW, stats="tensor")),
    Peer("torch AdamW foreach", "AdamW step", part(adamw_step, foreach=True), quick=up_to(32 * M)),
    Peer("torch AdamW fused", "AdamW step", part(adamw_step, fused=True)),
    Peer("torch AdamW compile", "AdamW step", adamw_compiled, compiles_soon, CXX, few),
    Peer("normkern moments", "moments", normkern_moments),
    Peer("normkern.ops.moments", "moments", part(op_moments, through_torch=False)),
    Peer("torch.ops.normkern.moments", "moments", part(op_moments, through_torch=True)),
    Peer("torch var_mean + norms", "moments", part(torch_moments, how="var_mean")),
    Peer("torch mean, squares, norms", "moments", part(torch_moments, how="squares")),
    Peer(
        "torch compile, squares, norms",
        "moments",
        part(torch_moments, how="squares", compiled=True),
        needs=CXX,
        quick=nothing,
    ),
    Peer("optax jit + norms", "step + statistics", part(optax_step, measured=True), on_the_index, JAX, up_to(32 * M)),
)
