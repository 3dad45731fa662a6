"""A static directory that is away, that knew nodes which are gone, or that takes no more regions, on a test's cue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peermem.core.errors import LimitReached
from peermem.core.region import PublishedRegion
from peermem.directory.base import GoneNode, NodeEntry, Status
from peermem.directory.static import StaticDirectory


class CuedDirectory(StaticDirectory):
    """Exactly the static one until a test gives the cue."""

    def __init__(self, *entries: NodeEntry) -> None:
        super().__init__({})
        self._nodes |= {entry.node: entry for entry in entries}
        self.away_for: float | None = None
        self.left: dict[str, GoneNode] = {}
        self.full = False

    def tell(self, entry: NodeEntry) -> None:
        """Have a node be what this says."""
        self._nodes[entry.node] = entry

    def gone(self) -> Mapping[str, GoneNode]:
        return self.left

    def status(self) -> Status:
        return replace(super().status(), away_for=self.away_for)

    def publish(self, region: PublishedRegion) -> None:
        if self.full:
            raise LimitReached("No more regions can be published.")
        super().publish(region)
