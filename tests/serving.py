"""NodeService of a broker in this process, on a unix socket, with the host and the topology that a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from peermem.api.calls import CallInterceptor
from peermem.api.identity import Identity, Trust
from peermem.api.nodes import NodeService
from peermem.broker.preflight import Preflight
from peermem.core.gid import Gid
from peermem.core.node import NicPort
from peermem.core.preflight import Capability, HostFacts
from peermem.core.topology import Machine, Topology
from peermem.core.types import FabricKind
from peermem.telemetry.metrics import Metrics
from peermem.v1 import node_pb2_grpc
from tests.doubles import Host

GID = Gid(1, bytes(10) + b"\xff\xff\x0a\x00\x00\x01", "RoCE v2", "v1")
PORT = NicPort("nic0/1", "ACTIVE", "Ethernet", 2_500_000_000, -1, netdev="v1", gids=(GID,), uverbs="uverbs0")


@dataclass
class NodeFacts:
    """What the daemon reads of the node it is on."""

    topology: Topology = field(default_factory=lambda: Topology(Machine(), {}, {"nic0/1": PORT}))
    host: HostFacts = field(
        default_factory=lambda: HostFacts(
            kernel="7.3.4-amd64",
            memlock=None,
            capabilities=frozenset(Capability),
            rdma_mode="exclusive",
            device_files={"uverbs0": ""},
            lockdown="none",
            iommu={},
            pyverbs=True,
            rdma_core="56.1",
        )
    )

    def read_host(self, files: Sequence[str]) -> HostFacts:
        return self.host


@asynccontextmanager
async def node_service(host: Host, folder: Path, facts: NodeFacts | None = None) -> AsyncIterator[str]:
    """Serve, and yield the target."""
    known = facts or NodeFacts()
    broker = host.broker
    preflight = Preflight(
        broker.devices,
        broker.proofs,
        lambda: known.topology,
        known.read_host,
        broker.fabrics.get(FabricKind.VERBS),
    )
    server = grpc.aio.server(interceptors=[CallInterceptor(Metrics("0"), Identity(host.sessions, Trust()).admit)])
    node_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(broker, lambda: known.topology, preflight), server)
    target = f"unix://{folder}/peermem.sock"
    server.add_insecure_port(target)
    await server.start()
    try:
        yield target
    finally:
        await server.stop(None)
