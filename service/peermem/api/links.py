"""LinkService: other daemons open links and ask for grants. The only service where keys travel.

Rules of this file:

* Only a node's daemon gets in. Over TLS it is the node that its certificate says, and a link is that node's only.
* Each call about a link vouches for a while for what comes on its rails, without a certificate.
"""

from __future__ import annotations

from collections.abc import Callable

from peermem.api.calls import Context
from peermem.api.grants import GrantExchanges
from peermem.api.identity import Identity, spoken_subject
from peermem.broker.serving import Serving
from peermem.broker.vouching import Vouching
from peermem.core.errors import AccessDenied, FabricUnavailable, InvalidField
from peermem.core.names import parse_node, parse_region
from peermem.core.types import FabricKind, LinkAttributes
from peermem.fabric.base import Asker
from peermem.v1 import link_pb2, link_pb2_grpc
from peermem.wire import fabric_from_proto
from peermem.wire_links import opened_to_proto, queue_pairs_from_proto, right_from_proto

_MAX_COPIED = 4096
"""Pieces of one copy between a region and its staging buffer."""


class LinkService(link_pb2_grpc.LinkServiceServicer):
    """See protos/peermem/v1/link.proto."""

    def __init__(self, serving: Serving, vouching: Vouching, identity: Identity, max_rails: int) -> None:
        self._serving = serving
        self._vouching = vouching
        self._identity = identity
        self._max_rails = max_rails
        self._exchanges = GrantExchanges(serving, vouching)

    async def OpenLink(self, request: link_pb2.OpenLinkRequest, context: Context) -> link_pb2.OpenLinkResponse:
        """See the contract."""
        node = self._caller(parse_node(request.node, "node"), context)
        fabric = fabric_from_proto(request.fabric)
        if fabric in (None, FabricKind.LOCAL):
            raise FabricUnavailable("OpenLink needs a fabric that reaches other nodes, such as tcp.")
        if not 1 <= request.rails <= 16:
            raise InvalidField(f"rails {request.rails} must be 1 to 16.", field="rails")
        subject = spoken_subject(request.subject, "subject") if request.subject else None
        if subject is not None and not request.link_id:
            await self._vouching.check_link(node, subject)
        ends = queue_pairs_from_proto(request.queue_pairs)
        rails = request.rails if ends else min(request.rails, self._max_rails)
        offer = LinkAttributes(
            fabric, rails, request.link_id, queue_pairs=ends, subject=str(subject) if subject is not None else ""
        )
        opened = self._serving.open_link(node, offer, self._identity.voucher(context))
        return opened_to_proto(opened.attributes, opened.epoch)

    async def CloseLink(self, request: link_pb2.CloseLinkRequest, context: Context) -> link_pb2.CloseLinkResponse:
        """See the contract."""
        self._check_link(request.link_id, context)
        await self._serving.close_link(request.link_id)
        return link_pb2.CloseLinkResponse()

    async def ExchangeGrants(  # type: ignore[override]  # written with context.read and write: half the latency
        self, requests: object, context: Context
    ) -> None:
        """See the contract."""
        await self._exchanges.serve(context, lambda link_id: self._check_link(link_id, context))

    def met(self, asker: Asker) -> Callable[[bytes], None]:
        """Return what takes what another daemon asks on a rail of its link. See `fabric.base.Met`."""
        return self._exchanges.met(asker)

    def close(self) -> None:
        """End the exchanges of grants, which else go on for as long as their callers like."""
        self._exchanges.close()

    async def ConfirmRelay(
        self, request: link_pb2.ConfirmRelayRequest, context: Context
    ) -> link_pb2.ConfirmRelayResponse:
        """See the contract."""
        self._identity.node(context)
        node, subject = parse_node(request.node, "node"), spoken_subject(request.subject, "subject")
        if not request.region:
            self._vouching.check_runs(node, str(subject))
        else:
            region, right = parse_region(request.region, "region"), right_from_proto(request.right)
            self._vouching.check_relayed(node, subject, region, right)
        return link_pb2.ConfirmRelayResponse()

    async def CopyStaged(self, request: link_pb2.CopyStagedRequest, context: Context) -> link_pb2.CopyStagedResponse:
        """See the contract."""
        self._check_link(request.link_id, context)
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
        self._check_link(request.link_id, context)
        await self._serving.flush(request.link_id, request.grant_id)
        return link_pb2.FlushResponse()

    async def Checksum(self, request: link_pb2.ChecksumRequest, context: Context) -> link_pb2.ChecksumResponse:
        """See the contract."""
        self._check_link(request.link_id, context)
        value = await self._serving.checksum(
            request.link_id, request.grant_id, request.offsets, request.lengths, request.initial
        )
        return link_pb2.ChecksumResponse(crc32c=value)

    def _caller(self, claimed: str, context: Context) -> str:
        """Return the node that calls, which says that it is `claimed`. Raises AccessDenied, Unauthenticated."""
        node = self._identity.node(context)
        if node and node != claimed:
            raise AccessDenied(
                f"The caller says that it is nodes/{claimed}, and its certificate that it is nodes/{node}. Correct its "
                "configuration.",
                node=node,
            )
        return claimed

    def _check_link(self, link_id: bytes, context: Context) -> None:
        """Return where the caller may use a link, or there is no such link. Raises AccessDenied, Unauthenticated."""
        node = self._identity.node(context)
        if node:
            self._serving.check_node(link_id, node)
        self._serving.vouch(link_id, self._identity.voucher(context))
