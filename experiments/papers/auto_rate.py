"""Arora, Li, Lyu 2018: Theoretical Analysis of Auto Rate-Tuning by Batch Normalization (arXiv 1812.03981).

Claims, and where they stand in the paper:

1. Abstract, section 6: with batch normalisation, gradient descent converges at any fixed learning rate of the
   scale-invariant weights; experiments sweep it over orders of magnitude.
2. Lemma 2.4: w is orthogonal to its gradient, so |w'|^2 = |w|^2 + lr^2 |g|^2 without weight decay and momentum. Summed:
   sum_t |g_v|^2 = sum_t |w_t|^2 (|w_t+1|^2 - |w_t|^2) / lr^2, the unit gradient g_v being that at w/|w|.
3. Section 3, theorem 3.1: full-batch gradient descent, any lr: min over t < T of |grad L(v)| is O(T^-1/2).
4. Section 4, theorem 4.2: SGD, any lr: the same is O(T^-1/4) up to logarithms.
5. Section 1 and lemma 2.4: the effective learning rate lr/|w|^2 tunes itself; with noise |w|^2 grows as
   lr sqrt(2 |g_v|^2 t), so the effective rate tends to one that lr has dropped out of.

The paper trains a VGG on CIFAR-10; here small residual networks on small images, several at once as one batched model.

python -m experiments.papers.auto_rate [--quick] [--data FOLDER]
"""

from __future__ import annotations

import math
from typing import Any

import torch

import normkern
from normkern import AutoRateMonitor, PowerDecayLR

from . import statistics
from .claims import Claim
from .data import batches, for_all, load, loss_of
from .figures import Figures, band, label
from .nets import Ensemble, by_member
from .paper import Paper, Scale, main
from .runs import Results, Run
from .training import log_steps, take_step

ARXIV = "1812.03981"
BATCH = 32
#: Of what is not scale-invariant, in `tuned`; decays as (t + 1)^-1/2, as theorem 4.2 asks.
HEAD_LR = 0.5
#: Of labels, where noise is to stay.
WRONG = 0.1
#: Regressions begin here: before, |grad L(v)| is that of the initial weights.
FIRST_T = 32


def tuned(lr: float, wrong: float, seed: int, members: int, steps: int, data: str | None) -> dict[str, Any]:
    """SGD with a constant lr of the scale-invariant weights and a trained last layer.

    With a share of wrong labels, others at each draw, the noise stays; without, it ends when every image is learnt.
    """
    images = load(data)
    generator = torch.Generator().manual_seed(seed)
    net = Ensemble(members, images.images.shape[1], generator, trained_head=True)
    groups = [
        {"params": net.scale_invariant(), "lr": lr},
        {"params": [("head", net.head), ("bias", net.bias)], "lr": HEAD_LR},
    ]
    optimizer = normkern.SGD(groups, stats="row")
    schedule = PowerDecayLR(optimizer, [0.0, 0.5])
    first = net.weight_sq()
    effective, at = [], log_steps(steps)
    layers = len(net.scale_invariant())
    for step, batch in zip(range(1, steps + 1), batches(images, members, BATCH, generator, wrong=wrong), strict=False):
        take_step(net, optimizer, batch)
        schedule.step()
        if step in at:
            of_layers = by_member(optimizer.stats().effective_lr[: layers * members], members)
            effective.append(of_layers.log().mean(0).exp().tolist())
    return {
        "steps": at,
        "effective_lr": effective,
        "growth": (net.weight_sq() / first).tolist(),
        "train_accuracy": net.train_accuracy(images),
        "accuracy": net.accuracy(images),
    }


def identity(lr: float, seed: int, members: int, steps: int, data: str | None) -> dict[str, Any]:
    """Both sides of the summed lemma 2.4 in float64."""
    images = load(data).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    net = Ensemble(members, images.images.shape[1], generator).double()
    optimizer = normkern.SGD(net.scale_invariant(), lr=lr, stats="row")
    monitor = AutoRateMonitor(optimizer)
    for _, batch in zip(range(steps), batches(images, members, BATCH, generator), strict=False):
        take_step(net, optimizer, batch)
        monitor.update()
    told = [row for rows in monitor.report().slots.values() for row in rows]
    return {
        "mismatch": [abs(row.mismatch) for row in told if row.mismatch is not None],
        "least_over_bound": [row.least_unit_grad / row.bound for row in told if row.bound],
    }


