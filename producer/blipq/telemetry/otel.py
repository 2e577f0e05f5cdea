"""Spans by OpenTelemetry. The one module that imports it, and is imported only where it is on."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from blipq.redaction import redacted
from blipq.telemetry import names
from blipq.telemetry.trace import SpanKind, Trace, formatted

#: Characters of an error in a span.
_LONGEST_ERROR = 500
_KINDS: Mapping[SpanKind, api.SpanKind] = {
    "internal": api.SpanKind.INTERNAL,
    "producer": api.SpanKind.PRODUCER,
    "consumer": api.SpanKind.CONSUMER,
    "client": api.SpanKind.CLIENT,
}


class Span(Trace):
    """A span that is recorded."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: api.Tracer, span: api.Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def context(self) -> str:
        """See ``Trace.context``."""
        return formatted(self._span.get_span_context())

    def child(
        self,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        since_ns: int | None = None,
    ) -> Trace:
        """See ``Trace.child``."""
        below = api.set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, below, attributes=attributes, start_time=since_ns)
        return Span(self._tracer, span)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """See ``Trace.set_attributes``."""
        self._span.set_attributes(attributes)

    def link(self, context: str) -> None:
        """See ``Trace.link``."""
        self._span.add_link(_of(context))

    def end(self, error: BaseException | None = None) -> None:
        """See ``Trace.end``."""
        if error is not None:
            self._span.set_attribute(names.ERROR_TYPE, type(error).__name__)
            message = redacted(str(error))[:_LONGEST_ERROR]
            self._span.set_status(api.Status(api.StatusCode.ERROR, message))
        self._span.end()


class Tracer:
    """Makes spans by a provider: the application's, or our own."""

    def __init__(self, provider: api.TracerProvider) -> None:
        self._tracer = provider.get_tracer(names.SCOPE, schema_url=names.SCHEMA_URL)

    def begun(
        self,
        name: str,
        parent: str,
        kind: SpanKind,
        attributes: Mapping[str, Any] | None,
        links: Sequence[str],
        since_ns: int | None,
    ) -> Trace:
        """See ``tracing.begun``."""
        below = Context()
        if parent:
            below = api.set_span_in_context(api.NonRecordingSpan(_of(parent)), below)
        span = self._tracer.start_span(
            name,
            below,
            kind=_KINDS[kind],
            attributes=attributes,
            links=[api.Link(_of(each)) for each in links],
            start_time=since_ns,
        )
        return Span(self._tracer, span) if span.is_recording() else Trace(parent)


def exporting(service: str) -> Tracer:
    """A tracer by the ``OTEL_*`` variables.

    Spans wait in a bounded queue for a thread to send them: a collector that does not answer costs
    spans, and no job.
    """
    named = {} if _has_name() else {SERVICE_NAME: service}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


def _has_name() -> bool:
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")
    keys = {pair.partition("=")[0].strip() for pair in given}
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or SERVICE_NAME in keys


def _of(context: str) -> api.SpanContext:
    """A ``traceparent`` as OpenTelemetry's context, from elsewhere."""
    _, trace_id, span_id, flags = context.split("-")
    return api.SpanContext(
        int(trace_id, 16), int(span_id, 16), True, api.TraceFlags(int(flags, 16))
    )
