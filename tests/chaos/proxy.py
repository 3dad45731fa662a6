"""TCP wires between daemons that can be cut, without root: each is a port that leads to another.

Rules of this file:

* A wire that is open passes bytes on and ends. One that is stalled accepts and passes nothing on, as a network that
  drops packets. One that is cut ends what is on it, and whatever comes, with a reset.
* All wires run on one event loop in a thread of their own; anybody may change a wire at any time.
* Nobody is refused by a wire: a refusal says that a daemon is dead, which only its own host can know.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum

_RESET = struct.pack("ii", 1, 0)
_PIECE = 1 << 18


class Mode(Enum):
    """What a wire does."""

    OPEN = "open"
    STALLED = "stalled"
    CUT = "cut"


class Wire:
    """One port that leads to another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, upstream: str) -> None:
        self.upstream = upstream
        self.address = ""
        self._loop = loop
        self._mode = Mode.OPEN
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=_PIECE)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])

    async def close(self) -> None:
        """End what is on the wire, and accept no more; called on the loop."""
        if self._server is not None:
            self._server.close()
        await self._set(Mode.CUT)

    def set(self, mode: Mode) -> None:
        """Change what the wire does, from any thread; it is so when this returns."""
        asyncio.run_coroutine_threadsafe(self._set(mode), self._loop).result(10)

    def reset(self) -> None:
        """End what is on the wire now; what comes later passes."""
        self.set(Mode.CUT)
        self.set(Mode.OPEN)

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.STALLED:
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode is Mode.CUT:
            for writer in list(self._ends):
                _abort(writer)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        try:
            await self._flowing.wait()
            if self._mode is Mode.CUT:
                return
            host, _, port = self.upstream.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=_PIECE)
            self._ends.add(far_writer)
            try:
                await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            finally:
                self._ends.discard(far_writer)
                _abort(far_writer)
        except OSError:
            pass
        finally:
            self._ends.discard(writer)
            _abort(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # whichever side ends, both do


def _abort(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as a host that lost it does."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


class Network:
    """The wires, and the thread that they run in."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._wires: list[Wire] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()

    def wire(self, upstream: str) -> Wire:
        """Return a new wire, open, that leads to `host:port`."""
        wire = Wire(self._loop, upstream)
        asyncio.run_coroutine_threadsafe(wire.open(), self._loop).result(10)
        self._wires.append(wire)
        return wire

    def close(self) -> None:
        """End all wires."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        for wire in self._wires:
            await wire.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def network() -> Iterator[Network]:
    """Run a network for the time of a block."""
    made = Network()
    try:
        yield made
    finally:
        made.close()
