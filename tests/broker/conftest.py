"""Two brokers with real fabrics in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from peermem.broker.broker import Broker
from tests.doubles import Host


@asynccontextmanager
async def hosts(*nodes: str, **settings: float) -> AsyncIterator[list[Host]]:
    """Run brokers that know each other, and check that they leave nothing behind."""
    brokers: dict[str, Broker] = {}
    made = [Host(node, brokers, **settings) for node in nodes]
    async with AsyncExitStack() as stack:
        for host in made:
            await host.open(stack)
        yield made
    for host in made:
        assert host.device.available == host.device.size
        assert host.broker.serving.grant_count == 0
        assert host.broker.transfers.running_count == 0
        assert len(host.broker.regions) == 0


@pytest.fixture
async def pair() -> AsyncIterator[list[Host]]:
    async with hosts("a", "b") as made:
        yield made
