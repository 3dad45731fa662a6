"""Sends a daemon's spans to a collector, over OTLP.

Rules of this file:

* OpenTelemetry is imported when the configuration names a collector, and only then.
* A collector that is slow or gone costs spans, not transfers: the queue is bounded, and what does not fit is dropped.
* Whether a trace is kept is decided where it begins; what a caller decided holds here too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from peermem.core.spans import keep_with
from peermem.core.version import VERSION

_PATIENCE = 2.0
"""Seconds that the end of a daemon waits for the last spans to be taken."""


def start_tracing(endpoint: str, share: float, node: str, epoch: str) -> Callable[[], None]:
    """Keep the spans of this process, and send them to the gRPC server of a collector at a URL; return what ends that,
    which blocks for a moment. `share` of the traces that begin here are kept.

    Raises OSError where the packages are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        from peermem.otel import OtelKeeper
    except ImportError as error:
        raise OSError(
            f"tracing.endpoint is set, and the Python package {error.name or 'opentelemetry'} is missing, which comes "
            "with peermem[tracing]. Install it, or leave the endpoint empty."
        ) from None
    resource = Resource.create(
        {"service.name": "peermemd", "service.version": VERSION, "service.instance.id": epoch, "peermem.node": node}
    )
    provider = TracerProvider(ParentBased(TraceIdRatioBased(share)), resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    keep_with(OtelKeeper(provider))

    def end() -> None:
        keep_with(None)
        closing = threading.Thread(target=provider.shutdown, name="tracing-end", daemon=True)  # which has no limit
        closing.start()
        closing.join(_PATIENCE)
        exporter.shutdown()
        closing.join(_PATIENCE)

    return end
