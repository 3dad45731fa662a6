"""LinkService: other daemons open links and ask for grants. The only service where keys travel."""

from __future__ import annotations

from peermem.api.calls import Context
from peermem.api.identity import spoken_subject
from peermem.broker.serving import Serving
from peermem.core.errors import FabricUnavailable, InvalidField
from peermem.core.grant import Wanted
from peermem.core.names import parse_node, parse_region
from peermem.core.types import FabricKind, LinkAttributes, Rights
from peermem.v1 import link_pb2, link_pb2_grpc
from peermem.wire import fabric_from_proto
from peermem.wire_links import grant_to_proto, opened_to_proto, queue_pairs_from_proto

_MAX_RELEASED = 1000
_MAX_COPIED = 4096
"""Pieces of one copy between a region and its staging buffer."""
_RIGHTS = {link_pb2.RIGHT_READ: Rights.READ, link_pb2.RIGHT_WRITE: Rights.WRITE}


class LinkService(link_pb2_grpc.LinkServiceServicer):
    """See protos/peermem/v1/link.proto."""

    def __init__(self, serving: Serving, max_rails: int) -> None:
        self._serving = serving
        self._max_rails = max_rails

    async def OpenLink(self, request: link_pb2.OpenLinkRequest, context: Context) -> link_pb2.OpenLinkResponse:
        """See the contract."""
        fabric = fabric_from_proto(request.fabric)
        if fabric in (None, FabricKind.LOCAL):
            raise FabricUnavailable("OpenLink needs a fabric that reaches other nodes, such as tcp.")
        if not 1 <= request.rails <= 16:
            raise InvalidField(f"rails {request.rails} must be 1 to 16.", field="rails")
        ends = queue_pairs_from_proto(request.queue_pairs)
        rails = request.rails if ends else min(request.rails, self._max_rails)
        offer = LinkAttributes(fabric, rails, request.link_id, queue_pairs=ends)
        opened = self._serving.open_link(parse_node(request.node, "node"), offer)
        return opened_to_proto(opened.attributes, opened.epoch)

    async def CloseLink(self, request: link_pb2.CloseLinkRequest, context: Context) -> link_pb2.CloseLinkResponse:
        """See the contract."""
        await self._serving.close_link(request.link_id)
        return link_pb2.CloseLinkResponse()

    async def AcquireGrant(self, request: link_pb2.AcquireGrantRequest, context: Context) -> link_pb2.Grant:
        """See the contract."""
        if request.right not in _RIGHTS:
            raise InvalidField("right must be READ or WRITE.", field="right")
        if not request.length:
            raise InvalidField("length must be at least 1 byte.", field="length")
        wanted = Wanted(
            parse_region(request.region, "region"),
            _RIGHTS[request.right],
            spoken_subject(request.subject, "subject"),
            request.offset,
            request.length,
            request.staged,
        )
        return grant_to_proto(await self._serving.acquire(request.link_id, request.epoch, wanted))

    async def ReleaseGrants(
        self, request: link_pb2.ReleaseGrantsRequest, context: Context
    ) -> link_pb2.ReleaseGrantsResponse:
        """See the contract."""
        if len(request.grant_ids) > _MAX_RELEASED:
            raise InvalidField(f"grant_ids must hold at most {_MAX_RELEASED}.", field="grant_ids")
        await self._serving.release(request.link_id, request.grant_ids)
        return link_pb2.ReleaseGrantsResponse()

    async def CopyStaged(self, request: link_pb2.CopyStagedRequest, context: Context) -> link_pb2.CopyStagedResponse:
        """See the contract."""
        columns = (request.region_offsets, request.buffer_offsets, request.lengths)
        if len(set(map(len, columns))) != 1 or not 1 <= len(request.lengths) <= _MAX_COPIED:
            raise InvalidField(
                f"region_offsets, buffer_offsets and lengths must have the same number of entries, 1 to {_MAX_COPIED}.",
                field="lengths",
            )
        pieces = tuple(zip(*columns, strict=True))
        await self._serving.copy_staged(request.link_id, request.grant_id, pieces, into_region=request.into_region)
        return link_pb2.CopyStagedResponse()

    async def Flush(self, request: link_pb2.FlushRequest, context: Context) -> link_pb2.FlushResponse:
        """See the contract."""
        await self._serving.flush(request.link_id, request.grant_id)
        return link_pb2.FlushResponse()

    async def Checksum(self, request: link_pb2.ChecksumRequest, context: Context) -> link_pb2.ChecksumResponse:
        """See the contract."""
        value = await self._serving.checksum(
            request.link_id, request.grant_id, request.offsets, request.lengths, request.initial
        )
        return link_pb2.ChecksumResponse(crc32c=value)
