from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from peermem.fabric.base import Fabric
from peermem.fabric.local import LocalFabric
from tests.fabric.conformance import FabricConformance
from tests.fabric.support import Clock


class TestLocalFabric(FabricConformance):
    @staticmethod
    @asynccontextmanager
    async def make_fabrics(clock: Clock, on_link_lost: Callable[[bytes], None]) -> AsyncIterator[tuple[Fabric, Fabric]]:
        fabric = LocalFabric(clock=clock, on_link_lost=on_link_lost)
        await fabric.start()
        yield fabric, fabric
        await fabric.close()
