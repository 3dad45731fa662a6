"""What the broker needs of a directory: soft state that says which nodes there are and where.

Rules of this file:

* A directory holds no keys and no bytes, and is believed only about where to ask: a node proves itself who it is, and
  the node that owns a region decides about it.
* Its loss never ends running transfers, nor makes known nodes unknown: they stay as they were told last, and `status`
  says since when that is.
* Nothing here waits for a directory that is away, but `find`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from peermem.core.errors import PeermemError
from peermem.core.names import ChildName
from peermem.core.node import NodeDevice
from peermem.core.region import PublishedRegion
from peermem.core.types import FabricKind


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One node as the directory knows it; a static one knows only the first two fields of other nodes."""

    node: str
    """Short name."""
    address: str
    """host:port of its gRPC server."""
    epoch: str = ""
    """Identifies this run of its daemon."""
    version: str = ""
    fabrics: tuple[FabricKind, ...] = ()
    nics: tuple[str, ...] = ()
    """NIC ports that its verbs fabric uses."""
    devices: tuple[NodeDevice, ...] = ()


@dataclass(frozen=True, slots=True)
class GoneNode:
    """A node that was known and is no more."""

    entry: NodeEntry
    """As it was told last."""
    gone_for: float
    """Seconds."""


@dataclass(slots=True)
class Counts:
    """What happened since the start."""

    renewals: int = 0
    """Times that the lease was renewed."""
    failed_renewals: int = 0
    lost_leases: int = 0
    """Times that the lease had ended, so that the others took this node for gone."""
    resumes: int = 0
    """Times that the watch went on where it had been broken off."""
    listings: int = 0
    """Times that all nodes were read: at the start, and where what had been missed was not to be had any more."""
    garbage: int = 0
    """Entries that made no sense, and were left out."""


@dataclass(frozen=True, slots=True)
class Status:
    """How it is about the directory now."""

    kind: str
    """As in the configuration."""
    away_for: float | None = None
    """Seconds for which it could not be reached; None while it can."""
    problem: PeermemError | None = None
    """Why not, in a sentence; None while it can."""
    refusal: PeermemError | None = None
    """Why this node can't be in it although it can be reached: NodeNameTaken."""
    lease_left: float | None = None
    """Seconds until the others take this node for gone, unless the lease is renewed; None without a lease."""
    published: int = 0
    """Regions of this node that it is to tell of."""
    unwritten: int = 0
    """Of these and of withdrawn ones, those that it has not been told yet."""
    counts: Counts = field(default_factory=Counts)


class Directory(Protocol):
    """Finds nodes and published regions."""

    async def open(self) -> None:
        """Begin to know nodes; waits until they are known, or for a few seconds."""

    async def join(self, entry: NodeEntry) -> None:
        """Make this node known, now or as soon as the directory can be reached; doesn't wait for it."""

    async def leave(self) -> None:
        """Withdraw this node and its regions. Not having joined is no error."""

    def nodes(self) -> Mapping[str, NodeEntry]:
        """Return every known node by its short name, as of now; never waits. This node is one as soon as it joined."""

    def gone(self) -> Mapping[str, GoneNode]:
        """Return nodes that were known lately and are no more."""

    async def changed(self) -> None:
        """Return after the next change of the nodes or the status."""

    def status(self) -> Status:
        """Return how it is about the directory now."""

    def publish(self, region: PublishedRegion) -> None:
        """Have a region of this node told of, now or later. Raises LimitReached."""

    def withdraw(self, name: ChildName) -> None:
        """Have a region of this node told of no more. One that is not published is no error."""

    async def find(
        self, labels: Mapping[str, str], after: ChildName | None, limit: int
    ) -> tuple[Sequence[PublishedRegion], ChildName | None]:
        """Return published regions of all nodes that carry all labels, in order of node and region, from behind
        `after`: at most `limit`, and behind which one to go on (None: there are no more). It may be fewer.

        Raises DirectoryUnreachable.
        """

    async def close(self) -> None:
        """Release what the directory holds."""


class Changes:
    """Tells those who wait that something changed."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def tell(self) -> None:
        """Wake all who wait now."""
        told, self._next = self._next, asyncio.Event()
        told.set()

    async def wait(self) -> None:
        """Return when something changed since this was called."""
        await self._next.wait()


def sort_key(name: ChildName) -> str:
    """Return what published regions are ordered by."""
    return f"{name.node}/{name.id}"
