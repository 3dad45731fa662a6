"""LinkService: other daemons open links and ask for grants. The only service where keys travel."""

from __future__ import annotations

from peermem.api.calls import Context
from peermem.api.identity import on_behalf
from peermem.broker.serving import Serving
from peermem.core.errors import FabricUnavailable, InvalidField
from peermem.core.names import parse_node, parse_region
from peermem.core.types import FabricKind, LinkAttributes, Rights
from peermem.v1 import link_pb2, link_pb2_grpc
from peermem.wire import duration_to_proto, fabric_from_proto

_MAX_RELEASED = 1000
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
        offer = LinkAttributes(fabric, min(request.rails, self._max_rails))
        opened = self._serving.open_link(parse_node(request.node, "node"), offer)
        return link_pb2.OpenLinkResponse(
            link_id=opened.attributes.link_id,
            epoch=opened.epoch,
            address=opened.attributes.address,
            secret=opened.attributes.secret,
            rails=opened.attributes.rails,
        )

    async def CloseLink(self, request: link_pb2.CloseLinkRequest, context: Context) -> link_pb2.CloseLinkResponse:
        """See the contract."""
        await self._serving.close_link(request.link_id)
        return link_pb2.CloseLinkResponse()

    async def AcquireGrant(self, request: link_pb2.AcquireGrantRequest, context: Context) -> link_pb2.Grant:
        """See the contract."""
        if request.right not in _RIGHTS:
            raise InvalidField("right must be READ or WRITE.", field="right")
        granted = self._serving.acquire(
            request.link_id,
            request.epoch,
            parse_region(request.region, "region"),
            _RIGHTS[request.right],
            on_behalf(request.subject, "subject"),
        )
        return link_pb2.Grant(
            grant_id=granted.grant_id,
            rkey=granted.key.rkey,
            address=granted.key.address,
            length=granted.key.length,
            ttl=duration_to_proto(granted.ttl),
            region_uid=granted.region_uid,
        )

    async def ReleaseGrants(
        self, request: link_pb2.ReleaseGrantsRequest, context: Context
    ) -> link_pb2.ReleaseGrantsResponse:
        """See the contract."""
        if len(request.grant_ids) > _MAX_RELEASED:
            raise InvalidField(f"grant_ids must hold at most {_MAX_RELEASED}.", field="grant_ids")
        await self._serving.release(request.link_id, request.grant_ids)
        return link_pb2.ReleaseGrantsResponse()

    async def Checksum(self, request: link_pb2.ChecksumRequest, context: Context) -> link_pb2.ChecksumResponse:
        """See the contract."""
        value = await self._serving.checksum(
            request.link_id, request.grant_id, request.offsets, request.lengths, request.initial
        )
        return link_pb2.ChecksumResponse(crc32c=value)
