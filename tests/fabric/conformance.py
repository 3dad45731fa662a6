"""What every fabric has to do, whatever carries its bytes; a subclass of `FabricConformance` runs it on one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest

from peermem.core.errors import FabricUnavailable, LinkNotFound, NodeUnreachable, ShuttingDown
from peermem.core.types import FabricKind, LinkAttributes, Ranges, RemoteKey, Rights
from peermem.fabric.base import Fabric, LinkClosed, LinkEnd, Opcode, Status
from tests.fabric.support import (
    MIB,
    Clock,
    Connection,
    FileMemory,
    VanishingMemory,
    eventually,
    open_sockets,
    ranges_of,
    turns,
)

Factory = Callable[[Clock, Callable[[bytes], None]], AbstractAsyncContextManager[tuple[Fabric, Fabric]]]
"""Makes two started fabrics: one that initiates, and one that serves and reports lost links."""

SHAPES = {
    "one byte": ranges_of([5], [9], [1]),
    "a page": ranges_of([4096], [8192], [4096]),
    "unaligned": ranges_of([3], [4099], [12_345]),
    "a slice": ranges_of([1], [0], [MIB]),
    "several ranges": ranges_of([0, 700_001, 5000], [900_000, 1, 65_536], [4096, 77, 60_000]),
    "hundreds of ranges": ranges_of(
        [8000 * i + i % 7 for i in range(256)], [8000 * (255 - i) for i in range(256)], [1 + 29 * i for i in range(256)]
    ),
}
LENGTH = 4 * MIB
BIG = 48 * MIB
"""More than fits into any buffer between the two sides."""

both_ways = pytest.mark.parametrize("opcode", list(Opcode))


class FabricConformance:
    """The tests. A subclass gives `make_fabrics`, a `Factory`."""

    make_fabrics: Factory
    carries = False
    """Whether messages for the daemons cross its links; `test_tcp_carry.py` has what more is asked of them."""

    async def pass_time(self, connection: Connection, clock: Clock, seconds: float) -> None:
        """Let grants grow older."""
        clock.ahead += seconds

    def before(self, key: RemoteKey) -> tuple[RemoteKey, Ranges]:
        """Return what asks for the byte before those that a key opens."""
        return key, Ranges.single(0, 2**64 - 1, 1)

    @pytest.fixture
    async def fabrics(self, clock: Clock, lost: list[bytes]) -> AsyncIterator[tuple[Fabric, Fabric]]:
        before = open_sockets()
        async with self.make_fabrics(clock, lost.append) as fabrics:
            yield fabrics
        assert open_sockets() <= before

    @pytest.fixture
    async def connection(self, memories: object, fabrics: tuple[Fabric, Fabric]) -> AsyncIterator[Connection]:
        connection = await Connection(*fabrics).open()
        yield connection
        await connection.close()
        assert connection.events.faults == []

    # Bytes

    @pytest.mark.parametrize("shape", SHAPES)
    @both_ways
    async def test_moves_exactly_the_bytes_asked_for(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode, shape: str
    ) -> None:
        local, remote = memories(seed=1), memories(seed=2)
        expected_local, expected_remote = bytearray(local.bytes()), bytearray(remote.bytes())
        ranges = SHAPES[shape]
        for here, there, length in zip(ranges.local, ranges.remote, ranges.lengths, strict=True):
            if opcode is Opcode.WRITE:
                expected_remote[1000 + there : 1000 + there + length] = expected_local[here : here + length]
            else:
                expected_local[here : here + length] = expected_remote[1000 + there : 1000 + there + length]
        key = await connection.grant(remote, offset=1000)
        assert await connection.run(opcode, local, key, ranges) is Status.SUCCESS
        assert local.bytes() == expected_local
        assert remote.bytes() == expected_remote

    @pytest.mark.parametrize("rails", [1, 3])
    async def test_many_requests_in_flight_both_ways(
        self, fabrics: tuple[Fabric, Fabric], memories: Callable[..., FileMemory], rails: int
    ) -> None:
        connection = await Connection(*fabrics).open(rails)
        source, target, back = memories(32 * MIB, 1), memories(32 * MIB), memories(32 * MIB)
        fixed = memories(32 * MIB, 3)
        key, fixed_key = await connection.grant(target), await connection.grant(fixed)
        for memory in (source, back):
            await connection.register(fabrics[0], memory)
        posted = []
        for start in range(0, 32 * MIB, 512 << 10):
            ranges = Ranges.single(start, start, 512 << 10)
            posted.append(connection.post(Opcode.WRITE, source, key, ranges))
            posted.append(connection.post(Opcode.READ, back, fixed_key, ranges))
        assert set(await connection.events.wait(posted)) == {Status.SUCCESS}
        assert target.bytes() == source.bytes()
        assert back.bytes() == fixed.bytes()
        await connection.close()
        assert connection.events.faults == []

    # Rights

    @both_ways
    @pytest.mark.parametrize(
        "kind", ["before", "behind", "across", "unknown", "other link", "no right", "expired", "revoked"]
    )
    async def test_refuses_what_the_grant_does_not_allow(
        self,
        connection: Connection,
        memories: Callable[..., FileMemory],
        clock: Clock,
        opcode: Opcode,
        kind: str,
    ) -> None:
        local, remote = memories(seed=1), memories(seed=2)
        before = local.bytes(), remote.bytes()
        key, ranges = await self._forbidden(connection, remote, clock, opcode, kind)
        assert await connection.run(opcode, local, key, ranges) is Status.REM_ACCESS_ERR
        assert (local.bytes(), remote.bytes()) == before
        good = await connection.grant(remote)
        assert await connection.run(opcode, local, good, Ranges.single(0, 0, LENGTH)) is Status.SUCCESS

    async def _forbidden(
        self, connection: Connection, remote: FileMemory, clock: Clock, opcode: Opcode, kind: str
    ) -> tuple[RemoteKey, Ranges]:
        ranges = Ranges.single(0, 0, 300_000)
        if kind == "before":
            return self.before(await connection.grant(remote, offset=1000, length=MIB))
        if kind in ("behind", "across"):
            start = MIB if kind == "behind" else MIB - 1
            return await connection.grant(remote, length=MIB), ranges_of([0, 8], [0, start], [8, 8])
        if kind == "unknown":
            return RemoteKey(12345, LENGTH), ranges
        if kind == "other link":
            other = await connection.another()
            return await other.grant(remote), ranges
        if kind == "no right":
            rights = Rights.READ if opcode is Opcode.WRITE else Rights.WRITE
            return await connection.grant(remote, rights=rights), ranges
        key = await connection.grant(remote, ttl=5.0)
        if kind == "expired":
            await self.pass_time(connection, clock, 5.0)
        else:
            await connection.target.revoke(key)
        return key, ranges

    async def test_grants_only_to_open_links_and_only_what_is_there(
        self, connection: Connection, memories: Callable[..., FileMemory]
    ) -> None:
        memory = memories()
        with pytest.raises(LinkNotFound):
            await connection.target.grant(b"?" * 16, memory, 0, LENGTH, Rights.READ, 10.0)
        with pytest.raises(ValueError, match="no range"):
            await connection.grant(memory, offset=1, length=LENGTH)

    @both_ways
    async def test_revoke_fences_a_running_request(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode
    ) -> None:
        local, remote = memories(BIG, 1), FileMemory(BIG, 2)
        posted = await connection.post_all(opcode, local, key := await connection.grant(remote))
        await connection.events.wait(posted[:1])
        await connection.target.revoke(key)
        written = remote.bytes()
        await turns()
        assert remote.bytes() == written
        await connection.release(remote)
        remote.close()  # nobody holds it, although requests are still on the way
        statuses = await connection.events.wait(posted)
        assert set(statuses) <= {Status.SUCCESS, Status.REM_ACCESS_ERR}
        await connection.target.revoke(key)

    async def test_a_grant_that_is_revoked_while_its_link_hangs_up(
        self, connection: Connection, memories: Callable[..., FileMemory]
    ) -> None:
        local, remote = memories(BIG, 1), FileMemory(BIG, 2)
        posted = await connection.post_all(Opcode.WRITE, local, key := await connection.grant(remote))
        await connection.events.wait(posted[:1])
        hanging_up = asyncio.create_task(connection.target.hang_up(connection.link_id))
        await turns(1)
        await connection.target.revoke(key)
        await connection.release(remote)
        remote.close()
        await hanging_up
        statuses = await connection.events.wait(posted)
        assert set(statuses) <= {Status.SUCCESS, Status.REM_ACCESS_ERR, Status.WR_FLUSH_ERR}

    async def test_two_who_revoke_are_both_fenced(
        self, connection: Connection, memories: Callable[..., FileMemory]
    ) -> None:
        local, remote = memories(BIG, 1), memories(BIG)
        posted = await connection.post_all(Opcode.WRITE, local, key := await connection.grant(remote))
        await connection.events.wait(posted[:1])
        first = asyncio.create_task(connection.target.revoke(key))
        await turns(1)
        await connection.target.revoke(key)
        written = remote.bytes()
        await first
        await connection.events.wait(posted)
        assert remote.bytes() == written

    async def test_a_grant_that_expires_stops_a_running_request(
        self, connection: Connection, memories: Callable[..., FileMemory], clock: Clock
    ) -> None:
        local, remote = memories(BIG, 1), memories(BIG)
        posted = await connection.post_all(Opcode.WRITE, local, await connection.grant(remote, ttl=50.0))
        await connection.events.wait(posted[:1])
        await self.pass_time(connection, clock, 50.0)
        statuses = await connection.events.wait(posted)
        assert set(statuses) <= {Status.SUCCESS, Status.REM_ACCESS_ERR}
        size = connection.initiator.limits.slice_bytes
        for index, status in enumerate(statuses):
            if status is Status.SUCCESS:
                landed = slice(index * size, (index + 1) * size)
                assert remote.view()[landed] == local.view()[landed]

    # Faults of memory

    @both_ways
    async def test_local_ranges_outside_local_memory(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode
    ) -> None:
        local, remote = memories(4096), memories()
        key = await connection.grant(remote)
        for ranges in (Ranges.single(1, 0, 4096), Ranges.single(-1, 0, 1), ranges_of([0, 4096], [0, 9], [1, 1])):
            assert await connection.run(opcode, local, key, ranges) is Status.LOC_PROT_ERR
        assert await connection.run(opcode, local, key, Ranges.single(0, 0, 4096)) is Status.SUCCESS

    @both_ways
    @pytest.mark.parametrize("side", [Status.LOC_PROT_ERR, Status.REM_OP_ERR])
    @pytest.mark.parametrize("size", [4096, MIB])
    async def test_vanished_memory_fails_its_request_and_no_other(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode, side: Status, size: int
    ) -> None:
        vanishing = VanishingMemory(MIB)
        sound = memories(MIB, 1)
        local, remote = (vanishing, sound) if side is Status.LOC_PROT_ERR else (sound, vanishing)
        key = await connection.grant(remote)
        vanishing.vanish()
        ranges = Ranges.single(MIB - size, MIB - size, size)
        assert await connection.run(opcode, local, key, ranges) is side
        vanishing.reappear()
        assert await connection.run(opcode, local, key, ranges) is Status.SUCCESS

    @both_ways
    async def test_closed_local_memory(
        self, connection: Connection, memories: Callable[..., FileMemory], opcode: Opcode
    ) -> None:
        local, key = FileMemory(4096), await connection.grant(memories())
        assert await connection.run(opcode, local, key, Ranges.single(0, 0, 4096)) is Status.SUCCESS
        await connection.release(local)
        local.close()
        posted = connection.post(opcode, local, key, Ranges.single(0, 0, 4096))
        assert await connection.events.wait([posted]) == [Status.LOC_PROT_ERR]

    async def test_a_local_fault_is_flushed_before_close_returns(
        self, connection: Connection, memories: Callable[..., FileMemory]
    ) -> None:
        key = await connection.grant(memories())
        wr_id = connection.post(Opcode.WRITE, memories(), key, Ranges.single(LENGTH, 0, 1))
        await connection.link.close()
        assert wr_id in connection.events.statuses

    # Ends

    async def test_closing_twice_and_using_a_closed_link(
        self, connection: Connection, memories: Callable[..., FileMemory]
    ) -> None:
        memory = memories()
        key = await connection.grant(memory)
        await connection.link.close()
        await connection.link.close()
        with pytest.raises(LinkClosed):
            connection.post(Opcode.WRITE, memory, key, Ranges.single(0, 0, 1))
        assert connection.events.ends == []

    @both_ways
    async def test_close_flushes_and_nothing_is_written_locally_afterwards(
        self, connection: Connection, memories: Callable[..., FileMemory], lost: list[bytes], opcode: Opcode
    ) -> None:
        local, remote = FileMemory(BIG), memories(BIG, 1)
        posted = await connection.post_all(opcode, local, await connection.grant(remote))
        await connection.events.wait(posted[:1])
        await connection.link.close()
        assert set(connection.events.statuses) == set(posted)
        assert set(connection.events.statuses.values()) <= {Status.SUCCESS, Status.WR_FLUSH_ERR}
        seen = local.bytes()
        await eventually(lambda: lost == [connection.link_id])
        assert local.bytes() == seen
        await connection.release(local)
        local.close()
        assert connection.events.ends == []

    async def test_a_closed_link_is_lost_at_its_target_with_its_grants(
        self, connection: Connection, memories: Callable[..., FileMemory], lost: list[bytes]
    ) -> None:
        await connection.grant(memories())
        await connection.link.close()
        await eventually(lambda: lost == [connection.link_id])
        with pytest.raises(LinkNotFound):
            await connection.grant(memories())

    @both_ways
    @pytest.mark.parametrize("how", ["hang up", "close the fabric"])
    async def test_remote_side_gone_in_the_middle(
        self, connection: Connection, memories: Callable[..., FileMemory], lost: list[bytes], opcode: Opcode, how: str
    ) -> None:
        local, remote = memories(BIG), FileMemory(BIG, 1)
        posted = await connection.post_all(opcode, local, await connection.grant(remote))
        await connection.events.wait(posted[:1])
        if how == "hang up":
            await connection.target.hang_up(connection.link_id)
            await connection.target.hang_up(connection.link_id)
        else:
            await connection.target.close()
        await connection.release(remote)
        remote.close()
        statuses = await connection.events.wait(posted)
        assert set(statuses) <= {Status.SUCCESS, Status.WR_FLUSH_ERR}
        if connection.target is not connection.initiator or how == "hang up":
            await eventually(lambda: connection.events.ends != [])
            assert connection.events.ends == [LinkEnd.REMOTE_CLOSED]
        with pytest.raises(LinkClosed):
            connection.post(opcode, local, RemoteKey(1, 1), Ranges.single(0, 0, 1))
        assert lost == []

    async def test_closing_the_fabric_flushes_its_links(
        self, connection: Connection, memories: Callable[..., FileMemory]
    ) -> None:
        local, remote = memories(BIG), memories(BIG)
        posted = await connection.post_all(Opcode.WRITE, local, await connection.grant(remote))
        await connection.initiator.close()
        await connection.initiator.close()
        assert set(connection.events.statuses) == set(posted)
        assert connection.events.ends == []
        with pytest.raises(LinkClosed):
            connection.post(Opcode.WRITE, local, RemoteKey(1, 1), Ranges.single(0, 0, 1))

    async def test_posting_from_a_completion(self, connection: Connection, memories: Callable[..., FileMemory]) -> None:
        memory, remote = memories(seed=1), memories()
        key = await connection.grant(remote)
        await connection.register(connection.initiator, memory)
        record = connection.events.completed

        def completed(completions: list[object]) -> None:
            record(completions)  # type: ignore[arg-type]
            if len(connection.events.statuses) < 50:
                connection.post(Opcode.WRITE, memory, key, Ranges.single(0, 0, 4096))

        connection.events.completed = completed  # type: ignore[method-assign,assignment]
        connection.post(Opcode.WRITE, memory, key, Ranges.single(0, 0, 4096))
        await connection.events.wait(range(1, 51))

    async def test_carries_messages_or_says_that_it_does_not(self, connection: Connection) -> None:
        assert connection.link.carry(b"message") is self.carries

    # Opening

    async def test_what_the_exchange_raises_comes_through(self, fabrics: tuple[Fabric, Fabric]) -> None:
        async def refuse(offer: LinkAttributes) -> LinkAttributes:
            raise ShuttingDown("not now")

        with pytest.raises(ShuttingDown):
            await fabrics[0].connect(refuse, Connection(*fabrics).events)

    async def test_an_answer_that_leads_nowhere(self, fabrics: tuple[Fabric, Fabric]) -> None:
        async def mislead(offer: LinkAttributes) -> LinkAttributes:
            answer = fabrics[1].accept(offer)
            await fabrics[1].hang_up(answer.link_id)
            return answer

        with pytest.raises(NodeUnreachable):
            await fabrics[0].connect(mislead, Connection(*fabrics).events)

    async def test_accept_wants_its_own_fabric_and_a_served_one(self, fabrics: tuple[Fabric, Fabric]) -> None:
        target = fabrics[1]
        other = FabricKind.TCP if target.kind is not FabricKind.TCP else FabricKind.LOCAL
        with pytest.raises(FabricUnavailable):
            target.accept(LinkAttributes(other, 1))
        await target.close()
        with pytest.raises(FabricUnavailable):
            target.accept(LinkAttributes(target.kind, 1))
