"""A job's spans. Without a configuration nothing is recorded, and OpenTelemetry is not imported.

The application's own tracer provider is used where it has set one up; otherwise one is made where
``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) is set. A place in a trace is a W3C
``traceparent``, which a job's record keeps: whoever has the job later goes on there.
"""

import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blipq.telemetry.trace import NOTHING, SpanKind, Trace, formatted, is_sampled, parsed

if TYPE_CHECKING:
    from blipq.telemetry.otel import Tracer

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_MISSING = "OTEL_EXPORTER_OTLP_ENDPOINT is set, but %s is not installed: no traces (blipq[otel])"


def begun(
    name: str,
    parent: str = "",
    *,
    kind: SpanKind = "internal",
    attributes: Mapping[str, Any] | None = None,
    links: Sequence[str] = (),
    since_ns: int | None = None,
) -> Trace:
    """Begins a span below a ``traceparent``, or a trace of its own; the caller ends it.

    No span is made below a parent that is not sampled, or where the sampler drops it.
    """
    parent = parsed(parent)
    if parent and not is_sampled(parent):
        return Trace(parent)
    tracer = _tracer()
    if tracer is None:
        return Trace(parent) if parent else NOTHING
    return tracer.begun(name, parent, kind, attributes, links, since_ns)


def continued(
    name: str,
    parent: str,
    *,
    kind: SpanKind = "internal",
    attributes: Mapping[str, Any] | None = None,
    links: Sequence[str] = (),
    since_ns: int | None = None,
) -> Trace:
    """As ``begun``, but nothing without a parent: only who submits a job begins its trace."""
    if not parent:
        return NOTHING
    return begun(name, parent, kind=kind, attributes=attributes, links=links, since_ns=since_ns)


def ambient() -> str:
    """Where the application's current span is; "" where it has none."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    current = api.get_current_span().get_span_context()
    return formatted(current) if current.is_valid else ""


def is_on() -> bool:
    """Whether spans can be recorded in this process."""
    return _tracer() is not None


def start(service: str) -> None:
    """Makes tracing ready in a process of blipq's, so that no job waits for the imports.

    service: the name of the process where neither ``OTEL_SERVICE_NAME`` nor
    ``OTEL_RESOURCE_ATTRIBUTES`` has one.
    """
    _process.service = service
    _process.read()


class _Process:
    """The tracer of this process: read from the environment once, and again after a fork."""

    def __init__(self, service: str = "blipq") -> None:
        self.service = service
        # Two tracers would be two exporting threads. Once read, spans begin without the lock.
        self._lock = threading.Lock()
        self._is_read = False
        self._own: Tracer | None = None
        self._of_application: tuple[Any, Tracer] | None = None

    def read(self) -> "Tracer | None":
        """The tracer that the environment configures."""
        if not self._is_read:
            with self._lock:
                if not self._is_read:
                    self._own = _configured(self.service)
                    self._is_read = True  # last: others return ``_own`` as soon as they see it
        return self._own

    def of_application(self, api: Any) -> "Tracer | None":
        """A tracer of the provider that the application has set; None without one."""
        provider = api.get_tracer_provider()
        if isinstance(provider, api.ProxyTracerProvider):
            return None
        known = self._of_application
        if known is None or known[0] is not provider:
            from blipq.telemetry.otel import Tracer

            known = self._of_application = provider, Tracer(provider)
        return known[1]


_process = _Process()


def reset() -> None:
    """Reads the environment again when a span is begun next. A forked process does so by itself."""
    global _process
    _process = _Process(_process.service)


# What exports spans is a thread, which a fork does not copy.
os.register_at_fork(after_in_child=reset)


def _tracer() -> "Tracer | None":
    api = sys.modules.get("opentelemetry.trace")
    # Another thread may be importing it at this moment.
    if api is not None and hasattr(api, "get_tracer_provider"):
        found = _process.of_application(api)
        if found is not None:
            return found
    return _process.read()


def _configured(service: str) -> "Tracer | None":
    """The tracer of the environment; a fault in it is logged, and turns off the traces alone."""
    if not _is_wanted():
        return None
    try:
        from blipq.telemetry.otel import exporting

        return exporting(service)
    except ImportError as error:
        log.warning(_MISSING, error.name)
    except Exception as error:
        log.warning("no traces: the OTEL_* variables are refused: %s", error)
    return None


def _is_wanted() -> bool:
    get = os.environ.get
    if get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp", "none"):
        log.warning("no traces: OTEL_TRACES_EXPORTER=%s: otlp and none are known", exporter)
        return False
    if exporter == "none":
        return False
    return exporter == "otlp" or any(get(name) for name in _ENDPOINTS)
