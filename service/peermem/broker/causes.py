"""Why a work request of a leg failed, as a reason for people."""

from __future__ import annotations

from peermem.broker.links import OutboundLink
from peermem.core.errors import GrantRefused, Internal, NodeUnreachable, PeermemError, RegionRevoked
from peermem.core.plan import Leg
from peermem.core.types import FabricKind
from peermem.fabric.base import Status


def cause_of(status: Status, leg: Leg, fabric: FabricKind, link: OutboundLink) -> PeermemError:
    """Return what it means that a work request of `leg`, over a link of `fabric`, ended with `status`."""
    local, other = leg.local, leg.other
    if status is Status.LOC_PROT_ERR:
        return RegionRevoked(f"{local}: its memory can't be accessed any more.", region=local)
    if status is Status.REM_OP_ERR:
        return RegionRevoked(f"{other}: its memory can't be accessed any more.", region=other)
    if status is Status.REM_ACCESS_ERR:
        return GrantRefused(
            f"nodes/{other.node} refused access to {other} again under a new grant. Try again, and look at "
            "that daemon's log.",
            region=other,
        )
    if status is Status.WR_FLUSH_ERR:
        end, cause = link.down_cause or (None, link.rail_cause or "it was closed")
        what = "A rail of the" if link.down_cause is None and link.rail_cause else "The"
        return NodeUnreachable(
            f"{what} {fabric.value} link to nodes/{other.node} went down ({cause}).",
            node=other.node,
            cause=end.value if end else "closed",
        )
    return Internal(f"A work request to {other} ended with {status.value}.", status=status.value)
