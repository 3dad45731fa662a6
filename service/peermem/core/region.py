"""The life of a region as a table.

READY: transfers may use it. DRAINING: it is being deleted; its work is being fenced. REVOKED: the
device took the memory back; what remains is to delete it. GONE: nothing holds its memory any more.
Pairs that are absent from the table are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peermem.core.names import ChildName
from peermem.core.origin import NOWHERE, Origin
from peermem.core.types import LeaseKind, Path, Word

MIN_TTL, MAX_TTL = 1.0, 7 * 86400.0
"""Bounds of a lease's time to live, seconds."""


class State(Word):
    """Where a region is in its life; values are the contract's enum names."""

    READY = "READY"
    DRAINING = "DRAINING"
    REVOKED = "REVOKED"
    GONE = "GONE"


class Event(Word):
    """What happens to a region."""

    DELETE = "delete"
    REVOKE = "revoke"
    DRAINED = "drained"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.READY, Event.DELETE): State.DRAINING,
    (State.READY, Event.REVOKE): State.REVOKED,
    (State.REVOKED, Event.DELETE): State.DRAINING,
    (State.REVOKED, Event.REVOKE): State.REVOKED,
    (State.DRAINING, Event.REVOKE): State.DRAINING,
    (State.DRAINING, Event.DRAINED): State.GONE,
}


@dataclass(frozen=True, slots=True)
class Lease:
    """What keeps a region alive."""

    kind: LeaseKind
    ttl: float = 0.0
    """Seconds from one renewal to the end; only for LeaseKind.TTL."""


@dataclass(frozen=True, slots=True)
class RegionFacts:
    """What a region is, as told to callers."""

    name: ChildName
    length: int
    """Bytes."""
    device: str
    owner: str
    labels: Mapping[str, str]
    lease: Lease
    expires_at: float | None
    """Unix time of the lease's end, for LeaseKind.TTL."""
    path: Path
    state: State
    created_at: float
    """Unix time."""
    nics: tuple[str, ...] = ()
    """NIC ports that it is registered with, nearest first."""
    why: str = ""
    """Why these NICs, or why none."""
    origin: Origin = NOWHERE
    """Which job made it, as far as that is certain."""
    published: bool = False
    """Whether the directory tells of it."""


@dataclass(frozen=True, slots=True)
class PublishedRegion:
    """What the directory tells of a region."""

    name: ChildName
    length: int
    """Bytes."""
    device_kind: str
    path: Path
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RegionRequest:
    """What a caller asks for."""

    region_id: str
    """Last part of the name; empty lets the daemon pick one."""
    length: int
    """Bytes; 0 for all of what is adopted."""
    device: str
    """Allocate here, or the GPU whose memory is adopted; empty for an adopted file descriptor."""
    adopted: str
    """Token of the attach socket for a file descriptor handed in; empty for an allocation."""
    labels: Mapping[str, str]
    lease: Lease | None
    """None: the session's where there is one, else none."""
    handle: bytes = field(default=b"", repr=False)
    """By which a GPU's driver opens an allocation of the job, which is adopted; a secret. Empty for the others."""
    offset: int = 0
    """First byte of the region in that allocation."""
    publish: bool = False
    """Have the directory tell of it."""
