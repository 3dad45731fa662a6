"""The directory on etcd.

Rules of this file:

* Everything runs on one connection to one member: the watch of the nodes, this node's lease, its regions. Whatever
  fails ends that connection, and the next member is tried, with pauses that grow.
* All daemons know all nodes. Published regions are read from etcd when somebody asks, by the label that the fewest
  have.
* What can't be done is told in the log when it begins, when its cause changes and when it is over; never silently.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from peermem.core.errors import DirectoryUnreachable
from peermem.core.names import ChildName
from peermem.core.region import PublishedRegion
from peermem.core.retries import Backoff
from peermem.directory.base import Changes, Counts, Directory, GoneNode, NodeEntry, Status
from peermem.directory.etcd_connection import Connection, Fault, Proof, connect, first_of
from peermem.directory.etcd_member import Member
from peermem.directory.etcd_nodes import Nodes
from peermem.directory.records import BadRecord, Keys, Span, read_region
from peermem.etcd import rpc_pb2

log = structlog.get_logger(__name__)

_SHORTEST, _LONGEST = 0.1, 5.0
"""Seconds between two attempts to reach etcd."""
_PROVEN = 5.0
"""Seconds after which a connection counts as sound."""
_PARTS = 2
"""Of the work on a connection: the nodes' and this node's."""
_PATIENCE = 3.0
"""Seconds that a start waits for the nodes, and an end for etcd."""
_PAGES = 10
"""Pages of 1000 regions that one call of `find` looks through; more where none of them makes sense, of which none could
name where to go on."""
_FINDING = 8
"""Calls of `find` that ask etcd at the same time; others wait."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What it goes by."""

    endpoints: Sequence[str]
    """host:port of each member."""
    prefix: str
    cluster: str
    lease: float
    """Whole seconds."""
    max_published: int
    """Regions of this node."""
    machine: str = ""
    """Tells this host from another one of the same address."""
    proof: Proof = field(default_factory=Proof)


