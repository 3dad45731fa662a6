"""The static directory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from peermem.directory.base import Directory
from peermem.directory.static import StaticDirectory
from tests.directory.conformance import A, B, DirectoryConformance


class TestStaticDirectory(DirectoryConformance):
    @pytest.fixture
    async def directory(self) -> AsyncIterator[Directory]:
        directory = StaticDirectory({B.node: B.address})
        await directory.open()
        yield directory
        await directory.close()


async def test_this_node_may_be_among_the_configured_ones() -> None:
    directory = StaticDirectory({A.node: "wrong:1", B.node: B.address})
    await directory.join(A)
    assert directory.nodes() == {"a": A, "b": B}
