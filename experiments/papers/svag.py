"""Li, Malladi, Arora 2021: On the Validity of Modeling SGD with Stochastic Differential Equations (arXiv 2102.12470).

Claims, and where they stand in the paper:

1. Section 4 and its figures: where the noise is large, SVAG with growing l (towards the SDE) has SGD's test accuracy,
   |w|^2 and noise-to-signal ratio, along continuous time.
2. Section 5, theorem 5.2 and figures: where the batch is large, the noise-to-signal ratio is below 1/(C^2 - 1), and
   SVAG leaves SGD: SGD is not close to its SDE.
3. Section 5, the linear scaling rule: scaling batch and lr by k must fail beyond a k that noise and signal at the small
   batch predict; here k = C^2 + (C^2 - 1) N/G, a tighter form of the paper's C^2 (1 + N/G), from the same proof.
4. Section 5, equilibrium: (2/lr - wd/l) wd R = N + G/l with R = |w|^2, G = |grad L|^2, N = tr Sigma.
5. Theorem 4.3: SVAG is an approximation of the SDE of weak order 1 in 1/l, at a fixed, finite lr.

C-close: ratios of R, G and N of two equilibria within [1/C, C]; C = sqrt(2), as in the paper. It trains PreResNets and
VGGs on CIFAR-10; here small residual networks on small images, several at once. Claim 5 is about an expectation that is
known in closed form: a quadratic loss with Gaussian noise, a million runs at once.

python -m experiments.papers.svag [--quick] [--data FOLDER]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import normkern
from normkern.advice import compare_runs
from normkern.theory import max_linear_scaling, nsr_condition, svag_equilibrium, svag_steps

from . import statistics
from .claims import Claim
from .data import batches, load, loss_of
from .figures import Figures, band, label
from .nets import Ensemble, by_member
from .paper import Paper, Scale, Table, main
from .runs import Results, Run

ARXIV = "2102.12470"
C = math.sqrt(2)
WRONG = 0.1
WEIGHT_DECAY = 0.005
#: The small batch, its lr, and how many times both are scaled for the large one, where signal is to outweigh noise.
BATCH, LR, LARGE = 16, 0.1, 64
MEASURES = ("weight_sq", "signal", "noise")
#: How the tables of comparisons are to be read.
HOW = (
    "R, G and N: ratios of means over networks, with intervals that hold together with 95 %. Accuracy: a difference, "
    "which is in no verdict. Close: all three intervals within [1/√2, √2]; not close: one of them outside; else "
    "undecided. These verdicts are by intervals, and so stricter than the criteria of the claims, which take estimates."
)
#: Of the quadratic of claim 5: lr, time, begin; curvature and noise are 1.
TOY_LR, TOY_TIME, TOY_BEGIN = 0.8, 4.0, 2.0


def svag(l: float, scale: int, seed: int, members: int, time: float, data: str | None) -> dict[str, Any]:
    """A run over so much continuous time, with batch and lr scaled alike: equilibrium and what leads to it.

    Two gradients at each step, also where l = 1 uses one: their noise is measured.
    """
    images = load(data)
    generator = torch.Generator().manual_seed(seed)
    net = Ensemble(members, images.images.shape[1], generator)
    lr = LR * scale
    original = round(time / lr)
    steps = svag_steps(steps=original, l=l)
    # Averages over the last quarter, roughly, each step of it with less weight than the next.
    decay = 1 - 8 / steps
    optimizer = normkern.SVAG(
        net.scale_invariant(), lr=lr, l=l, weight_decay=WEIGHT_DECAY, stats="row", noise_decay=decay
    )
    source = batches(images, members, BATCH * scale, generator, shift=True, wrong=WRONG)
    weight_sq, at = torch.zeros(members, dtype=torch.float64), _looks(steps)
    told: dict[str, list[Any]] = {"time": [], "weight_sq": [], "nsr": [], "accuracy": []}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for half in range(2):
            batch = next(source)
            loss_of(net(batch.images), batch.labels).backward()
            if half == 0:
                optimizer.hold()
        optimizer.step()
        now = by_member(optimizer.stats().weight_sq, members).sum(0)
        weight_sq += (now - weight_sq) * (1 - decay) / (1 - decay**step)
        if step in at:
            signal, noise = _noise(optimizer, members)
            told["time"].append(step * lr / l)
            told["weight_sq"].append(now.tolist())
            told["nsr"].append((noise / signal).tolist())
            told["accuracy"].append(net.accuracy(images))
    signal, noise = _noise(optimizer, members)
    means = {"weight_sq": weight_sq.tolist(), "signal": signal.tolist(), "noise": noise.tolist()}
    return {**told, "means": means, "lr": lr, "steps": steps}


def _looks(steps: int) -> set[int]:
    return {max(1, round(steps * i / 12)) for i in range(1, 13)}


def _noise(optimizer: normkern.SVAG, members: int) -> tuple[Tensor, Tensor]:
    """|grad L|^2 and tr Sigma of each member, all layers together."""
    noise = optimizer.noise()
    return (
        by_member(noise.slot_grad_sq_norm_unbiased, members).sum(0),
        by_member(noise.slot_trace_sigma, members).sum(0),
    )


def quadratic(l: float, seed: int, particles: int) -> dict[str, Any]:
    r"""The mean of x^2 after SVAG on (x - xi)^2/2, xi ~ N(0, 1), each coordinate a run of its own.

    SDE: :math:`E\,x_T^2 = x_0^2 e^{-2T} + \frac{\eta}{2} (1 - e^{-2T})`.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.Parameter(torch.full((particles,), TOY_BEGIN))
    optimizer = normkern.SVAG([x], lr=TOY_LR, l=l)
    for _ in range(svag_steps(steps=round(TOY_TIME / TOY_LR), l=l)):
        for half in range(2):
            x.grad = x.detach() - torch.randn(particles, generator=generator)
            if half == 0:
                optimizer.hold()
        optimizer.step()
    square = x.detach().double().square()
    decayed = math.exp(-2 * TOY_TIME)
    exact = TOY_BEGIN**2 * decayed + TOY_LR / 2 * (1 - decayed)
    return {"error": float(square.mean()) - exact, "standard_error": float(square.std()) / math.sqrt(particles)}


