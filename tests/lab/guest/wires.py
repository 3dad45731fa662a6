"""Links of the verbs fabric to a node in another namespace, as tests use them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from peermem.core.types import LinkAttributes, Ranges, RemoteKey
from peermem.fabric.base import Opcode, Status, WorkRequest
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.fabric.verbs_link import VerbsLink
from peermem.fabric.verbs_types import Settings
from tests.fabric.support import MIB, FileMemory, Recorder
from tests.lab.guest.fabric_node import LENGTH, FarNode

QUICK = Settings(stall_timeout=5.0, keepalive=1.0)


class Wire:
    """A link to a far node, with local memory that is registered."""

    def __init__(self, fabric: VerbsFabric, far: FarNode, local: FileMemory, subject: str = "") -> None:
        self.fabric = fabric
        self.subject = subject
        self.far = far
        self.local = local
        self.events = Recorder()
        self.link: VerbsLink
        self._next_id = 0

    async def open(self, rails: int = 1) -> Wire:
        self.events = Recorder()
        self.link = await self.fabric.connect(self._exchange, self.events, rails, self.subject)
        await self.link.prepare(self.local, 0, LENGTH)
        return self

    async def _exchange(self, offer: LinkAttributes) -> LinkAttributes:
        return await self.far.exchange(dataclasses.replace(offer, subject=self.subject))

    def domains(self) -> set[tuple[str, int]]:
        """Return the protection domains of this end, as the kernel numbers them."""
        command = ["rdma", "-j", "-d", "resource", "show", "qp"]
        listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        ends = {(rail.port.name.partition("/")[0], rail.here.number) for rail in self.link.uses(lambda _: True)}
        return {(pair["ifname"], pair["pdn"]) for pair in listed if (pair["ifname"], pair["lqpn"]) in ends}

    def post(self, opcode: Opcode, key: RemoteKey, ranges: Ranges) -> int:
        self._next_id += 1
        self.link.post(WorkRequest(self._next_id, opcode, self.local, key, ranges))
        return self._next_id

    def post_all(self, opcode: Opcode, key: RemoteKey) -> list[int]:
        return [self.post(opcode, key, Ranges.single(at, at, MIB)) for at in range(0, LENGTH, MIB)]

    async def wait(self, posted: list[int], patience: float = 60.0) -> set[Status]:
        async with asyncio.timeout(patience):
            while not all(number in self.events.statuses for number in posted):
                self.events.news.clear()
                await self.events.news.wait()
        return {self.events.statuses[number] for number in posted}


Wired = Callable[[Settings], AbstractAsyncContextManager[Wire]]


async def far_state(wire: Wire, is_so: Callable[[list[bytes], int, int, Mapping[str, int]], bool]) -> None:
    """Wait until the far node's lost links, links, grants and verbs objects are so."""
    async with asyncio.timeout(30):
        while not is_so(*await wire.far.state()):  # noqa: ASYNC110  it tells when it is asked
            await asyncio.sleep(0.05)


async def all_well(wire: Wire) -> None:
    """See that bytes go over and come back."""
    key = await wire.far.grant()
    assert await wire.wait([wire.post(Opcode.WRITE, key, Ranges.single(0, 1, MIB))]) == {Status.SUCCESS}
    assert await wire.far.content(1, MIB) == wire.local.bytes()[:MIB]
    assert await wire.wait([wire.post(Opcode.READ, key, Ranges.single(MIB + 2, 1, MIB))]) == {Status.SUCCESS}
    assert wire.local.bytes()[MIB + 2 : 2 * MIB + 2] == wire.local.bytes()[:MIB]
    await wire.far.revoke(key)
