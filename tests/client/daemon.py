"""A daemon that misbehaves as a test wants: a real gRPC server whose pipelines follow scripts.

What a well-behaved daemon does is tested end to end; this one breaks calls at chosen points.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from peermem.v1 import node_pb2, node_pb2_grpc, region_pb2, region_pb2_grpc, transfer_pb2, transfer_pb2_grpc

Requests = Iterator[transfer_pb2.PipelineTransfersRequest]
Responses = Iterator[transfer_pb2.PipelineTransfersResponse]
Script = Callable[[Requests, grpc.ServicerContext], Responses]


class ScriptedDaemon:
    """Serves on a unix socket; each pipeline follows the next script, the last one over and over."""

    def __init__(self, folder: Path, *scripts: Script) -> None:
        self.target = f"unix://{folder}/peermem.sock"
        self.renewed: list[list[str]] = []
        self.lost: set[str] = set()
        self.renewal = threading.Semaphore(0)
        self.metadata: list[dict[str, Any]] = []
        self.flaky = 0
        self._scripts = list(scripts)
        self._server = grpc.server(ThreadPoolExecutor(16))
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(_Transfers(self), self._server)  # type: ignore[abstract]
        node_pb2_grpc.add_NodeServiceServicer_to_server(_Nodes(self), self._server)  # type: ignore[abstract]
        region_pb2_grpc.add_RegionServiceServicer_to_server(_Regions(self), self._server)  # type: ignore[abstract]
        self._server.add_insecure_port(self.target)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End at once, breaking all calls."""
        self._server.stop(None).wait()

    def next_script(self) -> Script:
        return self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]


class _Nodes(node_pb2_grpc.NodeServiceServicer):
    def __init__(self, daemon: ScriptedDaemon) -> None:
        self._daemon = daemon

    def GetNode(self, request: node_pb2.GetNodeRequest, context: grpc.ServicerContext) -> node_pb2.Node:
        self._daemon.metadata.append(dict(context.invocation_metadata()))
        if self._daemon.flaky:
            self._daemon.flaky -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "try again")
        return node_pb2.Node(name="nodes/a")


class _Regions(region_pb2_grpc.RegionServiceServicer):
    def __init__(self, daemon: ScriptedDaemon) -> None:
        self._daemon = daemon

    def CreateRegion(self, request: region_pb2.CreateRegionRequest, context: grpc.ServicerContext) -> region_pb2.Region:
        name = f"nodes/a/regions/{request.region_id}"
        return region_pb2.Region(name=name, length=request.length, lease=request.lease)

    def RenewLease(
        self, request: region_pb2.RenewLeaseRequest, context: grpc.ServicerContext
    ) -> region_pb2.RenewLeaseResponse:
        self._daemon.renewed.append(list(request.names))
        self._daemon.renewal.release()
        if self._daemon.lost.intersection(request.names):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "not yours")
        return region_pb2.RenewLeaseResponse()


class _Transfers(transfer_pb2_grpc.TransferServiceServicer):
    def __init__(self, daemon: ScriptedDaemon) -> None:
        self._daemon = daemon

    def PipelineTransfers(self, requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield from self._daemon.next_script()(requests, context)


def event(tag: int, state: int, done: int = 0, **fields: Any) -> transfer_pb2.PipelineTransfersResponse:
    """Return the report of a transfer of 100 bytes."""
    transfer = transfer_pb2.Transfer(
        name=f"nodes/a/transfers/t{tag}",
        state=transfer_pb2.TransferState.ValueType(state),
        bytes_total=100,
        bytes_done=done,
        **fields,
    )
    return transfer_pb2.PipelineTransfersResponse(tag=tag, transfer=transfer)


def succeed(requests: Requests, context: grpc.ServicerContext) -> Responses:
    """End each transfer as soon as it is asked for."""
    for request in requests:
        yield event(request.tag, transfer_pb2.TRANSFER_STATE_SUCCEEDED, 100)
