"""Is the advisor right? Branch a run at checkpoints, go on with batch x k, and compare with `normkern.advise`.

At each checkpoint of a run every branch sees the same number of samples with batch k B: SGD with lr times k (linear
rule), AdamW by the square root rule. A branch has left the run where its training loss at the end, over that of the
branch with k = 1, exceeds 1 + tolerance. The ratio is of geometric means over networks, each beside itself, with a
95 % interval: "in" where the interval lies below the tolerance, "out" where it lies above, else "open". The branched
critical k lies between the last k before which all are in, and the first k from which on all are out.

The advisor reads pairs of batches of the branch with k = 1, all networks together. For AdamW it has no limit for k, and
its noise scale over B stands beside the branched k.

python -m experiments.papers.branched [--quick] [--data FOLDER]
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import normkern
from normkern.monitors.report import table
from normkern.theory import square_root_scaling

from . import statistics
from .data import Batch, Data, batches, load, loss_of, losses_of
from .figures import Figures, label
from .nets import Ensemble
from .paper import FULL, QUICK, Scale, options, versions
from .report import QUICK as QUICK_WARNING
from .runs import Results, Run, run_all
from .training import take_step

NAME = "branched"
BATCH, WRONG, TOLERANCE = 16, 0.1, 0.1
LR = {"sgd": 0.1, "adamw": 0.003}
WEIGHT_DECAY = {"sgd": 0.005, "adamw": 0.05}
BETAS, EPS = (0.9, 0.99), 1e-8


def branches(
    optimizer: str, steps: int, ks: Sequence[int], samples: int, members: int, seed: int, data: str | None
) -> dict[str, Any]:
    """Train to a checkpoint, then every branch from there: losses at its end, and the noise of the one with k = 1."""
    images = load(data)
    generator = torch.Generator().manual_seed(seed)
    net = Ensemble(members, images.images.shape[1], generator)
    trunk = _optimizer(optimizer, net, 1)
    source = _source(images, members, 1, generator)
    for _ in range(steps):
        take_step(net, trunk, next(source))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = trunk.state_dict()
    told: dict[str, Any] = {"loss": {}, "trace_sigma": [], "grad_sq_norm_unbiased": []}
    for k in ks:
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(weights[name])
        branch = _continued(optimizer, net, k, state)
        source = _source(images, members, k, torch.Generator().manual_seed(seed + 1000 + k))
        for _ in range(max(1, samples // (BATCH * k))):
            first = next(source)
            if k == 1:
                signal, noise = _pair(net, first, next(source), members)
                told["grad_sq_norm_unbiased"].append(signal)
                told["trace_sigma"].append(noise)
            take_step(net, branch, first)
        told["loss"][str(k)] = _losses(net, images).tolist()
    return told


def _source(images: Data, members: int, k: int, generator: torch.Generator) -> Iterator[Batch]:
    return batches(images, members, BATCH * k, generator, shift=True, wrong=WRONG)


def _optimizer(name: str, net: Ensemble, k: int) -> torch.optim.Optimizer:
    """The optimizer of a run with k times the batch, by its scaling rule."""
    lr, decay = LR[name], WEIGHT_DECAY[name]
    if name == "sgd":
        return normkern.SGD(net.scale_invariant(), lr=lr * k, weight_decay=decay)
    scaled = square_root_scaling(lr=lr, betas=BETAS, eps=EPS, batch_size=BATCH, new_batch_size=BATCH * k)
    return normkern.AdamW(net.scale_invariant(), **scaled._asdict(), weight_decay=decay * math.sqrt(k))


def _continued(name: str, net: Ensemble, k: int, state: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer with the state of the trunk and the hyperparameters of k."""
    optimizer = _optimizer(name, net, k)
    own = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
        group.update(hyperparameters)
    return optimizer


def _pair(net: Ensemble, first: Batch, second: Batch, members: int) -> tuple[float, float]:
    """|grad L|^2 and tr Sigma of a batch gradient, means over the members."""
    gradients: list[list[Tensor]] = []
    for batch in (first, second):
        net.zero_grad()
        loss_of(net(batch.images), batch.labels).backward()
        gradients.append([p.grad.double() for _, p in net.scale_invariant() if p.grad is not None])
    a, b = gradients
    signal = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    noise = sum(float((x - y).square().sum()) / 2 for x, y in zip(a, b, strict=True))
    return signal / members, noise / members


@torch.no_grad()
def _losses(net: Ensemble, images: Data) -> Tensor:
    """The training loss of each member, with statistics of the weights as they are."""
    some = images.first(1000)
    logits = net.logits(images, some.images)
    return losses_of(logits, some.labels.unsqueeze(1).expand(-1, logits.shape[1]))


def runs(scale: Scale) -> list[Run]:
    """Two optimizers, three checkpoints each."""
    made = []
    for optimizer in ("sgd", "adamw"):
        ks = {"sgd": scale.pick([1, 4, 16, 64], [1, 2, 4, 8, 16, 32, 64]), "adamw": scale.pick([1, 4], [1, 2, 4, 8])}
        for steps in scale.pick((60, 120, 240), (300, 1000, 3000)):
            members, samples = scale.pick((2, 4096), (8, 65536))
            given = {
                "optimizer": optimizer, "steps": steps, "ks": ks[optimizer], "samples": samples, "members": members,
                "seed": steps, "data": scale.data,
            }  # fmt: skip
            made.append(Run(branches, given, members * (steps + len(ks[optimizer]) * samples / BATCH)))
    return made