def unit_grads(net: Ensemble, optimizer: normkern.SGD) -> torch.Tensor:
    """|grad L(v)| of each member at the weights before the last step, all layers together."""
    stats = optimizer.stats()
    return by_member(stats.weight_sq * stats.grad_sq, net.members).sum(0).sqrt()


def descent(lr: float, seed: int, members: int, steps: int, images: int, data: str | None) -> dict[str, Any]:
    """Full-batch gradient descent: the least |grad L(v)| so far, at powers of two."""
    some = load(data).first(images)
    generator = torch.Generator().manual_seed(seed)
    net = Ensemble(members, some.images.shape[1], generator)
    optimizer = normkern.SGD(net.scale_invariant(), lr=lr, stats="row")
    inputs, labels = for_all(some.images, members), some.labels[:, None].expand(-1, members)
    least, curve = torch.full((members,), math.inf, dtype=torch.float64), []
    at = log_steps(steps, 1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(net(inputs), labels).backward()
        optimizer.step()
        least = torch.minimum(least, unit_grads(net, optimizer))
        if step in at:
            curve.append(least.tolist())
    return {"T": at, "least": curve}


def stochastic(lr: float, seed: int, members: int, steps: int, images: int, data: str | None) -> dict[str, Any]:
    """SGD: the least |grad L(v)| of the whole loss so far, looked at eight times per doubling."""
    some = load(data).first(images)
    generator = torch.Generator().manual_seed(seed)
    # Batch normalisation makes the loss depend on the batch; group normalisation has one loss for all batch sizes.
    net = Ensemble(members, some.images.shape[1], generator, norm="group")
    optimizer = normkern.SGD(net.scale_invariant(), lr=lr)
    inputs, labels = for_all(some.images, members), some.labels[:, None].expand(-1, members)
    least, curve = torch.full((members,), math.inf, dtype=torch.float64), []
    often, at = set(log_steps(steps, 8)), log_steps(steps, 1)
    for step, batch in zip(range(1, steps + 1), batches(some, members, BATCH, generator), strict=False):
        if step in often:
            loss = loss_of(net(inputs), labels)
            weights = [p for _, p in net.scale_invariant()]
            square = torch.zeros(members, dtype=torch.float64)
            for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                square += w.detach().double().flatten(1).square().sum(1) * g.double().flatten(1).square().sum(1)
            least = torch.minimum(least, square.sqrt())
        if step in at:
            curve.append(least.tolist())
        take_step(net, optimizer, batch)
    return {"T": at, "least": curve}


def runs(scale: Scale) -> list[Run]:
    """Four decades of lr, two of them for what takes longer."""
    made = []
    members, steps = scale.pick((4, 800), (8, 12000))
    for lr in (0.01, 0.1, 1.0, 10.0, 100.0):
        given = {"lr": lr, "wrong": 0.0, "seed": 0, "members": members, "steps": steps, "data": scale.data}
        made.append(Run(tuned, given, members * steps))
    members, steps = 4, scale.pick(1600, 40000)
    for lr in (0.1, 0.3, 1.0, 3.0, 10.0):
        given = {"lr": lr, "wrong": WRONG, "seed": 4, "members": members, "steps": steps, "data": scale.data}
        made.append(Run(tuned, given, members * steps))
    for lr in (0.01, 1.0, 100.0):
        given = {"lr": lr, "seed": 1, "members": 2, "steps": scale.pick(100, 2000), "data": scale.data}
        made.append(Run(identity, given, 4 * given["steps"]))
    members, steps, images = scale.pick((4, 512, 128), (8, 8192, 256))
    for lr in (0.1, 1.0, 10.0):
        given = {"lr": lr, "seed": 2, "members": members, "steps": steps, "images": images, "data": scale.data}
        made.append(Run(descent, given, members * steps * images / 64))
    members, steps, images = scale.pick((4, 1024, 256), (8, 16384, 512))
    for lr in (0.1, 1.0, 10.0):
        given = {"lr": lr, "seed": 3, "members": members, "steps": steps, "images": images, "data": scale.data}
        made.append(Run(stochastic, given, members * steps))
    return made


def judge(results: Results, figures: Figures) -> list[Claim]:
    """The five claims."""
    return [
        _converge(results, figures),
        _identity(results),
        _rate(results, figures, 3, descent, -0.5, "gd", "full-batch gradient descent"),
        _rate(results, figures, 4, stochastic, -0.25, "sgd", "SGD"),
        _effective(results, figures),
    ]


def _converge(results: Results, figures: Figures) -> Claim:
    told = {a["lr"]: r for a, r in results.of(tuned, wrong=0.0)}
    reached = {lr: statistics.mean(r["train_accuracy"]) for lr, r in told.items()}
    worst = min(reached, key=lambda lr: reached[lr].estimate)
    with figures.draw("sweep", 2) as (left, right):
        for lr, r in told.items():
            band(left, r["steps"], list(zip(*r["effective_lr"], strict=True)), label=f"lr {lr:g}")
        left.set_xscale("log")
        left.set_yscale("log")
        left.legend()
        label(left, "step", "effective learning rate lr/|w|²", "It tunes itself")
        for key, name in (("train_accuracy", "training images"), ("accuracy", "test images")):
            means = [statistics.mean(r[key]) for r in told.values()]
            error = [[m.estimate - max(m.low, 0) for m in means], [min(m.high, 1) - m.estimate for m in means]]
            right.errorbar(list(told), [m.estimate for m in means], yerr=error, marker="o", capsize=3, label=name)
        right.set_xscale("log")
        right.legend()
        label(right, "lr of the scale-invariant weights", "accuracy, 0 to 1", "After the last step, 95 % intervals")
    (arguments, r), *_ = results.of(tuned)
    return Claim(
        ARXIV, 1, "abstract; section 6",
        "any fixed lr of scale-invariant weights converges, over orders of magnitude",
        f"training accuracy over lr {min(told):g} to {max(told):g}: least {reached[worst]} at lr {worst:g}",
        "mean training accuracy after the run at least 0.95 at every lr of four decades",
        all(x.estimate >= 0.95 for x in reached.values()),
        len(r["accuracy"]),
        f"ResNets of six convolutions for a VGG, {arguments['steps']} steps. A small lr needs time of order 1/lr "
        "to move at "
        "all: where only the smallest lr fails, a longer run decides; where large ones do, the theorem would be hurt.",
        {f"train accuracy, lr {lr:g}": x._asdict() for lr, x in reached.items()}
        | {f"test accuracy, lr {lr:g}": statistics.mean(r["accuracy"])._asdict() for lr, r in told.items()},
        (figures.file("sweep"),),
    )  # fmt: skip


def _identity(results: Results) -> Claim:
    worst = {a["lr"]: max(r["mismatch"]) for a, r in results.of(identity)}
    bound = {a["lr"]: max(r["least_over_bound"]) for a, r in results.of(identity)}
    count = sum(len(r["mismatch"]) for _, r in results.of(identity))
    return Claim(
        ARXIV, 2, "lemma 2.4",
        "|w'|² = |w|² + lr²|g|², exactly",
        f"summed over all steps off by at most {max(worst.values()):.1e} in {count} tensors; "
        f"least |g_v| over its bound at most {max(bound.values()):.3f}",
        "relative mismatch of the sums below 1e-9 in float64 at every lr, and min |g_v| never above its bound",
        max(worst.values()) < 1e-9 and max(bound.values()) <= 1 + 1e-9,
        2 * len(worst),
        "Nothing: it holds for any loss. An eps in the normalisation, or a float32 sum, would show here.",
        {"mismatch": {str(k): v for k, v in worst.items()}, "min over bound": {str(k): v for k, v in bound.items()}},
    )  # fmt: skip


def _rate(
    results: Results, figures: Figures, number: int, function: Any, predicted: float, name: str, method: str
) -> Claim:
    slopes = {}
    with figures.draw(name, 1) as (axis,):
        for a, r in results.of(function):
            points = [(t, least) for t, least in zip(r["T"], r["least"], strict=True) if t >= FIRST_T]
            logs = [math.log(t) for t, _ in points]
            of_seeds = list(zip(*([math.log(x) for x in least] for _, least in points), strict=True))
            slopes[a["lr"]] = statistics.slope_over_seeds(logs, of_seeds)
            band(
                axis,
                r["T"],
                list(zip(*r["least"], strict=True)),
                label=f"lr {a['lr']:g}: slope {slopes[a['lr']].estimate:.2f}",
            )
        top = max(r["least"][r["T"].index(FIRST_T)][0] for _, r in results.of(function))
        end = r["T"][-1]
        axis.plot([FIRST_T, end], [top, top * (end / FIRST_T) ** predicted], "k--", label=f"slope {predicted:g}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend()
        label(axis, "T, steps", "least |∇L(v)| in T steps", method)
    slowest = max(slopes.values(), key=lambda s: s.estimate)
    return Claim(
        ARXIV, number, "theorem 3.1" if function is descent else "theorem 4.2",
        f"{method}: least unit gradient falls at least as T^{predicted:g}, any lr",
        f"slope of log against log, slowest of lr {', '.join(f'{lr:g}' for lr in slopes)}: {slowest}",
        f"at every lr the 95 % interval over seeds lies below {predicted:g}, or holds it and is at most 0.1 to "
        "either side",
        all(s.high <= predicted or (s.low <= predicted and s.half_width <= 0.1) for s in slopes.values()),
        len(r["least"][0]),
        f"T from {FIRST_T} to {end}: a bound in O() speaks of what follows. Slopes above it at small T and small "
        "lr are no "
        "contradiction, and longer runs decide. ReLU is not smooth, which the theorem asks for.",
        {f"slope, lr {lr:g}": s._asdict() for lr, s in slopes.items()},
        (figures.file(name),),
    )  # fmt: skip


def _slope_of_tuned(told: dict[float, dict[str, Any]]) -> tuple[statistics.Interval, dict[float, float]]:
    """Of log(effective lr) on log(lr), and the means, of the lr whose |w|^2 has at least tripled."""
    tuning = {lr: r["effective_lr"][-1] for lr, r in told.items() if min(r["growth"]) >= 3}
    means = {lr: math.exp(sum(map(math.log, of)) / len(of)) for lr, of in tuning.items()}
    if len(tuning) < 2:
        return statistics.Interval(math.nan, -math.inf, math.inf), means
    x = [math.log(lr) for lr, of in tuning.items() for _ in of]
    return statistics.slope(x, [math.log(v) for of in tuning.values() for v in of]), means


def _effective(results: Results, figures: Figures) -> Claim:
    told = {a["lr"]: r for a, r in results.of(tuned, wrong=WRONG)}
    slope, means = _slope_of_tuned(told)
    without, _ = _slope_of_tuned({a["lr"]: r for a, r in results.of(tuned, wrong=0.0)})
    decades = math.log10(max(means) / min(means)) if means else 0.0
    with figures.draw("effective", 1) as (axis,):
        for lr, r in told.items():
            band(axis, r["steps"], list(zip(*r["effective_lr"], strict=True)), label=f"lr {lr:g}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend()
        label(axis, "step", "effective learning rate lr/|w|²", "With noise that stays")
    return Claim(
        ARXIV, 5, "section 1; lemma 2.4",
        "the effective lr after training does not depend on the lr chosen (slope 0; 1 if nothing tuned it)",
        f"d log(effective lr) / d log(lr) = {slope} over {decades:.1f} decades with noise that stays; without "
        f"{without}",
        "of the lr whose |w|² has at least tripled, over two decades or more: the interval of the slope within "
        "±0.1, in runs "
        "with noise that stays",
        decades >= 2 and slope.within(-0.1, 0.1),
        len(next(iter(told.values()))["accuracy"]),
        "A small lr takes |w_0|⁴/(2 lr² |g_v|²) steps to be tuned. A large one throws the weights to lr²|g|² in "
        "its first step, "
        "and takes as many more as lr² to forget that: beyond lr 10 more than these runs have. Where images are "
        "learnt by heart "
        "the noise ends, and with it the tuning: a tenth of the labels is wrong, others at each draw.",
        {"slope": slope._asdict(), "slope without noise that stays": without._asdict(),
         "effective lr": {str(lr): x for lr, x in means.items()},
         "growth of |w|²": {str(lr): min(r["growth"]) for lr, r in told.items()}},
        (figures.file("effective"),),
    )  # fmt: skip


PAPER = Paper(
    ARXIV, "auto_rate", "Theoretical Analysis of Auto Rate-Tuning by Batch Normalization", "Arora, Li, Lyu 2018",
    __doc__ or "", runs, judge,
)  # fmt: skip

if __name__ == "__main__":
    main("auto_rate")
