"""What the broker needs of a directory: soft state that says which nodes there are and where.

A directory holds no keys and no bytes, and its loss never ends running transfers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One node as the directory knows it."""

    node: str
    """Short name."""
    address: str
    """host:port of its gRPC server."""


class Directory(Protocol):
    """Finds nodes."""

    async def join(self, entry: NodeEntry) -> None:
        """Make this node known. Called once, when the daemon is ready."""

    async def leave(self) -> None:
        """Withdraw this node. Not having joined is no error."""

    def nodes(self) -> Mapping[str, NodeEntry]:
        """Return every known node by its short name, as of now; never waits."""

    async def close(self) -> None:
        """Release what the directory holds."""
