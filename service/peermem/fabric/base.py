"""What the broker needs of a fabric.

Rules that every fabric keeps (`tests/fabric/conformance.py` runs them on each one):

* Nothing blocks: `post` queues work and returns; completions arrive on the event loop.
* Each posted work request is completed exactly once, also when the link closes or breaks
  (WR_FLUSH_ERR). A WRITE's SUCCESS means that its bytes are in the remote memory, a READ's that they
  are in the local memory.
* Memory is registered before it is used, locally or by a grant, and unregistered after its last use.
* The side that owns memory checks each access against the grant: link, right, range, expiry.
* After `revoke` returns, no byte is read or written under that key. After a link's `close` returns,
  no byte is written into local memory on its behalf.
* What a link carries for the daemons at its ends arrives once, unchanged and in order on its rail, and is known to be
  of the link's other end; what was on a rail that breaks is lost. A fabric that can't say so carries nothing.
* Closing twice is no error. Using a closed link raises LinkClosed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from peermem.core.errors import PeermemError
from peermem.core.types import FabricKind, LinkAttributes, Path, Ranges, RemoteKey, Rights, Word
from peermem.memory import Memory


class Opcode(Word):
    """One-sided operations, seen from the side that posts."""

    WRITE = 1
    READ = 2


class Status(Word):
    """How a work request ended, under the names of ibv_wc_status (rdma-core, libibverbs/verbs.h)."""

    SUCCESS = "SUCCESS"
    LOC_PROT_ERR = "LOC_PROT_ERR"
    """Local memory could not be accessed."""
    WR_FLUSH_ERR = "WR_FLUSH_ERR"
    """The link closed, or the rail that carried it broke, before the request ended; whether bytes landed, or still will
    in a WRITE, is not known."""
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


class Completion(NamedTuple):
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

    def heard(self, message: bytes) -> None:
        """The far end's daemon answers something that was carried to it. Raises MalformedMessage for what makes no
        sense, which breaks the rail."""

    def rail_down(self, cause: str, pause: float) -> None:
        """A rail broke, after its requests were completed, or could not be brought up again; the link goes on with
        others. It is tried again in `pause` seconds; never, where that is infinite. `cause` is a clause for people."""

    def rail_up(self) -> None:
        """A rail that was down is up again."""

    def down(self, end: LinkEnd, cause: str) -> None:
        """The link went down by itself, after all its requests were completed. `cause` is a clause for people."""


class Link(Protocol):
    """The initiator's end of a connection to one remote node."""

    @property
    def packet(self) -> int:
        """Bytes of payload of one packet, at whose borders a NIC begins to access memory anew; 0 where there are
        none."""

    @property
    def rails_down(self) -> int:
        """Rails that broke and are not up again."""

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        """Make a range of memory usable on this link, before it is posted; memory that is registered for the link's own
        subject is. Takes turns of the loop. A second time is no error.

        Raises FabricUnavailable, and RegionRevoked where its exporter has taken the memory back.
        """

    def post(self, request: WorkRequest) -> None:
        """Queue one request. Raises LinkClosed."""

    def carry(self, message: bytes) -> bool:
        """Send a message of at most CARRIED bytes to the far end's daemon; what it answers is `heard`. False where this
        link carries none, or none now."""

    async def close(self) -> None:
        """Flush what is outstanding, then end the connection."""


CARRIED = 256 << 10
"""Bytes of one message for a daemon, at most."""


class Asker(Protocol):
    """One rail of an accepted link, as the serving daemon sees it: what asks, and is answered."""

    @property
    def link_id(self) -> bytes:
        """Of the accepted link."""

    @property
    def remote(self) -> str:
        """The address of the other end, as the audit log names it."""

    def answer(self, message: bytes) -> None:
        """Send a message of at most CARRIED bytes back; nobody hears it where the rail is gone."""

    def hold(self, *, on: bool) -> None:
        """Take nothing from this rail while it is on: its questions are too many."""


