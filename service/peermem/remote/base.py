"""What the broker needs of another daemon, in core values. Every call may raise NodeUnreachable.

Keys and secrets cross here and nowhere else; what holds them hides them from repr.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peermem.core.grant import Wanted
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.node import NodeFacts
from peermem.core.transfer import TransferFacts, TransferRequest
from peermem.core.types import GrantedKey, LinkAttributes, Rights


@dataclass(frozen=True, slots=True)
class OpenedLink:
    """What the accepting daemon answered."""

    attributes: LinkAttributes
    epoch: str
    """Identifies the run of the accepting daemon; part of every later call on the link."""


class Ear(Protocol):
    """What takes in what a link's rails carry here from the daemon at its far end."""

    def heard(self, message: bytes) -> None:
        """A message came. Raises MalformedMessage."""

    def broke(self) -> None:
        """A rail broke: what was on it is lost."""


class GrantSource(Protocol):
    """The side that owns memory and lets links access it: a remote daemon, or this one for itself."""

    async def open_link(self, offer: LinkAttributes) -> OpenedLink:
        """Have a link accepted, or one with the id in `offer` rebuilt.

        Raises AccessDenied, FabricUnavailable, LimitReached, LinkNotFound, ShuttingDown.
        """

    def use_rails(self, link_id: bytes, carry: Callable[[bytes], bool]) -> Ear:
        """Ask on the rails of an open link as well, until `close_link`. `carry` is the fabric link's (`Link.carry`)."""

    async def close_link(self, link_id: bytes) -> None:
        """End a link and its grants. Unknown ids are no error."""

    async def acquire_grant(self, link_id: bytes, epoch: str, wanted: Wanted) -> GrantedKey:
        """Get the right to a range of a region. For a caller that is cancelled nothing stays granted.

        Raises RegionNotFound, RegionDeleted, RegionRevoked, AccessDenied, OutOfRange, FabricUnavailable, LinkNotFound,
        StaleEpoch, LimitReached.
        """

    async def release_grants(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        """End grants; when this returns, no byte moves under them any more."""

    def give_back(self, link_id: bytes, grant_id: int) -> None:
        """Have a grant ended soon, under which nothing is under way. Where that fails, its time ends it."""

    async def copy_staged(
        self, link_id: bytes, grant_id: int, pieces: Sequence[tuple[int, int, int]], *, into_region: bool
    ) -> None:
        """Copy between the staging buffer of a grant and its region.

        `pieces` are (offset in the region from the grant's first byte, offset in the buffer, length). Raises
        GrantRefused, OutOfRange, RegionDeleted, RegionRevoked.
        """

    async def flush(self, link_id: bytes, grant_id: int) -> None:
        """Make what was written under a grant visible to its device. Raises GrantRefused, GpuFailed, RegionDeleted,
        RegionRevoked."""

    async def checksum(
        self, link_id: bytes, grant_id: int, offsets: Sequence[int], lengths: Sequence[int], initial: int
    ) -> int:
        """Return the CRC32C of ranges under a grant, on top of `initial`. `offsets` are from the grant's first byte.

        Raises GrantRefused, OutOfRange.
        """


class RemoteNode(GrantSource, Protocol):
    """Another daemon."""

    async def create_transfer(self, request: TransferRequest, request_id: str, subject: Subject) -> TransferFacts:
        """Have it run a transfer for `subject`. Raises what its CreateTransfer raises."""

    def watch_transfer(self, name: ChildName, subject: Subject) -> AsyncGenerator[TransferFacts, None]:
        """Iterate for `subject` over the transfer as it stands, up to its outcome. Raises TransferNotFound."""

    async def cancel_transfer(self, name: ChildName, subject: Subject) -> None:
        """Cancel for `subject`; returns when the fence is up. Raises TransferNotFound, AccessDenied."""

    async def confirm_relay(self, node: str, subject: Subject, region: ChildName, right: Rights) -> None:
        """Return where it has `node` run a transfer for its client `subject` that needs a right to a region.

        Raises AccessDenied.
        """

    async def confirm_runs(self, node: str, subject: Subject) -> None:
        """Return where it has `node` run some transfer for its client `subject`. Raises AccessDenied."""

    async def node_facts(self) -> NodeFacts:
        """Return what it says of itself."""

    async def close(self) -> None:
        """Drop the connection."""


class Remotes(Protocol):
    """Every node that the directory knows, as a daemon to talk to."""

    def get(self, node: str) -> RemoteNode:
        """Return the daemon of `node`. Raises NodeNotFound."""

    async def close(self) -> None:
        """Drop all connections."""
