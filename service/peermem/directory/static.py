"""The directory of a file: nodes listed in the daemon's configuration, fixed for its life."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peermem.directory.base import Directory, NodeEntry


class StaticDirectory:
    """Knows the nodes it was made with, and this one once it joined."""

    def __init__(self, nodes: Mapping[Any, str]) -> None:
        """`nodes` maps short names to host:port."""
        self._nodes = {node: NodeEntry(node, address) for node, address in nodes.items()}
        self._joined: str | None = None

    async def join(self, entry: NodeEntry) -> None:
        """See Directory."""
        self._nodes[entry.node] = entry
        self._joined = entry.node

    async def leave(self) -> None:
        """See Directory."""
        if self._joined is not None:
            self._nodes.pop(self._joined, None)
            self._joined = None

    def nodes(self) -> Mapping[str, NodeEntry]:
        """See Directory."""
        return MappingProxyType(self._nodes)

    async def close(self) -> None:
        """See Directory."""


if TYPE_CHECKING:
    _: type[Directory] = StaticDirectory
