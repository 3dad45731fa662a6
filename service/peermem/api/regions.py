"""RegionService: messages in, broker calls, messages out.

Rules of this file:

* Who watches a load or store sees the newest state, not each step: a slow reader costs nothing and misses no outcome.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from peermem.api.calls import Context, traceparent_of
from peermem.api.identity import Identity
from peermem.api.once import Once
from peermem.broker import published
from peermem.broker.broker import Broker
from peermem.broker.sessions import Session
from peermem.broker.storage import StorageRun
from peermem.core.errors import InvalidField, LimitReached
from peermem.core.identity import Subject
from peermem.core.names import parse_region
from peermem.core.policy import Action
from peermem.core.region import RegionFacts, RegionRequest
from peermem.core.storage import StorageRequest
from peermem.v1 import region_pb2, region_pb2_grpc
from peermem.wire import (
    labels_from_proto,
    lease_from_proto,
    lease_to_proto,
    load_request_from_proto,
    published_to_proto,
    region_to_proto,
    storage_to_proto,
    store_request_from_proto,
)

_CHUNK = 64 << 10
_MAX_STREAMS = 256
"""Streams of bytes at the same time: gRPC keeps about two chunks for each that is not read."""
_MAX_CHUNK = 1 << 20
_MAX_PAGE = 1000
_TICK = 0.1
"""Seconds between two reports of a load or store."""


class RegionService(region_pb2_grpc.RegionServiceServicer):
    """See protos/peermem/v1/region.proto."""

    def __init__(
        self,
        broker: Broker,
        identity: Identity,
        created: Once[RegionFacts],
        deleted: Once[None],
        loaded: Once[StorageRun],
        stored: Once[StorageRun],
    ) -> None:
        """`created`, `deleted`, `loaded` and `stored` remember the results of repeated requests."""
        self._broker = broker
        self._identity = identity
        self._created = created
        self._deleted = deleted
        self._loaded = loaded
        self._stored = stored
        self._streams = 0

    async def CreateRegion(self, request: region_pb2.CreateRegionRequest, context: Context) -> region_pb2.Region:
        """See the contract."""
        subject = await self._identity.subject(context)
        session = self._identity.session(context)
        if not request.WhichOneof("source"):
            raise InvalidField("CreateRegion needs a device, or memory to adopt.", field="source")
        gpu = request.gpu if request.HasField("gpu") else None
        if gpu is not None and not gpu.handle:
            raise InvalidField("Memory of a GPU is adopted by its handle, which is empty.", field="gpu.handle")
        wanted = RegionRequest(
            region_id=request.region_id,
            length=request.length,
            device=request.device if gpu is None else gpu.device,
            adopted=request.adopted,
            handle=b"" if gpu is None else gpu.handle,
            offset=0 if gpu is None else gpu.offset,
            labels=labels_from_proto(list(request.labels.items())),
            lease=lease_from_proto(request.lease),
            publish=request.publish,
        )
        content = request.SerializeToString(deterministic=True)
        facts = await self._created.run(
            subject, request.request_id, content, lambda: self._create(subject, session, wanted)
        )
        return region_to_proto(facts)

    async def _create(self, subject: Subject, session: Session | None, wanted: RegionRequest) -> RegionFacts:
        return (await self._broker.create_region(subject, session, wanted)).facts

    async def GetRegion(self, request: region_pb2.GetRegionRequest, context: Context) -> region_pb2.Region:
        """See the contract."""
        subject = await self._identity.subject(context)
        return region_to_proto(self._broker.seen_region(subject, parse_region(request.name)).facts)

    async def ListRegions(
        self, request: region_pb2.ListRegionsRequest, context: Context
    ) -> region_pb2.ListRegionsResponse:
        """See the contract."""
        size = page_size(request.page_size)
        seen = self._broker.eyes(await self._identity.subject(context))
        found = self._broker.regions.page(request.page_token, size + 1, request.labels, seen)
        token = found[size - 1].name.id if len(found) > size else ""
        return region_pb2.ListRegionsResponse(
            regions=[region_to_proto(region.facts) for region in found[:size]], next_page_token=token
        )

    async def FindRegions(
        self, request: region_pb2.FindRegionsRequest, context: Context
    ) -> region_pb2.FindRegionsResponse:
        """See the contract."""
        size = page_size(request.page_size)
        labels = labels_from_proto(list(request.labels.items()))
        after = parse_region(request.page_token, "page_token") if request.page_token else None
        subject = await self._identity.subject(context)
        found, last = await published.find(self._broker, subject, labels, after, size)
        return region_pb2.FindRegionsResponse(
            regions=map(published_to_proto, found), next_page_token=str(last) if last is not None else ""
        )

    async def DeleteRegion(
        self, request: region_pb2.DeleteRegionRequest, context: Context
    ) -> region_pb2.DeleteRegionResponse:
        """See the contract."""
        subject = await self._identity.subject(context)
        name = parse_region(request.name)
        content = request.SerializeToString(deterministic=True)
        await self._deleted.run(
            subject,
            request.request_id,
            content,
            lambda: self._broker.delete_region(subject, name, force=request.force),
        )
        return region_pb2.DeleteRegionResponse()

    async def RenewLease(
        self, request: region_pb2.RenewLeaseRequest, context: Context
    ) -> region_pb2.RenewLeaseResponse:
        """See the contract."""
        if not 1 <= len(request.names) <= _MAX_PAGE:
            raise InvalidField(f"names must hold 1 to {_MAX_PAGE} regions, not {len(request.names)}.", field="names")
        names = [parse_region(name, "names") for name in request.names]
        regions = self._broker.renew_leases(await self._identity.subject(context), names)
        return region_pb2.RenewLeaseResponse(
            leases=[lease_to_proto(region.lease, region.expires_at) for region in regions]
        )

    async def ReadRegion(
        self, request: region_pb2.ReadRegionRequest, context: Context
    ) -> AsyncIterator[region_pb2.ReadRegionResponse]:
        """See the contract."""
        name = parse_region(request.name)
        length = request.length or max(0, self._broker.region(name).memory.length - request.offset)
        subject = await self._identity.subject(context)
        with self._stream(), self._broker.use_region(subject, name, Action.READ, request.offset, length) as use:
            for done in range(0, length, _CHUNK):
                size = min(_CHUNK, length - done)
                await self._broker.tenants.pace(subject, size)
                data = await use.read(request.offset + done, size)
                yield region_pb2.ReadRegionResponse(data=data)

    async def WriteRegion(
        self, requests: AsyncIterator[region_pb2.WriteRegionRequest], context: Context
    ) -> region_pb2.WriteRegionResponse:
        """See the contract."""
        subject = await self._identity.subject(context)
        requests = aiter(requests)
        first = await anext(requests, None)
        if first is None:
            raise InvalidField("WriteRegion needs a first message that names the region.", field="name")
        name, offset, data = parse_region(first.name), first.offset, first.data
        with self._stream(), self._broker.use_region(subject, name, Action.WRITE, offset, len(data)) as use:
            while True:
                if len(data) > _MAX_CHUNK:
                    raise InvalidField(f"data has {len(data)} bytes; a chunk has at most {_MAX_CHUNK}.", field="data")
                use.check_inside(offset, len(data))
                await self._broker.tenants.pace(subject, len(data))
                await use.write(offset, data)
                offset += len(data)
                message = await anext(requests, None)
                if message is None:
                    return region_pb2.WriteRegionResponse(length=offset - first.offset)
                data = message.data

    async def LoadRegion(
        self, request: region_pb2.LoadRegionRequest, context: Context
    ) -> AsyncIterator[region_pb2.StorageProgress]:
        """See the contract."""
        wanted = load_request_from_proto(request)
        async with aclosing(self._carry(self._loaded, request, wanted, context)) as steps:
            async for progress in steps:
                yield progress

    async def StoreRegion(
        self, request: region_pb2.StoreRegionRequest, context: Context
    ) -> AsyncIterator[region_pb2.StorageProgress]:
        """See the contract."""
        wanted = store_request_from_proto(request)
        async with aclosing(self._carry(self._stored, request, wanted, context)) as steps:
            async for progress in steps:
                yield progress

    async def _carry(
        self,
        known: Once[StorageRun],
        request: region_pb2.LoadRegionRequest | region_pb2.StoreRegionRequest,
        wanted: StorageRequest,
        context: Context,
    ) -> AsyncGenerator[region_pb2.StorageProgress]:
        """Begin a load or store, or find the one that this request began before, and tell how far it is."""
        subject = await self._identity.subject(context)

        async def make() -> StorageRun:
            return StorageRun(subject, replace(wanted, traceparent=traceparent_of(context)))

        content = request.SerializeToString(deterministic=True)
        run = await known.run(subject, request.request_id, content, make)
        with self._broker.storage.watched(run):
            told = None
            while not await run.ended_within(_TICK):
                before, told = told, run.facts
                if told != before:
                    yield storage_to_proto(told)
        if run.error is not None:
            raise run.error
        yield storage_to_proto(run.facts)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        if self._streams >= _MAX_STREAMS:
            raise LimitReached(f"{_MAX_STREAMS} streams of bytes are open, the limit. Close some.", limit=_MAX_STREAMS)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


def page_size(asked: int) -> int:
    """Return the size of a page. Raises InvalidField."""
    if not 0 <= asked <= _MAX_PAGE:
        raise InvalidField(f"page_size {asked} must be 0 to {_MAX_PAGE}.", field="page_size")
    return asked or _MAX_PAGE
