"""The verbs fabric over a NIC that is a stand-in: what every fabric has to do, at a NIC's keys and rights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from peermem.core.types import Ranges, RemoteKey
from peermem.fabric.base import Fabric
from peermem.fabric.verbs_fabric import VerbsFabric
from tests.fabric.conformance import FabricConformance
from tests.fabric.pyverbs_double import pyverbs
from tests.fabric.support import Clock, Connection


class TestVerbsFabric(FabricConformance):
    @staticmethod
    @asynccontextmanager
    async def make_fabrics(clock: Clock, on_link_lost: Callable[[bytes], None]) -> AsyncIterator[tuple[Fabric, Fabric]]:
        with pyverbs("nic0", "nic1"):
            initiator = VerbsFabric(["nic0"])
            target = VerbsFabric(["nic1"], clock=clock, on_link_lost=on_link_lost)
            await initiator.start()
            await target.start()
            yield initiator, target
            await initiator.close()
            await target.close()
            assert not any(initiator.object_counts().values())
            assert not any(target.object_counts().values())

    async def pass_time(self, connection: Connection, clock: Clock, seconds: float) -> None:
        """A NIC knows no time: the fabric revokes what has expired."""
        clock.ahead += seconds
        assert isinstance(connection.target, VerbsFabric)
        await connection.target.expire()

    def before(self, key: RemoteKey) -> tuple[RemoteKey, Ranges]:
        """See FabricConformance. A NIC is asked by address."""
        rails = [[replace(part, address=part.address - 1) for part in parts] for parts in key.rails]
        return replace(key, rails=rails), Ranges.single(0, 0, 1)
