"""The lines that the demo prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import BATCH_SIZE

if TYPE_CHECKING:
    from rich.console import Console

#: What the table has in place of a ratio to a gradient that the noise hides.
UNKNOWN = "unknown"


def group_sizes(groups: list[dict[str, Any]]) -> str:
    """Return a line with the numbers of tensors and weights in each group."""
    parts = []
    for group in groups:
        params = [p for _, p in group["params"]]
        parts.append(f"{group['name'].replace('_', ' ')}: {len(params)} tensors, {sum(p.numel() for p in params)}")
    return f"Found {'; '.join(parts)}. Only the first group has weight decay."


def introduction(
    convolutions: int,
    l: float | None,
    svag_steps: int,
    epoch_steps: int,
    noise_every: int | None,
    decay: str,
    is_adamw: bool = False,
) -> str:
    """Return what the columns of `epoch_line` are, and their heads. `l` is None without SVAG."""
    predicted = "weight_decay * (1 - beta1) / (1 + beta1)" if is_adamw else "weight_decay / (1 + momentum)"
    text = (
        f"Effective LR: mean over the {convolutions} convolutions. Angular update: root mean square, in radians;\n"
        f"predicted: sqrt(2 * lr * {predicted}).\n"
    )
    heads = "\nepoch     loss   test accuracy   effective LR   angular update   predicted"
    if l is not None:
        text += (
            f"SVAG, l = {l:g}: every step has the learning rate lr / l and takes two batches of {BATCH_SIZE}. An epoch "
            f"is {svag_steps} steps and\ncovers the training time of {epoch_steps} steps of SGD.\n"
            "Passes: over the data, so far. nsr: noise-to-signal ratio of a batch gradient, and its standard error.\n"
        )
        heads += "   passes      nsr   +-"
    if noise_every is not None:
        text += (
            f"From the samples' gradients, in eval mode, every {noise_every} steps: the gradient noise scale, gns, in "
            "samples;\nthe noise-to-signal ratio of a batch gradient, nsr_batch.\n"
        )
        heads += "       gns   nsr_batch"
    if decay == "exponential":
        text += (
            "Weight decay as an exponential learning rate, on the convolutions. Exponential LR: the learning rate of "
            "the\nequivalent run without weight decay.\n"
        )
        heads += "   exponential LR"
    return text + heads


def epoch_line(row: dict[str, Any]) -> str:
    """Return a line of the table, with the columns that the row has."""

    def text(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    def ratio(key: str) -> str:
        # Measured, and yet no ratio: `is_unknown`.
        return UNKNOWN if is_unknown(row, key) else text(key, ".3g")

    line = (
        f"{row['epoch']:5}  {row['loss']:7.4f}  {row['test_accuracy']:14.2%}  {text('effective_lr', '.5f'):>13}  "
        f"{text('angular_update', '.5f'):>15}  {row['predicted_angular_update']:10.5f}"
    )
    if "passes" in row:
        line += f"  {row['passes']:7.1f}  {ratio('nsr'):>7}   {text('nsr_stderr', '.3g')}"
    if "gns" in row:
        line += f"{ratio('gns'):>10}  {text('nsr_batch', '.3g'):>10}"
    if "exponential_lr" in row:
        line += f"{row['exponential_lr']:17.5g}"
    return line


def is_unknown(row: dict[str, Any], key: str) -> bool:
    """Return whether the ratio `key` ("nsr", "gns") was measured and is unknown, because noise hides the gradient."""
    return row.get(key, 0.0) is None and row["trace_sigma"] is not None


def advice(curves: list[dict[str, Any]]) -> str | None:
    """Return what to do about the ratios that are unknown; None if there are none."""
    hidden = [key for key in ("nsr", "gns") if any(is_unknown(row, key) for row in curves)]
    if not hidden:
        return None
    more = "a smaller --noise-every averages more batches" if hidden == ["gns"] else "a larger --l takes more steps"
    return (
        f"{hidden[0]} unknown, average longer: the noise hides the squared norm of the gradient, whose estimate is not "
        f"clearly positive ({more})."
    )


def print_times(console: Console, seconds: dict[str, float], parameters: int) -> None:
    """Print the table of `timing.time_steps`, whose first entry is normkern's."""
    from rich.table import Table

    title = f"A step with |w|, |g|, <w,g>, |u|, <w,u> of all {parameters} parameter tensors"
    table = Table(title=title, title_style="")
    table.add_column("optimizer")
    table.add_column("microseconds", justify="right")
    table.add_column("ratio to normkern", justify="right")
    labels = {
        "normkern": 'normkern.SGD(stats="tensor")',
        "torch": "torch.optim.SGD, norms eagerly",
        "torch-foreach": "torch.optim.SGD(foreach=True), norms eagerly",
        "torch-fused": "torch.optim.SGD(fused=True), norms eagerly",
        "adamw": 'normkern.AdamW(stats="tensor")',
        "torch-adamw": "torch's AdamW, norms eagerly",
        "torch-adamw-foreach": "torch's AdamW(foreach=True), norms eagerly",
        "torch-adamw-fused": "torch's AdamW(fused=True), norms eagerly",
    }
    ours = next(iter(seconds.values()))
    for name, time_of_step in seconds.items():
        table.add_row(labels[name], f"{1e6 * time_of_step:.0f}", f"{time_of_step / ours:.2f}")
    console.print(table)
