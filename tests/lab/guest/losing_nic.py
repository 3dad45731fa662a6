"""A link over two NICs of this namespace, one of which is removed while in use; run by `test_fabric_verbs_lost`."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from peermem.core.errors import NicLost
from peermem.core.types import Ranges
from peermem.fabric.base import LinkEnd, Opcode, Status
from peermem.fabric.verbs_fabric import VerbsFabric
from tests.fabric.support import MIB, Connection, FileMemory, eventually


async def main(nic: str) -> None:
    initiator, target, only = VerbsFabric(), VerbsFabric(), VerbsFabric([f"{nic}/1"])
    for fabric in (initiator, target, only):
        await fabric.start()
    local, remote, lonely = FileMemory(MIB, 1), FileMemory(MIB), FileMemory(MIB)
    both, single = await Connection(initiator, target).open(), await Connection(only, only).open()
    key, single_key = await both.grant(remote), await single.grant(lonely)
    whole = Ranges.single(0, 0, MIB)
    assert await both.run(Opcode.WRITE, local, key, whole) is Status.SUCCESS
    assert await single.run(Opcode.WRITE, lonely, single_key, whole) is Status.SUCCESS
    subprocess.run(["rdma", "link", "delete", nic], check=True)  # noqa: ASYNC221
    await eventually(lambda: isinstance(initiator.nics[f"{nic}/1"], NicLost))
    assert initiator.unavailable is None
    for _ in range(4):
        assert await both.run(Opcode.WRITE, local, key, whole) is Status.SUCCESS
    assert remote.bytes() == local.bytes()
    await eventually(lambda: single.events.ends != [])
    assert set(single.events.ends) <= {LinkEnd.BROKEN, LinkEnd.REMOTE_CLOSED}
    assert isinstance(only.unavailable, NicLost)
    for connection in (both, single):
        await connection.close()
    for fabric in (initiator, target, only):
        await fabric.close()
        assert set(fabric.object_counts().values()) == {0}
    for memory in (local, remote, lonely):
        memory.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
