"""Li, Arora 2019: An Exponential Learning Rate Schedule for Deep Learning (arXiv 1910.07454).

Claims, and where they stand in the paper:

1. Theorem 2.12 and its extension to any schedule (section 2): SGD with momentum and weight decay on scale-invariant
   weights computes, at every step, the function of SGD without weight decay and an exponentially growing learning rate;
   for batch, group, layer and instance normalisation.
2. Section 4: in float32 rounding is amplified and runs part, yet their accuracies agree.
3. Section 1: learning rate and norm grow without end, beyond any floating point range.
4. Figures of section 4: |w|^2 / lr of the exponential run settles at a constant, while both grow.
5. Section 2.3 and appendix: with momentum and step decay TEXP is approximate, and TEXP++ exact.
6. Abstract, section 3: batch normalisation alone and weight decay alone reach the minimum; both together never settle.
7. Section 3: there the loss rises again and again, after a time of order 1/(lr wd).

The paper trains a PreResNet-32 on CIFAR-10; here small residual networks on small images. The toy of 6 and 7 is
x^2/(x^2 + y^2), from the authors' later text on intrinsic learning rates; the paper has a linear teacher.

python -m experiments.papers.exponential [--quick] [--data FOLDER]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import normkern
from normkern import TEXP, EquivalentExponentialLR
from normkern.theory import exponential_factor

from . import statistics
from .claims import Claim
from .data import Data, batches, for_all, load
from .figures import Figures, band, label
from .nets import Ensemble
from .paper import Paper, Scale, main
from .runs import Results, Run
from .training import cosine, set_lr, step_decay, take_step

ARXIV = "1910.07454"
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 32, 0.1, 0.9, 5e-3
NORMS, SCHEDULES = ("batch", "group", "layer", "instance"), ("step", "cosine")
#: For the runs that leave float32's range: as much decay as this momentum allows for, nearly.
STRONG_DECAY = 0.02
FLOAT32_LOG2 = 128


def _schedule(name: str, steps: int) -> Any:
    return cosine(LR, steps) if name == "cosine" else step_decay(LR, _milestones(steps))


def _milestones(steps: int) -> list[int]:
    return [steps // 2, 3 * steps // 4]


def _nets(count: int, norm: str, seed: int, members: int, data: Data) -> list[Ensemble]:
    """Networks with the same weights.

    Of maps that stay at 4 by 4: instance normalisation over 2 by 2 numbers amplifies rounding from step to step.
    """
    dtype = data.images.dtype
    made = []
    for _ in range(count):
        generator = torch.Generator().manual_seed(seed)
        made.append(Ensemble(members, data.images.shape[1], generator, norm=norm, shrinking=False).to(dtype))
    return made


def _sgd(net: Ensemble, **options: Any) -> normkern.SGD:
    return normkern.SGD(net.scale_invariant(), lr=LR, momentum=MOMENTUM, **options)


@torch.no_grad()
def _distance(a: Ensemble, b: Ensemble, images: Tensor) -> float:
    """Of the logits, relative to the largest; the images are one batch."""
    x, y = a(for_all(images, a.members)), b(for_all(images, b.members))
    return float((x - y).abs().max() / x.abs().max())


def side_by_side(norm: str, schedule: str, seed: int, steps: int, data: str | None) -> dict[str, Any]:
    """In float64: weight decay, the exponential learning rate, and ``decay="exponential"``, on the same batches.

    A fourth network, with weight decay too, begins with weights rounded otherwise: what training makes of rounding.
    """
    images = load(data).to(torch.float64)
    decaying, growing, folded, rounded = _nets(4, norm, seed, 1, images)
    with torch.no_grad():
        for _, w in rounded.scale_invariant():
            w.copy_(torch.nextafter(w, torch.full_like(w, math.inf)))
    lr_at = _schedule(schedule, steps)
    first = _sgd(decaying, weight_decay=WEIGHT_DECAY)
    second = _sgd(growing)
    scheduler = EquivalentExponentialLR(second, WEIGHT_DECAY, lr_at)
    third = _sgd(folded, weight_decay=WEIGHT_DECAY, decay="exponential")
    third.param_groups[0].update(norm_buffers=[], followers=[])
    fourth = _sgd(rounded, weight_decay=WEIGHT_DECAY)
    at: list[int] = []
    distances: dict[str, list[float]] = {"growing": [], "folded": [], "rounded": []}
    source = batches(images, 1, BATCH, torch.Generator().manual_seed(seed))
    for step, batch in zip(range(steps), source, strict=False):
        set_lr(first, lr_at(step))
        set_lr(third, lr_at(step))
        set_lr(fourth, lr_at(step))
        take_step(decaying, first, batch)
        take_step(growing, second, batch)
        take_step(folded, third, batch)
        take_step(rounded, fourth, batch)
        scheduler.step()
        if (step + 1) % (steps // 25) == 0:
            at.append(step + 1)
            for net, curve in zip((growing, folded, rounded), distances.values(), strict=True):
                curve.append(_distance(decaying, net, images.test_images[:64]))
    return {"steps": at, **distances, "log2_lr": math.log2(scheduler.get_last_lr()[0])}


def in_float32(norm: str, way: str, seed: int, members: int, steps: int, data: str | None) -> dict[str, Any]:
    """Test accuracies with a cosine schedule, by weight decay or by the exponential learning rate."""
    images = load(data)
    (net,) = _nets(1, norm, seed, members, images)
    lr_at = cosine(LR, steps)
    optimizer = _sgd(net, weight_decay=WEIGHT_DECAY if way == "decay" else 0.0)
    scheduler = EquivalentExponentialLR(optimizer, WEIGHT_DECAY, lr_at) if way == "exponential" else None
    source = batches(images, members, BATCH, torch.Generator().manual_seed(seed), shift=True)
    for step, batch in zip(range(steps), source, strict=False):
        if scheduler is None:
            set_lr(optimizer, lr_at(step))
        take_step(net, optimizer, batch)
        if scheduler is not None:
            scheduler.step()
    return {"accuracy": net.accuracy(images)}


def growth(seed: int, members: int, steps: int, data: str | None) -> dict[str, Any]:
    """A constant lr as an exponential one, in float64 so that nothing needs to be taken out: its lr and |w|^2."""
    images = load(data).to(torch.float64)
    (net,) = _nets(1, "batch", seed, members, images)
    optimizer = _sgd(net)
    scheduler = EquivalentExponentialLR(optimizer, STRONG_DECAY)
    source = batches(images, members, BATCH, torch.Generator().manual_seed(seed), wrong=0.1)
    at, log2_lr, log2_weight_sq = [], [], []
    for step, batch in zip(range(steps), source, strict=False):
        if step % (steps // 50) == 0:
            at.append(step)
            log2_lr.append(math.log2(scheduler.get_last_lr()[0]))
            log2_weight_sq.append(net.weight_sq().log2().tolist())
        take_step(net, optimizer, batch)
        scheduler.step()
    return {"steps": at, "log2_lr": log2_lr, "log2_weight_sq": log2_weight_sq, "accuracy": net.accuracy(images)}


def beyond(way: str, seed: int, members: int, steps: int, data: str | None) -> dict[str, Any]:
    """The same in float32, by weight decay or by ``decay="exponential"``, which does not overflow."""
    images = load(data)
    (net,) = _nets(1, "batch", seed, members, images)
    optimizer = _sgd(net, weight_decay=STRONG_DECAY, decay=way)
    optimizer.param_groups[0].update(norm_buffers=[], followers=[])
    source = batches(images, members, BATCH, torch.Generator().manual_seed(seed), wrong=0.1)
    for _, batch in zip(range(steps), source, strict=False):
        take_step(net, optimizer, batch)
    stored = max(float(p.detach().abs().max()) for _, p in net.scale_invariant())
    return {"accuracy": net.accuracy(images), "largest_weight": stored}


def tapered(way: str, seed: int, steps: int, data: str | None) -> dict[str, Any]:
    """In float64: step decay with weight decay beside TEXP or TEXP++."""
    images = load(data).to(torch.float64)
    decaying, growing = _nets(2, "batch", seed, 1, images)
    lr_at = _schedule("step", steps)
    first, second = _sgd(decaying, weight_decay=WEIGHT_DECAY), _sgd(growing)
    scheduler = TEXP(second, WEIGHT_DECAY, _milestones(steps), plus_plus=way == "TEXP++")
    at, distances = [], []
    source = batches(images, 1, BATCH, torch.Generator().manual_seed(seed))
    for step, batch in zip(range(steps), source, strict=False):
        set_lr(first, lr_at(step))
        take_step(decaying, first, batch)
        take_step(growing, second, batch)
        scheduler.step()
        if (step + 1) % (steps // 25) == 0:
            at.append(step + 1)
            distances.append(_distance(decaying, growing, images.test_images[:64]))
    return {"steps": at, "distance": distances}


def toy(loss: str, lr: float, weight_decay: float, steps: int) -> dict[str, Any]:
    """Gradient descent on x^2/(x^2 + y^2) ("normalised") or x^2 ("plain"), from (0.3, 1)."""
    w = torch.nn.Parameter(torch.tensor([0.3, 1.0], dtype=torch.float64))
    optimizer = normkern.SGD([w], lr=lr, weight_decay=weight_decay)
    losses = []
    for _ in range(steps):
        x, y = w.tolist()
        square = x * x + y * y if loss == "normalised" else 1.0
        losses.append(x * x / square)
        slope = 2 * x * y / square**2
        w.grad = torch.tensor([slope * y, -slope * x] if loss == "normalised" else [2 * x, 0.0], dtype=torch.float64)
        optimizer.step()
    begins = burst_begins(losses)
    return {
        "last_half": max(losses[steps // 2 :]),
        "bursts": len(begins),
        "period": (begins[-1] - begins[0]) / (len(begins) - 1) if len(begins) > 1 else None,
        "curve": losses[-2000:][:: max(1, min(2000, steps) // 500)],
    }


def burst_begins(losses: Sequence[float], high: float = 0.1, low: float = 0.01) -> list[int]:
    """Steps at which the loss passes `high` for the first time since it was below `low`."""
    begins, armed = [], False
    for step, loss in enumerate(losses):
        if loss < low:
            armed = True
        elif armed and loss > high:
            begins.append(step)
            armed = False
    return begins


def runs(scale: Scale) -> list[Run]:
    """The paper's runs, smaller."""
    made = []
    steps = scale.pick(200, 1000)
    for norm in NORMS:
        for schedule in SCHEDULES:
            given = {"norm": norm, "schedule": schedule, "seed": 0, "steps": steps, "data": scale.data}
            made.append(Run(side_by_side, given, 8 * steps))
    members, steps = scale.pick((6, 300), (20, 3000))
    for norm in NORMS:
        # Other seeds for each way: independent samples, as the comparison takes them to be.
        for way, seed in (("decay", 1), ("exponential", 2)):
            given = {"norm": norm, "way": way, "seed": seed, "members": members, "steps": steps, "data": scale.data}
            made.append(Run(in_float32, given, members * steps))
    per_step = -2 * math.log2(exponential_factor(lr=LR, weight_decay=STRONG_DECAY, momentum=MOMENTUM))
    steps, members = round(scale.pick(1.1, 2) * FLOAT32_LOG2 / per_step), scale.pick(2, 8)
    made.append(Run(growth, {"seed": 3, "members": members, "steps": steps, "data": scale.data}, 2 * members * steps))
    members = scale.pick(4, 16)
    for way, seed in (("coupled", 4), ("exponential", 5)):
        given = {"way": way, "seed": seed, "members": members, "steps": steps, "data": scale.data}
        made.append(Run(beyond, given, members * steps))
    for way in ("TEXP", "TEXP++"):
        given = {"way": way, "seed": 6, "steps": scale.pick(200, 1000), "data": scale.data}
        made.append(Run(tapered, given, 4 * given["steps"]))
    steps = scale.pick(10000, 200000)
    settings = [("normalised", 0.1, 0.0), ("plain", 0.1, 0.1)]
    settings += [("normalised", *x) for x in ((0.1, 0.5), (0.1, 0.1), (0.5, 0.1), (0.01, 0.5), (0.02, 0.1))]
    for loss, lr, decay in settings:
        made.append(Run(toy, {"loss": loss, "lr": lr, "weight_decay": decay, "steps": steps}, steps / 50))
    return made