def verdicts(loss: dict[str, list[float]]) -> dict[int, tuple[statistics.Interval, str]]:
    """Of each k the loss over that of k = 1, and "in", "out" or "open"."""
    found = {}
    for k in sorted(int(k) for k in loss if k != "1"):
        logs = [math.log(x / y) for x, y in zip(loss[str(k)], loss["1"], strict=True)]
        ratio = statistics.Interval(*map(math.exp, statistics.mean(logs)))
        limit = 1 + TOLERANCE
        found[k] = ratio, "in" if ratio.high <= limit else "out" if ratio.low > limit else "open"
    return found


def critical(of_k: dict[int, tuple[statistics.Interval, str]]) -> tuple[float, float]:
    """Between which k the branches leave the run: inf where none is known to have left."""
    low, high = 1.0, math.inf
    for k, (_, verdict) in of_k.items():
        if verdict != "in":
            break
        low = float(k)
    for k, (_, verdict) in reversed(of_k.items()):
        if verdict != "out":
            break
        high = float(k)
    return low, high


def compared(results: Results) -> list[dict[str, Any]]:
    """One row per optimizer and checkpoint: the advisor's number and the branched one."""
    rows = []
    for given, told in results.of(branches):
        log = {key: told[key] for key in ("trace_sigma", "grad_sq_norm_unbiased")}
        advice = normkern.advise(log, gradient_samples=BATCH, batch_size=BATCH, optimizer=given["optimizer"])
        advised = advice.max_k if given["optimizer"] == "sgd" else advice.nsr_batch
        of_k = verdicts(told["loss"])
        low, high = critical(of_k)
        known = advised.low is not None and advised.high is not None and advised.high <= 4 * advised.low
        overlaps = known and advised.low <= high and low <= advised.high
        rows.append(
            {
                "optimizer": given["optimizer"],
                "steps": given["steps"],
                "advised": [advised.estimate, advised.low, advised.high],
                "advised_is": "max_k" if given["optimizer"] == "sgd" else "noise scale / batch",
                "branched": [low, high if math.isfinite(high) else None],
                "loss_ratio": {str(k): [*x] for k, (x, _) in of_k.items()},
                "verdicts": {str(k): verdict for k, (_, verdict) in of_k.items()},
                "advised_interval_is_sharp": known,
                "intervals_overlap": overlaps,
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], figures: Figures) -> None:
    """Draw loss ratios over k with intervals, and the advisor's interval: a figure for each optimizer."""
    for optimizer in LR:
        _draw(optimizer, [row for row in rows if row["optimizer"] == optimizer], figures)


def _draw(optimizer: str, rows: list[dict[str, Any]], figures: Figures) -> None:
    with figures.draw(optimizer, len(rows)) as axes:
        for axis, row in zip(axes, rows, strict=True):
            ks = [int(k) for k in row["loss_ratio"]]
            middle, low, high = zip(*row["loss_ratio"].values(), strict=True)
            top = 3.0
            errors = [[m - max(a, 1e-3) for m, a in zip(middle, low, strict=True)],
                      [min(b, 1e3) - m for m, b in zip(middle, high, strict=True)]]  # fmt: skip
            axis.errorbar(ks, middle, yerr=errors, marker="o", capsize=3, label="branches, 95 %")
            axis.axhline(1 + TOLERANCE, color="k", linestyle="--", label=f"tolerance, {1 + TOLERANCE:g}")
            estimate, begin, end = row["advised"]
            axis.axvspan(
                begin or 0.5, end or 2 * max(ks), color="#2f6fb5", alpha=0.15, label=f"{row['advised_is']}, 95 %"
            )
            if estimate is not None:
                axis.axvline(estimate, color="#2f6fb5")
            axis.set_xscale("log", base=2)
            axis.set_ylim(0.5, top)
            axis.legend()
            label(axis, "k", "loss over that of k = 1", f"{row['optimizer']}, step {row['steps']}")


def main() -> None:
    """Run what has not been run yet, print the table, write ``branched.json`` and a figure for each optimizer."""
    given = options("The advisor's k beside branches of a run.")
    scale, out = Scale(given.quick, given.data), given.out or (QUICK if given.quick else FULL)
    out.mkdir(parents=True, exist_ok=True)
    results = run_all(runs(scale), out / f"{NAME}.jsonl", workers=given.workers, title=NAME, console=Console())
    rows = compared(results)
    draw(rows, Figures(out, NAME))
    document = {
        "quick": scale.quick, "data": "CIFAR-10" if scale.data else "scikit-learn's digits", "tolerance": TOLERANCE,
        "batch": BATCH, "compute_seconds": round(results.seconds), "versions": versions(), "rows": rows,
    }  # fmt: skip
    (out / f"{NAME}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if scale.quick:
        print(QUICK_WARNING)
    lines = [("branch point", "advised", "95 %", "branched k", "loss ratios")]
    for row in rows:
        estimate, low, high = ("-" if x is None else f"{x:.3g}" for x in row["advised"])
        branched = (
            f"{row['branched'][0]:g} to {'beyond' if row['branched'][1] is None else format(row['branched'][1], 'g')}"
        )
        ratios = ", ".join(f"{k}: {x[0]:.2f} {row['verdicts'][k]}" for k, x in row["loss_ratio"].items())
        lines.append((f"{row['optimizer']}, step {row['steps']}", estimate, f"[{low}, {high}]", branched, ratios))
    print("\n".join(table(lines)))


if __name__ == "__main__":
    from importlib import import_module

    import_module("experiments.papers.branched").main()  # by its name: runs are made in other processes
