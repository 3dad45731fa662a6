"""By which fabric a leg may reach its regions, and which of its ends have to be staged.

Rules of this file:

* The fabric is the first of those that the plan allows that reaches both regions, but for those that did not lately.
* What a NIC would misplace in a region is staged at that end.
"""

from __future__ import annotations

from itertools import chain

from peermem.broker.link_table import Detours
from peermem.broker.links import HeldGrant, OutboundLink
from peermem.broker.regions import Region
from peermem.core.errors import FabricUnavailable, PeermemError
from peermem.core.identity import Subject
from peermem.core.plan import Leg
from peermem.core.types import FabricKind


def candidates(leg: Leg, region: Region, detours: Detours, subject: Subject, why: str) -> tuple[list[FabricKind], str]:
    """Return the fabrics to try from `region` for `subject`, the best first, and why these, in words; `why` is what is
    known so far.

    Raises FabricUnavailable where none reaches the region here.
    """
    allowed = leg.fabrics
    here = [kind for kind in allowed if kind in region.fabrics]
    if not here:
        names = " or ".join(kind.value for kind in allowed)
        raise FabricUnavailable(
            f"{region.name} is not reached over {names}: {region.why or 'this node does not serve it'}",
            region=region.name,
        )
    if len(allowed) == 1:
        why = why or f"{here[0].value} is the only fabric for this pair, or was asked for."
    elif here[0] is not allowed[0]:
        why = f"{region.name}: {region.why}"
    else:
        why = f"{here[0].value} reaches both regions."
    for kind in here[:-1]:
        error = detours.why(leg.other, kind, subject)
        if error is not None:
            why = instead(kind, error)
            here = [other for other in here if other is not kind]
    return here, why


def instead(kind: FabricKind, error: PeermemError) -> str:
    """Return why another fabric than `kind` is used."""
    return f"{kind.value} did not reach the region: {error.message}"


def staged_ends(leg: Leg, region: Region, link: OutboundLink, held: HeldGrant) -> tuple[bool, bool]:
    """Return which ends are staged, the local and the remote one: by the region's path, or because a NIC would
    misplace what begins elsewhere than at multiples of its alignment. Both ends have to begin there: where either
    is in parts, ranges are cut at their edges."""
    here, there = region.reach.way.alignment, held.alignment
    need, ranges = max(here, there), leg.ranges
    starts = chain((link.packet, leg.start), ranges.local, ranges.remote)  # remote ones count from `leg.start`
    fits = need == 1 or not link.packet or not any(start % need for start in starts)
    return (
        region.reach.stages(link.fabric.kind) or (not fits and here > 1),
        held.slots is not None or (not fits and there > 1),
    )
