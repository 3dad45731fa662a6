"""What every command shares: the connection, and the way to another node.

Rules of this file:

* Connections are opened on first use and closed when the command ends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import TypeVar

import peermem
from peermem.core.errors import WrongNode

T = TypeVar("T")


class Settings:
    """The common options of one run, and the connections that it has open."""

    def __init__(self) -> None:
        self.target: str | None = None
        self.timeout = 30.0
        self.json = False
        self._open = ExitStack()

    def close(self) -> None:
        """Close what was opened."""
        self._open.close()

    @cached_property
    def node(self) -> peermem.Node:
        """The node that the tool talks to."""
        return self.connect(self.target)

    def connect(self, target: str | None) -> peermem.Node:
        """Open a connection that is closed with the command."""
        return self._open.enter_context(peermem.connect(target, timeout=self.timeout))

    def at_owner(self, act: Callable[[peermem.Node], T]) -> T:
        """Return what `act` returns at the node; where that isn't the resource's own, at the one it names."""
        try:
            return act(self.node)
        except WrongNode as fault:
            address = fault.metadata.get("address")
            if not address:
                raise
            return act(self.connect(address))

    def node_named(self, name: str) -> peermem.Node:
        """Return a connection to `nodes/{node}`, by the address that the directory knows."""
        return self.node if name == self.node.name else self.connect(self.node.info(name).address)
