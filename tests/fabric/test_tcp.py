from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from peermem.fabric.base import Fabric
from peermem.fabric.tcp import TcpFabric
from tests.fabric.carrying import Daemon
from tests.fabric.conformance import FabricConformance
from tests.fabric.support import Clock


class TestTcpFabric(FabricConformance):
    carries = True

    @staticmethod
    @asynccontextmanager
    async def make_fabrics(clock: Clock, on_link_lost: Callable[[bytes], None]) -> AsyncIterator[tuple[Fabric, Fabric]]:
        initiator = TcpFabric("127.0.0.1:0")
        target = TcpFabric("127.0.0.1:0", clock=clock, on_link_lost=on_link_lost, on_met=Daemon().met)
        await initiator.start()
        await target.start()
        yield initiator, target
        await initiator.close()
        await target.close()
