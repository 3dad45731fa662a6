"""One open file or block device: its descriptors, what direct I/O on it asks for, and its end.

Rules of this file:

* Everything here may block, and runs in threads.
* A file that is made or replaced as a whole is written under a name of its own beside the real one, which it gets when
  all its bytes are on the disk: nobody ever sees a part of it.
* A range of a file or block device is written in place, after its blocks were reserved where the filesystem can.
* A block device that is mounted or used otherwise is not stored into (O_EXCL).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

from peermem import memory
from peermem.core.errors import FileNotFound, FileTooShort, PeermemError, RegionRevoked, ZeroLength
from peermem.core.storage import Order, Span, cut
from peermem.memory import HostMemory
from peermem.storage import kernel
from peermem.storage.places import Places, refused

_UNTOLD = (
    "The filesystem of {path} offers no direct I/O, or does not tell what it asks for, so the bytes pass through the "
    "page cache."
)
_UNWILLING = "{path} can't be opened for direct I/O ({cause}), so the bytes pass through the page cache."


class Handles:
    """A file or block device that is read, or written in place."""

    def __init__(self, path: str, order: Order, fd: int, offset: int) -> None:
        """Owns `fd`."""
        self._closing = ExitStack()
        self._closing.callback(os.close, fd)
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.path = path
        self.order = order
        self.buffered = fd
        self.direct: int | None = None
        """Another descriptor of it, for direct I/O; None where there is none."""
        self.memory_unit = 1
        """What an address in memory must be a multiple of for direct I/O."""
        self.unit = 1
        """The same, for an offset in the file."""
        self.why = ""
        """Why there is no direct I/O; a sentence."""
        self.span = Span(offset, 0, 0)

    def whole_units(self, length: int) -> int:
        """Return `length` rounded up to what direct I/O asks for."""
        return -(-length // self.unit) * self.unit

    @property
    def size(self) -> int:
        """Bytes, now."""
        return os.lseek(self.buffered, 0, os.SEEK_END)

    @property
    def aftermath(self) -> str:
        """See OpenFile."""
        if self.order is Order.LOAD:
            return ""
        end = self.span.file + self.span.length
        return f"Bytes {self.span.file} to {end} of {self.path} hold old bytes, new ones, or a mix of both."

    def open_direct(self) -> None:
        """Open it for direct I/O too, where that works."""
        asked = kernel.direct_alignment(self.buffered)
        if asked is None and self._is_device:
            asked = (kernel.block_size(self.buffered),) * 2
        if asked is None:
            self.why = _UNTOLD.format(path=self.path)
            return
        try:
            self.direct = kernel.reopen(self.buffered, _flags(self.order) | os.O_DIRECT)
        except OSError as error:
            self.why = _UNWILLING.format(path=self.path, cause=os.strerror(error.errno or 0))
        else:
            self._closing.callback(os.close, self.direct)
            self.memory_unit, self.unit = asked

    def commit(self) -> None:
        """Have what was stored on the disk, under its name. Raises OSError."""
        os.fsync(self.buffered)

    def crc32c(self, block: int, stopped: Callable[[], bool]) -> int:
        """Return the CRC32C of the range, read anew; of less once `stopped`. Raises OSError."""
        value, straight = 0, self.buffered if self.direct is None else self.direct
        block = self.whole_units(block)
        with closing(HostMemory(block)) as buffer:
            for part, fd in zip(cut(self.span, self.unit), (self.buffered, straight, self.buffered), strict=True):
                for start in range(0, 0 if stopped() else part.length, block):
                    size = min(block, part.length - start)
                    memory.read_file(fd, part.file + start, buffer, 0, size)
                    value = memory.crc32c(buffer, [(0, size)], value)
                    if stopped():
                        break
        return value

    def failed(self, error: OSError) -> PeermemError:
        """Return what an error between the file and a region's memory means."""
        if error.errno == errno.EFAULT:
            return RegionRevoked(f"The region's memory can't be accessed any more ({error.strerror}).", path=self.path)
        may_be_cut = self.order is Order.LOAD and not self._is_device  # a device that ends was taken away
        ended = error.errno in (None, errno.EINVAL)  # the latter, where what is left is no block of the disk
        if may_be_cut and ended and (size := self.size) < self.span.file + self.span.length:
            return FileTooShort(f"{self.path} was cut to {size} bytes while it was read.", path=self.path, size=size)
        return refused(self.path, error)

    def close(self) -> None:
        """See OpenFile. Raises OSError, when all has been closed that can be."""
        self._closing.close()


