"""What the broker needs of a fabric.

Rules that every fabric keeps (`tests/fabric/conformance.py` runs them on each one):

* Nothing blocks: `post` queues work and returns; completions arrive on the event loop.
* Each posted work request is completed exactly once, also when the link closes or breaks
  (WR_FLUSH_ERR). A WRITE's SUCCESS means that its bytes are in the remote memory, a READ's that they
  are in the local memory.
* The side that owns memory checks each access against the grant: link, right, range, expiry.
* After `revoke` returns, no byte is read or written under that key. After a link's `close` returns,
  no byte is written into local memory on its behalf.
* Closing twice is no error. Using a closed link raises LinkClosed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from peermem.core.types import FabricKind, LinkAttributes, Ranges, RemoteKey, Rights
from peermem.memory import Memory


class Opcode(Enum):
    """One-sided operations, seen from the side that posts."""

    WRITE = 1
    READ = 2


class Status(Enum):
    """How a work request ended, under the names of ibv_wc_status (rdma-core, libibverbs/verbs.h)."""

    SUCCESS = "SUCCESS"
    LOC_PROT_ERR = "LOC_PROT_ERR"
    """Local memory could not be accessed."""
    WR_FLUSH_ERR = "WR_FLUSH_ERR"
    """The link closed or broke before the request ended; whether bytes landed is not known."""
    REM_INV_REQ_ERR = "REM_INV_REQ_ERR"
    """The remote side did not understand the request."""
    REM_ACCESS_ERR = "REM_ACCESS_ERR"
    """The key is unknown, ended, of another link, without the right, or too short."""
    REM_OP_ERR = "REM_OP_ERR"
    """The remote side could not access its own memory."""


class LinkEnd(Enum):
    """Why a link went down by itself."""

    REMOTE_CLOSED = "remote closed"
    """The remote side ended the connection, or its host says that nobody is there."""
    STALLED = "stalled"
    """Nothing moved for the stall timeout: the remote side may still act on what it was sent."""
    BROKEN = "broken"
    """An error of this side, or bytes that are not of the protocol."""


class LinkClosed(Exception):
    """The link was closed or went down."""


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """Move `ranges.total` bytes between local memory and what `key` opens on the remote node."""

    wr_id: int
    """The poster's number, unique among its outstanding requests on the link."""
    opcode: Opcode
    memory: Memory
    key: RemoteKey
    ranges: Ranges
    """`ranges.remote` are offsets from the start of what `key` opens."""


@dataclass(frozen=True, slots=True)
class Completion:
    """How a work request ended."""

    wr_id: int
    status: Status


@dataclass(frozen=True, slots=True)
class FabricLimits:
    """The shape of work that the fabric likes best."""

    slice_bytes: int
    """Bytes of one work request, at most."""
    slice_ranges: int
    """Pairs of ranges of one work request, at most."""
    window_bytes: int
    """Bytes outstanding on one link; more does not go faster."""


class LinkEvents(Protocol):
    """Where a link reports; called on the event loop, never from inside `post`."""

    def completed(self, completions: list[Completion]) -> None:
        """Some work requests ended."""

    def down(self, end: LinkEnd, cause: str) -> None:
        """The link went down by itself, after all its requests were completed. `cause` is a clause for people."""


class Link(Protocol):
    """The initiator's end of a connection to one remote node."""

    def post(self, request: WorkRequest) -> None:
        """Queue one request. Raises LinkClosed."""

    async def close(self) -> None:
        """Flush what is outstanding, then end the connection."""


Exchange = Callable[[LinkAttributes], Awaitable[LinkAttributes]]
"""Carries this side's attributes to the remote node's `accept` and returns what that answered."""


class Fabric(Protocol):
    """One way for bytes to cross, with both its sides: initiating, and serving local memory."""

    @property
    def kind(self) -> FabricKind:
        """Which fabric this is."""

    @property
    def limits(self) -> FabricLimits:
        """The shape of work that it likes best."""

    async def start(self) -> None:
        """Begin to serve. Raises OSError where a port can't be had."""

    async def close(self) -> None:
        """End all links and serve no more."""

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1) -> Link:
        """Open a link to the remote node that `exchange` reaches.

        Raises NodeUnreachable, and what `exchange` raises.
        """

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        """Make ready for one link of a remote node and say how to reach this end. Raises FabricUnavailable."""

    async def hang_up(self, link_id: bytes) -> None:
        """End an accepted link and its grants; afterwards nothing of it touches memory. Unknown ids are no error."""

    def grant(self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float) -> RemoteKey:
        """Let an accepted link access a range of `memory` for `ttl` seconds. Raises LinkNotFound."""

    async def revoke(self, key: RemoteKey) -> None:
        """End a grant: when this returns, no access under it is running or will. Unknown keys are no error."""