def runs(scale: Scale) -> list[Run]:
    """l at a small and a large batch; the linear scaling rule at l = 1; the quadratic."""
    made = []
    ls = scale.pick((1.0, 4.0), (1.0, 2.0, 4.0, 8.0, 16.0))
    settings = [(1, ls, *scale.pick((4, 40.0), (8, 300.0))), (LARGE, ls, *scale.pick((2, 320.0), (6, 1000.0)))]
    settings += [(k, (1.0,), *scale.pick((2, 160.0), (6, 300.0))) for k in scale.pick((16,), (4, 16))]
    for k, of_k, members, time in settings:
        for l in of_k:
            given = {"l": l, "scale": k, "seed": 0, "members": members, "time": time, "data": scale.data}
            made.append(Run(svag, given, (10 + 5 * k) * members * l * time / k))
    particles = scale.pick(500_000, 4_000_000)
    ls = scale.pick((1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0, 8.0, 16.0))
    made += [Run(quadratic, {"l": l, "seed": 1, "particles": particles}, l * particles / 20000) for l in ls]
    return made


def judge(results: Results, figures: Figures) -> list[Claim]:
    """The five claims."""
    return [
        _agrees(results, figures),
        _breaks_down(results, figures),
        _linear_scaling(results, figures),
        _balance(results, figures),
        _weak_order(results, figures),
    ]


def _by_l(results: Results, scale: int) -> dict[float, dict[str, Any]]:
    return {a["l"]: r for a, r in results.of(svag, scale=scale)}


def _ratios(run: dict[str, Any], base: dict[str, Any], noise_time: float = 1.0) -> dict[str, statistics.Interval]:
    """Of the equilibrium's R, G and N to those of another run; N times `noise_time`."""
    ratios = {}
    for key in MEASURES:
        x, y = run["means"][key], base["means"][key]
        if min(*x, *y) <= 0:  # an unbiased estimate of a signal that is lost in noise
            x, y = [max(sum(x) / len(x), 1e-12)] * len(x), [max(sum(y) / len(y), 1e-12)] * len(y)
        ratios[key] = statistics.log_ratio(x, y)
    ratios["noise"] = statistics.Interval(*(x * noise_time for x in ratios["noise"]))
    return ratios


