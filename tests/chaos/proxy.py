"""TCP wires between daemons that can be cut, without root: each is a port that leads to another.

Rules of this file:

* A wire that is open passes bytes on and ends. One that is stalled accepts and passes nothing on, as a network that
  drops packets. One that is mute passes nothing back. One that is late takes what comes and passes it on when it opens
  again, also what its sender has given up meanwhile, as a network with long queues. One that is late for bulk, or for
  that of every other connection, does so from the first large piece on. One that is cut ends what is on it, and
  whatever comes, with a reset.
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
_BULK = 16 << 10
"""Bytes that come at once from which on they are bulk."""
_QUEUE = 16 << 20
"""Bytes of one direction of a connection that a late wire takes."""


class Mode(Enum):
    """What a wire does."""

    OPEN = "open"
    STALLED = "stalled"
    LATE = "late"
    MUTE = "mute"
    BULK_LATE = "late for bulk"
    HALF_LATE = "late for bulk of every other connection"
    CUT = "cut"


_HOLDING = (Mode.STALLED, Mode.LATE, Mode.MUTE, Mode.BULK_LATE, Mode.HALF_LATE)


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
        self._accepted_count = 0
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
        if mode in _HOLDING:
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode is Mode.CUT:
            for writer in list(self._ends):
                _abort(writer)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted_count += 1
        is_odd = self._accepted_count % 2 == 1
        self._ends.add(writer)
        try:
            await self._flows()
            if self._mode is Mode.CUT:
                return
            host, _, port = self.upstream.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=_PIECE)
            self._ends.add(far_writer)
            try:
                await asyncio.gather(
                    self._pass(reader, far_writer, is_odd=is_odd),
                    self._pass(far_reader, writer, is_odd=is_odd, is_back=True),
                )
            finally:
                self._ends.discard(far_writer)
                _abort(far_writer)
        except OSError:
            pass
        finally:
            self._ends.discard(writer)
            _abort(writer)

    async def _flows(self, *, is_back: bool = False) -> None:
        """Wait until small pieces may pass; `is_back` where they come from the far end."""
        if self._mode in (Mode.STALLED, Mode.LATE) or (is_back and self._mode is Mode.MUTE):
            await self._flowing.wait()

    def _is_late(self, data: bytes, *, is_odd: bool) -> bool:
        """Whether a piece is to be passed on later."""
        if self._mode is Mode.LATE:
            return True
        return self._mode in (Mode.BULK_LATE, Mode.HALF_LATE)[: 1 + is_odd] and len(data) >= _BULK

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_odd: bool, is_back: bool = False
    ) -> None:
        """Pass on what comes, and then its end. That `writer`'s side has ended, the other direction finds out."""
        writer.transport.set_write_buffer_limits(0)
        is_over, was_late = False, False
        while not is_over:
            data, is_over = await _read(reader)
            if not is_over and self._is_late(data, is_odd=is_odd):
                rest, is_over = await self._queue(reader)
                data, was_late = data + rest, True
                await self._flowing.wait()
            await self._flows(is_back=is_back)
            with suppress(OSError):
                writer.write(data)
                await writer.drain()
        if was_late:
            writer.close()  # behind all that is on the way
        else:
            _abort(writer)

    async def _queue(self, reader: asyncio.StreamReader) -> tuple[bytes, bool]:
        """Take what comes until the wire opens or changes, or the queue is full; return it, and whether that is all."""
        queue, is_over = bytearray(), False
        opening = asyncio.ensure_future(self._flowing.wait())
        try:
            while not (opening.done() or is_over or len(queue) > _QUEUE):
                reading = asyncio.ensure_future(_read(reader))
                await asyncio.wait({opening, reading}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    await asyncio.wait({reading})
                if not reading.cancelled():
                    piece, is_over = reading.result()
                    queue += piece
        finally:
            opening.cancel()
        return bytes(queue), is_over


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """Return the next bytes, and whether there will be no more."""
    try:
        data = await reader.read(_PIECE)
    except OSError:
        return b"", True
    return data, not data


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
