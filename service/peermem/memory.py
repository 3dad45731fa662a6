"""The one place where the CPU touches region memory.

Rules of this file:

* Every copy is made by the kernel (`preadv`, `pwritev`) between a file and a mapping. Where device
  memory has vanished this is EFAULT, an ordinary OSError; a load or a memmove would be SIGBUS and end
  the process (seen on Linux 7.3.4 with an unbound NVMe controller). These calls release the GIL.
* Nothing here waits or schedules: a caller on the event loop keeps to small lengths or uses a thread.
* Offsets are checked by the caller; an offset outside the memory is a defect and raises ValueError.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Protocol

import google_crc32c

_SCRATCH = 1 << 20


class Memory(Protocol):
    """Bytes of a region as this process reaches them."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def fd(self) -> int | None:
        """A file that holds the bytes from offset 0 on, for sendfile and preadv; None where there is
        only a mapping."""

    def view(self) -> memoryview:
        """Return the writable mapping of all bytes, made on first use.

        Release slices of it before the owner closes the memory. Raises ValueError after that.
        """


class FileMemory:
    """The first `length` bytes of a file, mapped on first use; a `Memory`. Usable from any thread."""

    def __init__(self, fd: int, length: int) -> None:
        """Owns `fd`."""
        self.length = length
        self._fd: int | None = fd
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._before_unmap: list[Callable[[], None]] = []

    @property
    def fd(self) -> int | None:
        """See Memory; None after `close`."""
        return self._fd

    def view(self) -> memoryview:
        """See Memory."""
        with self._lock:
            if self._view is None:
                if self._mapping is None:
                    self._mapping = mmap.mmap(self.open_fd(), self.length)
                self._view = memoryview(self._mapping)
            return self._view

    def before_unmap(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once before the memory is unmapped, in the thread that closes it."""
        self._before_unmap.append(callback)

    def open_fd(self) -> int:
        """Return the file descriptor. Raises ValueError after `close`."""
        if self._fd is None:
            raise ValueError("the memory is closed")
        return self._fd

    def close(self) -> None:
        """Unmap and close the file; a second call does nothing. Frees 1 GiB in about 0.1 s.

        Raises BufferError while somebody holds a slice of the view: then the fence was missed, all stays
        as it is, and closing can be tried again.
        """
        with self._lock:
            if self._fd is None:
                return
            if self._view is not None:
                self._view.release()
                self._view = None
            if self._mapping is not None:
                while self._before_unmap:
                    self._before_unmap.pop()()
                self._mapping.close()
                self._mapping = None
            os.close(self._fd)
            self._fd = None
        self._closed()

    def _closed(self) -> None:
        """Called once, when the file has been closed."""


class HostMemory(FileMemory):
    """Zeroed memory of this process in a file of its own, such as a staging buffer. Its pages are made when they are
    first touched."""

    def __init__(self, length: int, name: str = "peermem-staging") -> None:
        """`name` is what /proc/PID/maps shows. Raises OSError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        super().__init__(fd, length)
        try:
            os.ftruncate(fd, length)
        except BaseException:
            self.close()
            raise


def whole_pages(length: int) -> int:
    """Return `length` rounded up to pages."""
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def copy(source: Memory, source_offset: int, target: Memory, target_offset: int, length: int) -> None:
    """Copy `length` bytes. Source and target ranges must not overlap.

    Raises OSError (EFAULT where the memory has vanished) and ValueError for ranges outside.
    """
    _check(source, source_offset, length)
    _check(target, target_offset, length)
    if source.fd is not None:
        _read_file(source.fd, source_offset, target.view()[target_offset : target_offset + length])
    elif target.fd is not None:
        _write_file(target.fd, target_offset, source.view()[source_offset : source_offset + length])
    else:
        _bounce(source, source_offset, target, target_offset, length)


def read(source: Memory, offset: int, length: int) -> bytearray:
    """Return `length` bytes from `offset` on. Raises as `copy`."""
    _check(source, offset, length)
    data = bytearray(length)
    if source.fd is not None:
        _read_file(source.fd, offset, memoryview(data))
        return data
    with _scratch(length) as scratch:
        _write_file(scratch.open_fd(), 0, source.view()[offset : offset + length])
        _read_file(scratch.open_fd(), 0, memoryview(data))
    return data


def write(target: Memory, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write `data` at `offset`. Raises as `copy`."""
    _check(target, offset, len(data))
    if target.fd is not None:
        _write_file(target.fd, offset, memoryview(data))
        return
    with _scratch(len(data)) as scratch:
        _write_file(scratch.open_fd(), 0, memoryview(data))
        _read_file(scratch.open_fd(), 0, target.view()[offset : offset + len(data)])


def flip(target: Memory, offset: int) -> None:
    """Change the byte at `offset`, for failpoints. Raises as `copy`."""
    write(target, offset, bytes([read(target, offset, 1)[0] ^ 0xFF]))


def read_file(fd: int, fd_offset: int, target: Memory, offset: int, length: int) -> None:
    """Fill a range of memory from a file, which may be open for direct I/O: then the device writes it.

    Raises OSError: EFAULT where the memory has vanished or direct I/O can't reach it, and one without a number where
    the file ends early.
    """
    _check(target, offset, length)
    _read_file(fd, fd_offset, target.view()[offset : offset + length])


def write_file(fd: int, fd_offset: int, source: Memory, offset: int, length: int) -> None:
    """Write a range of memory into a file, which may be open for direct I/O. Raises OSError, as `read_file`."""
    _check(source, offset, length)
    _write_file(fd, fd_offset, source.view()[offset : offset + length])


def crc32c(source: Memory, ranges: Iterable[tuple[int, int]], value: int = 0) -> int:
    """Return the CRC32C (Castagnoli, RFC 3720 B.4) of (offset, length) ranges in order, on top of `value`."""
    for offset, length in ranges:
        _check(source, offset, length)
        for start in range(offset, offset + length, _SCRATCH):
            value = google_crc32c.extend(value, _piece(source, start, min(_SCRATCH, offset + length - start)))
    return value


def _piece(source: Memory, offset: int, length: int) -> bytes:
    piece = os.pread(source.fd, length, offset) if source.fd is not None else b""
    return piece if len(piece) == length else bytes(read(source, offset, length))


def _scratch(length: int) -> closing[HostMemory]:
    """Return a file by way of which the kernel copies between two mappings."""
    return closing(HostMemory(length, "peermem-scratch"))


def _bounce(source: Memory, source_offset: int, target: Memory, target_offset: int, length: int) -> None:
    with _scratch(min(length, _SCRATCH)) as scratch:
        for done in range(0, length, _SCRATCH):
            size = min(_SCRATCH, length - done)
            _write_file(scratch.open_fd(), 0, source.view()[source_offset + done : source_offset + done + size])
            _read_file(scratch.open_fd(), 0, target.view()[target_offset + done : target_offset + done + size])


def _check(memory: Memory, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > memory.length:
        raise ValueError(f"bytes {offset} to {offset + length} are outside a memory of {memory.length} bytes")


def _read_file(fd: int, offset: int, into: memoryview) -> None:
    """Fill `into` and release it, since an error's traceback would keep it, and with it the memory, from closing."""
    with into:
        done = count = os.preadv(fd, [into], offset)
        while count and done < len(into):
            count = os.preadv(fd, [into[done:]], offset + done)
            done += count
        if done < len(into):
            raise OSError(f"the file ended {len(into) - done} bytes early")


def _write_file(fd: int, offset: int, data: memoryview) -> None:
    """Write `data` and release it, as `_read_file`."""
    with data:
        done = count = os.pwritev(fd, [data], offset)
        while count and done < len(data):
            count = os.pwritev(fd, [data[done:]], offset + done)
            done += count
        if done < len(data):
            raise OSError(f"the file took {done} of {len(data)} bytes")


def dma_buf_exporter(fd: int) -> str:
    """Return who exported a dma-buf, such as vfio_pci_core or udmabuf; empty for a file that is none, or is closed."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
            facts = dict(line.partition(":")[::2] for line in file)
    except OSError:
        return ""
    return facts.get("exp_name", "").strip()
