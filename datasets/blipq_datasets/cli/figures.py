"""Figures of a run on the terminal: what it will take, and what it took."""

from collections.abc import Iterator, Mapping
from typing import Any

from blipq_datasets.estimate import Estimate

_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def duration(seconds: float) -> str:
    """A duration in two figures or so, as in ``42 s`` and ``3.4 h``."""
    name, size = next(((n, s) for n, s in _UNITS if seconds >= 2 * s), ("s", 1))
    value = seconds / size
    return f"{value:.0f} {name}" if value >= 20 else f"{value:.1f} {name}"


def interval(values: tuple[float, float, float]) -> str:
    """The low and the high end."""
    _, low, high = values
    return f"{duration(low)} to {duration(high)}"


def lines_of(found: Estimate, source: str) -> Iterator[str]:
    """An estimate as lines of no more than 80 characters."""
    counted = "" if found.counted else "about "
    size = "" if found.bytes is None else f", {counted}{in_bytes(found.bytes)} of pictures"
    yield f"{source}: {counted}{found.rows:,} rows{size}"
    yield f"  jobs           {found.jobs:,}{_without(found)}"
    yield f"  cache hits     {found.cache_hits:.0%} of the sample"
    yield f"  GPU time       {duration(found.gpu_s[0])} ({interval(found.gpu_s)})"
    workers = f"{found.workers} live worker" + ("" if found.workers == 1 else "s")
    yield f"  on this fleet  {duration(found.run_s[0])} ({interval(found.run_s)}), {workers}"
    failed = f", {found.failed:,} without an answer" if found.failed else ""
    yield f"  sample         {found.sample:,} rows{failed}; its answers are kept"


def _without(found: Estimate) -> str:
    parts = [(found.repeated, "repeated"), (found.refused, "refused")]
    shown = [f"{count:,} {what}" for count, what in parts if count]
    return f" (rows without: {', '.join(shown)})" if shown else ""


def took_line(took: Mapping[str, Any], estimate: Mapping[str, Any] | None) -> str:
    """What a run took, and what was expected."""
    text = (
        f"took {duration(took['s'])}, {duration(took['gpu_s'])} of GPU time for "
        f"{took['jobs']:,} jobs, {took['cache_hits']:,} cache hits"
    )
    if estimate is None:
        return text
    run, gpu = interval(estimate["run_s"]), interval(estimate["gpu_s"])
    return f"{text}; estimated were {run}, {gpu} of GPU time"


def in_bytes(size: float) -> str:
    """A size in three figures or so."""
    power = min(len(_BYTES) - 1, max(0, len(f"{size:.0f}") - 1) // 3)
    value = size / 1000**power
    return (
        f"{value:.0f} {_BYTES[power]}"
        if value >= 100 or not power
        else f"{value:.1f} {_BYTES[power]}"
    )
