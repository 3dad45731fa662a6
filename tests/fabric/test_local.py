from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from peermem.core.errors import NodeUnreachable
from peermem.core.types import FabricKind, LinkAttributes, Ranges, Rights
from peermem.fabric.base import Fabric, Opcode, Status
from peermem.fabric.local import LocalFabric
from tests.fabric.conformance import FabricConformance, both_ways
from tests.fabric.support import MIB, Clock, Connection, FileMemory, Recorder, eventually, turns


class GatedMemory(FileMemory):
    """Memory at which a thread that copies has to wait."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.reached = threading.Event()
        self.gate = threading.Event()

    def view(self) -> memoryview:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.gate.wait(10)
        return super().view()


class TestLocalFabric(FabricConformance):
    @staticmethod
    @asynccontextmanager
    async def make_fabrics(clock: Clock, on_link_lost: Callable[[bytes], None]) -> AsyncIterator[tuple[Fabric, Fabric]]:
        fabric = LocalFabric(clock=clock, on_link_lost=on_link_lost)
        await fabric.start()
        yield fabric, fabric
        await fabric.close()

    @pytest.mark.parametrize("how", ["revoke", "hang up", "close the link", "close the fabric"])
    @both_ways
    async def test_an_end_waits_for_what_is_being_copied(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode, how: str
    ) -> None:
        gated, sound = GatedMemory(2 * MIB), memories(2 * MIB, 1)
        # the kernel copies from the file of the source into the view of the destination, which is gated
        local, remote = (sound, gated) if opcode is Opcode.WRITE else (gated, sound)
        key = await connection.grant(remote)
        wr_id = connection.post(opcode, local, key, Ranges.single(0, 0, 2 * MIB))
        await eventually(gated.reached.is_set)
        ways = {
            "revoke": lambda: connection.target.revoke(key),
            "hang up": lambda: connection.target.hang_up(connection.link_id),
            "close the link": connection.link.close,
            "close the fabric": connection.target.close,
        }
        ends = [asyncio.create_task(ways[how]()) for _ in range(2)]
        await turns()
        assert not any(end.done() for end in ends)
        gated.gate.set()
        await asyncio.gather(*ends)
        written = gated.bytes()
        gated.close()
        assert written == sound.bytes()[:MIB] + bytes(MIB)
        expected = Status.REM_ACCESS_ERR if how == "revoke" else Status.WR_FLUSH_ERR
        assert await connection.events.wait([wr_id]) == [expected]

    async def test_another_daemon_can_not_be_reached(self, fabrics: tuple[Fabric, Fabric]) -> None:
        async def exchange(offer: LinkAttributes) -> LinkAttributes:
            return LinkAttributes(FabricKind.LOCAL, 1, b"x" * 16)

        with pytest.raises(NodeUnreachable, match="only reaches regions of its own node"):
            await fabrics[0].connect(exchange, Recorder())

    async def test_what_nobody_connects_is_forgotten(
        self, memories: Callable[..., FileMemory], lost: list[bytes]
    ) -> None:
        fabric = LocalFabric(connect_timeout=0.05, on_link_lost=lost.append)
        await fabric.start()
        answer = fabric.accept(LinkAttributes(FabricKind.LOCAL, 1))
        await fabric.grant(answer.link_id, memories(), 0, 1, Rights.READ, 10.0)
        assert (fabric.accepted_count, fabric.grant_count) == (1, 1)
        await eventually(lambda: lost == [answer.link_id])
        assert (fabric.accepted_count, fabric.grant_count) == (0, 0)
        fabric.accept(LinkAttributes(FabricKind.LOCAL, 1))
        await fabric.close()
        assert fabric.accepted_count == 0
