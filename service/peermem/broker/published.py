"""Regions that the directory tells of: published by who makes them, found by whoever is known.

Rules of this file:

* What is published is known everywhere, whatever the policy says of the region; who may use it is decided as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from peermem.broker.regions import Region
from peermem.core.errors import LimitReached
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.region import PublishedRegion, State

if TYPE_CHECKING:
    from peermem.broker.broker import Broker


async def publish(broker: Broker, region: Region) -> None:
    """Have the directory tell of a region until it ends. Raises LimitReached, after the region's end."""
    if region.state is State.READY:
        try:
            broker.directory.publish(region.told)
        except LimitReached as error:
            await broker.regions.start_end(region, error)
            raise
        region.published = True


async def find(
    broker: Broker, subject: Subject, labels: Mapping[str, str], after: ChildName | None, limit: int
) -> tuple[Sequence[PublishedRegion], ChildName | None]:
    """Return published regions of all nodes, see Directory. Raises as RegionService.FindRegions."""
    broker.tenants.request(subject)
    broker.policy.check_finder(subject)
    return await broker.directory.find(labels, after, limit)
