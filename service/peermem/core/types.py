"""The nouns that several rooms share. Values only: frozen, comparable, no behaviour beyond questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntFlag


class Word(Enum):
    """An enumeration whose members are hashed as the objects that they are, by no call of Python: they are the keys of
    what each slice and each transfer looks up."""

    __hash__ = object.__hash__


class Path(Word):
    """How a NIC reaches a region's memory; values are the contract's enum names and metric labels."""

    P2PDMA = "P2PDMA"
    DMABUF = "DMABUF"
    LEGACY_PEER_MEMORY = "LEGACY_PEER_MEMORY"
    HOST = "HOST"
    STAGED = "STAGED"


class FabricKind(Word):
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
class KeyPart:
    """What opens a consecutive part of remote memory on one rail (verbs)."""

    rkey: int = field(repr=False)
    address: int = field(repr=False)
    """Of the part's first byte, as the remote NIC counts."""
    length: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class RemoteKey:
    """What a work request presents to reach remote memory. A bearer secret: never logged."""

    rkey: int = field(repr=False)
    """Names the grant at the fabric that made it."""
    length: int
    """Bytes that the key opens: of the grant, or of a staging buffer."""
    rails: Sequence[Sequence[KeyPart]] = ()
    """For verbs: per rail of the link the parts that make up the memory, in order; none for a rail whose
    remote NIC does not reach it."""


@dataclass(frozen=True, slots=True)
class GrantedKey:
    """A grant as its holder has it."""

    grant_id: int
    key: RemoteKey = field(repr=False)
    ttl: float
    """Seconds from the answer to its end."""
    region_uid: int
    """Tells the region from others that have, had or will have its name."""
    staged: bool = False
    """Whether the key opens a staging buffer instead of the region: `copy_staged` copies between the two."""
    alignment: int = 1
    """Bytes at whose multiples packets have to begin in the region for the NIC to place them right."""
    flush: bool = False
    """Whether what is written under it is visible to the device only after `flush`."""


@dataclass(frozen=True, slots=True)
class QueuePair:
    """One end of a rail, as its other end has to know it (verbs; IBA 1.4, 11.2.5)."""

    nic: str
    """NIC port, such as mlx5_0/1; for logs and the choice of rails."""
    number: int
    """24 bits; 0 in an answer for an end that can't be connected now."""
    psn: int
    """First packet sequence number that this end sends, 24 bits, random."""
    gid: bytes
    """16 bytes."""
    lid: int
    """0 on Ethernet."""
    mtu: int
    """Bytes of payload in one packet, at most."""
    reads: int
    """READs that this end serves at the same time."""


@dataclass(frozen=True, slots=True)
class LinkAttributes:
    """What the two ends of a link tell each other over LinkService when it is opened, or rebuilt after an error."""

    fabric: FabricKind
    rails: int
    """Connections that share the load, at least 1."""
    link_id: bytes = field(default=b"", repr=False)
    """16 random bytes of the accepting side. Empty in the caller's half, unless it rebuilds that link's rails."""
    address: str = ""
    """host:port to connect to, from the accepting side (tcp)."""
    secret: bytes = field(default=b"", repr=False)
    """What each connection proves to know, from the accepting side (tcp)."""
    queue_pairs: Sequence[QueuePair] = ()
    """This end of each rail (verbs). The answer has as many as the offer; in the same order."""
    subject: str = ""
    """Whose link it is, as nodes speak of a subject, but without groups; from the caller's side (verbs)."""
