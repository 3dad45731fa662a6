"""Cutting requests into the work requests of a NIC, and judging what remote nodes send; pure, to be tested without one.

Rules of this file:

* A work request stays within one memory region on each side.
* Neighbours that continue each other on both sides become one.
* What a remote node sent is looked at here before a verb sees it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from peermem.core.types import FabricKind, KeyPart, LinkAttributes, QueuePair, Ranges
from peermem.fabric.verbs_types import MTUS, Piece

MAX_RAILS = 16
"""Of one link."""
_ID_BYTES = 16


def cut(ranges: Ranges, address: int, lkeys: Sequence[int], part: int, remote: Sequence[KeyPart]) -> list[Piece]:
    """Return the work requests that move `ranges`.

    Local memory starts at `address`; `lkeys` are those of its parts of `part` bytes each. All ranges are inside.
    """
    if len(ranges.lengths) == len(lkeys) == len(remote) == 1:  # most are so
        key = remote[0]
        return [(address + ranges.local[0], ranges.total, lkeys[0], key.address + ranges.remote[0], key.rkey)]
    starts = [0]
    for key_part in remote[:-1]:
        starts.append(starts[-1] + key_part.length)
    pieces: list[Piece] = []
    end = remote_end = -1
    for here, there, length in zip(ranges.local, ranges.remote, ranges.lengths, strict=True):
        while length:
            lkey_index = here // part
            index = bisect_right(starts, there) - 1
            key = remote[index]
            into = there - starts[index]
            size = min(length, (lkey_index + 1) * part - here, key.length - into)
            local_address, remote_address = address + here, key.address + into
            lkey = lkeys[lkey_index]
            if end == local_address and remote_end == remote_address and pieces[-1][2::2] == (lkey, key.rkey):
                start, done, _, remote_start, _ = pieces[-1]
                pieces[-1] = (start, done + size, lkey, remote_start, key.rkey)
            else:
                pieces.append((local_address, size, lkey, remote_address, key.rkey))
            end, remote_end = local_address + size, remote_address + size
            here, there, length = here + size, there + size, length - size
    return pieces


def is_sound(remote: Sequence[KeyPart], length: int) -> bool:
    """Whether parts that a remote node sent fit into work requests and make up `length` bytes."""
    return sum(part.length for part in remote) >= length and all(
        part.length > 0 and 0 <= part.rkey < 1 << 32 and 0 <= part.address <= (1 << 64) - part.length for part in remote
    )


def is_sound_end(end: QueuePair) -> bool:
    """Whether a queue pair that a remote node sent can be connected to."""
    return (
        0 < end.number < 1 << 24
        and 0 <= end.psn < 1 << 24
        and len(end.gid) == 16
        and (any(end.gid) or end.lid > 0)
        and 0 <= end.lid < 1 << 16
        and end.mtu in MTUS.values()
        and end.reads > 0
    )


def is_sound_answer(answer: LinkAttributes, rails: int) -> bool:
    """Whether what a remote node answered is about all the rails that it was offered. An end without a number is down
    there for now."""
    return (
        answer.fabric is FabricKind.VERBS
        and len(answer.link_id) == _ID_BYTES
        and len(answer.queue_pairs) == rails
        and all(end.number == 0 or is_sound_end(end) for end in answer.queue_pairs)
    )
