"""The composition root. Opens in order, closes in reverse; only it and its `app_*` siblings name concrete classes.

Rules of this file:

* HTTP is up before anything else, so that a daemon that can't start says why in its readiness.
* Order of the end: not ready, out of the directory, transfers end or fail within the grace time, no more
  calls, regions, links, grants, fabrics, devices, HTTP.
* What was opened is closed, also when a later step fails.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial

import structlog

from peermem import failing
from peermem.api.attach import AttachServer
from peermem.api.http import Health, HttpServer
from peermem.api.identity import Identity, Trust
from peermem.api.links import LinkService
from peermem.api.nodes import NodeService
from peermem.api.once import Once
from peermem.api.page.document import Document
from peermem.api.page.door import Page
from peermem.api.regions import RegionService
from peermem.api.server import GrpcServer, Limits, Services, grpc_methods
from peermem.api.transfers import TransferService
from peermem.app_directory import make_directory, notes_of, own_entry, why_unknown
from peermem.app_parts import Parts
from peermem.app_policy import open_guard, policy_source
from peermem.app_slices import publish_devices
from peermem.app_snapshot import condition, snapshot
from peermem.app_trust import ends, open_trust
from peermem.broker.broker import Broker
from peermem.broker.preflight import Preflight
from peermem.broker.sessions import SessionTable
from peermem.broker.settings import Settings
from peermem.broker.storage import StorageRun
from peermem.config import Config, Grpc
from peermem.core.errors import NodeNotFound
from peermem.core.failpoints import FailOrder
from peermem.core.topology import Topology
from peermem.core.types import FabricKind
from peermem.core.version import VERSION
from peermem.device.host import read_host
from peermem.device.sysfs import nic_ports, port_counters, read_topology
from peermem.directory.base import Directory
from peermem.offload import in_thread
from peermem.remote.client import GrpcRemotes
from peermem.supervisor import Given, Supervisor
from peermem.telemetry.lag import watch_event_loop
from peermem.telemetry.metrics import Metrics, Replayed
from peermem.telemetry.nics import NicUse
from peermem.telemetry.tracing import start_tracing

log = structlog.get_logger(__name__)


class App:
    """One daemon: made from a configuration, started once, stopped once."""

    def __init__(self, config: Config, supervisor: Supervisor | None = None) -> None:
        """Raises ConfigError where something is wrong with the policy file."""
        self.config = config
        self._supervisor = supervisor or Supervisor(Given())
        self.metrics = Metrics(VERSION, node=config.node)
        self._policy = policy_source(config, self.metrics.policy)
        self._reasons: tuple[str, ...] = ("The daemon is starting.",)
        self._topology = _Recent(read_topology)
        self._trust = Trust()
        self._epoch = secrets.token_hex(8)
        self._page = Page(config.http.page, config.http.names)
        self._directory = make_directory(config)
        self._stack = AsyncExitStack()
        self.metrics.condition.observe_health(lambda: self._health().ready, lambda: bool(self._policy.problem))

    async def start(self) -> None:
        """Open everything in order. Raises OSError where an address or a socket can't be had."""
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Drain within the grace time, then close everything in reverse order."""
        self._reasons = ("The daemon is shutting down.",)
        self._supervisor.stopping()
        log.info("stopping", grace=float(self.config.shutdown.grace))
        await self._stack.aclose()
        log.info("stopped")

    def reload(self) -> None:
        """Have the policy file read again, as when it has changed."""
        self._policy.ask()

    async def _open(self) -> None:
        config = self.config
        self._break_on_purpose(config.failpoints)
        await self._start_http()
        self._start_tracing()
        directory = self._directory
        self._stack.push_async_callback(directory.close)
        await directory.open()
        parts = Parts(config, lambda link_id: broker.serving.link_lost(link_id), lambda asker: links.met(asker))
        await self._start_fabrics(parts)
        sessions = SessionTable(max_sessions=config.attach.max_sessions)
        self._trust = trust = await open_trust(config, self._stack, self._spawn)
        self._stack.push_async_callback(parts.storage.close)
        broker = self._broker(directory, parts, sessions, trust)
        self._stack.push_async_callback(broker.close)
        self._observe(broker, sessions, parts, trust)
        attach = self._listen_for_jobs(broker, sessions, trust)
        identity = Identity(sessions, trust)
        links = LinkService(broker.serving, broker.vouching, identity, config.tcp.rails)
        server = self._server(broker, identity, trust, links)
        self._stack.push_async_callback(server.stop, _CALLS_GRACE)
        real, tokens = await server.start(config.grpc.socket, config.grpc.address, config.grpc.token_address)
        if attach is not None:
            attach.serve()
        addresses = parts.addresses | ({"without_certificate": tokens} if tokens else {})
        await self._join(broker, directory, server, config.grpc.advertise or real)
        log.info("ready", node=config.node, epoch=broker.epoch, grpc=config.grpc.advertise or real, **addresses)

    async def _start_fabrics(self, parts: Parts) -> None:
        for kind, fabric in parts.fabrics.items():
            await _listening(f"The {kind.value} fabric", self.config.tcp.address, fabric.start())
            self._stack.push_async_callback(fabric.close)
            if fabric.unavailable is not None:
                log.warning("fabric_unavailable", fabric=kind.value, cause=fabric.unavailable.message)

    def _observe(self, broker: Broker, sessions: SessionTable, parts: Parts, trust: Trust) -> None:
        """Let scrapes ask what there is from now on."""
        paths = {name: device.paths for name, device in broker.devices.items()}
        self.metrics.serve_devices(paths, broker.fabrics.keys())
        self.metrics.observe(lambda: snapshot(broker, sessions, parts))
        self.metrics.condition.observe(lambda: condition(broker, self.config.region.max_regions))
        if trust.credentials is not None:
            self.metrics.certificates.observe(partial(ends, trust.credentials))
        self.metrics.observe_nics(lambda: [NicUse(port, port_counters(port.name)) for port in nic_ports(gids=False)])

    async def _join(self, broker: Broker, directory: Directory, server: GrpcServer, address: str) -> None:
        """Begin to take work; what is pushed here is the beginning of the end."""
        for work in (
            broker.tend(),
            self._policy.tend(broker.go_by),
            watch_event_loop(self.metrics),
            self.metrics.history.keep(),
            self._supervisor.tend(self._status),
        ):
            self._spawn(work)
        self._stack.push_async_callback(broker.drain, self.config.shutdown.grace)
        await directory.join(own_entry(broker.node_facts(), address))
        self._stack.push_async_callback(directory.leave)
        preflight = self._preflight(broker)
        publish_devices(
            self.config.kubernetes,
            lambda: preflight.reach(broker.device_facts()),
            read_topology,
            self._stack,
            self._spawn,
        )
        self._stack.push_async_callback(server.refuse)
        self._reasons = ()
        self._supervisor.ready()

    def _break_on_purpose(self, texts: Sequence[str]) -> None:
        if self.config.break_on_purpose:
            log.warning("breaks_on_purpose", failpoints=list(texts))
            orders = [FailOrder.parse(text) for text in texts]
            failing.turn_on(orders)
            self._stack.callback(failing.turn_off, orders)

    async def _start_http(self) -> None:
        if self.config.http.address:
            server = HttpServer(self.config.http.address, self.metrics, self._health, self._page)
            await _listening("HTTP", server.address, server.start())
            self._stack.push_async_callback(server.close)
            log.info("http_listening", address=server.address)

    def _start_tracing(self) -> None:
        tracing = self.config.tracing
        if tracing.endpoint:
            end = start_tracing(tracing.endpoint, tracing.sample, self.config.node, self._epoch)
            self._stack.push_async_callback(in_thread, end)

    def _health(self) -> Health:
        status = self._directory.status()
        over = self._trust.credentials.problem() if self._trust.credentials is not None else ""
        refused = status.refusal.message if status.refusal is not None else ""
        reasons = (*self._reasons, *filter(None, (over, refused)))
        return Health(not reasons, reasons, (*filter(None, (self._policy.problem,)), *notes_of(status)))

    def _status(self) -> str:
        health = self._health()
        return " ".join((f"Node {self.config.node}.", *health.reasons, *health.notes))

    def _broker(self, directory: Directory, parts: Parts, sessions: SessionTable, trust: Trust) -> Broker:
        config = self.config
        settings = Settings(
            node=config.node,
            rails=config.tcp.rails,
            max_regions=config.region.max_regions,
            max_running=config.transfer.max_running,
            max_segments=config.transfer.max_segments,
            keep_ended=config.transfer.keep_ended,
            keep_ended_for=config.transfer.keep_ended_for,
            grant_ttl=config.transfer.grant_ttl,
            link_idle=config.transfer.link_idle,
            retry_for=config.transfer.retry_for,
        )
        remotes = GrpcRemotes(
            config.node, self._epoch, lambda node: _address(config, directory, node), trust.credentials
        )
        return Broker(
            settings,
            self._epoch,
            parts.devices,
            parts.fabrics,
            remotes,
            directory,
            open_guard(config, self._policy, self.metrics.policy, self._stack),
            sessions,
            self.metrics,
            self._topology,
            parts.storage,
        )

    def _listen_for_jobs(self, broker: Broker, sessions: SessionTable, trust: Trust) -> AttachServer | None:
        path = self.config.attach.socket
        handed_over = self._supervisor.adopt(path)
        if path is None:
            return None
        server = AttachServer(path, sessions, broker.map_region, trust.token_subject, self.config.node)
        server.listen(handed_over)
        self._stack.push_async_callback(server.close)
        return server

    def _server(self, broker: Broker, identity: Identity, trust: Trust, links: LinkService) -> GrpcServer:
        config = self.config
        keep = config.transfer.keep_ended
        preflight = self._preflight(broker)
        self._page.facts = Document(broker, preflight, self._topology, self.metrics.history, self._health)
        loaded, stored = (Once[StorageRun](keep, self._replayed(Replayed.STORAGE), _is_spent) for _ in range(2))
        services = Services(
            node=NodeService(broker, read_topology, preflight),
            region=RegionService(
                broker, identity, Once(keep, self._replayed(Replayed.REGION)), Once(keep), loaded, stored
            ),
            transfer=TransferService(
                broker,
                identity,
                Once(keep, self._replayed(Replayed.TRANSFER)),
                config.transfer.max_segments,
                self.metrics.transfer_refused,
            ),
            link=links,
        )
        self.metrics.serve_grpc(grpc_methods())
        return GrpcServer(
            services,
            self.metrics,
            identity.admit,
            trust.credentials,
            limits=_limits(config.grpc),
            reflection_on=config.grpc.reflection,
        )

    def _preflight(self, broker: Broker) -> Preflight:
        verbs = broker.fabrics.get(FabricKind.VERBS)
        return Preflight(broker.devices, broker.proofs, read_topology, read_host, verbs)

    def _replayed(self, what: Replayed) -> Callable[[], None]:
        return lambda: self.metrics.replayed(what)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)


def _limits(config: Grpc) -> Limits:
    return Limits(
        message=config.max_message,
        calls=config.max_concurrent_calls,
        connections=config.max_connections,
        handshake=config.handshake_timeout,
    )


def _is_spent(run: StorageRun) -> bool:
    return run.error is not None


class _Recent:
    """A topology that is read again when somebody asks after a few seconds: ports come up, devices come and go.
    May be called in any thread."""

    def __init__(self, read: Callable[[], Topology]) -> None:
        self._read = read
        self._last: tuple[float, Topology] | None = None

    def __call__(self) -> Topology:
        now = time.monotonic()
        if self._last is None or now > self._last[0] + _RECENT:
            self._last = (now, self._read())
        return self._last[1]


_RECENT = 5.0
"""Seconds that a topology is believed."""
_CALLS_GRACE = 1.0  # seconds that calls get to end after the transfers; only watchers and streams are left then


async def _listening(what: str, address: str, start: Awaitable[None]) -> None:
    try:
        await start
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{what} can't listen on {address}: {cause}. Free it, or configure another address.") from error


def _address(config: Config, directory: Directory, node: str) -> str:
    entry = directory.nodes().get(node)
    if entry is None:
        raise NodeNotFound(f"nodes/{node} is not in the directory, {why_unknown(config, directory)}", node=node)
    return entry.address
