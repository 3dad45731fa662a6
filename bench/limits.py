"""The raw limits of this machine: bytes over one loopback TCP connection between two processes, and copies of memory.

`python -m bench.limits PORT BYTES:REPEATS ...` is the receiving process: `recv_into` a memory file, then one byte
back, so that a time is from the first byte sent to the word that the last one arrived.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from bench import processes
from bench.figures import Measured, Shape, sample

_PIECE = 1 << 20
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class _File:
    """A memory file and its mapping, all of whose pages exist."""

    fd: int
    view: memoryview


@contextmanager
def _memory(size: int) -> Iterator[_File]:
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)
        with mmap.mmap(fd, size) as mapping, memoryview(mapping) as view:
            for page in range(0, size, mmap.PAGESIZE):
                view[page] = 1
            yield _File(fd, view)
    finally:
        os.close(fd)


def wire(iterations: Mapping[int, int], *, sendfile: bool) -> Measured:
    """Measure totals of bytes sent one after the other, from a memory file by sendfile or from its mapping."""
    sizes = [f"{total}:{count + _WARM_UP}" for total, count in iterations.items()]
    send = _send_file if sendfile else _send_mapping
    with (
        _memory(max(iterations)) as memory,
        socket.create_server(("127.0.0.1", 0)) as listener,
        processes.module("bench.limits", str(listener.getsockname()[1]), *sizes),
        _accepted(listener) as sock,
    ):
        return {
            Shape(total): sample(total, _times(partial(_delivered, sock, send, memory, total), count))
            for total, count in iterations.items()
        }


def copy(iterations: Mapping[int, int], threads: int) -> Measured:
    """Measure copies from a memory file to another one's mapping by preadv, shared among `threads`."""
    with _memory(max(iterations)) as source, _memory(max(iterations)) as target, ThreadPoolExecutor(threads) as pool:

        def once(total: int) -> None:
            part = total // threads
            list(pool.map(lambda start: _copy(source, target, start, start + part), range(0, total, part)))

        return {Shape(total): sample(total, _times(partial(once, total), count)) for total, count in iterations.items()}


def _accepted(listener: socket.socket) -> socket.socket:
    listener.settimeout(30)
    sock, _ = listener.accept()
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _times(once: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(_WARM_UP + count):
        began = perf_counter()
        once()
        times.append(perf_counter() - began)
    return times[_WARM_UP:]


def _delivered(
    sock: socket.socket, send: Callable[[socket.socket, _File, int], None], memory: _File, total: int
) -> None:
    send(sock, memory, total)
    if not sock.recv(1):
        raise ConnectionError("The receiving process went away.")


def _send_file(sock: socket.socket, memory: _File, total: int) -> None:
    sent = 0
    while sent < total:
        sent += os.sendfile(sock.fileno(), memory.fd, sent, min(_PIECE, total - sent))


def _send_mapping(sock: socket.socket, memory: _File, total: int) -> None:
    sent = 0
    while sent < total:
        sent += sock.sendmsg([memory.view[sent : min(sent + _PIECE, total)]])


def _copy(source: _File, target: _File, start: int, end: int) -> None:
    while start < end:
        start += os.preadv(source.fd, [target.view[start : min(start + _PIECE, end)]], start)


def _receive(port: int, sizes: list[tuple[int, int]]) -> None:
    with _memory(max(total for total, _ in sizes)) as memory, socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for total, repeats in sizes:
            for _ in range(repeats):
                got = 0
                while got < total:
                    count = sock.recv_into(memory.view[got:total])
                    if count == 0:
                        return
                    got += count
                sock.sendall(b"!")


if __name__ == "__main__":
    pairs = (argument.split(":") for argument in sys.argv[2:])
    _receive(int(sys.argv[1]), [(int(total), int(repeats)) for total, repeats in pairs])
