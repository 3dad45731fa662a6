"""The directory of a file: nodes listed in the daemon's configuration, fixed for its life.

Rules of this file:

* Nobody is told of anything: this node and the regions that it publishes are found by its own daemon only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peermem.core.names import ChildName
from peermem.core.region import PublishedRegion
from peermem.directory.base import Changes, Directory, GoneNode, NodeEntry, Status, sort_key


class StaticDirectory:
    """Knows the nodes it was made with, and this one once it joined."""

    def __init__(self, nodes: Mapping[Any, str]) -> None:
        """`nodes` maps short names to host:port."""
        self._nodes = {node: NodeEntry(node, address) for node, address in nodes.items()}
        self._joined: str | None = None
        self._published: dict[ChildName, PublishedRegion] = {}
        self._changes = Changes()

    async def open(self) -> None:
        """See Directory."""

    async def join(self, entry: NodeEntry) -> None:
        """See Directory."""
        self._nodes[entry.node] = entry
        self._joined = entry.node
        self._changes.tell()

    async def leave(self) -> None:
        """See Directory."""
        if self._joined is not None:
            self._nodes.pop(self._joined, None)
            self._joined = None
            self._published.clear()
            self._changes.tell()

    def nodes(self) -> Mapping[str, NodeEntry]:
        """See Directory."""
        return MappingProxyType(self._nodes)

    def gone(self) -> Mapping[str, GoneNode]:
        """See Directory."""
        return {}

    async def changed(self) -> None:
        """See Directory."""
        await self._changes.wait()

    def status(self) -> Status:
        """See Directory."""
        return Status("static", published=len(self._published))

    def publish(self, region: PublishedRegion) -> None:
        """See Directory."""
        self._published[region.name] = region

    def withdraw(self, name: ChildName) -> None:
        """See Directory."""
        self._published.pop(name, None)

    async def find(
        self, labels: Mapping[str, str], after: ChildName | None, limit: int
    ) -> tuple[Sequence[PublishedRegion], ChildName | None]:
        """See Directory."""
        wanted = labels.items()
        found = [
            self._published[name]
            for name in sorted(self._published, key=sort_key)
            if (after is None or sort_key(name) > sort_key(after)) and wanted <= self._published[name].labels.items()
        ]
        return found[:limit], found[limit - 1].name if len(found) > limit else None

    async def close(self) -> None:
        """See Directory."""


if TYPE_CHECKING:
    _: type[Directory] = StaticDirectory
