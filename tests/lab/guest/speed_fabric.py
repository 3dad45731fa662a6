"""One end of a link of the verbs fabric whose speed is measured; a process: see `ends`.

The near end initiates: `offer` and `connect` open the link, then it posts. The far end accepts and grants.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter

from peermem.core.types import LinkAttributes, Ranges, RemoteKey, Rights
from peermem.fabric.base import Completion, Link, LinkEnd, Opcode, Status, WorkRequest
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.memory import HostMemory, Memory
from tests.lab.guest.ends import serve
from tests.lab.guest.speed_memory import OUTSTANDING, PATHS, allocate, mark, marks, slices


class FabricEnd:
    """A fabric on one NIC port, with memory of each kind that it is asked for."""

    def __init__(self, nic: str) -> None:
        self._fabric = VerbsFabric((nic,))
        self._memories: dict[str, Memory] = {}
        self._link_id = b""
        self._work: _Work | None = None
        self._opening: asyncio.Task[Link]
        self._answer: asyncio.Future[LinkAttributes]
        self._link: Link

    async def start(self) -> None:
        await self._fabric.start()

    # The far end

    async def accept(self, offer: LinkAttributes) -> LinkAttributes:
        answer = self._fabric.accept(offer)
        self._link_id = answer.link_id
        return answer

    async def grant(self, kind: str) -> RemoteKey:
        memory = await self._memory(kind)
        return await self._fabric.grant(self._link_id, memory, 0, memory.length, Rights.READ | Rights.WRITE, ttl=3600.0)

    # The near end

    async def offer(self) -> LinkAttributes:
        loop = asyncio.get_running_loop()
        offered: asyncio.Future[LinkAttributes] = loop.create_future()
        self._answer = loop.create_future()

        async def exchange(offer: LinkAttributes) -> LinkAttributes:
            offered.set_result(offer)
            return await self._answer

        self._opening = loop.create_task(self._fabric.connect(exchange, self))
        return await offered

    async def connect(self, answer: LinkAttributes) -> None:
        self._answer.set_result(answer)
        self._link = await self._opening

    async def move(self, opcode: Opcode, key: RemoteKey, segment: int, count: int) -> float:
        """Move so many slices of host memory; return the seconds that it took."""
        turns = slices(segment)
        requests = [turns[number % len(turns)] for number in range(count)]
        began = perf_counter()
        await self._run(opcode, key, requests, OUTSTANDING)
        return perf_counter() - began

    async def latencies(self, opcode: Opcode, key: RemoteKey, size: int, count: int) -> list[float]:
        """Move a few bytes so many times, one after the other; return what each took."""
        return await self._run(opcode, key, [Ranges.single(0, 0, size)] * count, 1)

    async def _run(self, opcode: Opcode, key: RemoteKey, requests: list[Ranges], at_once: int) -> list[float]:
        memory = await self._memory("host")
        made = [WorkRequest(number, opcode, memory, key, ranges) for number, ranges in enumerate(requests)]
        self._work = _Work(self._link, made)
        for _ in range(min(at_once, len(made))):
            self._work.post()
        return await self._work.done

    # Both

    async def mark(self, kind: str, segment: int) -> None:
        mark(await self._memory(kind), segment)

    async def marks(self, kind: str, segment: int) -> bytes:
        return marks(await self._memory(kind), segment)

    async def registering(self, length: int) -> tuple[float, float]:
        """Register so much host memory; return the seconds that it took and the loop's longest turn meanwhile."""
        memory = HostMemory(length, "speed-large")
        memory.view()
        began = perf_counter()
        watch = _Watch()
        await self._fabric.register(memory, PATHS["host"])
        taken, longest = perf_counter() - began, watch.stop()
        await self._fabric.unregister(memory)
        memory.close()
        return taken, longest

    async def _memory(self, kind: str) -> Memory:
        if kind not in self._memories:
            self._memories[kind] = memory = await allocate(kind)
            await self._fabric.register(memory, PATHS[kind])
        return self._memories[kind]

    def completed(self, completions: list[Completion]) -> None:
        """See LinkEvents."""
        assert self._work
        self._work.completed(completions)

    def heard(self, message: bytes) -> None:
        """See LinkEvents."""
        raise AssertionError("nothing was carried, and something came back")

    def rail_down(self, cause: str, pause: float) -> None:
        """See LinkEvents."""
        raise AssertionError(f"a rail went down: {cause}")

    def rail_up(self) -> None:
        """See LinkEvents."""

    def down(self, end: LinkEnd, cause: str) -> None:
        """See LinkEvents."""
        sys.exit(f"the link went down: {end}, {cause}")


class _Work:
    """Requests that are posted one for each that completes."""

    def __init__(self, link: Link, requests: list[WorkRequest]) -> None:
        self.done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._link = link
        self._requests = requests
        self._began: list[float] = []
        self._taken: list[float] = []

    def post(self) -> None:
        request = self._requests[len(self._began)]
        self._began.append(perf_counter())
        self._link.post(request)

    def completed(self, completions: list[Completion]) -> None:
        now = perf_counter()
        for completion in completions:
            assert completion.status is Status.SUCCESS, completion
            self._taken.append(now - self._began[completion.wr_id])
        for _ in range(min(len(completions), len(self._requests) - len(self._began))):
            self.post()
        if len(self._taken) == len(self._requests):
            self.done.set_result(self._taken)


class _Watch:
    """Sees how long the loop's turns take."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = perf_counter()
        self._longest = 0.0
        self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        now = perf_counter()
        self._longest, self._last = max(self._longest, now - self._last), now
        self._handle = self._loop.call_soon(self._turn)

    def stop(self) -> float:
        self._handle.cancel()
        return max(self._longest, perf_counter() - self._last)


if __name__ == "__main__":
    asyncio.run(serve(FabricEnd(sys.argv[1])))
