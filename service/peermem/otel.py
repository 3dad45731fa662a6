"""Spans kept by OpenTelemetry: in a daemon that its configuration tells to, and in a job that has loaded it.

Rules of this file:

* It is imported where traces are kept, and only there; it needs the API alone.
* What is not sampled costs one span: its parts are not begun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from peermem.core.errors import PeermemError
from peermem.core.spans import Keeper, Span, Unkept, Value
from peermem.core.version import VERSION

_PREFIX = "peermem."


class OtelKeeper:
    """Keeps spans with a tracer."""

    def __init__(self, provider: trace.TracerProvider | None = None, kind: SpanKind = SpanKind.SERVER) -> None:
        """`provider` None: the process's own. `kind` is that of what begins here."""
        self._tracer = trace.get_tracer("peermem", VERSION, provider)
        self._kind = kind

    def begin(self, name: str, parent: str, attributes: dict[str, Value]) -> Span:
        """See Keeper; without a parent it is a child of what the process is at, if it is at something."""
        context = _context(parent) if parent else contexts.get_current()
        return _begun(self._tracer, name, context, self._kind, attributes)


class _Kept:
    """A span of OpenTelemetry's."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        """See Span."""
        return _traceparent(self._span.get_span_context())

    @property
    def trace_id(self) -> str:
        """See Span."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def child(self, name: str, **attributes: Value) -> Span:
        """See Span."""
        context = trace.set_span_in_context(self._span, Context())
        return _begun(self._tracer, name, context, SpanKind.INTERNAL, attributes)

    def note(self, **attributes: Value) -> None:
        """See Span."""
        self._span.set_attributes(_named(attributes))

    def end(self, error: BaseException | None = None) -> None:
        """See Span."""
        if not self._span.is_recording():
            return
        if error is not None:
            kind, told = type(error).__name__, ""
            if isinstance(error, PeermemError):  # what others say may hold anything
                kind, told = error.reason, error.message
            self._span.set_attribute("error.type", kind)
            self._span.set_status(Status(StatusCode.ERROR, told))
        self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, stack: object) -> None:
        self.end(error)


def _begun(tracer: trace.Tracer, name: str, context: Context, kind: SpanKind, attributes: dict[str, Value]) -> Span:
    span = tracer.start_span(name, context, kind, _named(attributes))
    if span.is_recording():
        return _Kept(tracer, span)
    known = span.get_span_context()
    return Unkept(_traceparent(known) if known.is_valid else "")


def _context(parent: str) -> Context:
    _, trace_id, span_id, flags = parent.split("-")
    known = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return trace.set_span_in_context(trace.NonRecordingSpan(known), Context())


def _traceparent(known: SpanContext) -> str:
    return f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags & TraceFlags.SAMPLED:02x}"


def _named(attributes: dict[str, Value]) -> dict[str, Value]:
    return {f"{_PREFIX}{name}": value for name, value in attributes.items()}


if TYPE_CHECKING:
    _span: type[Span] = _Kept
    _keeper: type[Keeper] = OtelKeeper
