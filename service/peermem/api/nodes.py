"""NodeService: what this node is and has, what works on it, and which others there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from peermem.api.calls import Context
from peermem.api.regions import page_size
from peermem.broker.broker import Broker
from peermem.broker.facts import known_nodes
from peermem.broker.preflight import Preflight
from peermem.core.names import parse_node
from peermem.core.topology import Topology
from peermem.offload import in_thread
from peermem.v1 import node_pb2, node_pb2_grpc
from peermem.wire import device_to_proto, nic_to_proto, node_to_proto, verdict_to_proto


class NodeService(node_pb2_grpc.NodeServiceServicer):
    """See protos/peermem/v1/node.proto."""

    def __init__(self, broker: Broker, topology: Callable[[], Topology], preflight: Preflight) -> None:
        """`topology` reads this node's NIC ports as of now, in a thread."""
        self._broker = broker
        self._topology = topology
        self._preflight = preflight

    async def GetNode(self, request: node_pb2.GetNodeRequest, context: Context) -> node_pb2.Node:
        """See the contract."""
        node = parse_node(request.name) if request.name else self._broker.node
        return node_to_proto(await self._broker.find_node(node))

    async def ListNodes(self, request: node_pb2.ListNodesRequest, context: Context) -> node_pb2.ListNodesResponse:
        """See the contract."""
        size = page_size(request.page_size)
        found = [node for node in known_nodes(self._broker) if node.node > request.page_token]
        return node_pb2.ListNodesResponse(
            nodes=map(node_to_proto, found[:size]), next_page_token=found[size - 1].node if len(found) > size else ""
        )

    async def ListDevices(self, request: node_pb2.ListDevicesRequest, context: Context) -> node_pb2.ListDevicesResponse:
        """See the contract."""
        facts = await self._preflight.reach(self._broker.device_facts())
        return node_pb2.ListDevicesResponse(devices=[device_to_proto(each) for each in facts])

    async def ListNics(self, request: node_pb2.ListNicsRequest, context: Context) -> node_pb2.ListNicsResponse:
        """See the contract."""
        topology = await in_thread(self._topology)
        return node_pb2.ListNicsResponse(
            nics=[nic_to_proto(port, self._preflight.nic_error(port.name)) for port in topology.nics.values()]
        )

    async def Preflight(
        self, request: node_pb2.PreflightRequest, context: Context
    ) -> AsyncIterator[node_pb2.PreflightVerdict]:
        """See the contract."""
        async with aclosing(self._preflight.run(request.devices)) as steps:
            async for step in steps:
                yield verdict_to_proto(*step)
