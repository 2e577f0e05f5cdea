"""``/metrics`` of a worker with fronts: what all have counted, and how its processes are."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from blipq.exporter import new_registry
from blipq_worker.process.metrics import (
    CANARY_PASSED,
    DECODE_BOUND,
    DECODING,
    DECODING_LABELS,
    LOAD_SECONDS,
    SERVING,
    counted_in,
)
from blipq_worker.process.nvml import GpuCollector
from blipq_worker.supervision.state import Whole

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Page:
    """The text that Prometheus reads. folder: where the fronts count. canary: whether the engine
    checks its models.

    Never OpenMetrics: what processes count in files has no exemplars.
    """

    def __init__(self, whole: Whole, folder: Path, *, canary: bool) -> None:
        self._folder = folder
        self._registry = new_registry()
        self._registry.register(_Processes(whole, canary))
        engine = whole.engine
        self._registry.register(GpuCollector(lambda: [each.gpu for each in engine.models.values()]))

    def __call__(self, accept: str) -> tuple[str, bytes]:
        return CONTENT_TYPE_LATEST, generate_latest(self._registry) + counted_in(self._folder)


class _Processes(Collector):
    """Gauges have no place in files: what a front says of itself is in its status."""

    def __init__(self, whole: Whole, canary: bool) -> None:
        self._whole = whole
        self._canary = canary

    def describe(self) -> list[Metric]:
        return []  # so that registering reads nothing

    def collect(self) -> Iterator[Metric]:
        whole = self._whole
        state = whole.state()
        yield _gauge("jobs_held", "Jobs held now.", state.active)
        yield _gauge("slots", "Jobs that it can hold.", state.threads)
        yield _gauge("draining", "Whether it takes no more jobs.", state.draining)
        yield _gauge("decode_bound", DECODE_BOUND, state.decode_bound)
        yield _gauge("stalled_seconds", "Since the model last progressed.", whole.engine.stalled_s)
        yield _gauge("engine_serving", SERVING, whole.engine.serving)
        if self._canary and whole.engine.models:  # it has served: they have passed the first check
            yield _gauge("canary_passed", CANARY_PASSED, whole.engine.refusal is None)
        yield _gauge("fronts", "Front processes that run.", whole.live_fronts())
        yield self._decoding()
        yield self._loaded()
        yield from self._usage()

    def _decoding(self) -> Metric:
        decoding = GaugeMetricFamily("blipq_worker_decoding", DECODING, labels=DECODING_LABELS)
        for name, info in self._whole.engine.models.items():
            decoding.add_metric([name, info.decoding, info.device], 1)
        return decoding

    def _loaded(self) -> Metric:
        name = "blipq_worker_model_load_seconds"
        loaded = GaugeMetricFamily(name, LOAD_SECONDS, labels=["model"])
        for model, info in self._whole.engine.models.items():
            loaded.add_metric([model], info.load_seconds)
        return loaded

    def _usage(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily(
            "blipq_worker_process_memory_bytes",
            "Resident memory by process; its own is process_resident_memory_bytes.",
            labels=["process"],
        )
        cpu = CounterMetricFamily(
            "blipq_worker_process_cpu_seconds",
            "CPU time by process, since it started; its own is process_cpu_seconds_total.",
            labels=["process"],
        )
        for name, pid in self._pids():
            with suppress(OSError, IndexError, ValueError):  # it has just ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                cpu.add_metric([name], (int(fields[11]) + int(fields[12])) / _TICKS)
                memory.add_metric([name], int(fields[21]) * _PAGE)
        yield memory
        yield cpu

    def _pids(self) -> Iterator[tuple[str, int]]:
        processes = [("engine", self._whole.engine.pid)]
        processes += [(f"front-{front.number}", front.pid) for front in self._whole.fronts]
        return ((name, pid) for name, pid in processes if pid is not None)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"blipq_worker_{name}", text, value=float(value))
