"""File descriptors for tests: make them, count and limit them, and wait for their end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def open_files() -> int:
    """Return how many descriptors this process has open.

    That nothing stays is `<=`: what earlier tests have left to gRPC's threads is closed when these come to it.
    """
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def limited(which: int, soft: int) -> Iterator[None]:
    """Lower a limit of this process (resource.RLIMIT_...) for a while."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def memory_file(length: int, flags: int = os.MFD_ALLOW_SEALING) -> int:
    """Return a memory file such as a job would hand in."""
    fd = os.memfd_create("job", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return fd


UDMABUF = Path("/dev/udmabuf")


def dma_buf(length: int) -> int:
    """Return a dma-buf of ordinary memory, in whole pages, such as a job would hand in. Raises OSError."""
    driver, file = os.open(UDMABUF, os.O_RDWR), memory_file(length)
    try:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return int(fcntl.ioctl(driver, 0x40187542, bytearray(struct.pack("=IIQQ", file, 1, 0, length))))
    finally:
        os.close(driver)
        os.close(file)


def lingering_socket() -> tuple[int, socket.socket]:
    """Return a descriptor whose last close hangs until the socket that is also returned is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        end, _ = listener.accept()
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    sender.setblocking(False)
    while select.select([], [sender], [], 0.05)[1]:  # until nothing more fits
        sender.send(bytes(1 << 16))
    return sender.detach(), end


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; fail after 10 seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is not an event
            await asyncio.sleep(0.001)
