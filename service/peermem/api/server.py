"""The gRPC server: services, health, reflection and limits.

Rules of this file:

* `grpc.health.v1` answers for the whole server and for each service; at shutdown all turn NOT_SERVING
  before anything else happens.
* Bounds on messages and on concurrent calls hold before a handler sees a byte; those on connections and handshakes
  before anybody has shown who it is.
* With credentials, a TCP port is TLS and nothing else. gRPC for Python can either insist on a certificate or ask for
  none, so that who shows a token has a port of its own, and a server of its own: whoever can connect there without
  having shown anything fills up that one only.
"""

from __future__ import annotations

import asyncio
import os
import socket as sockets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from peermem.api.calls import Admit, CallInterceptor
from peermem.api.links import LinkService
from peermem.api.nodes import NodeService
from peermem.api.regions import RegionService
from peermem.api.sockets import free_socket_path
from peermem.api.tls import server_credentials
from peermem.api.transfers import TransferService
from peermem.credentials.base import Credentials
from peermem.telemetry.metrics import GrpcMethod, Metrics
from peermem.v1 import (
    link_pb2,
    link_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)

_IDLE = 300
"""Seconds that a connection without calls is kept: nobody holds places for nothing."""
_AGE = 3600.0
"""Seconds after which a caller has to connect again where TLS is on: what let it in may be over by then. Calls that run
go on on the old connection."""
SERVICES = tuple(f"peermem.v1.{name}Service" for name in ("Node", "Region", "Transfer", "Link"))


@dataclass(frozen=True, slots=True)
class Limits:
    """What callers can take of the server."""

    message: int
    """Bytes of one message, both ways."""
    calls: int
    """At the same time; more are refused."""
    connections: int
    """At the same time on one port; more are closed at once."""
    handshake: float
    """Seconds that one has for the handshakes of TLS and HTTP/2."""


@dataclass(frozen=True, slots=True)
class Services:
    """The handlers of the contract."""

    node: NodeService
    region: RegionService
    transfer: TransferService
    link: LinkService


class GrpcServer:
    """The server on a unix socket, a TCP port, or both."""

    def __init__(
        self,
        services: Services,
        metrics: Metrics,
        admit: Admit,
        credentials: Credentials | None = None,
        *,
        limits: Limits,
        reflection_on: bool,
    ) -> None:
        """`admit` is asked before each call; without `credentials` TCP is plain."""
        self._services = services
        self._interceptor = CallInterceptor(metrics, admit)
        self._credentials = credentials
        self._limits = limits
        self._reflection_on = reflection_on
        self._health = health_aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []

    def _door(self) -> grpc.aio.Server:
        """Return a server with limits of its own: who fills it up keeps nobody out of another one."""
        limits = self._limits
        server = grpc.aio.server(
            interceptors=[self._interceptor],
            maximum_concurrent_rpcs=limits.calls,
            options=(
                ("grpc.max_receive_message_length", limits.message),
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake * 1000)),
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.so_reuseport", 0),
                ("grpc.max_connection_idle_ms", _IDLE * 1000),
                *([("grpc.max_connection_age_ms", int(_AGE * 1000))] if self._credentials is not None else []),
            ),
        )
        node_pb2_grpc.add_NodeServiceServicer_to_server(self._services.node, server)
        region_pb2_grpc.add_RegionServiceServicer_to_server(self._services.region, server)
        transfer_pb2_grpc.add_TransferServiceServicer_to_server(self._services.transfer, server)
        link_pb2_grpc.add_LinkServiceServicer_to_server(self._services.link, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._reflection_on:
            reflection.enable_server_reflection((*SERVICES, reflection.SERVICE_NAME), server)
        self._servers.append(server)
        return server

    async def start(self, socket: str | None, address: str | None, token_address: str | None = None) -> list[str]:
        """Listen on a unix socket's path, on a host:port, and on one for callers without a certificate; return the two
        TCP addresses with their real ports, empty for none.

        Raises OSError.
        """
        known = self._door()
        if socket:
            _listen_unix(known, socket)
        real = [self._listen_tcp(known, address, asks=True), ""]
        if token_address:
            real[1] = self._listen_tcp(self._door(), token_address, asks=False)
        for server in self._servers:
            await server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return real

    async def refuse(self) -> None:
        """Tell health checks that this server is going away."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Take no more calls, let running ones end within `grace` seconds, then break them."""
        self._services.link.close()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

    def _listen_tcp(self, server: grpc.aio.Server, address: str | None, *, asks: bool) -> str:
        if not address:
            return ""
        credentials = server_credentials(self._credentials, asks=asks) if self._credentials else None
        return f"{address.rpartition(':')[0]}:{_listen(server, address, credentials)}"


def _listen_unix(server: grpc.aio.Server, path: str) -> None:
    free_socket_path(Path(path), sockets.SOCK_STREAM)
    before = os.umask(0)  # whoever may enter the folder may connect; who may do what is the policy's business
    try:
        _listen(server, f"unix:{path}")
    finally:
        os.umask(before)


def _listen(server: grpc.aio.Server, target: str, credentials: grpc.ServerCredentials | None = None) -> int:
    try:
        if credentials is not None:
            return server.add_secure_port(target, credentials)
        return server.add_insecure_port(target)
    except RuntimeError as error:
        raise OSError(f"gRPC can't listen on {target}: is it in use by another daemon? ({error})") from error


def grpc_methods() -> Iterator[GrpcMethod]:
    """Return the methods that the server answers, for the metrics."""
    modules = (node_pb2, region_pb2, transfer_pb2, link_pb2, health_pb2)
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                kind = _KINDS[method.client_streaming, method.server_streaming]
                yield GrpcMethod(service.full_name, method.name, kind)


_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
