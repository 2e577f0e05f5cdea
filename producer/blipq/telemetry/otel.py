"""Spans by OpenTelemetry. The one module that imports it, and is imported only where it is on."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, ParentBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

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


#: Flags of a trace that begins here: sampled, and its id is random.
_BEGINS = api.TraceFlags(3)
_UNSET = api.Status()


class Span(Trace):
    """A span that an application's provider records."""

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
            self._span.set_status(_status(error))
        self._span.end()


class Tracer:
    """Makes spans by a provider."""

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


class Recorded(Trace):
    """A span of our own exporter: plain values until it ends, and then what is exported.

    The SDK's span has a lock for each of its parts, and is copied when it ends: several times the
    cost. One thread at a time uses a span of a job.
    """

    __slots__ = (
        "_attributes",
        "_kind",
        "_links",
        "_name",
        "_parent",
        "_place",
        "_recorder",
        "_since",
    )

    def __init__(
        self,
        recorder: "Recorder",
        name: str,
        parent: api.SpanContext | None,
        place: api.SpanContext,
        attributes: Mapping[str, Any] | None,
        since_ns: int | None,
        kind: api.SpanKind = api.SpanKind.INTERNAL,
        links: Sequence[str] = (),
    ) -> None:
        self._recorder, self._name = recorder, name
        self._parent, self._place = parent, place
        self._kind, self._links = kind, list(links)
        self._attributes: dict[str, Any] | None = dict(attributes or ())  # None once it has ended
        self._since = time.time_ns() if since_ns is None else since_ns

    @property
    def context(self) -> str:
        """See ``Trace.context``."""
        return formatted(self._place)

    def child(
        self,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        since_ns: int | None = None,
    ) -> Trace:
        """See ``Trace.child``."""
        place = self._recorder.place(self._place)
        return Recorded(self._recorder, name, self._place, place, attributes, since_ns)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """See ``Trace.set_attributes``."""
        if self._attributes is not None:
            self._attributes.update(attributes)

    def link(self, context: str) -> None:
        """See ``Trace.link``."""
        self._links.append(context)

    def end(self, error: BaseException | None = None) -> None:
        """See ``Trace.end``."""
        attributes, self._attributes = self._attributes, None
        if attributes is None:
            return
        status = _UNSET
        if error is not None:
            attributes[names.ERROR_TYPE] = type(error).__name__
            status = _status(error)
        self._recorder.processor.on_end(
            ReadableSpan(
                self._name,
                self._place,
                self._parent,
                self._recorder.resource,
                attributes,
                links=[api.Link(_of(each)) for each in self._links] if self._links else (),
                kind=self._kind,
                status=status,
                start_time=self._since,
                end_time=time.time_ns(),
                instrumentation_scope=self._recorder.scope,
            )
        )


class Recorder(Tracer):
    """Makes spans for a processor of our own provider, but not within its limits."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        super().__init__(provider)
        self.processor = processor
        self.resource = _Hashed(provider.resource.attributes, provider.resource.schema_url)
        self.scope = InstrumentationScope(names.SCOPE, None, names.SCHEMA_URL)
        self._sampler = provider.sampler
        #: A parent that is sampled is enough: below others nobody begins a span.
        self._follows = isinstance(provider.sampler, ParentBased)
        self._ids = provider.id_generator

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
        above = _of(parent) if parent else None
        place = self.place(above)
        if above is None or not self._follows:
            sampled = self._sampler.should_sample(
                Context(), place.trace_id, name, _KINDS[kind], attributes
            )
            if sampled.decision is not Decision.RECORD_AND_SAMPLE:
                return Trace(parent)
        return Recorded(self, name, above, place, attributes, since_ns, _KINDS[kind], links)

    def place(self, above: api.SpanContext | None) -> api.SpanContext:
        """A new span's, below another, or in a trace of its own."""
        if above is None:
            trace_id, flags = self._ids.generate_trace_id(), _BEGINS
        else:
            trace_id, flags = above.trace_id, above.trace_flags
        return api.SpanContext(trace_id, self._ids.generate_span_id(), False, flags)


class _Hashed(Resource):
    """A resource whose hash is known: the exporter asks for it with each span."""

    def __init__(self, attributes: Mapping[str, Any], schema_url: str) -> None:
        super().__init__(attributes, schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def exporting(service: str) -> Tracer:
    """A tracer by the ``OTEL_*`` variables.

    Spans wait in a bounded queue for a thread to send them: a collector that does not answer costs
    spans, and no job.
    """
    named = {} if _has_name() else {SERVICE_NAME: service}
    provider = TracerProvider(resource=Resource.create(named))
    processor = BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(processor)
    # Limits of attributes and links are kept by the SDK's spans.
    if any(name.startswith("OTEL_") and name.endswith("_LIMIT") for name in os.environ):
        return Tracer(provider)
    return Recorder(provider, processor)


def _has_name() -> bool:
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")
    keys = {pair.partition("=")[0].strip() for pair in given}
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or SERVICE_NAME in keys


def _status(error: BaseException) -> api.Status:
    text = redacted(str(error))[:_LONGEST_ERROR]
    # protobuf refuses a lone surrogate, and with it all spans of a batch.
    text = text.encode("utf-8", "backslashreplace").decode()
    return api.Status(api.StatusCode.ERROR, text)


def _of(context: str) -> api.SpanContext:
    """A ``traceparent`` as OpenTelemetry's context, from elsewhere."""
    _, trace_id, span_id, flags = context.split("-")
    return api.SpanContext(
        int(trace_id, 16), int(span_id, 16), True, api.TraceFlags(int(flags, 16) & _BEGINS)
    )
