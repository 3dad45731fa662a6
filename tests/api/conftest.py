"""A node behind a real attach socket, for the tests of that socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.attaching import Node, quiet_node, serving


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with quiet_node(tmp_path) as node:
        yield node


@pytest.fixture
async def served(node: Node) -> AsyncIterator[Node]:
    async with serving(node.server()):
        yield node
