"""Li, Lyu, Arora 2020: Reconciling Modern Deep Learning with Traditional Optimization Analyses: The Intrinsic Learning
Rate (arXiv 2010.02916).

Claims, and where they stand in the paper:

1. Section 3 and theorem 5.1: at equilibrium the effective learning rate lr/|w|^2 depends on lr and weight decay through
   their product alone, the intrinsic learning rate.
2. Theorem 5.1: g = (|w|^2/lr)^2 obeys dg/dt = -4 lr wd g + 2 tr Sigma: it relaxes with the time 1/(4 lr wd).
3. Section 5: dividing lr by k makes the effective learning rate fall by k, and come back to 1/sqrt(k) of what it was.
4. Section 4, fast equilibrium conjecture, and its Monte Carlo figure: networks of different early schedules have, after
   O(1/(lr wd)) steps of the same lr and wd, the same distribution of predictions, although their weights differ.
5. The same figure: distances fall as functions of intrinsic time lr wd t, for several intrinsic rates, and not of lr t.
6. Section 4, figures on initial learning rates: a small initial learning rate catches up, given time.

The paper trains ResNets on CIFAR-10 and a CNN on MNIST; here an ensemble of small residual networks, many members at
once as one batched model, each with weights and batches of its own.

python -m experiments.papers.intrinsic [--quick] [--data FOLDER]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import normkern
from normkern.theory import intrinsic_lr, lr_drop_recovery, steps_to_equilibrium

from . import statistics
from .claims import Claim
from .data import batches, load
from .figures import Figures, band, label
from .nets import Ensemble, by_member
from .paper import Paper, Scale, main
from .runs import Results, Run
from .training import log_steps, set_lr, take_step

ARXIV = "2010.02916"
BATCH = 32
#: Of labels that are wrong, others at each draw: an equilibrium needs noise that training cannot end.
WRONG = 0.1
#: Of labels that are wrong and stay so: small learning rates fit them, large ones do not.
FIXED_WRONG = 0.2
PERTURBED = 1.25


class _Training:
    """An ensemble under training, with momentum 0, as in the paper's theory."""

    def __init__(self, lr: float, weight_decay: float, seed: int, members: int, data: str | None, fixed: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.data = load(data)
        if fixed:
            self.data = self.data.with_wrong_labels(FIXED_WRONG)
        self.net = Ensemble(members, self.data.images.shape[1], self.generator)
        self.optimizer = normkern.SGD(self.net.scale_invariant(), lr=lr, weight_decay=weight_decay, stats="row")
        self._batches = batches(
            self.data, members, BATCH, self.generator, wrong=0.0 if fixed else WRONG, shift=not fixed
        )

    def step(self) -> None:
        take_step(self.net, self.optimizer, next(self._batches))

    def effective_lr(self) -> Tensor:
        """Of the last step, (members,), the geometric mean over layers."""
        return by_member(self.optimizer.stats().effective_lr, self.net.members).log().mean(0).exp()


def equilibrium(
    lr: float, weight_decay: float, seed: int, members: int, time: float, data: str | None
) -> dict[str, Any]:
    """So many 1/(lr wd) of training: the effective lr, and its mean over the last half."""
    run = _Training(lr, weight_decay, seed, members, data, fixed=False)
    steps = round(time / intrinsic_lr(lr=lr, weight_decay=weight_decay))
    at, curve, logs = set(log_steps(steps)), [], torch.zeros(members, dtype=torch.float64)
    for step in range(1, steps + 1):
        run.step()
        now = run.effective_lr()
        if step in at:
            curve.append(now.tolist())
        if step > steps // 2:
            logs += now.log()
    mean = (logs / (steps - steps // 2)).exp()
    return {"steps": sorted(at), "curve": curve, "mean": mean.tolist(), "accuracy": run.net.accuracy(run.data)}


def relaxation(lr: float, weight_decay: float, seed: int, members: int, data: str | None) -> dict[str, Any]:
    """At equilibrium all weights are made longer: how g = (|w|^2/lr)^2 comes back, relative to before."""
    run = _Training(lr, weight_decay, seed, members, data, fixed=False)
    time = steps_to_equilibrium(lr=lr, weight_decay=weight_decay, momentum=0)
    before, burn, count = torch.zeros(members, dtype=torch.float64), round(16 * time), round(4 * time)
    for step in range(burn + count):
        run.step()
        if step >= burn:
            before += run.effective_lr().square().reciprocal()
    before /= count
    with torch.no_grad():
        for _, w in run.net.scale_invariant():
            w *= PERTURBED
    steps, excess = round(2 * time), []
    for _ in range(steps):
        run.step()
        excess.append((run.effective_lr().square().reciprocal() / before - 1).tolist())
    every = max(1, steps // 50)
    return {"steps": list(range(0, steps, every)), "excess": excess[::every]}


def drop(lr: float, weight_decay: float, factor: float, seed: int, members: int, data: str | None) -> dict[str, Any]:
    """The effective lr after lr was divided by the factor at equilibrium, relative to before."""
    run = _Training(lr, weight_decay, seed, members, data, fixed=False)
    time = steps_to_equilibrium(lr=lr, weight_decay=weight_decay, momentum=0)
    before, burn, count = torch.zeros(members, dtype=torch.float64), round(16 * time), round(4 * time)
    for step in range(burn + count):
        run.step()
        if step >= burn:
            before += run.effective_lr().log()
    before /= count
    set_lr(run.optimizer, lr / factor)
    steps = round(6 * factor * time)
    at, ratios = set(np.linspace(0, steps - 1, 60, dtype=int).tolist()), []
    for step in range(steps):
        run.step()
        if step in at:
            ratios.append((run.effective_lr().log() - before).exp().tolist())
    return {"steps": sorted(at), "ratio": ratios}


def predictions(net: Ensemble, data: Any, images: Tensor) -> Tensor:
    """Softmax of each member's logits, (images, members, classes)."""
    return net.logits(data, images).softmax(2).double()


def total_variation(a: Tensor, b: Tensor) -> float:
    r"""Between two distributions of predictions, mean over images:
    :math:`\frac12 \sum_k |\bar p_a(k) - \bar p_b(k)|`."""
    return float((a.mean(1) - b.mean(1)).abs().sum(1).mean() / 2)


def mixing(
    lr: float, weight_decay: float, seed: int, members: int, intrinsic_time: float, data: str | None
) -> dict[str, Any]:
    """Two ensembles, one begun with a large and one with a small lr, from then on with the same lr and weight decay."""
    runs = [
        _Training(lr * early, weight_decay, seed + i, members, data, fixed=True) for i, early in enumerate((4, 1 / 16))
    ]
    time = 1 / intrinsic_lr(lr=lr, weight_decay=weight_decay)
    for run in runs:
        for _ in range(round(time)):
            run.step()
        set_lr(run.optimizer, lr)
    images = torch.cat([runs[0].data.images[:200], runs[0].data.test_images[:200]])
    steps = round(intrinsic_time * time)
    at, distances, null = [0, *(s for s in log_steps(steps) if s >= steps / 256)], [], []
    for step in range(steps + 1):
        if step in at:
            told = [predictions(run.net, run.data, images) for run in runs]
            distances.append(total_variation(*told))
            # Halves have half the members, and their means twice the variance of the wholes'.
            halves = [total_variation(p[:, ::2], p[:, 1::2]) for p in told]
            null.append(sum(halves) / 2 / math.sqrt(2))
        if step < steps:
            for run in runs:
                run.step()
    return {"steps": at, "distance": distances, "null": null}


def catching_up(way: str, lr: float, weight_decay: float, factor: float, seed: int, members: int, time: float,
                data: str | None) -> dict[str, Any]:  # fmt: skip
    """Test accuracy at lr / factor, after a beginning with all of lr ("large") or without ("small")."""
    run = _Training(lr if way == "large" else lr / factor, weight_decay, seed, members, data, fixed=True)
    begin = round(2 / intrinsic_lr(lr=lr, weight_decay=weight_decay))
    for _ in range(begin):
        run.step()
    set_lr(run.optimizer, lr / factor)
    steps = round(time / intrinsic_lr(lr=lr / factor, weight_decay=weight_decay))
    at, accuracies = [s for s in log_steps(steps, 1) if s >= steps / 64], []
    for step in range(1, steps + 1):
        run.step()
        if step in at:
            accuracies.append(run.net.accuracy(run.data))
    return {"steps": at, "begin": begin, "accuracy": accuracies}


def runs(scale: Scale) -> list[Run]:
    """Equilibria, what disturbs them, and ensembles that mix."""
    made = []
    rate, members, time = scale.pick((0.008, 4, 8), (0.001, 8, 20))
    for lr in (0.0125, 0.05, 0.2, 0.8):
        given = {"lr": lr, "weight_decay": rate / lr, "seed": 0, "members": members, "time": time, "data": scale.data}
        made.append(Run(equilibrium, given, members * time / rate))
    for lr, rate in scale.pick(((0.2, 0.004), (0.2, 0.016)), ((0.2, 0.0005), (0.2, 0.002), (0.2, 0.008), (0.8, 0.002))):
        given = {"lr": lr, "weight_decay": rate / lr, "seed": 1, "members": members, "data": scale.data}
        made.append(Run(relaxation, given, members * 5.5 / rate))
    for factor in scale.pick((4,), (2, 4, 10)):
        rate = scale.pick(0.016, 0.004)
        given = {
            "lr": 0.4,
            "weight_decay": rate / 0.4,
            "factor": factor,
            "seed": 2,
            "members": members,
            "data": scale.data,
        }
        made.append(Run(drop, given, members * (5 + 1.5 * factor) / rate))
    settings = scale.pick(
        ((0.2, 0.08), (0.8, 0.02), (0.8, 0.005)),
        ((0.2, 0.04), (0.8, 0.01), (0.2, 0.01), (0.8, 0.0025), (0.05, 0.04), (0.2, 0.0025), (0.8, 0.000625)),
    )
    members, time = scale.pick((16, 4), (64, 6))
    for lr, decay in settings:
        given = {
            "lr": lr,
            "weight_decay": decay,
            "seed": 3,
            "members": members,
            "intrinsic_time": time,
            "data": scale.data,
        }
        made.append(Run(mixing, given, 2 * members * (time + 1) / (lr * decay)))
    members, time = scale.pick((4, 2), (16, 6))
    for way, seed in (("large", 5), ("small", 6)):
        given = {"way": way, "lr": 0.8, "weight_decay": scale.pick(0.02, 0.005), "factor": 10, "seed": seed,
                 "members": members, "time": time, "data": scale.data}  # fmt: skip
        made.append(Run(catching_up, given, members * 10 * time / (0.8 * given["weight_decay"])))
    return made


def judge(results: Results, figures: Figures) -> list[Claim]:
    """The six claims."""
    distant = _distances(results)
    return [
        _same(results, figures),
        _relaxes(results, figures),
        _recovers(results, figures),
        _mixes(distant, results, figures),
        _collapses(distant, results, figures),
        _catches_up(results, figures),
    ]


def _columns(rows: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _same(results: Results, figures: Figures) -> Claim:
    told = {a["lr"]: r for a, r in results.of(equilibrium)}
    slope = statistics.slope(
        [math.log(lr) for lr, r in told.items() for _ in r["mean"]],
        [math.log(x) for r in told.values() for x in r["mean"]],
    )
    means = {lr: math.exp(sum(map(math.log, r["mean"])) / len(r["mean"])) for lr, r in told.items()}
    spread = max(means.values()) / min(means.values())
    rate = next(a["lr"] * a["weight_decay"] for a, _ in results.of(equilibrium))
    with figures.draw("equilibrium", 1) as (axis,):
        for lr, r in told.items():
            band(axis, r["steps"], _columns(r["curve"]), label=f"lr {lr:g}, wd {rate / lr:.3g}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend()
        label(axis, "step", "effective learning rate lr/|w|²", f"lr·wd = {rate:g}")
    return Claim(
        ARXIV, 1, "section 3; theorem 5.1",
        "equal lr·wd, equal equilibrium effective lr, whatever lr and wd",
        f"lr {min(told):g} to {max(told):g}: largest over smallest {spread:.4f}; "
        f"d log(effective lr) / d log(lr) = {slope}",
        "largest over smallest mean at most 1.05, and the interval of the slope within ±0.02",
        spread <= 1.05 and slope.within(-0.02, 0.02), len(next(iter(told.values()))["mean"]),
        "Labels are wrong at random with probability 0.1, so that training has noise without end; no momentum.",
        {"effective lr": {str(lr): x for lr, x in means.items()}, "slope": slope._asdict()},
        (figures.file("equilibrium"),),
    )  # fmt: skip


def _relaxes(results: Results, figures: Figures) -> Claim:
    products, times = {}, []
    with figures.draw("relaxation", 1) as (axis,):
        for a, r in results.of(relaxation):
            rate = a["lr"] * a["weight_decay"]
            name = f"lr {a['lr']:g}, wd {a['weight_decay']:g}"
            # Log of the seeds' mean: a single seed's excess is noise around zero at the end.
            mean = [sum(x) / len(x) for x in r["excess"]]
            fitted = statistics.slope([4 * rate * s for s in r["steps"]], [math.log(max(x, 1e-3)) for x in mean])
            product = -1 / fitted.estimate
            products[name] = product
            times.append((rate, product / (4 * rate)))
            axis.plot([4 * rate * s for s in r["steps"]], mean, label=name)
        start = PERTURBED**4 - 1
        axis.plot([0, 2], [start, start * math.exp(-2)], "k--", label="exp(-4 lr wd t)")
        axis.set_yscale("log")
        axis.legend()
        label(axis, "4 lr wd t", "(|w|²/lr)², relative excess", f"Weights made {PERTURBED:g} times as long")
    slope = (
        statistics.slope([math.log(x) for x, _ in times], [math.log(t) for _, t in times]) if len(times) > 2 else None
    )
    low, high = min(products.values()), max(products.values())
    return Claim(
        ARXIV, 2, "theorem 5.1",
        "relaxation time 1/(4 lr wd)",
        f"fitted time · 4 lr wd from {low:.3f} to {high:.3f} over {len(products)} settings"
        + (f"; slope of log time on log(lr wd) {slope}" if slope else ""),
        "every product within [0.8, 1.25]",
        low >= 0.8 and high <= 1.25, len(next(results.of(relaxation))[1]["excess"][0]),
        "The equation's rate holds at given tr Sigma of the unit sphere. In a network that answers to the "
        "effective lr: longer "
        "weights turn less, fit better and have less noise, so that they come back sooner, in the first order of any "
        "disturbance. A loss whose gradient is noise alone would decide.",
        {"time · 4 lr wd": products, "slope": slope._asdict() if slope else "too few settings"},
        (figures.file("relaxation"),),
    )  # fmt: skip


def _recovers(results: Results, figures: Figures) -> Claim:
    worst, ends = {}, {}
    with figures.draw("drop", 1) as (axis,):
        for i, (a, r) in enumerate(results.of(drop)):
            k = a["factor"]
            formula = [
                lr_drop_recovery(factor=k, steps=s, lr=a["lr"], weight_decay=a["weight_decay"], momentum=0)
                for s in r["steps"]
            ]
            mean = [math.exp(sum(map(math.log, x)) / len(x)) for x in r["ratio"]]
            worst[f"k = {k:g}"] = max(abs(m / f - 1) for m, f in zip(mean, formula, strict=True))
            ends[f"k = {k:g}"] = mean[-1] * math.sqrt(k)
            scaled = [4 * a["lr"] * a["weight_decay"] / k * s for s in r["steps"]]
            band(axis, scaled, _columns(r["ratio"]), label=f"lr divided by {k:g}")
            axis.plot(scaled, formula, "k--", label="formula" if i == 0 else None)
        axis.legend()
        label(axis, "4 lr wd t, with the new lr", "effective lr, relative to before", "Recovery from a drop")
    name = max(worst, key=lambda n: worst[n])
    return Claim(
        ARXIV, 3, "section 5",
        "after lr/k the effective lr is 1/k of before, and recovers to 1/√k with the time k/(4 lr wd)",
        f"farthest from the formula {worst[name]:.1%} ({name}); at the end "
        + ", ".join(f"{x:.3f} of 1/√k for {n}" for n, x in ends.items()),
        "the mean over seeds within 10 % of the formula at every look",
        max(worst.values()) <= 0.1, len(next(results.of(drop))[1]["ratio"][0]),
        "The formula keeps tr Sigma of the unit sphere constant, but a smaller effective lr lets the network fit "
        "better, "
        "with less noise. Then it ends above 1/√k, by the fourth root of how much the noise fell: that measured "
        "would decide.",
        {"farthest": worst, "end over 1/√k": ends}, (figures.file("drop"),),
    )  # fmt: skip


def _distances(results: Results) -> list[dict[str, Any]]:
    """Of each setting: the distance beyond the null, as a part of that at the beginning, and when it is 1/e."""
    told = []
    for a, r in results.of(mixing):
        excess = [d - n for d, n in zip(r["distance"], r["null"], strict=True)]
        part = [x / excess[0] for x in excess]
        when = math.nan
        for (s, x), (t, y) in zip(
            zip(r["steps"], part, strict=True), zip(r["steps"][1:], part[1:], strict=True), strict=False
        ):
            if x > 1 / math.e >= y:
                when = s + (t - s) * (x - 1 / math.e) / (x - y)
                break
        told.append({**a, **r, "rate": a["lr"] * a["weight_decay"], "part": part, "when": when})
    return told


def _mixes(told: list[dict[str, Any]], results: Results, figures: Figures) -> Claim:
    with figures.draw("mixing", 3) as (first, second, third):
        for x in told:
            name = f"lr {x['lr']:g}, wd {x['weight_decay']:g}"
            (line,) = first.plot([x["rate"] * s for s in x["steps"]], x["distance"], label=name)
            first.plot([x["rate"] * s for s in x["steps"]], x["null"], ":", color=line.get_color())
            second.plot([x["rate"] * s for s in x["steps"][1:]], x["part"][1:], label=name)
            third.plot([x["lr"] * s for s in x["steps"][1:]], x["part"][1:], label=name)
        first.legend()
        label(first, "intrinsic time lr·wd·t", "distance of predictions, 0 to 1", "Dotted: two halves of one ensemble")
        for axis, time in ((second, "intrinsic time lr·wd·t"), (third, "lr·t")):
            axis.set_xscale("log")
            axis.axhline(1 / math.e, color="k", linewidth=0.8)
            label(axis, time, "excess distance, part of the first", "")
    begin = {f"lr {x['lr']:g}, wd {x['weight_decay']:g}": x["distance"][0] / x["null"][0] for x in told}
    end = {f"lr {x['lr']:g}, wd {x['weight_decay']:g}": x["part"][-1] for x in told}
    worst = max(end.values())
    horizon = next(a["intrinsic_time"] for a, _ in results.of(mixing))
    return Claim(
        ARXIV, 4, "section 4; Monte Carlo figure",
        "after O(1/(lr wd)) steps predictions have the same distribution, whatever came before",
        f"{horizon:g}/(lr wd) steps on, at most {worst:.1%} of the first excess distance is left in {len(told)} "
        "settings; "
        f"before, it was {min(begin.values()):.1f} times the null or more",
        "at first at least twice the distance of two halves of one ensemble; at the end at most 0.1 of the excess "
        "over it",
        min(begin.values()) >= 2 and worst <= 0.1, next(a["members"] for a, _ in results.of(mixing)),
        "Means of softmax over members on 400 images, a part of the law alone; 500 trials in the paper. A fifth "
        "of the labels "
        "is wrong and stays so, so that a small lr learns other things than a large one. Larger ensembles lower "
        "the null.",
        {"first distance over null": begin, "excess left": end}, (figures.file("mixing"),),
    )  # fmt: skip


def _collapses(told: list[dict[str, Any]], results: Results, figures: Figures) -> Claim:
    mixed = [x for x in told if math.isfinite(x["when"])]
    intrinsic = float(np.std([math.log(x["rate"] * x["when"]) for x in mixed])) if mixed else math.nan
    ordinary = float(np.std([math.log(x["lr"] * x["when"]) for x in mixed])) if mixed else math.nan
    varied = len({round(math.log(x["rate"]), 6) for x in mixed}) > 1
    slope = (
        statistics.slope([math.log(1 / x["rate"]) for x in mixed], [math.log(x["when"]) for x in mixed])
        if varied and len(mixed) > 2
        else statistics.Interval(math.nan, -math.inf, math.inf)
    )
    return Claim(
        ARXIV, 5, "section 4; Monte Carlo figure",
        "distances fall on one curve of lr·wd·t, and not of lr·t",
        f"log time to 1/e scatters by {intrinsic:.2f} in lr·wd·t and by {ordinary:.2f} in lr·t; slope of log time on "
        f"log 1/(lr wd) {slope}",
        "in every setting the distance falls to 1/e; the scatter in intrinsic time is less than half of the "
        "other; the slope "
        "is within 0.25 of 1",
        len(mixed) == len(told) and intrinsic < ordinary / 2 and abs(slope.estimate - 1) <= 0.25,
        next(a["members"] for a, _ in results.of(mixing)),
        "Mixing of what the network knows, not of its norms, sets this time: learning a new label takes long "
        "where effective "
        "learning rates are small. More intrinsic rates, and larger ensembles, decide.",
        {"time to 1/e, steps": {f"lr {x['lr']:g}, wd {x['weight_decay']:g}": x["when"] for x in told},
         "scatter, intrinsic": intrinsic, "scatter, lr t": ordinary, "slope": slope._asdict()},
        (figures.file("mixing"),),
    )  # fmt: skip


def _catches_up(results: Results, figures: Figures) -> Claim:
    large, small = (results.one(catching_up, way=way) for way in ("large", "small"))
    arguments = next(a for a, _ in results.of(catching_up, way="large"))
    rate = arguments["lr"] / arguments["factor"] * arguments["weight_decay"]
    with figures.draw("catching_up", 1) as (axis,):
        for r, name in ((large, "large lr first"), (small, "small lr always")):
            band(axis, [rate * s for s in r["steps"]], _columns(r["accuracy"]), marker="o", label=name)
        axis.set_xscale("log")
        axis.legend()
        label(
            axis,
            "intrinsic time lr·wd·t at the small lr",
            "test accuracy, 0 to 1",
            "A small initial learning rate catches up",
        )
    first = statistics.difference(large["accuracy"][0], small["accuracy"][0])
    last = statistics.difference(large["accuracy"][-1], small["accuracy"][-1])
    margin = 0.02
    return Claim(
        ARXIV, 6, "section 4; figures on initial learning rates",
        "an lr that is small from the beginning is worse at first, and equal in the end",
        f"test accuracy with a large lr first less that without: {first} soon after, {last} after "
        f"{large['steps'][-1]} steps",
        f"the first interval above 0, the last one within ±{margin:g}",
        first.low > 0 and last.within(-margin, margin), len(large["accuracy"][0]),
        "The factor is 10, not 100, and a fifth of the labels is wrong. Where the first gap is not there, these "
        "small images "
        "have nothing that only a large lr finds; larger ones would decide.",
        {"first": first._asdict(), "last": last._asdict()}, (figures.file("catching_up"),),
    )  # fmt: skip


PAPER = Paper(
    ARXIV, "intrinsic",
    "Reconciling Modern Deep Learning with Traditional Optimization Analyses: The Intrinsic Learning Rate",
    "Li, Lyu, Arora 2020", __doc__ or "", runs, judge,
)  # fmt: skip

if __name__ == "__main__":
    main("intrinsic")