def judge(results: Results, figures: Figures) -> list[Claim]:
    """The seven claims."""
    return [
        _equal(results, figures),
        _float32(results, figures),
        _range(results, figures),
        _constant(results, figures),
        _texp(results, figures),
        _never_settle(results, figures),
        _period(results, figures),
    ]


def _equal(results: Results, figures: Figures) -> Claim:
    worst: dict[str, float] = {}
    rounded: dict[str, float] = {}
    with figures.draw("equal", 2) as axes:
        for axis, schedule in zip(axes, SCHEDULES, strict=True):
            for a, r in results.of(side_by_side, schedule=schedule):
                name = f"{a['norm']}, {schedule}"
                worst[name], rounded[name] = max(r["growing"] + r["folded"]), max(r["rounded"])
                (line,) = axis.plot(r["steps"], r["growing"], label=a["norm"])
                axis.plot(r["steps"], r["rounded"], ":", color=line.get_color())
            axis.set_yscale("log")
            axis.legend()
            label(axis, "step", "relative difference of logits", f"{schedule} schedule; dotted: another rounding")
    steps = max(a["steps"] for a, _ in results.of(side_by_side))
    bound, times = 1e-12, 30
    farthest = max(worst, key=lambda name: worst[name])
    return Claim(
        ARXIV, 1, "theorem 2.12; section 2, any schedule",
        "the same function at every step, for BN, GN, LN and IN, step decay and cosine",
        f"outputs of {len(worst)} pairs after up to {steps} steps of float64: largest difference {worst[farthest]:.1e} "
        f"({farthest}), where another rounding of the first weights makes {rounded[farthest]:.1e}",
        "the largest relative difference of the logits, by EquivalentExponentialLR and by decay=\"exponential\", "
        "below "
        f"{bound:g}, or at most {times} times what another rounding of the first weights makes of the run with "
        "weight decay",
        all(worst[name] <= max(bound, times * rounded[name]) and rounded[name] <= 1e-6 for name in worst), len(worst),
        "Training amplifies rounding, most with instance normalisation: that is why the run with weight decay is "
        "compared with "
        "itself too, and where that makes more than 1e-6 nothing is told, and the claim fails.",
        {"largest difference": worst, "of another rounding": rounded}, (figures.file("equal"),),
    )  # fmt: skip


