"""What one worker process does, for Prometheus; what the ledger holds: ``blipq.ops.metrics``."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.exposition import choose_encoder

from blipq.contract import Kind, Receipt
from blipq.exporter import SECONDS, new_registry
from blipq.telemetry.trace import exemplar
from blipq_worker.process.nvml import GpuCollector

#: Stages of a job, and the fields of its receipt that say their milliseconds.
STAGES = {
    name.removesuffix("_ms"): name
    for name in Receipt.model_fields
    if name.endswith("_ms") and name not in ("gpu_ms", "first_token_ms")  # of several stages
}

DECODE_BOUND = "Whether the model waits for images to be decoded."
DECODING = "How texts are written, by model: always 1."
DECODING_LABELS = ("model", "way", "device")
SERVING = "Whether the model can serve."
CANARY_PASSED = (
    "Whether all models have passed their last check; missing where BLIPQ_CANARY is off."
)
LOAD_SECONDS = "What loading each model took, from its checkpoint to the device."

Outcome = Literal[
    "succeeded",
    "failed",
    "retried",  # it will be tried again later
    "handed_back",  # this worker stops
    "lost",  # cancelled, expired or taken over
]


#: Room of a process for its counters, and for its histograms: many times what they take.
_ROOM = 1024 * 1024


def count_in(folder: Path, process: str) -> None:
    """From now on this process counts in files of the folder, for ``counted_in`` to add up.

    Before the first metric is made. process: a name without _, whose next process goes on counting
    where this one stops. Gauges that are read at a scrape have no place there. Raises OSError.
    """
    for kind in ("counter", "histogram"):
        # prometheus_client maps them: where the disk is full by then, a new page would be SIGBUS.
        with (folder / f"{kind}_{process}.db").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]


def counted_in(folder: Path) -> bytes:
    """What all processes have counted in the folder, as the text that Prometheus reads."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


class WorkerMetrics:
    """Counts jobs by their outcome here, and what their receipts say."""

    def __init__(self) -> None:
        self._registry = new_registry()
        self._jobs = Counter(
            "blipq_worker_jobs",
            "Jobs by what came of them here; code says why they failed or are retried.",
            ["model", "kind", "outcome", "code"],
            registry=self._registry,
        )
        self._refused = Counter(
            "blipq_worker_messages_refused",
            "Malformed messages: recorded as a failed job, or dropped.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("recorded", "dropped"):  # so that the first of them is an increase
            self._refused.labels(outcome)
        self._stages = Histogram(
            "blipq_worker_stage_seconds",
            "Time of a job in each stage, as its receipt says.",
            ["kind", "stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._seconds = Histogram(
            "blipq_worker_job_seconds",
            "From a job's submission to its end here, retries included.",
            ["model", "kind"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "blipq_worker_first_token_seconds",
            "From a job's submission to the first token of its first text.",
            ["model", "kind"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._gpu = Counter(
            "blipq_worker_gpu_seconds",
            "GPU time of jobs: their shares of the passes that they ran in.",
            ["model", "kind"],
            registry=self._registry,
        )
        self._batch = Histogram(
            "blipq_worker_batch_size",
            "Jobs in the pass that a job ran in.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self._registry,
        )
        self._tokens = Histogram(
            "blipq_worker_job_tokens",
            "Tokens generated for a job.",
            ["model", "kind"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
            registry=self._registry,
        )
        self._cache = Counter(
            "blipq_worker_feature_cache",
            "Jobs whose image's features were kept (hit) or not (miss).",
            ["model", "found"],
            registry=self._registry,
        )

    def refused(self, outcome: Literal["recorded", "dropped"]) -> None:
        """Counts a message that no Celery client should have sent."""
        self._refused.labels(outcome).inc()

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A number that is read at each scrape."""
        Gauge(f"blipq_worker_{name}", text, registry=self._registry).set_function(value)

    def decoding(self, ways: Mapping[str, tuple[str, str]]) -> None:
        """Says how each model's texts are written: way and device."""
        gauge = Gauge("blipq_worker_decoding", DECODING, DECODING_LABELS, registry=self._registry)
        for model, way in ways.items():
            gauge.labels(model, *way).set(1)

    def gpus(self, uuids: Iterable[str]) -> None:
        """Has metrics of the GPUs of models, by their UUIDs."""
        found = frozenset(uuids)
        self._registry.register(GpuCollector(lambda: found))

    def loaded(self, seconds: Mapping[str, float]) -> None:
        """Says how long each model took to load."""
        name = "blipq_worker_model_load_seconds"
        gauge = Gauge(name, LOAD_SECONDS, ["model"], registry=self._registry)
        for model, took in seconds.items():
            gauge.labels(model).set(took)

    def done(
        self,
        kind: Kind,
        outcome: Outcome,
        took: Mapping[str, Any],
        code: str = "",
        *,
        model: str,
        run_ms: float | None = None,
        trace: str = "",
    ) -> None:
        """Counts a job that this worker is done with.

        took: what its receipt has so far. run_ms: since its claim, where it has run. trace: the
        span of its run, or "": the times of a job that is sampled lead to its trace.
        """
        leads_to = exemplar(trace)
        self._jobs.labels(model, kind, outcome, code).inc()
        for stage, name in STAGES.items():
            if name in took:
                self._stages.labels(kind, stage).observe(took[name] / 1000, leads_to)
        if "batch_size" in took:
            self._batch.labels(model).observe(took["batch_size"])
        if "cache_hit" in took:
            self._cache.labels(model, "hit" if took["cache_hit"] else "miss").inc()
        if "tokens" in took:
            self._tokens.labels(model, kind).observe(took["tokens"])
        if "first_token_ms" in took:
            seconds = took["first_token_ms"] / 1000
            self._first_token.labels(model, kind).observe(seconds, leads_to)
        if "gpu_ms" in took:
            self._gpu.labels(model, kind).inc(took["gpu_ms"] / 1000)
        if run_ms is not None and outcome in ("succeeded", "failed"):
            seconds = (took.get("queue_ms", 0.0) + run_ms) / 1000
            self._seconds.labels(model, kind).observe(seconds, leads_to)

    def page(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)

    def answer(self, accept: str) -> tuple[str, bytes]:
        """Content type and text of what Prometheus reads; exemplars have a place in OpenMetrics
        alone, which it asks for by ``accept``.
        """
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)
