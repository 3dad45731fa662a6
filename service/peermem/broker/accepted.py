"""The links that remote nodes opened to this one, and whose they are.

Rules of this file:

* A link is one node's, and on a fabric that separates subjects one subject's, for as long as it is open.
* The whole node and each remote one may have so many open, and each link so many grants, not more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from peermem.core.errors import FabricUnavailable, LimitReached, LinkNotFound
from peermem.core.types import FabricKind, LinkAttributes
from peermem.fabric.base import Fabric

MAX_LINKS, MAX_LINKS_OF_NODE, MAX_GRANTS_OF_LINK = 4096, 512, 16_384
Voucher = Callable[[], None]
"""Returns while the certificate that a node showed counts for what comes without one. Raises Unauthenticated where it
was shown too long ago, AccessDenied where it counts no more."""


@dataclass(slots=True)
class AcceptedLink:
    """One of them."""

    fabric: Fabric
    node: str
    subject: str
    """Whose it is, as nodes speak of a subject; empty for one that is for all."""
    vouched: Voucher
    grants: set[int] = field(default_factory=set)
    """Ids of those that it holds."""
    making: int = 0
    """Grants that are being made for it."""

    def check_room(self) -> None:
        """Raise LimitReached where it may hold no more grants."""
        if len(self.grants) + self.making >= MAX_GRANTS_OF_LINK:
            raise LimitReached(
                f"The link holds {MAX_GRANTS_OF_LINK} grants of this node, the limit.", limit=MAX_GRANTS_OF_LINK
            )


class AcceptedLinks:
    """All of them, by their ids."""

    def __init__(self, fabrics: Mapping[FabricKind, Fabric]) -> None:
        self._fabrics = fabrics
        self._links: dict[bytes, AcceptedLink] = {}

    def ids(self) -> list[bytes]:
        """Return the ids of those that are open."""
        return list(self._links)

    def every(self) -> list[AcceptedLink]:
        """Return those that are open."""
        return list(self._links.values())

    def counts(self) -> dict[FabricKind, int]:
        """Return how many are open, by fabric."""
        counts = dict.fromkeys(self._fabrics, 0)
        for link in self._links.values():
            counts[link.fabric.kind] += 1
        return counts

    def find(self, link_id: bytes) -> AcceptedLink | None:
        """Return a link, or None where it is not open."""
        return self._links.get(link_id)

    def pop(self, link_id: bytes) -> AcceptedLink | None:
        """Forget a link and return it; its owner closes it."""
        return self._links.pop(link_id, None)

    def open(self, node: str, offer: LinkAttributes, vouched: Voucher) -> LinkAttributes:
        """Accept a link of `node`, or have the one with the id in `offer` rebuilt, and say how to reach it.

        Raises FabricUnavailable, LimitReached, LinkNotFound.
        """
        fabric = self._fabrics.get(offer.fabric)
        if fabric is None:
            raise FabricUnavailable(f"This node does not serve the {offer.fabric.value} fabric.")
        if offer.link_id:
            link = self._links.get(offer.link_id)
            if link is None or (link.node, link.fabric, link.subject) != (node, fabric, offer.subject):
                raise LinkNotFound("The link to rebuild is not open here (any more). Open a new one.")
            link.vouched = vouched
            return fabric.accept(offer)
        self._check_room(node)
        if fabric.separates_subjects is not bool(offer.subject):
            what = "be for all" if offer.subject else "name the subject that it is for"
            raise FabricUnavailable(
                f"A link over {fabric.kind.value} has to {what}. Run the same release of the daemon on both nodes."
            )
        attributes = fabric.accept(offer)
        self._links[attributes.link_id] = AcceptedLink(fabric, node, offer.subject, vouched)
        return attributes

    def _check_room(self, node: str) -> None:
        if len(self._links) >= MAX_LINKS:
            raise LimitReached(f"This node has {MAX_LINKS} links open, its limit.", limit=MAX_LINKS)
        if sum(link.node == node for link in self._links.values()) >= MAX_LINKS_OF_NODE:
            raise LimitReached(
                f"nodes/{node} has {MAX_LINKS_OF_NODE} links to this node open, the limit.", limit=MAX_LINKS_OF_NODE
            )
