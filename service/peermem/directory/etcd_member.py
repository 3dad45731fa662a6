"""This node in etcd: its name under a lease, and the regions that it publishes.

Rules of this file:

* A name belongs to whoever put it there first. Only the daemon that comes after it on the same host, at the same
  address, takes it over at once; any other one waits until it is free. A daemon whose name was taken over does not take
  it back.
* What hangs on the lease is written only while the name is this daemon's: each write says so to etcd, which compares.
* A lease that has ended is replaced by a new one, and everything is written again. Its time is counted by the monotonic
  clock, from before the call that renewed it.
* Regions are written in batches with pauses between, smaller and longer the busier etcd is, and never keep the lease
  from being renewed; one that came and went meanwhile is never written. Where etcd takes none, nothing else ends.
* A write that was given up may have been made all the same: what it would have written is deleted unless it is wanted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from peermem.core.errors import LimitReached, NodeNameTaken
from peermem.core.names import ChildName
from peermem.core.region import PublishedRegion
from peermem.core.retries import Backoff
from peermem.directory.base import Changes, Counts, NodeEntry
from peermem.directory.etcd_connection import DEADLINE, MAX_OPERATIONS, Connection, Fault, LeaseLost, first_of
from peermem.directory.records import BadRecord, Keys, NodeRecord, read_node, write_node, write_region
from peermem.etcd import rpc_pb2

log = structlog.get_logger(__name__)

BETWEEN_BATCHES = 0.05
"""Seconds, more or less."""
_SMALL = 16
"""Operations of the first batch, and of one after another that took long; they double where etcd is quick."""
_QUICK = 0.5
"""Seconds."""
_SHORTEST, _LONGEST = 1.0, 10.0
"""Seconds until a batch is tried again that etcd did not take, and the longest pause."""
_REST = 4.0
"""Pause between two batches, by the time that the last one took: a busy etcd is left more time."""
_ATTEMPTS = 5
"""To write the name, while others write it at the same time."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What this node's entries hang on."""

    id: int
    until: float
    """By the loop's clock."""