def _float32(results: Results, figures: Figures) -> Claim:
    gaps, shown = {}, {}
    for norm in NORMS:
        ways = [results.one(in_float32, norm=norm, way=way)["accuracy"] for way in ("decay", "exponential")]
        gaps[norm], shown[norm] = statistics.difference(ways[1], ways[0]), ways
    with figures.draw("float32", 1) as (axis,):
        for i, ways in enumerate(shown.values()):
            for j, accuracies in enumerate(ways):
                x = [i - 0.12 + 0.24 * j] * len(accuracies)
                axis.plot(x, accuracies, "o", alpha=0.6, color=("#1b3a6b", "#d9542b")[j],
                          label=("weight decay", "exponential lr")[j] if i == 0 else None)  # fmt: skip
        axis.set_xticks(range(len(NORMS)), NORMS)
        axis.legend()
        label(axis, "normalisation", "test accuracy, 0 to 1", "float32, a point per network")
    widest = max(gaps.values(), key=lambda g: max(abs(g.low), abs(g.high)))
    margin = 0.02
    return Claim(
        ARXIV, 2, "section 4",
        "the same test accuracy in float32",
        f"accuracy by exponential lr less that by weight decay, widest of {len(NORMS)} norms: {widest}",
        f"the interval of the difference within ±{margin:g} for every norm (equivalence, not mere absence of evidence)",
        all(g.within(-margin, margin) for g in gaps.values()), len(next(iter(shown.values()))[0]),
        "Few test images, so networks scatter by a point; more networks narrow the interval.",
        {norm: g._asdict() for norm, g in gaps.items()}, (figures.file("float32"),),
    )  # fmt: skip