class EtcdDirectory:
    """Knows the nodes of one cluster."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys = Keys(settings.prefix, settings.cluster)
        self._changes = Changes()
        self._counts = Counts()
        self._member = Member(
            self._keys,
            settings.lease,
            settings.machine,
            settings.max_published,
            self._changes,
            self._counts,
        )
        self._nodes = Nodes(self._keys, settings.lease, self._changes, self._counts, self._member.evicted)
        self._connection: Connection | None = None
        self._away_since: float | None = None
        self._problem: DirectoryUnreachable | None = None
        self._backoff = Backoff(_SHORTEST, _LONGEST)
        self._finding = asyncio.Semaphore(_FINDING)
        self._tried = asyncio.Event()
        """Set once etcd was reached, or no member could be."""
        self._reached_at = 0.0
        self._told: dict[str, str] = {}
        """What the log holds of why a member can't be reached."""
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """See Directory."""
        loop = asyncio.get_running_loop()
        self._away_since = loop.time()
        self._task = loop.create_task(self._stay_connected())
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._tried.wait()

    async def join(self, entry: NodeEntry) -> None:
        """See Directory."""
        self._nodes.set_own(entry)
        self._member.join(entry)

    async def leave(self) -> None:
        """See Directory."""
        self._nodes.set_own(None)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._member.leave()

    def nodes(self) -> Mapping[str, NodeEntry]:
        """See Directory."""
        return self._nodes.entries()

    def gone(self) -> Mapping[str, GoneNode]:
        """See Directory."""
        return self._nodes.gone()

    async def changed(self) -> None:
        """See Directory."""
        await self._changes.wait()

    def status(self) -> Status:
        """See Directory."""
        now, lease = asyncio.get_running_loop().time(), self._member.lease
        return Status(
            kind="etcd",
            away_for=None if self._away_since is None else now - self._away_since,
            problem=self._problem,
            refusal=self._member.refusal,
            lease_left=None if lease is None else max(0.0, lease.until - now),
            published=self._member.published,
            unwritten=self._member.unwritten,
            counts=self._counts,
        )

    def publish(self, region: PublishedRegion) -> None:
        """See Directory."""
        self._member.publish(region)

    def withdraw(self, name: ChildName) -> None:
        """See Directory."""
        self._member.withdraw(name)

    async def find(
        self, labels: Mapping[str, str], after: ChildName | None, limit: int
    ) -> tuple[Sequence[PublishedRegion], ChildName | None]:
        """See Directory."""
        async with self._finding:
            connection = self._connection
            if connection is None:
                raise self._problem or _unreachable("it has not been reached yet")
            try:
                return await self._find(connection, labels, after, limit)
            except Fault as fault:
                raise _unreachable(fault.cause) from None

    async def _find(
        self, connection: Connection, labels: Mapping[str, str], after: ChildName | None, limit: int
    ) -> tuple[Sequence[PublishedRegion], ChildName | None]:
        span = await self._span(connection, labels)
        start = self._keys.behind(span, after) if after is not None else b""
        found: list[PublishedRegion] = []
        last: ChildName | None = None
        pages = 0
        while True:
            page = await connection.range(span, start=start)
            pages += 1
            for kv in page.kvs:
                region = self._read(span, kv)
                if region is None:
                    continue
                if labels.items() <= region.labels.items():
                    if len(found) == limit:
                        return found, found[-1].name
                    found.append(region)
                last = region.name
            if not page.more:
                return found, None
            if pages >= _PAGES and last is not None:
                return found, last
            start = page.kvs[-1].key + b"\0"

    def _read(self, span: Span, kv: rpc_pb2.KeyValue) -> PublishedRegion | None:
        try:
            return read_region(self._keys.region_of(span, kv.key), kv.value)
        except BadRecord:
            self._counts.garbage += 1
            return None

    async def _span(self, connection: Connection, labels: Mapping[str, str]) -> Span:
        """Return the smallest span in which all regions with these labels are."""
        spans = [self._keys.of_label(*label) for label in labels.items()] or [self._keys.regions]
        if len(spans) == 1:
            return spans[0]
        counts = await asyncio.gather(*(connection.count(span) for span in spans))
        return min(zip(counts, spans, strict=True))[1]

    async def close(self) -> None:
        """See Directory."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._nodes.close()

    async def _stay_connected(self) -> None:
        """Be connected to one member or another, for good."""
        endpoints = list(self._settings.endpoints)
        random.shuffle(endpoints)
        while True:
            for endpoint in endpoints:
                try:
                    await self._session(endpoint)
                except Fault as fault:
                    self._lost(endpoint, fault)
                except Exception:
                    log.exception("directory_defect")
                    self._lost(endpoint, Fault("a defect; the daemon's log has the details"))
            self._tried.set()
            await asyncio.sleep(self._backoff.pause(random.random()))

    async def _session(self, endpoint: str) -> None:
        """Do everything over one connection. Ends with a Fault."""
        connection = await connect(endpoint, self._settings.proof)
        try:
            if not self._nodes.is_known:
                await self._nodes.read(connection)
            both = self._both(lambda: self._reached(endpoint, connection))
            await first_of(
                self._nodes.follow(connection, lambda: both("nodes")),
                self._member.stay(connection, lambda: both("member")),
            )
        finally:
            self._connection = None
            await connection.close()

    def _both(self, reached: Callable[[], None]) -> Callable[[str], None]:
        """Return what calls `reached` once, when it has been called for both parts."""
        done: set[str] = set()

        def call(part: str) -> None:
            before = len(done)
            done.add(part)
            if before < len(done) == _PARTS:
                reached()

        return call

    def _reached(self, endpoint: str, connection: Connection) -> None:
        if self._counts.listings and self._told:
            log.info("directory_reached", endpoint=endpoint, nodes=len(self._nodes.entries()))
        self._connection, self._away_since, self._problem = connection, None, None
        self._reached_at = asyncio.get_running_loop().time()
        self._told.clear()
        self._tried.set()
        self._changes.tell()

    def _lost(self, endpoint: str, fault: Fault) -> None:
        now = asyncio.get_running_loop().time()
        if self._away_since is None:
            self._away_since = now
            if now - self._reached_at >= _PROVEN:
                self._backoff.reset()
        self._problem = _unreachable(f"{endpoint}: {fault.cause}")
        if self._told.get(endpoint) != fault.cause:
            self._told[endpoint] = fault.cause
            tell = log.error if fault.refused else log.warning
            tell("directory_away", endpoint=endpoint, cause=fault.cause)
        self._changes.tell()


def _unreachable(cause: str) -> DirectoryUnreachable:
    return DirectoryUnreachable(
        f"etcd can't be used as the directory: {cause}. Check that it runs, and directory.etcd."
    )


if TYPE_CHECKING:
    _: type[Directory] = EtcdDirectory