def _close(ratios: dict[str, statistics.Interval]) -> bool:
    return all(1 / C <= r.estimate <= C for r in ratios.values())


def _nsr(run: dict[str, Any]) -> float:
    """Of the batch gradient at equilibrium, all members together: a ratio of means, not a mean of ratios."""
    return sum(run["means"]["noise"]) / sum(run["means"]["signal"])


def _draw_along_time(results: Results, figures: Figures, scale: int, name: str) -> None:
    with figures.draw(name, 3) as axes:
        for l, r in _by_l(results, scale).items():
            for axis, key in zip(axes, ("accuracy", "weight_sq", "nsr"), strict=True):
                band(axis, r["time"], list(zip(*r[key], strict=True)), label=f"l = {l:g}")
        axes[0].legend()
        label(
            axes[0],
            "continuous time, lr · steps / l",
            "test accuracy, 0 to 1",
            f"batch {BATCH * scale}, lr {LR * scale:g}",
        )
        label(axes[1], "continuous time, lr · steps / l", "|w|²")
        label(axes[2], "continuous time, lr · steps / l", "noise-to-signal N/G")


def _told(ratios: dict[str, statistics.Interval]) -> str:
    return ", ".join(f"{name} {ratios[key]}" for name, key in zip(("|w|²", "G", "N"), MEASURES, strict=True))


def _agrees(results: Results, figures: Figures) -> Claim:
    by_l = _by_l(results, 1)
    _draw_along_time(results, figures, 1, "small_batch")
    ratios = {l: _ratios(r, by_l[1.0]) for l, r in by_l.items() if l > 1}
    gaps = {l: statistics.difference(r["accuracy"][-1], by_l[1.0]["accuracy"][-1]) for l, r in by_l.items() if l > 1}
    last = max(ratios)
    margin = 0.03
    return Claim(
        ARXIV, 1, "section 4, figures",
        "where noise is large, SVAG of every l agrees with SGD in accuracy, |w|² and noise",
        f"batch {BATCH}, N/G {_nsr(by_l[1.0]):.2f}: l = {last:g} over l = 1: {_told(ratios[last])}; accuracy "
        f"{gaps[last].estimate:+.3f} [{gaps[last].low:.3f}, {gaps[last].high:.3f}]",
        f"for every l the ratios of R, G and N within [1/√2, √2] and the mean accuracy within ±{margin:g}",
        all(map(_close, ratios.values())) and all(abs(g.estimate) <= margin for g in gaps.values()),
        len(by_l[1.0]["accuracy"][0]),
        "No learning rate decay, and a tenth of the labels wrong at random: accuracies are those of the "
        "equilibrium. The "
        "condition is necessary, not sufficient; a smaller batch would decide where it fails.",
        {f"l = {l:g}": {k: r._asdict() for k, r in of.items()} for l, of in ratios.items()}
        | {"accuracy": {f"l = {l:g}": gap._asdict() for l, gap in gaps.items()}}
        | {"N/G": {f"l = {l:g}": _nsr(r) for l, r in by_l.items()}},
        (figures.file("small_batch"),),
    )  # fmt: skip


def _breaks_down(results: Results, figures: Figures) -> Claim:
    by_l = _by_l(results, LARGE)
    _draw_along_time(results, figures, LARGE, "large_batch")
    ratios = {l: _ratios(r, by_l[1.0]) for l, r in by_l.items() if l > 1}
    last, nsr, needed = max(ratios), _nsr(by_l[1.0]), nsr_condition(C)
    return Claim(
        ARXIV, 2, "section 5, theorem 5.2",
        f"where N/G < {needed:.3g} SGD is not √2-close to its SDE: SVAG leaves it",
        f"batch {BATCH * LARGE}, lr {LR * LARGE:g}: N/G {nsr:.2f}; l = {last:g} over l = 1: {_told(ratios[last])}",
        f"N/G of SGD below {needed:.3g}, and one of R, G, N of the largest l outside [1/√2, √2]",
        nsr < needed and not _close(ratios[last]), len(by_l[1.0]["accuracy"][0]),
        "The largest l stands for the SDE. Wrong labels keep the noise up even at this batch: were N/G above the "
        "bound, a "
        "larger batch would decide.",
        {f"l = {l:g}": {k: r._asdict() for k, r in of.items()} for l, of in ratios.items()}
        | {"N/G": {f"l = {l:g}": _nsr(r) for l, r in by_l.items()}},
        (figures.file("large_batch"),),
    )  # fmt: skip


