"""A collector of traces: a real gRPC server that takes OTLP, and what came to it as a tree."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

PATIENCE = 30.0


@dataclass(frozen=True)
class Seen:
    """A span, and where it was made."""

    name: str
    node: str
    """Empty for a job's."""
    id: str
    parent: str
    trace: str
    failed: bool
    attributes: dict[str, Any]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that daemons send."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.bytes = b""
        """All that came, as it came."""
        self._news = threading.Condition()

    def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: object) -> object:
        """See TraceService."""
        with self._news:
            self.bytes += request.SerializeToString()
            for resource in request.resource_spans:
                node = _values(resource.resource.attributes).get("peermem.node", "")
                self.spans += [_seen(span, node) for scope in resource.scope_spans for span in scope.spans]
            self._news.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def until(self, condition: Callable[[list[Seen]], bool]) -> list[Seen]:
        """Wait until a condition holds of the spans that came, and return them."""
        end = time.monotonic() + PATIENCE
        with self._news:
            while not condition(self.spans):
                assert self._news.wait(end - time.monotonic()), f"it did not come: {tree(self.spans)}"
            return list(self.spans)


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Run a collector; yields it and its URL."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def tree(spans: list[Seen]) -> list[str]:
    """Return a line for each span, `node:name` behind those above it, sorted and without repetitions."""
    by_id = {span.id: span for span in spans}

    def line(span: Seen) -> str:
        above = by_id.get(span.parent)
        own = f"{span.node or 'job'}:{span.name}"
        return f"{line(above)} > {own}" if above else own

    return sorted({line(span) for span in spans})


def _seen(span: trace_pb2.Span, node: str) -> Seen:
    return Seen(
        span.name,
        node,
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_id.hex(),
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        _values(span.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
