"""What surrounds every call: a server with handlers that raise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable

import grpc
import pytest

from peermem.api.calls import CallInterceptor, Context
from peermem.api.identity import Identity, Trust
from peermem.broker.sessions import SessionTable
from peermem.client.errors import from_call
from peermem.core import errors
from peermem.core.errors import PeermemError
from peermem.telemetry.metrics import GrpcMethod, Metrics
from peermem.v1 import node_pb2, node_pb2_grpc


class Nodes(node_pb2_grpc.NodeServiceServicer):
    """Raises what it is told to."""

    fault: Exception

    async def GetNode(self, request: node_pb2.GetNodeRequest, context: Context) -> node_pb2.Node:
        raise self.fault

    async def Preflight(
        self, request: node_pb2.PreflightRequest, context: Context
    ) -> AsyncIterator[node_pb2.PreflightVerdict]:
        yield node_pb2.PreflightVerdict(device="bar0")
        raise self.fault


class Server:
    def __init__(self) -> None:
        self.nodes = Nodes()  # type: ignore[abstract]
        self.metrics = Metrics("0")
        self.metrics.serve_grpc(
            [
                GrpcMethod("peermem.v1.NodeService", "GetNode", "unary"),
                GrpcMethod("peermem.v1.NodeService", "Preflight", "server_stream"),
            ]
        )
        admit = Identity(SessionTable(1), Trust()).admit
        self.server = grpc.aio.server(interceptors=[CallInterceptor(self.metrics, admit)])
        node_pb2_grpc.add_NodeServiceServicer_to_server(self.nodes, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.server.start()
    yield server
    await server.server.stop(None)


async def called(server: Server, fault: Exception, *, stream: bool) -> PeermemError:
    server.nodes.fault = fault
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        answer: Awaitable[object]
        if not stream:
            answer = stub.GetNode(node_pb2.GetNodeRequest())
        else:
            verdicts = stub.Preflight(node_pb2.PreflightRequest())
            assert await verdicts.read() == node_pb2.PreflightVerdict(device="bar0")
            answer = verdicts.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
    assert caught.value.code().value[0] == from_call(caught.value, "it").code
    return from_call(caught.value, "it")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", list(PeermemError.by_reason.values()))
async def test_every_fault_keeps_its_reason_message_and_metadata(
    server: Server, kind: type[PeermemError], stream: bool
) -> None:
    seen = await called(server, kind("What and why. How to mend it.", region="nodes/a/regions/x"), stream=stream)
    assert type(seen) is kind
    assert (seen.message, seen.metadata) == ("What and why. How to mend it.", {"region": "nodes/a/regions/x"})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_defect_shows_its_id_and_nothing_of_the_inside(
    server: Server, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    seen = await called(server, KeyError("the inside"), stream=stream)
    assert type(seen) is errors.Internal
    assert "inside" not in seen.message
    logged = "".join(capsys.readouterr())
    assert seen.metadata["error_id"] in logged
    assert "the inside" in logged
