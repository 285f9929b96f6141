"""The demo's picture: panels over the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import normkern

from .measurements import measured, root_mean_square
from .settings import BATCH_SIZE, LR

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(
    file: Path,
    title: str,
    curves: list[dict[str, Any]],
    steps: list[normkern.StepStats],
    names: list[str],
    lr: float = LR,
    is_adamw: bool = False,
) -> None:
    """Draw panels over the epochs, as PNG: loss, test accuracy, effective LR, angular update and its prediction.

    A run that measured the gradient noise has two more: the noise-to-signal ratio or the noise scale, and the parts of
    that ratio. `lr` is the learning rate at the start; epochs with a smaller one are grey. `is_adamw`:
    of a run of AdamW.
    """
    from matplotlib.figure import Figure

    ends = [row["epoch"] for row in curves]
    middles = [end - 0.5 for end in ends]
    has_noise = "trace_sigma" in curves[0]
    figure = Figure(figsize=(10, 10.5 if has_noise else 7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(3 if has_noise else 2, 2)
    (loss, correct), (rate, angle) = panels[:2]

    loss.plot(middles, [row["loss"] for row in curves])
    loss.set(title="Training loss", ylabel="cross entropy (nats)", yscale="log")

    correct.plot(ends, [100 * row["test_accuracy"] for row in curves], marker=".")
    correct.set(title=f"Test accuracy: {curves[-1]['test_accuracy']:.2%} at the end", ylabel="correct (%)")

    rate.set(title="Effective learning rate", ylabel="lr / |w|" if is_adamw else "lr / |w|$^2$")
    angle.set(title="Angular update", ylabel="angle that w turns in a step (rad)")
    if steps:
        when = [(i + 1) * len(curves) / len(steps) for i in range(len(steps))]
        effective_lr, angular_update = measured(steps, names)
        each = rate.plot(when, effective_lr, color="C0", alpha=0.35, linewidth=0.8)
        each[0].set_label("each convolution")
        rate.plot(when, effective_lr.mean(1), color="C0", label="their mean")
        rate.set(yscale="log")
        rate.legend(loc="lower left")
        angle.plot(when, root_mean_square(angular_update, 1), color="C1", alpha=0.35, linewidth=0.8, label="each step")
        angle.plot(middles, [row["angular_update"] for row in curves], color="C1", label="each epoch")
    else:
        rate.text(0.5, 0.5, "torch's optimizers do not measure it", transform=rate.transAxes, ha="center")
    predicted = [row["predicted_angular_update"] for row in curves]
    factor = r"(1 - \beta_1) / (1 + \beta_1)" if is_adamw else r"/ (1 + \mathrm{momentum})"
    angle.plot(
        [0, *ends], [predicted[0], *predicted], drawstyle="steps-pre", color="black", linestyle="--",
        label=rf"at equilibrium: $\sqrt{{2 \cdot \mathrm{{lr}} \cdot \mathrm{{wd}} \, {factor}}}$",
    )  # fmt: skip
    angle.set_ylim(bottom=0)
    angle.legend(loc="upper right")
    if has_noise:
        (plot_noise if "nsr" in curves[0] else plot_noise_scale)(panels[2, 0], panels[2, 1], curves)

    falling = [row["epoch"] - 1 for row in curves if row["lr"] < lr]
    for panel in panels.flat:
        if falling:
            panel.axvspan(falling[0], ends[-1], color="black", alpha=0.06, linewidth=0)
        panel.set(xlabel="epoch (grey: the learning rate falls to 0)", xlim=(0, ends[-1]))
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def plot_noise(ratio: Axes, parts: Axes, curves: list[dict[str, Any]]) -> None:
    """Draw the panels of the noise of batch gradients."""
    draw_positive(ratio, "nsr", "", curves)
    ratio.set(title="Noise-to-signal ratio of a batch gradient", ylabel=r"tr $\Sigma$ / $|\nabla L|^2$")
    plot_noise_and_signal(parts, curves)
    parts.set(title="Noise and signal (bars: standard errors)")


def plot_noise_scale(scale: Axes, parts: Axes, curves: list[dict[str, Any]]) -> None:
    """Draw the panels of the noise of the samples' gradients."""
    draw_positive(scale, "gns", "", curves)
    scale.axhline(BATCH_SIZE, color="black", linestyle="--", label=f"the batch: {BATCH_SIZE}")
    scale.set(title="Gradient noise scale", ylabel=r"tr $\Sigma$ / $|\nabla L|^2$ (samples)", yscale="log")
    scale.legend()
    plot_noise_and_signal(parts, curves)
    parts.set(title="Noise of a sample, and signal")


def plot_noise_and_signal(parts: Axes, curves: list[dict[str, Any]]) -> None:
    """Draw the noise and the signal of which the other panel has the ratio."""
    draw_positive(parts, "trace_sigma", r"noise: tr $\Sigma$", curves)
    draw_positive(parts, "grad_sq_norm_unbiased", r"signal: $|\nabla L|^2$", curves)
    if parts.has_data():
        parts.legend()


def draw_positive(panel: Axes, key: str, label: str, curves: list[dict[str, Any]]) -> None:
    """Draw a curve over the epochs on a logarithmic axis, without the estimates that are unknown or not positive."""
    known = [(row["epoch"], row[key], row.get(f"{key}_stderr") or 0.0) for row in curves if row[key]]
    if any(value > 0 for _, value, _ in known):
        where, values, errors = zip(*[entry for entry in known if entry[1] > 0], strict=True)
        bars = errors if any(errors) else None
        panel.errorbar(where, values, yerr=bars, marker=".", capsize=2, linewidth=1, label=label)
        panel.set_yscale("log", nonpositive="clip")
