"""The gRPC channel of a synchronous program: calls in, answers or `PeermemError` out.

Rules of this file:

* Certificates that are renewed make a new channel for what is called from then on.
* Every call of the synchronous client but the pipeline's is made here, with a deadline.
* `grpc.RpcError` ends here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from peermem.client import calls, errors, requests, tracing
from peermem.client.storage import Course, StorageInfo, Watcher
from peermem.client.tls import Access
from peermem.v1 import node_pb2, node_pb2_grpc, region_pb2, region_pb2_grpc, transfer_pb2_grpc

Q = TypeVar("Q")
A = TypeVar("A")

_KEPT = 2
"""Channels at the same time: calls on the one before the newest go on under the certificates they began with."""


class _Stubs:
    """A channel, and what can be called on it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.nodes = node_pb2_grpc.NodeServiceStub(channel)
        self.regions = region_pb2_grpc.RegionServiceStub(channel)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(channel)


class Channel:
    """The stubs of one daemon, and the ways to call them."""

    def __init__(self, target: str, access: Access, timeout: float) -> None:
        self.target = target
        self._access = access
        self._timeout = timeout
        self._closed = False
        self._lock = threading.Lock()
        self._open: list[_Stubs] = [self._stubs()]
        """The newest last; the one before it may have calls that run."""

    @property
    def nodes(self) -> node_pb2_grpc.NodeServiceStub:
        """Calls of NodeService."""
        return self._now().nodes

    @property
    def regions(self) -> region_pb2_grpc.RegionServiceStub:
        """Calls of RegionService."""
        return self._now().regions

    @property
    def transfers(self) -> transfer_pb2_grpc.TransferServiceStub:
        """Calls of TransferService."""
        return self._now().transfers

    def _now(self) -> _Stubs:
        with self._lock:
            if not self._closed and self._access.renewed():
                self._open.append(self._stubs())
                while len(self._open) > _KEPT:
                    self._open.pop(0).channel.close()
            return self._open[-1]

    def _stubs(self) -> _Stubs:
        shown, options = self._access.credentials(), [*calls.CHANNEL_OPTIONS, *self._access.options]
        if shown is None:
            return _Stubs(grpc.insecure_channel(self.target, options=options))
        return _Stubs(grpc.secure_channel(self.target, shown, options=options))

    def close(self) -> None:
        """End the channel and what runs on it."""
        with self._lock:
            self._closed = True
        for stubs in self._open:
            stubs.channel.close()

    def unary(self, method: grpc.UnaryUnaryMultiCallable[Q, A], request: Q) -> A:
        """Call `method` and return its answer."""
        with self._faults():
            return method(request, timeout=self._timeout, metadata=self._access.metadata())

    def preflight(self, request: node_pb2.PreflightRequest) -> Iterator[node_pb2.PreflightVerdict]:
        """Stream preflight's verdicts; it lasts as long as it lasts, or until the caller has enough."""
        with self._faults():
            call = self.nodes.Preflight(request, metadata=self._access.metadata())
            try:
                yield from call
            finally:
                call.cancel()

    def storage(
        self,
        method: grpc.UnaryStreamMultiCallable[Q, region_pb2.StorageProgress],
        request: Q,
        watcher: Watcher | None,
    ) -> StorageInfo:
        """Carry a load or store to its outcome; it lasts as long as it lasts, and ends where this is broken off."""
        course = Course(watcher)
        with tracing.begin("peermem.storage") as span, self._faults():
            call = method(request, metadata=(*self._access.metadata(), *tracing.metadata(span)))
            try:
                for message in call:
                    course.take(message)
            finally:
                call.cancel()
        return course.outcome()

    def read(self, request: region_pb2.ReadRegionRequest) -> bytes:
        """Return bytes of a region."""
        timeout = self._timeout + request.length / calls.SLOWEST
        with self._faults():
            chunks = self.regions.ReadRegion(request, timeout=timeout, metadata=self._access.metadata())
            return b"".join(chunk.data for chunk in chunks)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes into a region."""
        timeout = self._timeout + len(data) / calls.SLOWEST
        with self._faults():
            chunks = requests.write_region(name, offset, data)
            self.regions.WriteRegion(chunks, timeout=timeout, metadata=self._access.metadata())

    @contextmanager
    def _faults(self) -> Iterator[None]:
        if self._closed:
            raise errors.closed(self.target)
        try:
            yield
        except grpc.RpcError as error:
            raise errors.from_call(error, self.target) from None  # type: ignore[arg-type]