def _linear_scaling(results: Results, figures: Figures) -> Claim:
    scaled = {a["scale"]: r for a, r in results.of(svag, l=1.0)}
    base, nsr = scaled[1], _nsr(scaled[1])
    limit = max_linear_scaling(nsr_batch=nsr, C=C) if nsr > 0 else math.inf
    # The rule keeps the noise per unit of time, lr tr(Sigma).
    ratios = {k: _ratios(r, base, k) for k, r in sorted(scaled.items()) if k > 1}
    beyond = [k for k in ratios if k > limit]
    with figures.draw("linear_scaling", 1) as (axis,):
        ks = [1, *ratios]
        for i, (key, name) in enumerate(zip(MEASURES, ("|w|²", "G = |∇L|²", "lr·N"), strict=True)):
            axis.plot(ks, [1.0, *(r[key].estimate for r in ratios.values())], "o-", color=f"C{2 * i}", label=name)
        axis.axhspan(1 / C, C, color="k", alpha=0.08)
        if math.isfinite(limit):
            axis.axvline(limit, color="k", linestyle="--", label=f"limit {limit:.1f}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.legend()
        label(axis, "k: batch and lr times k", "ratio to k = 1", "Linear scaling rule")
    told = "; ".join(f"k = {k}: {'close' if _close(r) else 'not close'}" for k, r in ratios.items())
    return Claim(
        ARXIV, 3, "section 5, linear scaling rule",
        "batch and lr times k cannot stay √2-close beyond k = C² + (C² - 1) N/G",
        f"N/G {nsr:.2f} at batch {BATCH}: limit {limit:.1f}; {told}",
        "at least one k beyond the limit was run, and none of those is √2-close",
        bool(beyond) and not any(_close(ratios[k]) for k in beyond), len(base["accuracy"][0]),
        "Necessary, not sufficient: k below the limit may fail too. More k around the limit would show how tight "
        "it is.",
        {"limit": limit, "the paper's form": C * C * (1 + nsr), "N/G": nsr,
         "ratios": {f"k = {k}": {key: x._asdict() for key, x in r.items()} for k, r in ratios.items()}},
        (figures.file("linear_scaling"),),
    )  # fmt: skip


def _balance(results: Results, figures: Figures) -> Claim:
    off = {}
    with figures.draw("balance", 1) as (axis,):
        for scale in (1, LARGE):
            by_l = _by_l(results, scale)
            for l, r in by_l.items():
                means = r["means"]
                predicted = [
                    svag_equilibrium(
                        lr=r["lr"], weight_decay=WEIGHT_DECAY, l=l, grad_sq_norm=max(g, 0.0), trace_sigma=n
                    )
                    for g, n in zip(means["signal"], means["noise"], strict=True)
                ]
                off[f"batch {BATCH * scale}, l = {l:g}"] = statistics.mean(
                    [w / p for w, p in zip(means["weight_sq"], predicted, strict=True)]
                )
            intervals = [off[f"batch {BATCH * scale}, l = {l:g}"] for l in by_l]
            error = [[x.estimate - x.low for x in intervals], [x.high - x.estimate for x in intervals]]
            axis.errorbar(list(by_l), [x.estimate for x in intervals], yerr=error, marker="o", capsize=3,
                          label=f"batch {BATCH * scale}")  # fmt: skip
        axis.axhline(1, color="k", linestyle="--")
        axis.set_xscale("log", base=2)
        axis.legend()
        label(axis, "l", "|w|², measured over predicted", "(2/lr - wd/l) wd R = N + G/l")
    worst = max(off, key=lambda name: abs(off[name].estimate - 1))
    return Claim(
        ARXIV, 4, "section 5, equilibrium",
        "(2/lr - wd/l) wd R = N + G/l at equilibrium",
        f"R measured over R from measured N and G, farthest from 1 of {len(off)}: {off[worst]} ({worst})",
        "the mean over networks within 0.05 of 1 for every batch and l",
        all(abs(x.estimate - 1) <= 0.05 for x in off.values()), len(next(results.of(svag))[1]["accuracy"][0]),
        "Averages are over the end of a run, and exact only where it is stationary: longer runs decide.",
        {name: x._asdict() for name, x in off.items()}, (figures.file("balance"),),
    )  # fmt: skip


def _weak_order(results: Results, figures: Figures) -> Claim:
    told = {a["l"]: r for a, r in results.of(quadratic)}
    tail = {l: r for l, r in told.items() if l >= 2}
    slope = statistics.slope([math.log(l) for l in tail], [math.log(abs(r["error"])) for r in tail.values()])
    with figures.draw("weak_order", 1) as (axis,):
        errors, twice = ([f * abs(r[key]) for r in told.values()] for f, key in ((1, "error"), (2, "standard_error")))
        axis.errorbar(list(told), errors, yerr=twice,
                      marker="o", capsize=3, label="measured, ± 2 standard errors")  # fmt: skip
        first, value = max(told), abs(told[max(told)]["error"])
        axis.plot(list(told), [value * first / l for l in told], "k--", label="order 1")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.legend()
        label(axis, "l", "|E x² - that of the SDE|", f"Quadratic, lr {TOY_LR:g}")
    return Claim(
        ARXIV, 5, "theorem 4.3",
        "weak error of order 1 in 1/l at a finite lr",
        f"slope of log |error of E x²| on log l, from l = 2 on: {slope}; error {told[max(told)]['error']:.4f} "
        f"± {told[max(told)]['standard_error']:.4f} at l = {max(told):g}",
        "the slope at most -0.9, and at least -1.4: order 1 as l grows, approached from above",
        -1.4 <= slope.estimate <= -0.9, 1,
        "A quadratic of one variable, whose SDE is solved; the paper has no closed form to compare with. Larger l "
        "bring the "
        "slope closer to -1, and need more particles.",
        {f"l = {l:g}": r for l, r in told.items()} | {"slope": slope._asdict()}, (figures.file("weak_order"),),
    )  # fmt: skip


def tables(results: Results) -> list[Table]:
    """SVAG at every l beside SGD at both batches, and the linear scaling rule, judged by intervals."""
    made = []
    note = HOW
    for scale in (1, LARGE):
        by_l = {l: _logged(r) for l, r in _by_l(results, scale).items()}
        rows = compare_runs(by_l, reference=1.0, C=C).rows()
        made.append(Table(f"SVAG beside SGD, batch {BATCH * scale}, lr {LR * scale:g}", note, rows))
        note = "As in the table above."
    runs_at = sorted(((a["scale"], r) for a, r in results.of(svag, l=1.0)), key=lambda run: run[0])
    scaled = {f"k = {k}": _logged(r, k) for k, r in runs_at}
    note = "As above, with N per unit of time, which the rule keeps: k times that of a batch gradient."
    made.append(Table("Batch and lr times k", note, compare_runs(scaled, reference="k = 1", C=C).rows()))
    return made


def _logged(run: dict[str, Any], noise_time: float = 1.0) -> dict[str, list[float]]:
    """The measures of `compare_runs`, a number per network."""
    means = run["means"]
    noise = [noise_time * n for n in means["noise"]]
    return {"R": means["weight_sq"], "G": means["signal"], "N": noise, "accuracy": run["accuracy"][-1]}


PAPER = Paper(
    ARXIV, "svag", "On the Validity of Modeling SGD with Stochastic Differential Equations (SDEs)",
    "Li, Malladi, Arora 2021", __doc__ or "", runs, judge, tables,
)  # fmt: skip

if __name__ == "__main__":
    main("svag")
