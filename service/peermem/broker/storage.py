"""Loads and stores: bytes between a region of this node and a file or block device of this host.

Rules of this file:

* The policy is asked for the region, which a load writes and a store reads, and for the file. Which files anybody at
  all may use is the storage's business.
* A tenant's bytes are counted as they move; while it moves more than its limit, nothing new of it begins.
* A load or store uses its region like a transfer: a region that is to end makes it fail first, and waits for it.
* It lasts as long as somebody watches it. When the last watcher is gone it ends; blocks that are under way still land.
* It is reported complete when all bytes are in place, and for a store on the disk under the file's name.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from peermem.broker.access import checksum
from peermem.broker.guard import Guard
from peermem.broker.regions import Region
from peermem.broker.tenants import Tenants
from peermem.core import spans
from peermem.core.errors import (
    ChecksumMismatch,
    Internal,
    LimitReached,
    OutOfRange,
    PeermemError,
    TransferCancelled,
)
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.policy import Action
from peermem.core.quota import Hold, Resource
from peermem.core.storage import Order, StorageFacts, StorageRequest
from peermem.storage.base import Movement, OpenFile, Storage
from peermem.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

_TICK = 0.1
"""Seconds between two counts of what moved."""


REGION_ACTIONS = {Order.LOAD: Action.WRITE, Order.STORE: Action.READ}
"""What a load and a store do with their region."""


class StorageRun:
    """One load or store; a `regions.RegionUser`."""

    def __init__(self, subject: Subject, request: StorageRequest) -> None:
        self.subject = subject
        self.request = request
        self.error: PeermemError | None = None
        """Why it failed, or is about to."""
        self.ended = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        """Carries it out; None before anybody watched it."""
        self.watchers = 0
        self._began = 0.0
        self._duration: float | None = None
        self._total = self._done = 0
        self._counting = threading.Lock()
        self._crc32c: int | None = None
        self._movement: Movement | None = None
        self._region: Region | None = None
        self._last: StorageFacts | None = None

    @property
    def uses(self) -> list[tuple[Action, Region]]:
        """What it does with its region, while it does."""
        return [(REGION_ACTIONS[self.request.order], self._region)] if self._region is not None else []

    @property
    def facts(self) -> StorageFacts:
        """It as it stands."""
        if self._last is not None:
            return self._last
        movement = self._movement
        return StorageFacts(
            bytes_total=self._total,
            bytes_done=self._done,
            way=movement.way if movement else None,
            why=movement.why if movement else "",
            duration=self._duration,
            crc32c=self._crc32c,
        )

    def fail(self, error: PeermemError) -> None:
        """See RegionUser."""
        self.error = self.error or error
        if self._movement is not None:
            self._movement.stop()

    async def settled(self) -> None:
        """See RegionUser."""
        await self.ended.wait()

    async def ended_within(self, seconds: float) -> bool:
        """Wait for its end, but at most so long; return whether it has ended."""
        try:
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        except TimeoutError:
            return False
        return True

    async def drive(self, region: Region, storage: Storage) -> None:
        """Carry it to its end; never raises."""
        self._began = time.monotonic()
        self._region = region
        request = self.request
        names = {"region": str(region.name), "file": request.path}
        span = spans.begin(f"storage.{request.order.value}", request.traceparent, **names)
        try:
            await self._work(region, storage)
            self.error = None  # what came too late
        except PeermemError as error:
            self.error = error.again()  # the traceback of this one holds what is closed now
        except BaseException:
            log.exception("storage_defect", region=str(region.name))
            self.error = Internal(f"The {self.request.order.value} met a defect of the daemon; its log has details.")
        finally:
            self._duration = time.monotonic() - self._began
            region.users.discard(self)
            self._last, self._movement, self._region = self.facts, None, None  # who remembers it needs its facts only
            span.note(length=self._total, done=self._done, way=self._last.way.value if self._last.way else "none")
            span.end(self.error)
            self.ended.set()

    async def _work(self, region: Region, storage: Storage) -> None:
        request = self.request
        room = region.memory.length - request.region_offset
        length = request.length or (room if request.order is Order.STORE else 0)
        file = await storage.open(request.order, request.path, request.file_offset, length)
        try:
            _check_room(region, request, file.length)
            await self._carry(region, file)
        except PeermemError as error:
            raise self._told(self.error or error, file.aftermath) from error
        finally:
            await file.close()

    async def _carry(self, region: Region, file: OpenFile) -> None:
        self._total = file.length
        self._movement = file.movement(region.memory, region.copier, self.request.region_offset, self._moved)
        self._check()
        await self._movement.run()
        self._check()
        if self.request.checksum:
            self._crc32c = await self._verified(region, file)
        await file.commit()

    async def _verified(self, region: Region, file: OpenFile) -> int:
        """Return the CRC32C of both sides. Raises ChecksumMismatch."""
        in_file = await file.crc32c(lambda: self.error is not None)
        self._check()
        in_region = await checksum(region, [self.request.region_offset], [self._total], 0)
        self._check()
        if in_file != in_region:
            raise ChecksumMismatch(
                f"{self.request.path} has the CRC32C {in_file:08x} and {region.name} {in_region:08x}: the bytes were "
                "damaged, or something else wrote to one of them meanwhile. Move them again.",
                region=region.name,
                path=self.request.path,
            )
        return in_file

    def _moved(self, size: int) -> None:
        """Called in any thread."""
        with self._counting:
            self._done += size

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _told(self, error: PeermemError, aftermath: str) -> PeermemError:
        """Return the error with how far it came and what is there now."""
        done = f"{self._done} of {self._total} bytes were moved."
        message = " ".join(filter(None, (error.message, done, aftermath)))
        return type(error)(message, **(dict(error.metadata) | {"bytes_done": self._done}))


def _check_room(region: Region, request: StorageRequest, length: int) -> None:
    size = region.memory.length
    if request.region_offset + length > size:
        raise OutOfRange(
            f"Bytes {request.region_offset} to {request.region_offset + length} are outside {region.name}, which has "
            f"{size} bytes. Ask for fewer, or use a larger region.",
            region=region.name,
            length=size,
        )


class StorageRuns:
    """The loads and stores of this node."""

    def __init__(
        self,
        storage: Storage,
        find: Callable[[ChildName], Region],
        policy: Guard,
        tenants: Tenants,
        metrics: Metrics,
    ) -> None:
        """`find` returns a region of this node, as long as the node takes new work."""
        self._storage = storage
        self._find = find
        self._policy = policy
        self._tenants = tenants
        self._metrics = metrics
        self._running: set[StorageRun] = set()

    @contextmanager
    def watched(self, run: StorageRun) -> Iterator[None]:
        """Watch a load or store, which begins with its first watcher and fails when it has none any more.

        Raises RegionNotFound, AccessDenied, OutOfRange, WrongNode, RegionDeleted, RegionRevoked, LimitReached,
        QuotaExceeded, ShuttingDown.
        """
        run.watchers += 1
        try:
            if run.task is None:
                self._begin(run)
            yield
        finally:
            run.watchers -= 1
            if not run.watchers and not run.ended.is_set():
                run.fail(TransferCancelled(f"The call that asked for the {run.request.order.value} was ended."))

    def running(self) -> list[StorageRun]:
        """Return those that have not ended."""
        return list(self._running)

    def _begin(self, run: StorageRun) -> None:
        request = run.request
        self._tenants.request(run.subject)
        region = self._find(request.region)
        self._policy.check_region(run.subject, REGION_ACTIONS[request.order], region)
        self._policy.check_file(run.subject, request.order, request.path)
        region.check_usable()
        _check_room(region, request, max(1, request.length))
        if len(self._running) >= self._storage.limit:
            raise LimitReached(
                f"{self._storage.limit} loads and stores run on this node, its limit. Wait for one to end, or raise "
                "storage.max_running.",
                limit=self._storage.limit,
            )
        self._tenants.check_pace(run.subject)
        length = request.length or region.memory.length - request.region_offset  # of a whole file: at most this
        hold = self._tenants.hold(run.subject, {Resource.TRANSFERS: 1, Resource.OUTSTANDING: length})
        region.users.add(run)
        self._running.add(run)
        run.task = asyncio.get_running_loop().create_task(self._drive(run, region, hold))

    async def _drive(self, run: StorageRun, region: Region, hold: Hold) -> None:
        counting = asyncio.get_running_loop().create_task(self._count(run))
        await run.drive(region, self._storage)
        self._tenants.release(hold)
        self._running.discard(run)
        self._metrics.storage_ended(run.request.order, run.facts, run.error)
        await counting

    async def _count(self, run: StorageRun) -> None:
        """Count the bytes of a run while they move."""
        counted = 0
        ended = False
        while not ended:
            ended = await run.ended_within(_TICK)
            facts = run.facts
            if facts.way is not None and facts.bytes_done > counted:
                self._metrics.storage_bytes(run.request.order, facts.way, facts.bytes_done - counted)
                self._tenants.spend(run.subject, facts.bytes_done - counted)
                counted = facts.bytes_done
