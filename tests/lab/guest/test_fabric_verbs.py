"""The verbs fabric on a software NIC: both ends in one process, each with queue pairs of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace

import pytest

from peermem import memory
from peermem.core.types import Path, Ranges, RemoteKey
from peermem.fabric.base import Fabric, Opcode, Status
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.memory import HostMemory
from tests.fabric.conformance import FabricConformance, both_ways
from tests.fabric.support import MIB, Clock, Connection, FileMemory, VanishingMemory

pytest_plugins = ["tests.fabric.conftest"]


async def test_a_probe_that_puts_back_what_was_there() -> None:
    fabric = VerbsFabric()
    await fabric.start()
    try:
        with closing(HostMemory(3 * MIB)) as tried:
            before = os.urandom(3 * MIB)
            memory.write(tried, 0, before)
            for nic in fabric.nics:
                await fabric.probe(nic, tried, Path.HOST, keep=True)
            assert memory.read(tried, 0, 3 * MIB) == before
            await fabric.probe(nic, tried, Path.HOST)
            assert memory.read(tried, 0, MIB) != before[:MIB]
    finally:
        await fabric.close()


class TestVerbsFabric(FabricConformance):
    @staticmethod
    @asynccontextmanager
    async def make_fabrics(clock: Clock, on_link_lost: Callable[[bytes], None]) -> AsyncIterator[tuple[Fabric, Fabric]]:
        initiator = VerbsFabric()
        target = VerbsFabric(clock=clock, on_link_lost=on_link_lost)
        await initiator.start()
        await target.start()
        yield initiator, target
        await initiator.close()
        await target.close()

    async def pass_time(self, connection: Connection, clock: Clock, seconds: float) -> None:
        """A NIC knows no time: the fabric revokes what has expired."""
        clock.ahead += seconds
        assert isinstance(connection.target, VerbsFabric)
        await connection.target.expire()

    def before(self, key: RemoteKey) -> tuple[RemoteKey, Ranges]:
        """See FabricConformance. A NIC is asked by address."""
        rails = [[replace(part, address=part.address - 1) for part in parts] for parts in key.rails]
        return replace(key, rails=rails), Ranges.single(0, 0, 1)

    @both_ways
    @pytest.mark.parametrize("side", [Status.LOC_PROT_ERR, Status.REM_OP_ERR])
    @pytest.mark.parametrize("size", [4096, MIB])
    async def test_vanished_memory_fails_its_request_and_no_other(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode, side: Status, size: int
    ) -> None:
        """As for device memory, which is registered on demand; what is pinned can't vanish. A NIC may not tell a key
        that opens nothing from pages that are gone."""
        vanishing, sound = VanishingMemory(MIB), memories(MIB, 1)
        local, remote = (vanishing, sound) if side is Status.LOC_PROT_ERR else (sound, vanishing)
        await connection.register(
            connection.initiator if local is vanishing else connection.target, vanishing, Path.P2PDMA
        )
        key = await connection.grant(remote)
        vanishing.vanish()
        ranges = Ranges.single(MIB - size, MIB - size, size)
        status = await connection.run(opcode, local, key, ranges)
        assert status in ({side} if local is vanishing else {side, Status.REM_ACCESS_ERR})
        vanishing.reappear()
        assert await connection.run(opcode, local, key, ranges) is Status.SUCCESS
