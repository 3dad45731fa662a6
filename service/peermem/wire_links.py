"""LinkService's messages to core values and back: what daemons tell each other of links and grants.

Rules of this file:

* Every message may come from a hostile socket: `*_from_proto` raise InvalidField, nothing else.
* Keys and secrets pass through here; no error names one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peermem.core.errors import InvalidField
from peermem.core.types import FabricKind, GrantedKey, KeyPart, LinkAttributes, QueuePair, RemoteKey, Rights
from peermem.v1 import link_pb2
from peermem.wire import duration_from_proto, duration_to_proto

MAX_RAILS = 16
"""Of one link."""
_MAX_PARTS = 65_536
_ALIGNMENTS = frozenset({0, *(1 << bits for bits in range(17))})
_RIGHTS: dict[int, Rights] = {link_pb2.RIGHT_READ: Rights.READ, link_pb2.RIGHT_WRITE: Rights.WRITE}
_MTUS = frozenset({256, 512, 1024, 2048, 4096})


def right_from_proto(right: int) -> Rights:
    """Return what a grant is to let its holder do. Raises InvalidField."""
    if right not in _RIGHTS:
        raise InvalidField("right must be READ or WRITE.", field="right")
    return _RIGHTS[right]


def queue_pairs_to_proto(ends: Iterable[QueuePair]) -> list[link_pb2.QueuePair]:
    """Return the messages for the ends of rails."""
    return [
        link_pb2.QueuePair(
            nic=end.nic, number=end.number, psn=end.psn, gid=end.gid, lid=end.lid, mtu=end.mtu, reads=end.reads
        )
        for end in ends
    ]


def queue_pairs_from_proto(messages: Sequence[link_pb2.QueuePair]) -> tuple[QueuePair, ...]:
    """Return the ends of rails. Raises InvalidField."""
    if len(messages) > MAX_RAILS:
        raise InvalidField(
            f"queue_pairs has {len(messages)} entries; a link has at most {MAX_RAILS}.", field="queue_pairs"
        )
    return tuple(_queue_pair(message) for message in messages)


def _queue_pair(message: link_pb2.QueuePair) -> QueuePair:
    for field, value, limit in (
        ("number", message.number, 1 << 24),
        ("psn", message.psn, 1 << 24),
        ("lid", message.lid, 1 << 16),
        ("reads", message.reads, 256),
    ):
        if value >= limit:
            raise InvalidField(f"queue_pairs.{field} of {value} must be below {limit}.", field=f"queue_pairs.{field}")
    if len(message.gid) != 16:
        raise InvalidField(f"queue_pairs.gid of {len(message.gid)} bytes must have 16.", field="queue_pairs.gid")
    if message.mtu not in _MTUS:
        raise InvalidField(f"queue_pairs.mtu of {message.mtu} must be one of {sorted(_MTUS)}.", field="queue_pairs.mtu")
    if len(message.nic) > 128:
        raise InvalidField("queue_pairs.nic must have at most 128 characters.", field="queue_pairs.nic")
    return QueuePair(message.nic, message.number, message.psn, message.gid, message.lid, message.mtu, message.reads)


def opened_from_proto(fabric: FabricKind, answer: link_pb2.OpenLinkResponse) -> LinkAttributes:
    """Return the accepting side's half. Raises InvalidField."""
    return LinkAttributes(
        fabric, answer.rails, answer.link_id, answer.address, answer.secret, queue_pairs_from_proto(answer.queue_pairs)
    )


def opened_to_proto(attributes: LinkAttributes, epoch: str) -> link_pb2.OpenLinkResponse:
    """Return the message for the accepting side's half."""
    return link_pb2.OpenLinkResponse(
        link_id=attributes.link_id,
        epoch=epoch,
        address=attributes.address,
        secret=attributes.secret,
        rails=attributes.rails,
        queue_pairs=queue_pairs_to_proto(attributes.queue_pairs),
    )


def grant_to_proto(granted: GrantedKey) -> link_pb2.Grant:
    """Return the message for a grant."""
    rails = [
        link_pb2.RailKey(
            parts=[link_pb2.KeyPart(rkey=part.rkey, address=part.address, length=part.length) for part in parts]
        )
        for parts in granted.key.rails
    ]
    return link_pb2.Grant(
        grant_id=granted.grant_id,
        rkey=granted.key.rkey,
        length=granted.key.length,
        ttl=duration_to_proto(granted.ttl),
        region_uid=granted.region_uid,
        staged=granted.staged,
        alignment=granted.alignment,
        flush=granted.flush,
        rails=rails,
    )


def grant_from_proto(message: link_pb2.Grant) -> GrantedKey:
    """Return a grant. Raises InvalidField."""
    rails = [[KeyPart(part.rkey, part.address, part.length) for part in rail.parts] for rail in message.rails]
    if len(rails) > MAX_RAILS or sum(map(len, rails)) > _MAX_PARTS:
        raise InvalidField(f"grant.rails has more than {MAX_RAILS} rails or {_MAX_PARTS} parts.", field="grant.rails")
    if any(parts and sum(part.length for part in parts) != message.length for parts in rails):
        raise InvalidField("The parts of grant.rails do not make up the grant's length.", field="grant.rails")
    if message.alignment not in _ALIGNMENTS:
        raise InvalidField(
            f"grant.alignment of {message.alignment} must be a power of 2, at most {max(_ALIGNMENTS)}.",
            field="grant.alignment",
        )
    return GrantedKey(
        message.grant_id,
        RemoteKey(message.rkey, message.length, rails),
        duration_from_proto(message.ttl, "grant.ttl", 0.1, 3600.0),
        message.region_uid,
        message.staged,
        max(message.alignment, 1),
        message.flush,
    )
