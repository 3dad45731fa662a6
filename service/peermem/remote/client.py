"""Other daemons over gRPC.

Rules of this file:

* Every gRPC error becomes a PeermemError here: the one that the other daemon described, else
  NodeUnreachable.
* Every call has a deadline; a daemon that does not answer is unreachable.
* A call that found no connection is made again, once, on a new one.
* What leads to where no node is any more is closed when the last call and link there has ended.
* Grants are asked for on their link's rails where these carry it, which takes a fraction of the time; where they
  don't, or not in time, by a call. What is a fence is a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from peermem.core.errors import (
    DOMAIN,
    InvalidField,
    LimitReached,
    NodeNotFound,
    NodeUnreachable,
    PeermemError,
    Unauthenticated,
)
from peermem.core.grant import Wanted
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.node import NodeFacts
from peermem.core.transfer import TransferFacts, TransferRequest
from peermem.core.types import GrantedKey, LinkAttributes, Rights
from peermem.credentials.base import Credentials
from peermem.remote.base import Ear, OpenedLink, RemoteNode, Remotes
from peermem.remote.connection import Connection, Door, NotThatNode
from peermem.remote.grants import GrantCall, GrantExchange, GrantRails, Lost
from peermem.v1 import link_pb2, node_pb2, transfer_pb2
from peermem.wire import FABRICS, node_from_proto, transfer_from_proto, transfer_request_to_proto
from peermem.wire_links import grant_from_proto, opened_from_proto, queue_pairs_to_proto

T = TypeVar("T")

_DEADLINE = 5.0
"""Seconds for a call that the other daemon answers at once."""
_RAILS_DEADLINE = 3.0
"""Seconds for an answer on rails, until it is asked for by a call."""
_FEW = 64
"""Nodes of which none is let go because the directory does not know it."""
_RIGHTS = {Rights.READ: link_pb2.RIGHT_READ, Rights.WRITE: link_pb2.RIGHT_WRITE}
_SLOW_DEADLINE = 120.0
"""Seconds for a call that moves or checks bytes before it answers."""


class GrpcRemotes:
    """All other daemons, found by a directory."""

    def __init__(
        self, here: str, epoch: str, address_of: Callable[[str], str], credentials: Credentials | None = None
    ) -> None:
        """`here`, `epoch` and `credentials` are this node's; `address_of` returns host:port of a node or raises
        NodeNotFound."""
        self._here = here
        self._epoch = epoch
        self._address_of = address_of
        self._credentials = credentials
        self._nodes: dict[str, GrpcRemoteNode] = {}
        self._enough = _FEW
        """Nodes from which on those are let go that the directory does not know any more."""
        self._moved: list[GrpcRemoteNode] = []
        """Daemons that are not there any more, as far as is known; calls to them may be under way."""

    def get(self, node: str) -> RemoteNode:
        """See Remotes."""
        address = self._address_of(node)
        known = self._nodes.get(node)
        if known is not None and known.address == address:
            return known
        if known is not None:
            self._moved.append(self._nodes.pop(node))
        elif len(self._nodes) >= self._enough:
            self._let_go_of_gone()
        self._moved = [each for each in self._moved if not each.rest()]
        door = Door(node, address, self._credentials)
        made = self._nodes[node] = GrpcRemoteNode(door, node, self._here, self._epoch)
        return made

    def _let_go_of_gone(self) -> None:
        gone = [node for node, there in self._nodes.items() if not (there.links or self._is_at(node, there.address))]
        self._moved += map(self._nodes.pop, gone)
        self._enough = max(_FEW, 2 * len(self._nodes))

    def _is_at(self, node: str, address: str) -> bool:
        try:
            return self._address_of(node) == address
        except NodeNotFound:
            return False

    async def close(self) -> None:
        """See Remotes."""
        for node in (*self._nodes.values(), *self._moved):
            await node.close()
        self._nodes.clear()
        self._moved.clear()


class GrpcRemoteNode:
    """One other daemon."""

    def __init__(self, door: Door, node: str, here: str, epoch: str) -> None:
        self.address = door.address
        self.links: set[bytes] = set()
        """Open ones; the exchange of grants ends with the last."""
        self._door = door
        self._node = node
        self._here = here
        self._epoch = epoch
        self._rails: dict[bytes, GrantRails] = {}
        """Of links whose rails carry questions."""
        self._grants: GrantCall | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def open_link(self, offer: LinkAttributes) -> OpenedLink:
        """See GrantSource."""
        request = link_pb2.OpenLinkRequest(
            node=f"nodes/{self._here}",
            epoch=self._epoch,
            fabric=FABRICS[offer.fabric],
            rails=offer.rails,
            queue_pairs=queue_pairs_to_proto(offer.queue_pairs),
            link_id=offer.link_id,
            subject=offer.subject,
        )
        answer = await self._call(lambda to: to.links.OpenLink(request, timeout=_DEADLINE))
        with self._faults():
            opened = OpenedLink(opened_from_proto(offer.fabric, answer), answer.epoch)
        self.links.add(opened.attributes.link_id)
        return opened

    def use_rails(self, link_id: bytes, carry: Callable[[bytes], bool]) -> Ear:
        """See GrantSource."""
        rails = self._rails[link_id] = GrantRails(carry)
        return rails

    async def close_link(self, link_id: bytes) -> None:
        """See GrantSource."""
        if (rails := self._rails.pop(link_id, None)) is not None:
            rails.close()
        request = link_pb2.CloseLinkRequest(link_id=link_id)
        try:
            await self._call(lambda to: to.links.CloseLink(request, timeout=_DEADLINE))
        finally:
            self.links.discard(link_id)
            if not self.links:
                self._end_call()

    def _end_call(self) -> None:
        call, self._grants = self._grants, None
        if call is not None:
            closing = asyncio.get_running_loop().create_task(call.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _ask(self, ask: Callable[[GrantExchange], Awaitable[T]]) -> T:
        """Ask on the exchange of grants, as `_call` makes calls."""
        return await self._call(lambda to: ask(self._exchange_on(to)))

    def _exchange_on(self, connection: Connection) -> GrantExchange:
        if self._grants is None or not self._grants.serves(connection):
            self._end_call()
            self._grants = GrantCall(connection)
        return self._grants.exchange

    async def acquire_grant(self, link_id: bytes, epoch: str, wanted: Wanted) -> GrantedKey:
        """See GrantSource."""
        question = link_pb2.AcquireGrant(
            link_id=link_id,
            epoch=epoch,
            region=str(wanted.region),
            right=_RIGHTS[wanted.right],
            subject=self._on_behalf(wanted.subject),
            offset=wanted.offset,
            length=wanted.length,
            staged=wanted.staged,
            traceparent=wanted.traceparent,
        )
        grant = await self._acquire(question)
        with self._faults():
            return grant_from_proto(grant)

    async def _acquire(self, question: link_pb2.AcquireGrant) -> link_pb2.Grant:
        rails = self._rails.get(question.link_id)
        if rails is not None and rails.serves:
            try:
                return await rails.exchange.acquire(question, _RAILS_DEADLINE)
            except (Lost, TimeoutError, Unauthenticated):
                pass
        if rails is not None:
            rails.vouched()
        return await self._ask(lambda exchange: exchange.acquire(question, _DEADLINE))

    async def release_grants(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        """See GrantSource."""
        await self._ask(lambda exchange: exchange.release(link_id, grant_ids, _DEADLINE))

    def give_back(self, link_id: bytes, grant_id: int) -> None:
        """See GrantSource."""
        if (rails := self._rails.get(link_id)) is not None and rails.serves:
            rails.exchange.give_back(link_id, [grant_id])
        elif self._grants is not None and not self._grants.is_over:  # else its link broke as well
            self._grants.exchange.give_back(link_id, [grant_id])

    async def copy_staged(
        self, link_id: bytes, grant_id: int, pieces: Sequence[tuple[int, int, int]], *, into_region: bool
    ) -> None:
        """See GrantSource."""
        region_offsets, buffer_offsets, lengths = zip(*pieces, strict=True)
        request = link_pb2.CopyStagedRequest(
            link_id=link_id,
            grant_id=grant_id,
            into_region=into_region,
            region_offsets=region_offsets,
            buffer_offsets=buffer_offsets,
            lengths=lengths,
        )
        await self._call(lambda to: to.links.CopyStaged(request, timeout=_SLOW_DEADLINE))

    async def flush(self, link_id: bytes, grant_id: int) -> None:
        """See GrantSource."""
        request = link_pb2.FlushRequest(link_id=link_id, grant_id=grant_id)
        await self._call(lambda to: to.links.Flush(request, timeout=_SLOW_DEADLINE))

    async def checksum(
        self, link_id: bytes, grant_id: int, offsets: Sequence[int], lengths: Sequence[int], initial: int
    ) -> int:
        """See GrantSource."""
        request = link_pb2.ChecksumRequest(
            link_id=link_id, grant_id=grant_id, offsets=offsets, lengths=lengths, initial=initial
        )
        answer = await self._call(lambda to: to.links.Checksum(request, timeout=_SLOW_DEADLINE))
        return answer.crc32c

    async def create_transfer(self, request: TransferRequest, request_id: str, subject: Subject) -> TransferFacts:
        """See RemoteNode."""
        message = transfer_request_to_proto(request, request_id)
        metadata = self._metadata(subject)
        answer = await self._call(lambda to: to.transfers.CreateTransfer(message, timeout=_DEADLINE, metadata=metadata))
        with self._faults():
            return transfer_from_proto(answer)

    async def watch_transfer(self, name: ChildName, subject: Subject) -> AsyncGenerator[TransferFacts, None]:
        """See RemoteNode."""
        request = transfer_pb2.WatchTransferRequest(name=str(name))
        with self._faults():
            async with self._door.use() as to:
                call = to.transfers.WatchTransfer(request, metadata=self._metadata(subject))
                try:
                    async for message in call:
                        yield transfer_from_proto(message)
                finally:
                    call.cancel()

    async def cancel_transfer(self, name: ChildName, subject: Subject) -> None:
        """See RemoteNode."""
        request = transfer_pb2.CancelTransferRequest(name=str(name))
        metadata = self._metadata(subject)
        await self._call(lambda to: to.transfers.CancelTransfer(request, timeout=_SLOW_DEADLINE, metadata=metadata))

    async def confirm_relay(self, node: str, subject: Subject, region: ChildName, right: Rights) -> None:
        """See RemoteNode."""
        request = link_pb2.ConfirmRelayRequest(
            node=f"nodes/{node}", subject=subject.spoken(), region=str(region), right=_RIGHTS[right]
        )
        await self._call(lambda to: to.links.ConfirmRelay(request, timeout=_DEADLINE))

    async def confirm_runs(self, node: str, subject: Subject) -> None:
        """See RemoteNode."""
        request = link_pb2.ConfirmRelayRequest(node=f"nodes/{node}", subject=str(subject))
        await self._call(lambda to: to.links.ConfirmRelay(request, timeout=_DEADLINE))

    async def node_facts(self) -> NodeFacts:
        """See RemoteNode."""
        message = await self._call(lambda to: to.nodes.GetNode(node_pb2.GetNodeRequest(), timeout=_DEADLINE))
        with self._faults():
            return node_from_proto(message)

    def rest(self) -> bool:
        """Keep nothing open but for calls and links; return whether nothing is."""
        return self._door.rest() and not (self.links or self._closing)

    async def close(self) -> None:
        """See RemoteNode."""
        for rails in self._rails.values():
            rails.close()
        self._end_call()
        await self._door.close()
        if self._closing:
            await asyncio.wait(list(self._closing))

    async def _call(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        with self._faults():
            try:
                async with self._door.use() as to:
                    return await call(to)
            except grpc.aio.AioRpcError as error:
                if not _never_sent(error):
                    raise
            # the daemon may have come back meanwhile, with another certificate
            async with self._door.use() as to:
                return await call(to)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what gRPC raises, and what is wrong with an answer, into PeermemError."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._fault(error) from None
        except NotThatNode as error:
            raise self._unreachable("UNAVAILABLE" if error.absent else "UNAUTHENTICATED", str(error)) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # not this task but the call was cancelled: its connection was replaced
            raise self._unreachable("UNAVAILABLE", "the connection was given up") from None
        except TimeoutError:
            raise self._unreachable("DEADLINE_EXCEEDED", "no answer in time") from None
        except (DecodeError, ValueError, InvalidField) as error:
            raise self._unreachable("INTERNAL", f"its answer makes no sense: {error}") from None

    def _fault(self, error: grpc.aio.AioRpcError) -> PeermemError:
        described = _described(error)
        if described is not None:
            return described
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LimitReached(f"nodes/{self._node} at {self.address} refused the call: {error.details()}.")
        return self._unreachable(error.code().name, error.details() or "no details")

    def _unreachable(self, code: str, cause: str) -> NodeUnreachable:
        return NodeUnreachable(
            f"The daemon of nodes/{self._node} at {self.address} did not answer "
            f"({code}: {cause}). Check that it runs and that the address is right.",
            node=self._node,
            address=self.address,
            code=code,
            listens="no" if "onnection refused" in cause else "unknown",
        )

    def _on_behalf(self, subject: Subject) -> str:
        return subject.vouched_for(self._here).spoken()

    def _metadata(self, subject: Subject) -> tuple[tuple[str, str], ...]:
        return (("peermem-on-behalf-of", self._on_behalf(subject)),)


def _never_sent(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call failed because no connection came about, so that making it again makes it once."""
    details = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith("failed to connect to all addresses")


def _described(error: grpc.aio.AioRpcError) -> PeermemError | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in Status.FromString(value).details:
                info = ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return PeermemError.restore(info.reason, error.details() or "", dict(info.metadata))
    return None


if TYPE_CHECKING:
    _node: type[RemoteNode] = GrpcRemoteNode
    _remotes: type[Remotes] = GrpcRemotes