Met = Callable[[Asker], Callable[[bytes], None]]
"""Is told of each rail on which something is carried here, and returns what takes its messages; that raises
MalformedMessage for what makes no sense, which breaks the rail."""


Exchange = Callable[[LinkAttributes], Awaitable[LinkAttributes]]
"""Carries this side's attributes to the remote node's `accept` and returns what that answered. A fabric may use it
again while the link is open, with the link's id in the offer, to have its rails rebuilt after an error."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a probe that moved the right bytes measured."""

    latency: float
    """Median time of a 4 KiB WRITE (or of a page, where there is less), from post to completion, in seconds."""
    write_bandwidth: float
    """Into the memory, bytes per second."""
    read_bandwidth: float
    """Out of the memory, bytes per second."""
    alignment: int = 1
    """Bytes at whose multiples packets have to begin in the memory for the NIC to place them right. 4096 for a software
    NIC's memory on demand: rxe of Linux 7.3.4 takes every address in a page for the page's first one."""


class Fabric(Protocol):
    """One way for bytes to cross, with both its sides: initiating, and serving local memory."""

    @property
    def kind(self) -> FabricKind:
        """Which fabric this is."""

    @property
    def separates_subjects(self) -> bool:
        """Whether each link is for one subject, and what is made for one is of no use to another; else a link is for
        all."""

    @property
    def limits(self) -> FabricLimits:
        """The shape of work that it likes best."""

    @property
    def nics(self) -> Mapping[str, PeermemError | None]:
        """NIC ports by name, each with what keeps it from working now; empty for a fabric that uses none."""

    @property
    def unavailable(self) -> PeermemError | None:
        """What keeps the whole fabric from working now: PyverbsMissing, NicNotFound where the node has no NIC at all,
        or else the error of one of `nics`, none of which works; None where it works."""

    async def start(self) -> None:
        """Begin to serve. Raises OSError where a port can't be had; what ails NICs is told by `nics`."""

    async def close(self) -> None:
        """End all links and serve no more."""

    async def register(self, memory: Memory, path: Path, nics: Sequence[str] = (), subject: str = "") -> None:
        """Make memory usable on these NIC ports; where subjects are separated, on links of `subject`, whose memory it
        is. Takes turns of the loop; must not be called twice for a memory.

        Raises NicNotFound, RegistrationRefused, MemlockTooSmall, OnDemandMissing, and the error of a NIC in `nics`.
        """

    async def unregister(self, memory: Memory) -> None:
        """Forget memory; no request and no grant uses it any more. Unknown memory is no error."""

    async def probe(self, nic: str, memory: Memory, path: Path, *, keep: bool = False) -> Proof:
        """Prove that a NIC port reads and writes `memory` by moving a pattern both ways through it and comparing. Its
        bytes are overwritten; with `keep` they are put back. `memory` is not registered.

        Raises as `register`, and ProbeFailed, ProbeMismatch.
        """

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1, subject: str = "") -> Link:
        """Open a link to the remote node that `exchange` reaches, for `subject` where subjects are separated.

        Raises NodeUnreachable, FabricUnavailable where no NIC here works, and what `exchange` raises.
        """

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        """Make ready for one link of a remote node and say how to reach this end. Where subjects are separated it is
        for the one in the offer.

        An offer with the id of an accepted link has its rails rebuilt; grants stay. Raises FabricUnavailable,
        LinkNotFound.
        """

    async def hang_up(self, link_id: bytes) -> None:
        """End an accepted link and its grants; afterwards nothing of it touches memory. Unknown ids are no error."""

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        """Let an accepted link access a range of registered `memory` for `ttl` seconds.

        Raises LinkNotFound, FabricUnavailable where no rail of the link reaches the memory, and RegionRevoked where its
        exporter has taken the memory back.
        """

    async def revoke(self, key: RemoteKey) -> None:
        """End a grant: when this returns, no access under it is running or will. Unknown keys are no error."""
