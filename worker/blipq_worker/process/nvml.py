"""Memory and use of the GPUs that models are on, as the driver counts them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Asks NVML at each scrape; no sample where there is no GPU, or the driver does not say.

    gpus: UUIDs of the GPUs, as NVML knows them; "" for a model that is on none.
    """

    def __init__(self, gpus: Callable[[], Iterable[str]]) -> None:
        self._gpus = gpus

    def describe(self) -> list[Metric]:
        return []  # so that registering asks for nothing

    def collect(self) -> Iterator[Metric]:
        used, total, busy = (
            GaugeMetricFamily(f"blipq_worker_gpu_{name}", text, labels=["gpu"])
            for name, text in (
                ("memory_used_bytes", "GPU memory in use, by all processes on it."),
                ("memory_bytes", "GPU memory."),
                ("utilization_ratio", "Share of the last moments in which the GPU ran kernels."),
            )
        )
        nvml = _nvml()
        for gpu in sorted({each for each in self._gpus() if each}) if nvml else ():
            with suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByUUID(gpu)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                used.add_metric([gpu], memory.used)
                total.add_metric([gpu], memory.total)
                busy.add_metric([gpu], nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        yield from (used, total, busy)


@functools.cache
def _nvml() -> Any:
    """NVML, initialized; None without its package or its library."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
