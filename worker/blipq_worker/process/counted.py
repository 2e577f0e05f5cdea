"""What processes have counted in files, added up.

prometheus_client maps these files in the processes that count (see ``metrics.count_in``). Its own
reader takes them as they are: a length below zero keeps it in a loop, and one broken file takes the
whole page. Here a front may have written anything, so each file is read whole or left out.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Literal, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from blipq_worker.fronts.files import read

log = logging.getLogger(__name__)

Kind = Literal["counter", "histogram"]
KINDS: tuple[Kind, ...] = ("counter", "histogram")

#: Of a file of counters or histograms: many times what they take.
ROOM = 1024 * 1024
#: Files grow twofold, where labels are many.
_MOST = 4 * ROOM

_INT, _VALUE = Struct("i"), Struct("dd")  # of the host, as prometheus_client writes them
_START = 8
_FAMILY = re.compile(r"blipq_worker_[a-z0-9_]+")
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")

_Key = msgspec.json.Decoder(tuple[str, str, dict[str, str], str])
_Labels = tuple[tuple[str, str], ...]


class Count(NamedTuple):
    """One sample of a process. family: the metric's name; name: the sample's."""

    family: str
    name: str
    labels: dict[str, str]
    help: str
    value: float


def file_of(folder: Path, kind: Kind, process: str) -> Path:
    """Where a process counts. process: a name without _."""
    return folder / f"{kind}_{process}.db"


def counts_in(path: Path) -> list[Count]:
    """What is counted in a file. Raises ValueError where it is not whole, or not there."""
    data = read(path, _MOST)
    if data is None:
        raise ValueError("no such file, or none to be read")
    return list(_counts(data))


def counted_in(folder: Path) -> bytes:
    """What all processes have counted in the folder, as the text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_Counted(folder))
    return generate_latest(registry)


class _Counted(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> list[Metric]:
        return []  # so that registering reads nothing

    def collect(self) -> Iterator[Metric]:
        for kind in KINDS:
            found: dict[str, list[Count]] = defaultdict(list)
            for path in sorted(self._folder.glob(f"{kind}_*.db")):
                try:
                    counts = counts_in(path)
                except ValueError as error:
                    log.error("%s: left out of the metrics: %s", path, error)
                    continue
                for each in counts:
                    found[each.family].append(each)
            for counts in found.values():
                yield _added(kind, counts)


def _counts(data: bytes) -> Iterator[Count]:
    used = _INT.unpack_from(data)[0] if len(data) >= _START else 0
    if not 0 <= used <= len(data):
        raise ValueError(f"{used} of {len(data)} bytes in use")
    at = _START
    while at < used:
        if at + _INT.size > used:
            raise ValueError("it ends within a count")
        length = _INT.unpack_from(data, at)[0]
        key = at + _INT.size
        # Spaces fill the key up to a multiple of eight bytes, with the length before it.
        value = key + length + 8 - (length + _INT.size) % 8
        if length < 0 or value + _VALUE.size > used:
            raise ValueError("it ends within a count")
        yield _count(data[key : key + length], _VALUE.unpack_from(data, value)[0])
        at = value + _VALUE.size


def _count(key: bytes, value: float) -> Count:
    """A count that cannot break the page, whatever it says. Raises ValueError."""
    try:
        family, name, labels, help = _Key.decode(key)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error
    names = (name, *labels)
    if not _FAMILY.fullmatch(family) or not all(_NAME.fullmatch(each) for each in names):
        raise ValueError(f"no metric of a worker: {key[:200]!r}")
    if not name.startswith(family):
        raise ValueError(f"{name!r} is no sample of {family!r}")
    if "le" in labels:
        float(labels["le"])
    return Count(family, name, labels, help, value)


def _added(kind: Kind, counts: list[Count]) -> Metric:
    """One metric of all processes."""
    metric = Metric(counts[0].family, counts[0].help, kind)
    sums: dict[tuple[str, _Labels], float] = defaultdict(float)
    buckets: dict[_Labels, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for each in counts:
        labels = tuple(sorted((name, text) for name, text in each.labels.items() if name != "le"))
        if kind == "histogram" and "le" in each.labels:
            buckets[labels][float(each.labels["le"])] += each.value
        else:
            sums[each.name, labels] += each.value
    for labels, found in buckets.items():
        total = 0.0  # files count each bucket alone
        for bound, value in sorted(found.items()):
            total += value
            text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
            upto = {**dict(labels), "le": text}
            metric.add_sample(f"{metric.name}_bucket", upto, total)
        metric.add_sample(f"{metric.name}_count", dict(labels), total)
    for (name, labels), value in sums.items():
        metric.add_sample(name, dict(labels), value)
    return metric
