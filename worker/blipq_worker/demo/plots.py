"""The report's two plots as numbers; the template draws them.

Positions are in percent of the width, so that text keeps its size on every screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blipq_worker.demo.score import Answered, percentile

#: Stages of a job, with what happens in each.
STAGES = {
    "queue": "waits for a free worker thread",
    "fetch": "reads the picture from S3",
    "decode": "decodes and resizes it",
    "wait": "waits for its batch",
    "vision": "sees the picture",
    "generate": "writes captions and answers",
    "match": "compares text and picture",
}
MOST_BARS = 30
LEFT, RIGHT = 9.0, 100.0
LEAST_MS = 0.1


@dataclass(frozen=True)
class Tick:
    """A labelled line of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """The answers of one stretch of time; ``height`` is in percent of the plot."""

    x: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Throughput:
    """Answers per second over the run."""

    bars: Sequence[Bar]
    rates: Sequence[Tick]
    times: Sequence[Tick]
    mean: Tick


@dataclass(frozen=True)
class Stage:
    """One stage: its median and 95th percentile in ms, and where they lie on the axis."""

    name: str
    about: str
    p50_ms: float
    p95_ms: float
    p50_at: float
    p95_at: float


@dataclass(frozen=True)
class Stages:
    """How long jobs spent in each stage, on a logarithmic axis."""

    rows: Sequence[Stage]
    ticks: Sequence[Tick]


def throughput_plot(ended_after: Sequence[float]) -> Throughput | None:
    """The plot of jobs that ended so many seconds after the start; None without any."""
    if not ended_after or ended_after[-1] <= 0:
        return None
    total = ended_after[-1]
    step = round_up(total / MOST_BARS)
    counts = [0] * math.ceil(total / step)
    for second in ended_after:
        counts[min(int(second / step), len(counts) - 1)] += 1
    mean = len(ended_after) / total
    top_step = round_up(max(max(counts) / step, mean) / 4)
    top = top_step * math.ceil(max(max(counts) / step, mean) / top_step)
    span = len(counts) * step
    return Throughput(
        bars=[
            Bar(
                x=_across(place * step / span),
                width=(RIGHT - LEFT) / len(counts),
                height=100 * count / step / top,
                label=f"{place * step:.3g} s: {count / step:.3g} answers per second",
            )
            for place, count in enumerate(counts)
        ],
        rates=[
            Tick(100 * n * top_step / top, f"{n * top_step:g}")
            for n in range(round(top / top_step) + 1)
        ],
        times=[
            Tick(_across(n * every / span), f"{n * every:.3g} s")
            for every in [round_up(span / 5)]
            for n in range(int(span / every + 1e-9) + 1)
        ],
        mean=Tick(100 * mean / top, f"{mean:.3g} per second"),
    )


def stage_plot(answers: Sequence[Answered]) -> Stages:
    """The plot of the stages in the receipts."""
    times = {name: _stage_times(answers, name) for name in STAGES}
    longest = max((value for values in times.values() for value in values), default=1.0)
    decades = max(1, math.ceil(math.log10(max(longest, 1.0) / LEAST_MS)))

    def at(value: float) -> float:
        return 100 * math.log10(max(value, LEAST_MS) / LEAST_MS) / decades

    rows = []
    for name, values in times.items():
        p50_ms, p95_ms = percentile(values, 50), percentile(values, 95)
        if p50_ms is not None and p95_ms is not None:
            rows.append(Stage(name, STAGES[name], p50_ms, p95_ms, at(p50_ms), at(p95_ms)))
    powers = [LEAST_MS * 10**power for power in range(decades + 1)]
    return Stages(rows, [Tick(at(power), _unit(power)) for power in powers])


def round_up(value: float) -> float:
    """The next larger of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _across(share: float) -> float:
    return LEFT + (RIGHT - LEFT) * share


def _stage_times(answers: Sequence[Answered], stage: str) -> list[float]:
    receipts = (answer.info.receipt for answer in answers)
    found = (getattr(receipt, f"{stage}_ms") for receipt in receipts if receipt)
    return [value for value in found if value is not None]


def _unit(value_ms: float) -> str:
    return f"{value_ms / 1000:g} s" if value_ms >= 1000 else f"{value_ms:g} ms"
