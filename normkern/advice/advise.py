"""`advise`: answers from the noise that was measured in a run, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..theory.arguments import CLOSENESS, integer, number
from ..theory.closeness import max_linear_scaling, nsr_condition
from . import measurements as noise_measurements
from . import scaling_rule, settling
from .advice import Advice
from .answer import UNKNOWN, Answer, ends, is_sharp, missing
from .intervals import SHARE, Interval, RatioOfMeans, further_measurements
from .measurements import Series

if TYPE_CHECKING:
    from ..monitors.equilibrium import EquilibriumMonitor
    from ..monitors.equilibrium_report import EquilibriumReport


def advise(
    measurements: Iterable[Any] | Mapping[str, Any],
    *,
    batch_size: int,
    optimizer: Any = None,
    equilibrium: EquilibriumMonitor | EquilibriumReport | Sequence[EquilibriumReport] | None = None,
    gradient_samples: int | None = None,
    parameters: Iterable[str] | None = None,
    population: int | None = None,
    C: float = math.sqrt(2),
    confidence: float = 0.95,
    span: float = 4.0,
) -> Advice:
    r"""Return what the noise of a run says about its batch size, its scaling rule and its equilibrium.

    With the trace :math:`N_1 = \operatorname{tr}\Sigma_1` of one sample's gradient, :math:`G = |\nabla L|^2` and the
    batch size B, from means over the measurements:

    .. math::
        \text{noise scale} = \frac{\overline{N_1}}{\overline G}, \qquad
        \frac NG = \frac{\overline{N_1}}{B\,\overline G}, \qquad
        \text{SGD can follow its SDE} \iff \frac NG \ge \frac1{C^2-1}, \qquad
        k \le C^2 + (C^2 - 1)\frac NG

    with the conditions of `normkern.theory.nsr_condition` and `normkern.theory.max_linear_scaling`. Both are
    necessary, not sufficient: beyond such a k batch and lr times k must leave the run, below it they may. They are the
    paper's criterion, and have not been checked here against runs that continue with k times the batch.

    The interval of the ratio is Fieller's, with errors that allow for correlation in time
    (:mod:`normkern.advice.intervals`). Where the noise hides the signal it has no upper end. An answer is "unknown,
    average longer" where its interval decides nothing: where the ends of a positive number differ by more than `span`
    times, or the interval contains the limit that it is compared with.

    Args:
        measurements: results in the order of time, at least 2, equally spaced, of one type: `normkern.Noise` of one
            pair each (``opt.noise()`` after each step of ``SVAG(..., noise_decay=0)``, or `normkern.noise_from_pair`),
            or results of `normkern.DDPNoise` (with ``reset()`` after each), `normkern.GradientNoise`,
            `normkern.RunningMoments`, `normkern.moments`. Or a dict of logged arrays (n,), "trace_sigma" and
            "grad_sq_norm_unbiased", with `gradient_samples`.
        batch_size: B, samples of one optimizer step, of all processes together.
        optimizer: the optimizer, also wrapped by a framework, or "sgd", "svag", "adam", "adamw", "rmsprop"; for the
            scaling rule. Without it the rule and k are not answered.
        equilibrium: reports of a `normkern.EquilibriumMonitor` in the order of time, over at least 10 times its
            `steps_to_equilibrium`. One report, or the monitor, has no interval.
        gradient_samples: samples of each measured gradient, where the results do not know it; default for
            `normkern.Noise`: `batch_size`.
        parameters: names of the parameters to add up, such as the scale-invariant ones that the criterion is about;
            None: all that were measured.
        population: N, if the batches of a measurement are disjoint parts of one data set of N samples, as in an epoch
            without replacement; :math:`\nabla L` is then the gradient over that set. Such gradients lean away from each
            other: the signal is :math:`\overline G + \overline{N_1}/N`, the noise :math:`(1 - 1/N)\,\overline{N_1}`.
            None: independent batches.
        C: how close, finite and > 1.
        confidence: of the intervals, in (0, 1).
        span: the largest ratio of the ends of an interval that counts as known, > 1.

    Returns:
        `Advice`. Synchronises with the device.

    Raises:
        ValueError: fewer than 2 measurements, an average over steps, numbers that are not finite, a name that was not
            measured, or an argument out of its range. TypeError: measurements of several types, or of none of these.

    Reference: McCandlish et al. 2018, arXiv 1812.06162, for the noise scale; Li, Malladi, Arora 2021, arXiv 2102.12470,
    for k; Malladi et al. 2022, arXiv 2205.10287, for the square root rule; Li, Lyu, Arora 2020, arXiv 2010.02916, for
    equilibrium.

    >>> log = {"trace_sigma": [6.0, 5.0, 7.0, 6.0] * 20, "grad_sq_norm_unbiased": [2.0, 3.0, 2.0, 1.0] * 20}
    >>> advice = advise(log, gradient_samples=32, batch_size=32, optimizer="sgd")
    >>> round(advice.noise_scale.estimate, 6), round(advice.max_k.estimate, 6)
    (96.0, 5.0)
    >>> advice.rule.answer
    'linear: batch x k, lr x k; weight decay and momentum stay'
    """
    batch_size = integer("advise", "batch_size", batch_size, 1)
    if gradient_samples is not None:
        gradient_samples = integer("advise", "gradient_samples", gradient_samples, 1)
    C, confidence = number("advise", "C", C, CLOSENESS), number("advise", "confidence", confidence, SHARE)
    span = number("advise", "span", span, CLOSENESS)
    rule, reports = scaling_rule.read(optimizer), settling.read(equilibrium)
    if population is not None:
        population = integer("advise", "population", population, batch_size)
    series = noise_measurements.read(measurements, batch_size, gradient_samples, parameters, population)
    scale = RatioOfMeans.of_series(series.noise, series.signal)
    per_batch = RatioOfMeans.of_series(series.noise / batch_size, series.signal)
    settled = settling.answer(reports, confidence)
    return Advice(
        noise_scale=_ratio("noise scale, samples", scale, confidence, span, "samples"),
        nsr_batch=_ratio(f"noise/signal N/G at batch {batch_size}", per_batch, confidence, span, ""),
        follows_sde=_follows_sde(per_batch, C, confidence, rule),
        max_k=_max_k(per_batch, C, confidence, span, rule),
        rule=scaling_rule.answer(rule),
        equilibrium=settled,
        cannot_say=tuple(_cannot_say(series, scale, confidence, rule, settled, bool(reports))),
        batch_size=batch_size,
        C=C,
        confidence=confidence,
        span=span,
        optimizer=rule.name,
        source=series.source,
        count=scale.count,
        noise=tuple(series.noise.tolist()),
        signal=tuple(series.signal.tolist()),
        lengths=tuple(settling.lengths(reports, confidence)) if reports else (),
    )


def _ratio(question: str, ratio: RatioOfMeans, confidence: float, span: float, unit: str) -> Answer:
    interval = ratio.interval(confidence)
    if is_sharp(interval, span):
        return Answer(question, f"{ratio.estimate:.3g}", True, **ends(interval), unit=unit, more=0)
    more, note = _further(ratio, confidence, lambda x: is_sharp(x, span))
    if interval.low > 0:
        note = f"at least {interval.low:.3g}" + (f"; {note}" if note else "")
    return Answer(question, UNKNOWN, False, **ends(interval), unit=unit, more=more, note=note)


def _further(ratio: RatioOfMeans, confidence: float, enough: Any) -> tuple[int | None, str]:
    """Return how many more measurements decide, and that in words."""
    if ratio.denominator > 0:
        more = further_measurements(ratio, confidence, enough)
        return more, missing(more)
    more = further_measurements(ratio.optimistic(confidence), confidence, enough)
    return more, "" if more is None else f"more than {more:,} further measurements are needed"


def _follows_sde(nsr: RatioOfMeans, C: float, confidence: float, rule: scaling_rule.Optimizer) -> Answer:
    limit = nsr_condition(C)
    question = f"can SGD follow its SDE: N/G >= {limit:.3g}"
    if rule.name is not None and rule.rule != "linear":
        return Answer(question, f"not asked: the condition is for SGD, not for {rule.name}", False)
    interval = nsr.interval(confidence)
    if interval.low >= limit:
        return Answer(question, "not excluded", True, **ends(interval), more=0, note="it is a necessary condition")
    if interval.high < limit:
        return Answer(question, f"no: SGD is not {C:.3g}-close to it", True, **ends(interval), more=0)
    more, note = _further(nsr, confidence, lambda x: x.low >= limit or x.high < limit)
    return Answer(question, UNKNOWN, False, **ends(interval), more=more, note=note)


def _max_k(nsr: RatioOfMeans, C: float, confidence: float, span: float, rule: scaling_rule.Optimizer) -> Answer:
    question = "largest k for batch x k, lr x k"
    if rule.name is None:
        return Answer(question, "not asked: no optimizer was given", False, note="pass optimizer=")
    if rule.rule != "linear":
        return Answer(question, f"unknown: the criterion is for SGD, not for {rule.name}", False)

    def of(x: Interval) -> Interval:
        return Interval(*(max_linear_scaling(nsr_batch=end, C=C) if end >= 0 else math.nan for end in x))

    interval = of(nsr.interval(confidence))
    if is_sharp(interval, span):
        text = f"{interval.estimate:.3g}" if math.isfinite(interval.estimate) else f"at least {interval.low:.3g}"
        note = "beyond it the run must differ; below it it may"
        return Answer(question, text, True, **ends(interval), unit="times", more=0, note=note)
    more, note = _further(nsr, confidence, lambda x: is_sharp(of(x), span))
    note = f"no k below {interval.low:.3g} is excluded" + (f"; {note}" if note else "")
    return Answer(question, UNKNOWN, False, **ends(interval), unit="times", more=more, note=note)


def _cannot_say(
    series: Series,
    scale: RatioOfMeans,
    confidence: float,
    rule: scaling_rule.Optimizer,
    settled: Answer,
    has_reports: bool,
) -> Iterable[str]:
    """Yield what the numbers do not decide."""
    if rule.rule == "linear":
        yield (
            "Whether a k below the limit is safe. The limit is a necessary condition, the criterion of arXiv "
            "2102.12470; it has not been checked against runs that continue with k times the batch."
        )
        if not has_reports:
            yield "Whether the criterion applies: it is for scale-invariant weights at equilibrium. Pass equilibrium=."
        elif not (settled.known and settled.high == 0):
            yield (
                "Whether the criterion applies yet: it is for scale-invariant weights at equilibrium, and this run is "
                "not known to be there."
            )
        if rule.momentum:
            yield f"What momentum changes about k: the criterion is derived without it (momentum is {rule.momentum:g})."
    elif rule.rule == "square root":
        yield (
            f"How far the batch of {rule.name} can grow: no criterion is known for it. The noise scale is that of the "
            "gradient, not of the update, which divides each coordinate by its own size."
        )
    if series.in_eval_mode:
        yield (
            "The noise of training with BatchNorm: it was measured in eval mode, and the two may differ by a factor of "
            "two or more."
        )
    if not series.is_of_population:
        yield (
            "What batches drawn without replacement change: then the signal is too small by the noise of a sample over "
            "the size of the data set. Pass population=."
        )
    if scale.is_denominator_negative(confidence):
        yield (
            "Anything about the signal: its estimate is below zero by more than its error, which independent batches "
            "do not give. Draw the batches of a pair independently."
        )
    halves = _halves(series, confidence)
    if halves is not None:
        first, last = halves
        yield (
            f"The present noise scale: it moved from {first.estimate:.3g} to {last.estimate:.3g} samples between the "
            "first and the last half of the measurements. Pass only the latest."
        )
    yield "What happens at another learning rate or later in training: noise and signal change with both."
    yield "Test accuracy: the conditions are about weights, gradients and their noise."


def _halves(series: Series, confidence: float) -> tuple[Interval, Interval] | None:
    """Return the noise scale of both halves if the two differ by more than their errors."""
    half = len(series.noise) // 2
    if half < 2:
        return None
    each = 1 - (1 - confidence) / 2
    first, last = (
        RatioOfMeans.of_series(series.noise[part], series.signal[part]).interval(each)
        for part in (slice(0, half), slice(len(series.noise) - half, None))
    )
    apart = first.high < last.low or last.high < first.low
    return (first, last) if apart and not math.isnan(first.estimate + last.estimate) else None
