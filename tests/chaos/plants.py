"""Defects that a run plants in its daemons to show that the checker finds each of them, and where it looks.

Rules of this file:

* A plant is what a defect of the daemon would look like: its failpoints have the code itself do wrong, and tell nobody.
* What else stands in the way of harm fails too: a link that ends takes its grants with it, so that a fence that is
  missing shows only where the link's end is not heard of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.chaos.model import Fault

_DEAF = "link.close=raise:NODE_UNREACHABLE"


@dataclass(frozen=True, slots=True)
class Plant:
    """A defect."""

    name: str
    what: str
    failpoints: tuple[str, ...]
    """Of every daemon, at all times."""
    found: frozenset[Fault]
    """What the checker has to find: one of these."""
    is_left_over: bool = False
    """Whether it shows only when everybody is gone."""
    among: tuple[str, ...] = ()
    """The only faults beside it; none: all kinds."""
    opens: bool = False
    """Whether daemons allow everything."""


_FABRIC = ("daemon stopped", "links reset", "fabric stalled", "fabric late", "rails late")
_WIRES = (
    *_FABRIC,
    *("node late", "node cut off, silently", "node cut off, with resets", "one direction of gRPC stalled"),
)
_WRITTEN = frozenset((Fault.LATE, Fault.WRONG))
_PLANTS = (
    Plant(
        "no-fence",
        "a transfer is answered without a fence at the far end",
        ("fence.skip=on", _DEAF),
        _WRITTEN,
        among=_WIRES,
    ),
    Plant(
        "revoke-ignored",
        "a grant is told to have ended, and still opens its memory",
        ("grant.keep=on", _DEAF),
        _WRITTEN,
        among=_FABRIC,
    ),
    Plant("wrong-byte", "a byte changes on the way", ("tcp.corrupt=on*8+40",), _WRITTEN),
    Plant("grant-leaked", "a grant is not given back", ("grant.forget=on",), frozenset((Fault.LEAK,)), True),
    Plant("policy-unchecked", "everything is allowed to everybody", (), frozenset((Fault.REACHED,)), opens=True),
)
PLANTS: Mapping[str, Plant] = {plant.name: plant for plant in _PLANTS}
