"""The far end of a verbs link, in a process and a network namespace of its own.

It is reached over a Unix socket, which no network fault touches and whose refusal is a daemon's death. Run as
`ip netns exec n2 python -m tests.lab.guest.fabric_node SOCKET`; `far_process` starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

from peermem.core.errors import NodeUnreachable, PeermemError
from peermem.core.types import KeyPart, LinkAttributes, Path, RemoteKey, Rights
from peermem.fabric.verbs import MemoryRegion
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.fabric.verbs_types import Access, Settings
from tests.fabric.support import MIB, FileMemory

_HEAD = struct.Struct("<I")
LENGTH = 16 * MIB


class _Serving:
    """The process's fabric and its one memory; its public methods are what can be called."""

    def __init__(self) -> None:
        self._lost: list[bytes] = []
        self._exposed: list[MemoryRegion] = []
        self._memory = FileMemory(LENGTH, seed=2)
        self._fabric = VerbsFabric()

    async def restart(self, settings: Settings) -> None:
        await self._fabric.close()
        self._lost = []
        self._fabric = VerbsFabric(settings=settings, on_link_lost=self._lost.append)
        await self._fabric.start()
        await self._fabric.register(self._memory, Path.HOST)

    async def accept(self, offer: LinkAttributes) -> LinkAttributes:
        return self._fabric.accept(offer)

    async def grant(self, link_id: bytes, offset: int, length: int, rights: Rights) -> RemoteKey:
        return await self._fabric.grant(link_id, self._memory, offset, length, rights, 1000.0)

    async def revoke(self, key: RemoteKey) -> None:
        await self._fabric.revoke(key)

    async def expose(self, link_id: bytes) -> RemoteKey:
        """Register all of the memory for whoever is in the protection domains of a link: no window is in the way."""
        registration = self._fabric._memories.find(self._memory)
        assert registration is not None
        every, address = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE, registration.address
        rails = self._fabric._target._links[link_id].rails
        regions = [registration.tight(rail.domain, 0, LENGTH, every) for rail in rails]
        self._exposed += regions
        return RemoteKey(1, LENGTH, [[KeyPart(region.rkey, address, LENGTH)] for region in regions])

    async def conceal(self) -> None:
        while self._exposed:
            self._exposed.pop().close()

    async def hang_up(self, link_id: bytes) -> None:
        await self._fabric.hang_up(link_id)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self._memory.view()[offset : offset + length])

    async def state(self) -> tuple[list[bytes], int, int, Mapping[str, int]]:
        fabric = self._fabric
        return self._lost, fabric.accepted_count, fabric.grant_count, dict(fabric.object_counts())

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                name, arguments = await _receive(reader)
                try:
                    _send(writer, await getattr(self, name)(*arguments))
                except PeermemError as error:
                    _send(writer, (error.reason, error.message, dict(error.metadata)))
        writer.close()


async def _receive(reader: asyncio.StreamReader) -> Any:
    (size,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    return pickle.loads(await reader.readexactly(size))


def _send(writer: asyncio.StreamWriter, message: object) -> None:
    data = pickle.dumps(message)
    writer.write(_HEAD.pack(len(data)) + data)


class FarNode:
    """The process, as a test uses it."""

    def __init__(self, path: FilePath) -> None:
        self.link_id = b""
        self._path = path

    async def restart(self, settings: Settings) -> None:
        """Give it a fresh fabric."""
        await self._call("restart", settings)

    async def _call(self, name: str, *arguments: object) -> Any:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._path))
        except OSError as error:
            raise NodeUnreachable("The far node is dead.", code="UNAVAILABLE") from error
        try:
            _send(writer, (name, arguments))
            answer = await _receive(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise NodeUnreachable("The far node died.", code="UNAVAILABLE") from error
        finally:
            writer.close()
        if isinstance(answer, tuple) and answer and isinstance(answer[0], str):
            raise PeermemError.restore(*answer)
        return answer

    async def exchange(self, offer: LinkAttributes) -> LinkAttributes:
        answer: LinkAttributes = await self._call("accept", offer)
        self.link_id = answer.link_id
        return answer

    async def grant(
        self, offset: int = 0, length: int = LENGTH, rights: Rights = Rights.READ | Rights.WRITE
    ) -> RemoteKey:
        key: RemoteKey = await self._call("grant", self.link_id, offset, length, rights)
        return key

    async def revoke(self, key: RemoteKey) -> None:
        await self._call("revoke", key)

    async def expose(self) -> RemoteKey:
        key: RemoteKey = await self._call("expose", self.link_id)
        return key

    async def conceal(self) -> None:
        await self._call("conceal")

    async def hang_up(self) -> None:
        await self._call("hang_up", self.link_id)

    async def content(self, offset: int = 0, length: int = LENGTH) -> bytes:
        data: bytes = await self._call("read", offset, length)
        return data

    async def state(self) -> tuple[list[bytes], int, int, dict[str, int]]:
        """Return its lost links, and how many links, grants and verbs objects it has."""
        found: tuple[list[bytes], int, int, dict[str, int]] = await self._call("state")
        return found


@contextmanager
def far_process(folder: FilePath) -> Iterator[tuple[FilePath, subprocess.Popen[bytes]]]:
    """Run a far node in the namespace n2, and give the path of its socket."""
    path = folder / "far.sock"
    command = ["ip", "netns", "exec", "n2", sys.executable, "-m", __name__, str(folder)]
    with subprocess.Popen(command) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield path, process
        finally:
            process.kill()


async def _serve(folder: FilePath) -> None:
    serving = _Serving()
    server = await asyncio.start_unix_server(serving.answer, str(folder / "far.new"))
    (folder / "far.new").rename(folder / "far.sock")
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(FilePath(sys.argv[1])))
