"""Copies into and out of device memory, made by a process of its own (see `word_copier.py`, which says why).

Rules of this file:

* One process makes all copies of a BAR range, in the order of the calls, so that two of them never write back parts of
  the same word.
* When a call returns, also by an error or because its caller was cancelled, nothing of it is running any more.
* A process that SIGBUS ended, or whose function went silent, has lost the range: this and every later call raises
  RegionRevoked. After any other death a new process takes up what was not answered; a copy is the same made twice.
* No request waits in the socket that its process could not take soon: a few are sent, the others wait here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from peermem.core.errors import Internal, LimitReached, PeermemError, RegionRevoked
from peermem.device import word_copier
from peermem.device.base import Copier
from peermem.device.word_copier import MESSAGE_PIECES, Answer, Order
from peermem.memory import Memory
from peermem.offload import in_thread

log = structlog.get_logger(__name__)

_MESSAGE_BYTES = 1 << 20
"""Bytes at which a request is full: at 10 MB/s, as from a real BAR, a tenth of a second."""
_WINDOW = 4
"""Requests that a process has at a time, so that it need not wait for the next one."""
_TRIES = 3
"""Processes that a request may meet; after that it is the request that ends them."""
_END = 5.0
"""Seconds that a killed process gets to end; longer, and it hangs in the kernel on a dead bus."""

Piece = tuple[int, int, int]
"""Offset in the device memory, offset in the file, length."""


class BarRange(Protocol):
    """What a process maps."""

    @property
    def name(self) -> str:
        """Of the device."""

    @property
    def offset(self) -> int:
        """Of the range in its BAR, in whole pages."""

    @property
    def size(self) -> int:
        """Bytes, in whole pages."""

    def open(self) -> tuple[int, int]:
        """Return descriptors of the BAR and of the function's configuration space; the caller owns them.

        Raises why the range can't be used, and OSError.
        """

    def refused(self, errno: int) -> PeermemError:
        """Return what it means that the kernel does not map the range."""


class BarCopier:
    """All copies of one BAR range."""

    def __init__(self, bar: BarRange) -> None:
        self._bar = bar
        self._process: _Process | None = None
        self._waiting: deque[_Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._loss = ""

    @property
    def is_lost(self) -> bool:
        """Whether the range has vanished, for good."""
        return bool(self._loss)

    async def start(self) -> None:
        """Have a process map the range. Raises why it can't be used."""
        process = await self._start()
        self._task = asyncio.get_running_loop().create_task(self._run(process))

    async def close(self) -> None:
        """End the process. Nobody copies any more."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def copy(self, order: Order, file: int, pieces: Sequence[Piece]) -> None:
        """Copy pieces that lie inside the range, in order. Raises RegionRevoked, and OSError where the file fails."""
        if self._loss:
            raise RegionRevoked(self._loss, device=self._bar.name)
        datagrams = [word_copier.pack_request(order, part) for part in _parts(pieces)]
        if not datagrams:
            return
        call = _Call(len(datagrams))
        self._waiting.extend(_Request(datagram, file, call) for datagram in datagrams)
        self._send()
        try:
            await asyncio.shield(call.done)
        except asyncio.CancelledError:
            self._end(call, asyncio.CancelledError())
            await asyncio.wait([call.done])
            raise
        if call.error:
            raise call.error

    def _send(self) -> None:
        """Give the process what it may have."""
        process = self._process
        while process and self._waiting and len(process.sent) < _WINDOW:
            request = self._waiting[0]
            try:
                socket.send_fds(process.connection, [request.datagram], [request.file])
            except (BlockingIOError, ConnectionError):  # the next answer, or the process's end, goes on from here
                return
            except OSError as error:  # the file is closed, or too many descriptors are under way
                self._end(request.call, error)
            else:
                process.sent.append(self._waiting.popleft())

    def _end(self, call: _Call, error: BaseException) -> None:
        """Withdraw what is left of a call."""
        call.error = call.error or error
        kept = [request for request in self._waiting if request.call is not call]
        call.answered(len(self._waiting) - len(kept))
        self._waiting = deque(kept)

    async def _run(self, process: _Process) -> None:
        """Serve by one process after the other, until the range is lost or the device is closed."""
        why = f"Device {self._bar.name} was closed, because the daemon is shutting down."
        try:
            while True:
                self._process = process
                self._send()
                await self._serve(process)
                self._process = None
                self._take_back(process, await process.end())
                process = await self._start()
        except PeermemError as error:
            why = error.message
            log.error("device_lost", device=self._bar.name, cause=why)
        finally:
            self._loss, self._process = why, None
            await process.end()
            for request in (*process.sent, *self._waiting):
                request.call.error = request.call.error or RegionRevoked(why, device=self._bar.name)
                request.call.answered()

    async def _start(self) -> _Process:
        made: list[_Process] = []
        try:
            await in_thread(lambda: made.append(_spawn(self._bar)))
            answer, errno = await made[0].answer() or (Answer.OFF, 0)
            if answer is Answer.FAILED:
                raise self._bar.refused(errno)
            if answer is Answer.OFF:
                raise Internal(f"The process that copies for device {self._bar.name} ended at once; see the log.")
        except BaseException as error:
            for process in made:
                await process.end()
            if isinstance(error, OSError):
                raise LimitReached(
                    f"The process that copies for device {self._bar.name} can't be started: {error.strerror}. Raise "
                    "the daemon's limits of open files (LimitNOFILE) and tasks (TasksMax).",
                    device=self._bar.name,
                ) from error
            raise
        return made[0]

    async def _serve(self, process: _Process) -> None:
        """Carry requests to a process and answers back until it ends. Raises RegionRevoked when the device did."""
        while taken := await process.answer():
            answer, errno = taken
            if answer is Answer.OFF:
                raise RegionRevoked(_SILENT.format(device=self._bar.name))
            request = process.sent.popleft()
            if answer is Answer.FAILED:
                self._end(request.call, OSError(errno, os.strerror(errno)))
            request.call.answered()
            self._send()

    def _take_back(self, process: _Process, status: int) -> None:
        """Let the next process do what an ended one left. Raises RegionRevoked when no other would fare better."""
        if status == -signal.SIGBUS:
            raise RegionRevoked(_VANISHED.format(device=self._bar.name))
        log.warning("copy_process_ended", device=self._bar.name, status=status)
        if process.sent:
            process.sent[0].tries += 1
            if process.sent[0].tries == _TRIES:
                raise RegionRevoked(_FATAL.format(device=self._bar.name, tries=_TRIES, status=status))
        self._waiting.extendleft(reversed(process.sent))
        process.sent.clear()
        for call, error in {(request.call, request.call.error) for request in self._waiting}:
            if error:
                self._end(call, error)


_VANISHED = (
    "Device {device} vanished while its memory was accessed: its function was removed or reset, or a driver took the "
    "BAR. Bring it back and create the region anew."
)
_SILENT = (
    "Device {device} does not answer any more: its function was removed or reset, or its memory was switched off. "
    "Bring it back and create the region anew."
)
_FATAL = (
    "Device {device} is given up: {tries} processes that copied for it ended with status {status}. Look into the "
    "kernel's log for what ended them."
)


@dataclass(eq=False)
class _Call:
    """One `copy`; done when all its requests are."""

    left: int
    error: BaseException | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def answered(self, count: int = 1) -> None:
        """So many of its requests have ended."""
        self.left -= count
        if not self.left and not self.done.done():
            self.done.set_result(None)


@dataclass
class _Request:
    """One datagram."""

    datagram: bytes
    file: int
    call: _Call
    tries: int = 0
    """Processes that ended at it."""


class _Process:
    """A process that maps the range, and the requests that it has."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.connection = connection
        self.sent: deque[_Request] = deque()
        self._process = process

    async def answer(self) -> tuple[Answer, int] | None:
        """Return its next answer and the errno; None when it has ended."""
        try:
            data = await asyncio.get_running_loop().sock_recv(self.connection, 64)
        except ConnectionError:
            return None
        return word_copier.unpack_answer(data) if data else None

    async def end(self) -> int:
        """Kill it if need be, and return its status as `subprocess` counts it. It copies nothing any more."""
        self.connection.close()
        self._process.kill()
        try:
            return await in_thread(lambda: self._process.wait(_END))
        except subprocess.TimeoutExpired:
            log.error("copy_process_hangs", pid=self._process.pid)
            return -signal.SIGKILL


