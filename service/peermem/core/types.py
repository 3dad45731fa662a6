"""The nouns that several rooms share. Values only: frozen, comparable, no behaviour beyond questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntFlag


class Path(Enum):
    """How a NIC reaches a region's memory; values are the contract's enum names and metric labels."""

    P2PDMA = "P2PDMA"
    DMABUF = "DMABUF"
    LEGACY_PEER_MEMORY = "LEGACY_PEER_MEMORY"
    HOST = "HOST"
    STAGED = "STAGED"


class FabricKind(Enum):
    """How bytes cross between two regions; values are metric labels."""

    VERBS = "verbs"
    TCP = "tcp"
    LOCAL = "local"


class Rights(IntFlag):
    """What a grant lets its holder do."""

    READ = 1
    WRITE = 2


class LeaseKind(Enum):
    """What keeps a region alive: nothing more, a session of the attach socket, or renewals."""

    NONE = "none"
    SESSION = "session"
    TTL = "ttl"


@dataclass(frozen=True, slots=True)
class Ranges:
    """Pairs of ranges between one local and one remote memory, as three columns of equal length.

    `local[i]` and `remote[i]` are offsets in bytes, `lengths[i]` is in bytes and at least 1.
    """

    local: Sequence[int]
    remote: Sequence[int]
    lengths: Sequence[int]
    total: int
    """Sum of `lengths`, bytes."""

    @staticmethod
    def single(local: int, remote: int, length: int) -> Ranges:
        """Return one pair of ranges."""
        return Ranges((local,), (remote,), (length,), length)


@dataclass(frozen=True, slots=True)
class RemoteKey:
    """What a work request presents to reach remote memory. A bearer secret: never logged."""

    rkey: int = field(repr=False)
    address: int = field(repr=False)
    """What the remote side's fabric adds to an offset; 0 for tcp and local."""
    length: int
    """Bytes that the key opens, from `address` on."""


@dataclass(frozen=True, slots=True)
class LinkAttributes:
    """What the two ends of a link tell each other over LinkService when it is opened."""

    fabric: FabricKind
    rails: int
    """Connections that share the load, at least 1."""
    link_id: bytes = field(default=b"", repr=False)
    """16 random bytes of the accepting side; empty in the caller's half."""
    address: str = ""
    """host:port to connect to, from the accepting side (tcp)."""
    secret: bytes = field(default=b"", repr=False)
    """What each connection presents, from the accepting side (tcp)."""
