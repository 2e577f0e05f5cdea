"""What a sender of webhooks does, for Prometheus."""

import time

from prometheus_client import (
    Counter,
    Gauge,
    Histogram,
)

from blipq.exporter import SECONDS, new_registry
from blipq.telemetry.trace import exemplar


class SenderMetrics:
    def __init__(self) -> None:
        self.registry = new_registry()
        self._attempts = Counter(
            "blipq_sender_attempts",
            "Attempts at webhooks, by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "blipq_sender_attempt_seconds",
            "From the start of an attempt to its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.sending = Gauge(
            "blipq_sender_sending", "Webhooks being sent now.", registry=self.registry
        )

    def attempted(self, outcome: str, started: float, trace: str) -> None:
        """Counts an attempt. ``started`` is of the monotonic clock; trace: of its job, or ""."""
        self._attempts.labels(outcome).inc()
        self._seconds.observe(time.monotonic() - started, exemplar(trace))