def _range(results: Results, figures: Figures) -> Claim:
    ((arguments, r),) = results.of(growth)
    by_decay = results.one(beyond, way="coupled")["accuracy"]
    folded = results.one(beyond, way="exponential")
    gap = statistics.difference(folded["accuracy"], by_decay)
    lr, weight_sq = r["log2_lr"][-1], min(r["log2_weight_sq"][-1])
    with figures.draw("range", 2) as (left, right):
        left.plot(r["steps"], r["log2_lr"], label="learning rate")
        band(left, r["steps"], list(zip(*r["log2_weight_sq"], strict=True)), label="|w|²")
        left.axhline(FLOAT32_LOG2, color="k", linestyle="--", label="float32's largest")
        left.legend()
        label(left, "step", "log2", "The exponential run in float64")
        ratio = [[w - x for w in of] for of, x in zip(r["log2_weight_sq"], r["log2_lr"], strict=True)]
        band(right, r["steps"], list(zip(*ratio, strict=True)))
        label(right, "step", "log2 of |w|²/lr", "Their ratio")
    margin = 0.03
    return Claim(
        ARXIV, 3, "section 1",
        "lr and |w|² leave every floating point range, and training goes on",
        f"lr 2^{lr:.0f} and |w|² 2^{weight_sq:.0f} after {arguments['steps']} steps; in float32 by "
        "decay=\"exponential\" "
        f"the largest stored weight is {folded['largest_weight']:.2g}, accuracy less that by weight decay {gap}",
        f"both beyond 2^{FLOAT32_LOG2}, and the interval of the accuracies' difference within ±{margin:g}",
        min(lr, weight_sq) > FLOAT32_LOG2 and gap.within(-margin, margin), len(by_decay),
        "A constant learning rate and strong decay, so that a few thousand steps suffice; accuracies are those of the "
        "equilibrium, without a final small learning rate, and scatter more.",
        {"log2 lr": lr, "log2 |w|²": weight_sq, "accuracy difference": gap._asdict(),
         "largest stored weight": folded["largest_weight"]}, (figures.file("range"),),
    )  # fmt: skip


