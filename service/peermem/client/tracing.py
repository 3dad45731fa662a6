"""Spans of a job that is traced itself.

Rules of this file:

* A job that has loaded OpenTelemetry has spans of what it asks for, as children of what it is at, in its own provider;
  for any other nothing is loaded and nothing is kept.
"""

from __future__ import annotations

import sys

from peermem.client.tls import Metadata
from peermem.core.spans import HEADER, UNKEPT, Span, Value

_API = "opentelemetry.trace"


def begin(name: str, **attributes: Value) -> Span:
    """Begin work of the job's own."""
    if _API not in sys.modules:
        return UNKEPT
    from opentelemetry.trace import SpanKind

    from peermem.otel import OtelKeeper

    return OtelKeeper(kind=SpanKind.CLIENT).begin(name, "", dict(attributes))


def metadata(span: Span) -> Metadata:
    """Return what a call's metadata carry of a span."""
    return ((HEADER, span.traceparent),) if span.traceparent else ()
