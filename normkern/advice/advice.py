"""`Advice`: what `normkern.advise` returns; a table, JSON and a picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .answer import Answer
from .settling import Length

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Advice:
    r"""Answers from the noise of a run, each with its interval; `print` it for a table. Plain data: it can be pickled.

    Attributes:
        noise_scale: :math:`\operatorname{tr}\Sigma_1/|\nabla L|^2`, in samples: at this batch size noise equals signal.
        nsr_batch: :math:`N/G`, the noise-to-signal ratio of the batch gradient: the noise scale over `batch_size`.
        follows_sde: whether SGD can be C-close to its SDE at this batch size (`normkern.theory.nsr_condition`).
        max_k: the k beyond which batch and lr times k cannot stay C-close to this run
            (`normkern.theory.max_linear_scaling`); SGD only.
        rule: the rule by which lr follows the batch size.
        equilibrium: whether lr * weight_decay has reached equilibrium, and the steps left.
        cannot_say: what these numbers do not decide, as sentences.
        batch_size, C, confidence, span, optimizer, source: what was given, and the type of the measurements.
        count: number of measurements.
        noise, signal: the measurements: the trace of one sample's covariance, and the estimate of :math:`|\nabla L|^2`.
        lengths: of each parameter :math:`|w|/|w|_*`, its norm over that at equilibrium.
    """

    noise_scale: Answer
    nsr_batch: Answer
    follows_sde: Answer
    max_k: Answer
    rule: Answer
    equilibrium: Answer
    cannot_say: tuple[str, ...]
    batch_size: int
    C: float
    confidence: float
    span: float
    optimizer: str | None
    source: str
    count: int
    noise: tuple[float, ...] = field(repr=False)
    signal: tuple[float, ...] = field(repr=False)
    lengths: tuple[Length, ...] = field(repr=False)

    @property
    def answers(self) -> Iterator[tuple[str, Answer]]:
        """The answers with their names, in the order of the table."""
        for name in ("noise_scale", "nsr_batch", "follows_sde", "max_k", "rule", "equilibrium"):
            yield name, getattr(self, name)

    def table(self, width: int = 120) -> str:
        """Return the answers as a table of text, and what they do not decide.

        Args:
            width: characters of a line, at least 60.
        """
        rows = [("question", f"{self.confidence:.0%} interval", "answer")]
        rows += [(a.question, a.interval, a.answer) for _, a in self.answers]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        indent = sum(widths) + 4
        lines = [
            f"{self.count} measurements ({self.source}), batch {self.batch_size}, C = {self.C:.3g}"
            + (f", {self.optimizer}" if self.optimizer else "")
        ]
        notes = ["", *(a.note for _, a in self.answers)]
        room = max(width - indent, 24)
        for (question, interval, answer), note in zip(rows, notes, strict=True):
            cells = textwrap.wrap(answer, room) + [f"({part})" for part in [note] if part]
            cells = [part for cell in cells for part in textwrap.wrap(cell, room)]
            head = f"{question.ljust(widths[0])}  {interval.ljust(widths[1])}  "
            lines += [f"{head}{cells[0]}", *(" " * indent + cell for cell in cells[1:])]
        lines.append("These numbers do not say:")
        for sentence in self.cannot_say:
            lines += textwrap.wrap(sentence, max(width, 60), initial_indent="* ", subsequent_indent="  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and text: the answers, what was given, and the measurements.

        None stands for a number that is not known or not bounded.
        """
        return {
            "answers": {name: answer.to_dict() for name, answer in self.answers},
            "cannot_say": list(self.cannot_say),
            "batch_size": self.batch_size,
            "C": self.C,
            "confidence": self.confidence,
            "span": self.span,
            "optimizer": self.optimizer,
            "source": self.source,
            "count": self.count,
            "noise": list(self.noise),
            "signal": list(self.signal),
            "lengths": [
                {"name": x.name, "ratio": _finite(x.ratio), "steps_left": _finite(x.steps)} for x in self.lengths
            ],
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def plot(self, to: Any) -> list[Axes]:
        """Draw the noise scale while measurements add up, the k that can stay close, and norms over equilibrium.

        Bands and bars are the confidence intervals; grey is what they leave open.

        Args:
            to: a path to write a picture to, by its ending; or a sequence of three matplotlib Axes.

        Returns:
            The axes drawn on.

        Raises:
            TypeError: `to` is neither. ImportError: no matplotlib.
        """
        from .picture import draw

        return draw(
            to,
            noise=self.noise,
            signal=self.signal,
            batch_size=self.batch_size,
            confidence=self.confidence,
            C=self.C,
            max_k=self.max_k,
            equilibrium=self.equilibrium,
            lengths=self.lengths,
        )


def _finite(x: tuple[float, float, float]) -> list[float | None]:
    return [value if abs(value) < float("inf") else None for value in x]