class WholeFile(Handles):
    """A file that is made or replaced as a whole."""

    def __init__(self, path: str, folder: int, name: str) -> None:
        """Owns `folder`, which holds the file `name`, also when it raises. Raises OSError."""
        self._folder, self._name, self._named = folder, name, False
        self._other_name = f".peermem-{secrets.token_hex(8)}"
        try:
            flags = _flags(Order.STORE) | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._other_name, flags, 0o666, dir_fd=folder)
        except BaseException:
            os.close(folder)
            raise
        super().__init__(path, Order.STORE, fd, 0)
        self._closing.callback(os.close, folder)
        self._closing.callback(self._remove)

    @property
    def aftermath(self) -> str:
        """See OpenFile."""
        if self._named:
            return f"{self.path} holds all bytes, but might not outlast a crash of the node."
        return f"{self.path} is as it was before."

    def resemble(self, replaced: os.stat_result) -> None:
        """Have the permissions and, if the daemon may, the owner of the file that is replaced."""
        with suppress(PermissionError):
            os.fchown(self.buffered, replaced.st_uid, replaced.st_gid)
        os.fchmod(self.buffered, replaced.st_mode & 0o777)

    def commit(self) -> None:
        """See OpenFile."""
        super().commit()
        os.rename(self._other_name, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._named = True
        os.fsync(self._folder)

    def _remove(self) -> None:
        if not self._named:
            os.unlink(self._other_name, dir_fd=self._folder)


def open_source(places: Places, path: str, offset: int, length: int) -> Handles:
    """Open what is loaded; `length` 0 means up to its end. Raises as Storage.open."""
    pinned, _ = places.pin(path, write=False)
    handles = Handles(path, Order.LOAD, _reopened(path, pinned, _flags(Order.LOAD)), offset)
    with _closed_on_error(handles):
        return _spanned(handles, length or max(0, handles.size - offset), fixed=True)


def open_target(places: Places, path: str, offset: int | None, length: int) -> Handles:
    """Open what is stored into: at `offset`, or as a whole file for None. Raises as Storage.open."""
    try:
        pinned, info = places.pin(path, write=True)
    except FileNotFound:
        if offset is not None:
            raise
        return _whole(places, path, length, None)
    is_device = stat.S_ISBLK(info.st_mode)
    if offset is None and not is_device:
        os.close(pinned)
        return _whole(places, path, length, info)
    flags = _flags(Order.STORE) | (os.O_EXCL if is_device else 0)
    handles = Handles(path, Order.STORE, _reopened(path, pinned, flags), offset or 0)
    with _closed_on_error(handles):
        if not is_device:
            kernel.reserve(handles.buffered, handles.span.file, length, grow=False)
        return _spanned(handles, length, fixed=is_device)


def _whole(places: Places, path: str, length: int, replaced: os.stat_result | None) -> Handles:
    folder, name = places.folder(path)
    try:
        handles = WholeFile(path, folder, name)
    except OSError as error:
        raise refused(path, error) from error
    with _closed_on_error(handles):
        if replaced is not None:
            handles.resemble(replaced)
        kernel.reserve(handles.buffered, 0, length, grow=True)
        return _spanned(handles, length, fixed=False)


def _spanned(handles: Handles, length: int, *, fixed: bool) -> Handles:
    """Note the range, which must be inside a file of `fixed` size, and have it open for direct I/O."""
    offset, path, size = handles.span.file, handles.path, handles.size
    if not length:
        raise ZeroLength(f"{path} has no bytes from {offset} on. Name a file that has some.", path=path)
    if fixed and offset + length > size:
        raise FileTooShort(
            f"{path} has {size} bytes, and {length} from {offset} on were asked for. Ask for fewer, or another file.",
            path=path,
            size=size,
        )
    handles.span = Span(offset, 0, length)
    handles.open_direct()
    return handles


def _reopened(path: str, pinned: int, flags: int) -> int:
    try:
        return kernel.reopen(pinned, flags)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        os.close(pinned)


@contextmanager
def _closed_on_error(handles: Handles) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        handles.close()
        if isinstance(error, OSError):
            raise refused(handles.path, error) from error
        raise


def _flags(order: Order) -> int:
    return os.O_RDONLY if order is Order.LOAD else os.O_RDWR
