"""A place in a trace: W3C's ``traceparent``, and the span that is recorded there, if one is."""

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self

SpanKind = Literal["internal", "producer", "consumer", "client"]

#: Of a later version the first four parts are read, as of this one.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)


class Trace:
    """A place in a trace at which nothing is recorded: tracing is off, or the job is not sampled.

    ``otel.Span`` is one that records.
    """

    __slots__ = ("_context",)

    def __init__(self, context: str = "") -> None:
        self._context = context

    @property
    def context(self) -> str:
        """The place as a ``traceparent``; "" where there is no trace."""
        return self._context

    def child(
        self,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        since_ns: int | None = None,
    ) -> "Trace":
        """Begins a span below this one; ``since_ns`` (of the epoch) where it began earlier."""
        return self

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Adds attributes."""

    def link(self, context: str) -> None:
        """Names another span that this one has to do with."""

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span, as one that failed where there is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(error)


NOTHING = Trace()


def parsed(header: str | None) -> str:
    """A ``traceparent`` of version 00 from what strangers sent; "" for what is none."""
    match = _TRACEPARENT.fullmatch(header) if header else None
    return "" if match is None else f"00-{match[1]}-{match[2]}-{match[3]}"


def is_sampled(context: str) -> bool:
    """Whether spans are recorded below a ``traceparent``."""
    return int(context[-2:], 16) & 1 == 1


def trace_id(context: str) -> str:
    """The trace's id."""
    return context[3:35]


def exemplar(context: str) -> dict[str, str] | None:
    """What leads from a sample of a metric to a trace that is recorded; None without one."""
    return {"trace_id": trace_id(context)} if context and is_sampled(context) else None


def formatted(context: Any) -> str:
    """OpenTelemetry's context of a span as a ``traceparent``."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