def _spawn(bar: BarRange) -> _Process:
    """Start a process, which has the range's descriptors and one end of a socket. Raises as BarRange.open, OSError."""
    with ExitStack() as inherited:
        files = bar.open()
        for file in files:
            inherited.callback(os.close, file)
        connection, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inherited.enter_context(far_end)
        descriptors = (*files, far_end.fileno())
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", word_copier.__file__, *map(str, (*descriptors, bar.offset, bar.size))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        except BaseException:
            connection.close()
            raise
    connection.setblocking(False)
    return _Process(process, connection)


def _parts(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces of one request after the other. Pieces are cut only between words."""
    part: list[Piece] = []
    size = 0
    for offset, file_offset, length in pieces:
        for start in range(offset - offset % _MESSAGE_BYTES, offset + length, _MESSAGE_BYTES):
            first, end = max(start, offset), min(start + _MESSAGE_BYTES, offset + length)
            part.append((first, file_offset + first - offset, end - first))
            size += end - first
            if size >= _MESSAGE_BYTES or len(part) == MESSAGE_PIECES:
                yield part
                part, size = [], 0
    if part:
        yield part


class SliceCopier:
    """A part of a BAR range; a `Copier`."""

    def __init__(self, copier: BarCopier, start: int, length: int) -> None:
        self._copier = copier
        self._start = start
        self._length = length

    async def load(self, buffer: Memory, pieces: Sequence[Piece]) -> None:
        """See Copier."""
        await self._copy(Order.LOAD, buffer, pieces)

    async def store(self, buffer: Memory, pieces: Sequence[Piece]) -> None:
        """See Copier."""
        await self._copy(Order.STORE, buffer, pieces)

    def close(self) -> None:
        """Refuse all copies from now on."""
        self._length = -1

    async def _copy(self, order: Order, buffer: Memory, pieces: Sequence[Piece]) -> None:
        if self._length < 0:
            raise ValueError("the memory is closed")
        if buffer.fd is None:
            raise ValueError("the buffer has no file")
        for offset, position, length in pieces:
            if min(offset, position, length) < 0 or offset + length > self._length:
                raise ValueError(f"bytes {offset} to {offset + length} are outside a memory of {self._length} bytes")
            if position + length > buffer.length:
                raise ValueError(f"bytes {position} to {position + length} are outside a buffer of {buffer.length}")
        await self._copier.copy(order, buffer.fd, [(self._start + a, b, n) for a, b, n in pieces])


if TYPE_CHECKING:
    _copier: type[Copier] = SliceCopier