class Member:
    """What this node has in etcd, and is to have."""

    def __init__(
        self, keys: Keys, ttl: float, machine: str, max_published: int, changes: Changes, counts: Counts
    ) -> None:
        """`ttl` is the lease's, in seconds; `machine` tells this host from another one of the same address."""
        self.refusal: NodeNameTaken | None = None
        self.lease: Lease | None = None
        self._keys = keys
        self._ttl, self._machine = ttl, machine
        self._max_published = max_published
        self._changes, self._counts = changes, counts
        self._record: NodeRecord | None = None
        self._was_in = False
        """Whether this run of the daemon has had its name."""
        self._claimed_at = 0
        """etcd's revision at which the name was put there last."""
        self._lost_at = 0
        """etcd's revision at which it was seen to be there no more; the watch may tell of what was before the claim."""
        self._wake = asyncio.Event()
        """Set when this node is to be known, or was thrown out."""
        self._unwritten_cause = ""
        """Why the last batch of regions was not written, as the log says."""
        self._connection: Connection | None = None
        self._at_rest = asyncio.Event()
        """Set unless the name is being claimed."""
        self._at_rest.set()
        self._pending = asyncio.Event()
        """Set when regions are to be written."""
        self._regions: dict[ChildName, PublishedRegion] = {}
        self._dirty: dict[ChildName, None] = {}
        """Regions whose keys are not as they should be, in order."""
        self._written: dict[ChildName, PublishedRegion] = {}
        self._doubtful: dict[ChildName, set[bytes]] = {}
        """Keys that etcd may have: nobody knows whether they were written."""

    @property
    def published(self) -> int:
        """Regions that etcd is to tell of."""
        return len(self._regions)

    @property
    def unwritten(self) -> int:
        """Regions of which it was not told yet, one way or the other."""
        return len(self._dirty)

    def join(self, entry: NodeEntry) -> None:
        """Have this node be known."""
        self._record = NodeRecord(entry, self._machine)
        self._wake.set()

    async def leave(self) -> None:
        """Have it be known no more: at once where there is a connection, else when the lease ends."""
        self._record, lease, self.lease = None, self.lease, None
        self._regions.clear()
        self._forget_written()
        self._wake.set()
        if self._connection is not None and lease is not None:
            with suppress(Fault, LeaseLost):
                await self._connection.revoke(lease.id)
        await self._at_rest.wait()  # a claim that is on its way gives back what it gets

    def evicted(self, revision: int) -> None:
        """The name was deleted, or somebody else's, at a revision of etcd."""
        self._lost_at = max(self._lost_at, revision)
        self._wake.set()

    def publish(self, region: PublishedRegion) -> None:
        """Have a region told of. Raises LimitReached."""
        if len(self._regions) >= self._max_published:
            raise LimitReached(
                f"{self._max_published} regions of this node are published, its limit. Withdraw some, or raise "
                "directory.etcd.max_published.",
                limit=self._max_published,
            )
        self._regions[region.name] = region
        self._touch(region.name)

    def withdraw(self, name: ChildName) -> None:
        """Have a region told of no more."""
        if self._regions.pop(name, None) is not None:
            self._touch(name)

    def _touch(self, name: ChildName) -> None:
        if name not in self._doubtful and self._regions.get(name) is self._written.get(name):
            self._dirty.pop(name, None)
        else:
            self._dirty[name] = None
            self._pending.set()

    async def stay(self, connection: Connection, on_settled: Callable[[], None]) -> None:
        """Be known once this node is to be, and keep it so. Ends with a Fault only.

        `on_settled` is called when etcd has answered whether this node is in it.
        """
        self._connection = connection
        try:
            while True:
                self._wake.clear()
                if self._record is None:
                    on_settled()
                    await self._wake.wait()
                elif self.lease is None:
                    await self._try_to_enter(connection, self._record, on_settled)
                else:
                    await self._keep(connection, self.lease, on_settled)
        finally:
            self._connection = None

    async def _try_to_enter(self, connection: Connection, record: NodeRecord, on_settled: Callable[[], None]) -> None:
        self._at_rest.clear()
        try:
            await self._enter(connection, record)
        except LeaseLost:
            return  # it was over before it was used: once more
        except NodeNameTaken as taken:
            if self.refusal is None or self.refusal.message != taken.message:
                log.error("directory_name_taken", **taken.metadata, cause=taken.message)
            self._refuse(taken)
            on_settled()
            with suppress(TimeoutError):  # it may be given up without a word, as where its etcd lost its data
                async with asyncio.timeout(self._ttl):
                    self._at_rest.set()
                    await self._wake.wait()
        finally:
            self._at_rest.set()

    async def _enter(self, connection: Connection, record: NodeRecord) -> None:
        self._lost_at = 0
        asked = asyncio.get_running_loop().time()
        lease = await connection.grant(round(self._ttl))
        try:
            self._claimed_at = await self._claim(connection, record, lease)
        except NodeNameTaken:
            with suppress(LeaseLost):
                await connection.revoke(lease)
            raise
        if self._record is not record:  # it left meanwhile
            with suppress(LeaseLost):
                await connection.revoke(lease)
            return
        self.lease = Lease(lease, asked + self._ttl)
        self._was_in = True
        log.info("directory_joined", node=record.entry.node, address=record.entry.address)
        self._refuse(None)

    def _refuse(self, refusal: NodeNameTaken | None) -> None:
        self.refusal = refusal
        self._changes.tell()

    async def _claim(self, connection: Connection, record: NodeRecord, lease: int) -> int:
        """Put the name under a lease; return at which revision. Raises NodeNameTaken."""
        key = self._keys.node(record.entry.node)
        put = _put(key, write_node(record), lease)
        get = rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=key))
        condition = rpc_pb2.Compare(target=rpc_pb2.Compare.VERSION, key=key, version=0)
        before = 0
        for _ in range(_ATTEMPTS):
            answer = await connection.transact(rpc_pb2.TxnRequest(compare=[condition], success=[put], failure=[get]))
            if answer.succeeded:
                if before not in (0, lease):
                    with suppress(LeaseLost):
                        await connection.revoke(before)  # and the regions of the run before with it
                return answer.header.revision
            found = answer.responses[0].response_range.kvs
            if not found:
                condition, before = rpc_pb2.Compare(target=rpc_pb2.Compare.VERSION, key=key, version=0), 0
                continue
            self._check_mine(record, found[0].value)
            before = found[0].lease
            condition = rpc_pb2.Compare(target=rpc_pb2.Compare.MOD, key=key, mod_revision=found[0].mod_revision)
        raise Fault("this node's entry changes all the time")

    def _check_mine(self, record: NodeRecord, value: bytes) -> None:
        """Raise NodeNameTaken unless what is there is of this daemon, or of the run before it on this host."""
        node, here = record.entry.node, record.entry.address
        try:
            found = read_node(node, value)
        except BadRecord as bad:
            there, why = "unknown", f"something that makes no sense is in the directory under its name: {bad}"
        else:
            if found.entry.epoch == record.entry.epoch or (found.is_same_host(record) and not self._was_in):
                return
            there = found.entry.address
            other = "" if there != here else ", of another host or another daemon on this one"
            why = f"the daemon at {there}{other} is nodes/{node} already"
        raise NodeNameTaken(
            f"The daemon at {here} can't be nodes/{node}: {why}. Give one of them another name, or wait: within "
            f"{self._ttl:g} s of the other one's end the name is free.",
            node=node,
            address=here,
            other=there,
        )

    async def _keep(self, connection: Connection, lease: Lease, on_settled: Callable[[], None]) -> None:
        """Renew the lease in time, and write what is to be written, until the lease or the name is lost."""
        try:
            await first_of(
                self._renew_in_time(connection, lease.id, on_settled), self._write_in_batches(connection, lease.id)
            )
        except LeaseLost:
            if self._record is not None:  # else it was given back
                self._counts.lost_leases += 1
                log.warning("directory_lease_lost", ttl=self._ttl)
        if self._record is not None:
            await self._drop(connection, lease)
        else:
            self._forget_written()

    async def _renew_in_time(self, connection: Connection, lease: int, on_settled: Callable[[], None]) -> None:
        loop, period = asyncio.get_running_loop(), self._ttl / 3
        while self._record is not None and self._lost_at <= self._claimed_at:
            self._wake.clear()  # not behind the renewal, during which the name may be lost
            due = loop.time() + period
            await self._renew(connection, lease, min(DEADLINE, period))
            on_settled()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()

    async def _write_in_batches(self, connection: Connection, lease: int) -> None:
        loop, backoff, size = asyncio.get_running_loop(), Backoff(_SHORTEST, _LONGEST), _SMALL
        while True:
            self._pending.clear()
            while self._dirty:
                began, cause = loop.time(), ""
                try:
                    await self._write(connection, lease, size)
                    backoff.reset()
                    took = loop.time() - began
                    size = min(size * 2, MAX_OPERATIONS) if took < _QUICK else max(size // 2, _SMALL)
                    pause = min(max(BETWEEN_BATCHES, took * _REST), _LONGEST)
                except Fault as fault:  # whether the connection is at an end is for the renewals and the watch to say
                    size, pause, cause = _SMALL, backoff.pause(random.random()), fault.cause
                if cause and cause != self._unwritten_cause:
                    log.warning("directory_regions_unwritten", regions=len(self._dirty), cause=cause)
                self._unwritten_cause = cause
                await asyncio.sleep(pause * (0.5 + random.random()))
            await self._pending.wait()

    async def _drop(self, connection: Connection, lease: Lease) -> None:
        self.lease = None
        self._forget_written()
        with suppress(LeaseLost):
            await connection.revoke(lease.id)

    def _forget_written(self) -> None:
        self._written.clear()
        self._doubtful.clear()
        self._dirty = dict.fromkeys(self._regions)

    async def _renew(self, connection: Connection, lease: int, deadline: float) -> None:
        asked = asyncio.get_running_loop().time()
        try:
            await connection.renew(lease, deadline)
        except (Fault, LeaseLost):
            self._counts.failed_renewals += 1
            raise
        self._counts.renewals += 1
        if self.lease is not None:
            self.lease = Lease(lease, asked + self._ttl)
        self._changes.tell()

    async def _write(self, connection: Connection, lease: int, size: int) -> None:
        """Write one batch of regions, of at most so many operations, but one region at least."""
        operations: list[rpc_pb2.RequestOp] = []
        batch: dict[ChildName, PublishedRegion | None] = {}
        for name in self._dirty:
            more = self._operations(name, lease)
            if operations and len(operations) + len(more) > size:
                break
            operations += more
            batch[name] = self._regions.get(name)
        if self._record is None:
            return
        key = self._keys.node(self._record.entry.node)
        mine = rpc_pb2.Compare(target=rpc_pb2.Compare.LEASE, key=key, lease=lease)
        try:
            answer = await connection.transact(rpc_pb2.TxnRequest(compare=[mine], success=operations))
        except (Fault, asyncio.CancelledError) as error:
            if not (isinstance(error, Fault) and error.refused):
                self._doubt(batch)
            raise
        if not answer.succeeded:
            self.evicted(answer.header.revision)
            return
        for name, region in batch.items():
            if region is None:
                self._written.pop(name, None)
            else:
                self._written[name] = region
            self._doubtful.pop(name, None)
            self._touch(name)
        self._changes.tell()

    def _doubt(self, batch: Mapping[ChildName, PublishedRegion | None]) -> None:
        for name, region in batch.items():
            if region is not None:
                self._doubtful.setdefault(name, set()).update(self._keys.of_region(region))
            self._touch(name)

    def _operations(self, name: ChildName, lease: int) -> Sequence[rpc_pb2.RequestOp]:
        """Return what makes the keys of a region what they should be."""
        wanted, written = self._regions.get(name), self._written.get(name)
        puts: dict[bytes, rpc_pb2.RequestOp] = {}
        if wanted is not None:
            value = write_region(wanted)
            puts = {key: _put(key, value, lease) for key in self._keys.of_region(wanted)}
        old = {*self._doubtful.get(name, ()), *(self._keys.of_region(written) if written is not None else ())}
        return [*puts.values(), *(_delete(key) for key in sorted(old - puts.keys()))]


def _put(key: bytes, value: bytes, lease: int) -> rpc_pb2.RequestOp:
    return rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value, lease=lease))


def _delete(key: bytes) -> rpc_pb2.RequestOp:
    return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key))