def _constant(results: Results, figures: Figures) -> Claim:
    r = results.one(growth)
    half = len(r["steps"]) // 2
    x = r["log2_lr"][half:]
    ratios = [[w - lr for w, lr in zip(of, x, strict=True)] for of in zip(*r["log2_weight_sq"][half:], strict=True)]
    slope = statistics.slope_over_seeds(x, ratios)
    grown = x[-1] - x[0]
    return Claim(
        ARXIV, 4, "figures of section 4",
        "|w|²/lr constant while both grow",
        f"while lr grows by 2^{grown:.0f}, d log(|w|²/lr) / d log(lr) = {slope}",
        "the interval over seeds within ±0.01, in the second half of the run",
        slope.within(-0.01, 0.01), len(ratios),
        "The whole network's norm for that of one convolution. Labels are wrong at random with probability 0.1: a "
        "network "
        "that fits everything has no gradient left, and its norm no equilibrium.",
        {"slope": slope._asdict(), "log2 growth of lr": grown}, (figures.file("range"),),
    )  # fmt: skip


def _texp(results: Results, figures: Figures) -> Claim:
    told = {way: results.one(tapered, way=way) for way in ("TEXP", "TEXP++")}
    with figures.draw("texp", 1) as (axis,):
        for way, r in told.items():
            axis.plot(r["steps"], r["distance"], marker="o", label=way)
        axis.set_yscale("log")
        axis.legend()
        label(axis, "step", "relative difference of logits", "Against step decay with weight decay, float64")
    exact, close = max(told["TEXP++"]["distance"]), max(told["TEXP"]["distance"])
    return Claim(
        ARXIV, 5, "section 2; appendix",
        "with momentum TEXP++ is exact, TEXP approximate",
        f"outputs differ from those of step decay by at most {exact:.1e} (TEXP++) and {close:.1e} (TEXP)",
        "TEXP++ below 1e-8 at every look, TEXP above 1e-6",
        exact < 1e-8 and close > 1e-6, 1,
        "The paper treats TEXP's error as negligible, in accuracies. Here the buffers begin at zero, where TEXP's "
        "exponential begins with buffers in motion; what little differs at first is amplified by training.",
        {way: max(r["distance"]) for way, r in told.items()}, (figures.file("texp"),),
    )  # fmt: skip


