"""What a transfer needs of this node before it may begin: the regions here, and the right to use them."""

from __future__ import annotations

from peermem.broker.guard import Guard
from peermem.broker.regions import Region, RegionTable
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.policy import Action
from peermem.core.transfer import TransferRequest
from peermem.remote.base import Remotes


def local_regions(
    request: TransferRequest, subject: Subject, node: str, regions: RegionTable, policy: Guard, remotes: Remotes
) -> dict[ChildName, Region]:
    """Return the regions of a transfer that are of this node; the right to each is asked for once.

    Raises RegionNotFound, AccessDenied, RegionDeleted, RegionRevoked, OutOfRange, and NodeNotFound for other nodes.
    """
    found: dict[ChildName, Region] = {}
    asked: set[tuple[ChildName, Action]] = set()
    for entry in request.lists:
        for name, action in ((entry.source, Action.READ), (entry.destination, Action.WRITE)):
            if name.node == node:
                found[name] = region = regions.find(name)
                if (name, action) not in asked:
                    asked.add((name, action))
                    policy.check_region(subject, action, region)
                region.check_usable()
                entry.check_inside(name, region.memory.length)
            else:
                remotes.get(name.node)  # an unknown node is refused at once
    return found
