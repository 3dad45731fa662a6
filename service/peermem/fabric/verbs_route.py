"""Which rails of a link reach two memories, and which requests leave them."""

from __future__ import annotations

from collections.abc import Sequence

from peermem.core.types import KeyPart, RemoteKey
from peermem.fabric.base import Status, WorkRequest
from peermem.fabric.grants import inside
from peermem.fabric.verbs_memory import Parts, Registration
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_work import is_sound


def misfit(request: WorkRequest) -> Status | None:
    """Return how a request ends because it leaves its memory or its key, or None."""
    ranges, local_limit, remote_limit = request.ranges, request.memory.length, request.key.length
    lengths = ranges.lengths
    if len(lengths) == 1:  # `inside` takes its time
        length, local, remote = lengths[0], ranges.local[0], ranges.remote[0]
        if length >= 1 and 0 <= local <= local_limit - length and 0 <= remote <= remote_limit - length:
            return None
    if not inside(ranges.local, lengths, local_limit):
        return Status.LOC_PROT_ERR
    return None if inside(ranges.remote, lengths, remote_limit) else Status.REM_ACCESS_ERR


class Route:
    """The rails that reach two memories, with their keys."""

    def __init__(self, registration: Registration, key: RemoteKey, rails: Sequence[Rail]) -> None:
        self.registration = registration
        self.key = key
        local = [registration.parts(rail.domain) for rail in rails]
        self.reaches_here = any(local)
        self.ways: list[tuple[Rail, Parts, Sequence[KeyPart]]] = [
            (rail, here, there)
            for rail, here, there in zip(rails, local, key.rails, strict=False)
            if here is not None and is_sound(there, key.length)
        ]
