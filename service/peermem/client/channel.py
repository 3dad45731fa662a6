"""The gRPC channel of a synchronous program: calls in, answers or `PeermemError` out.

Rules of this file:

* Every call of the synchronous client but the pipeline's is made here, with a deadline.
* `grpc.RpcError` ends here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from peermem.client import calls, errors, requests
from peermem.client.storage import Course, StorageInfo, Watcher
from peermem.v1 import node_pb2, node_pb2_grpc, region_pb2, region_pb2_grpc, transfer_pb2_grpc

Q = TypeVar("Q")
A = TypeVar("A")


class Channel:
    """The stubs of one daemon, and the ways to call them."""

    def __init__(self, target: str, metadata: calls.Metadata, timeout: float) -> None:
        self.target = target
        self._metadata = metadata
        self._timeout = timeout
        self._closed = False
        self._channel = grpc.insecure_channel(target, options=calls.CHANNEL_OPTIONS)
        self.nodes = node_pb2_grpc.NodeServiceStub(self._channel)
        self.regions = region_pb2_grpc.RegionServiceStub(self._channel)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(self._channel)

    def close(self) -> None:
        """End the channel and what runs on it."""
        self._closed = True
        self._channel.close()

    def unary(self, method: grpc.UnaryUnaryMultiCallable[Q, A], request: Q) -> A:
        """Call `method` and return its answer."""
        with self._faults():
            return method(request, timeout=self._timeout, metadata=self._metadata)

    def preflight(self, request: node_pb2.PreflightRequest) -> Iterator[node_pb2.PreflightVerdict]:
        """Stream preflight's verdicts; it lasts as long as it lasts, or until the caller has enough."""
        with self._faults():
            call = self.nodes.Preflight(request, metadata=self._metadata)
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
        with self._faults():
            call = method(request, metadata=self._metadata)
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
            chunks = self.regions.ReadRegion(request, timeout=timeout, metadata=self._metadata)
            return b"".join(chunk.data for chunk in chunks)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes into a region."""
        timeout = self._timeout + len(data) / calls.SLOWEST
        with self._faults():
            chunks = requests.write_region(name, offset, data)
            self.regions.WriteRegion(chunks, timeout=timeout, metadata=self._metadata)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        if self._closed:
            raise errors.closed(self.target)
        try:
            yield
        except grpc.RpcError as error:
            raise errors.from_call(error, self.target) from None  # type: ignore[arg-type]