def _toys(results: Results) -> dict[tuple[float, float], dict[str, Any]]:
    return {(a["lr"], a["weight_decay"]): r for a, r in results.of(toy, loss="normalised") if a["weight_decay"] > 0}


def _never_settle(results: Results, figures: Figures) -> Claim:
    alone = results.one(toy, loss="normalised", weight_decay=0.0)["last_half"]
    plain = results.one(toy, loss="plain")["last_half"]
    both = {f"lr {lr:g}, wd {wd:g}": r for (lr, wd), r in _toys(results).items()}
    with figures.draw("toy", 3) as (*curves, right):
        # The two settings with the rarest bursts: the stored curves are too coarse for the others.
        rarest = sorted(_toys(results).items(), key=lambda item: item[0][0] * item[0][1])[:2]
        for axis, ((lr, wd), r) in zip(curves, rarest, strict=True):
            axis.plot([i * 2000 / len(r["curve"]) for i in range(len(r["curve"]))], r["curve"], linewidth=1)
            label(axis, "step, of the last 2000", "loss x²/(x²+y²)", f"lr {lr:g}, weight decay {wd:g}")
        toys = [((lr, wd), r["period"]) for (lr, wd), r in _toys(results).items() if r["period"]]
        right.plot([1 / (lr * wd) for (lr, wd), _ in toys], [p for _, p in toys], "o", label="measured")
        ends = [min(1 / (lr * wd) for (lr, wd), _ in toys), max(1 / (lr * wd) for (lr, wd), _ in toys)]
        right.plot(ends, ends, "k--", label="1/(lr wd)")
        right.set_xscale("log")
        right.set_yscale("log")
        right.legend()
        label(right, "1/(lr wd), steps", "steps between bursts", "Time between bursts")
    least = min(r["last_half"] for r in both.values())
    return Claim(
        ARXIV, 6, "abstract; section 3",
        "normalisation alone and weight decay alone reach the minimum, both together never settle",
        f"largest loss in the last half: {alone:.1e} normalised, {plain:.1e} decayed, at least {least:.2f} with both",
        "below 1e-6 for each alone, above 0.1 for every (lr, wd) with both",
        alone < 1e-6 and plain < 1e-6 and least > 0.1, len(both),
        "Two numbers for a linear teacher with Gaussian inputs. There is no chance in it.",
        {"normalised alone": alone, "decayed alone": plain, "both": {name: r["last_half"] for name, r in both.items()}},
        (figures.file("toy"),),
    )  # fmt: skip


def _period(results: Results, figures: Figures) -> Claim:
    toys = {key: r["period"] for key, r in _toys(results).items() if r["period"]}
    products = {f"lr {lr:g}, wd {wd:g}": period * lr * wd for (lr, wd), period in toys.items()}
    slope = statistics.slope([math.log(1 / (lr * wd)) for lr, wd in toys], [math.log(p) for p in toys.values()])
    low, high = min(products.values()), max(products.values())
    return Claim(
        ARXIV, 7, "section 3",
        "bursts return after a time of order 1/(lr wd)",
        f"period · lr wd from {low:.3f} to {high:.3f}; slope of log period on log 1/(lr wd) {slope}",
        "every product within [0.8, 1.25], and the slope within 0.05 of 1 with its interval within 0.1",
        low >= 0.8 and high <= 1.25 and abs(slope.estimate - 1) <= 0.05 and slope.within(0.9, 1.1), len(toys),
        "The paper bounds the time from above, with logarithms; the constant is of this toy.",
        {"period times lr wd": products, "slope": slope._asdict()}, (figures.file("toy"),),
    )  # fmt: skip


PAPER = Paper(
    ARXIV, "exponential", "An Exponential Learning Rate Schedule for Deep Learning", "Li, Arora 2019",
    __doc__ or "", runs, judge,
)  # fmt: skip

if __name__ == "__main__":
    main("exponential")
