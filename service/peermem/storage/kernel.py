"""System calls that Python's `os` lacks: openat2(2), statx(2) for direct I/O, fallocate(2), sizes of block devices."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from peermem.core.errors import KernelTooOld

_OPENAT2 = 437  # the same on every architecture (Linux 5.6)
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN, _STATX_SIZE = 0x2000, 256
_MASK_AT, _DIOALIGN_AT = 0, 152
_KEEP_SIZE = 1
_BLKSSZGET = 0x1268

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def open_beneath(folder: int, path: str, flags: int) -> int:
    """Open what is below a folder, reached by no symbolic link and no `..` that leads out of it.

    Raises OSError: EXDEV for a path that leaves the folder, ELOOP for a symbolic link; KernelTooOld.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    made = _libc.syscall(_OPENAT2, folder, os.fsencode(path), how, len(how))
    number = ctypes.get_errno()
    if made < 0 and number == errno.ENOSYS:
        raise KernelTooOld(
            "The kernel has no openat2, which keeps files in their folders, or a filter of system calls hides it. Run "
            "Linux 5.6 or newer; as a service of systemd, without RestrictSUIDSGID=."
        )
    if made < 0:
        raise OSError(number, os.strerror(number), path)
    return int(made)


def reopen(fd: int, flags: int) -> int:
    """Open the file of a descriptor (O_PATH) once more. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """Return what direct I/O on a file asks for: alignment in memory, and in the file. None where it can't be had, or
    where nobody says."""
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer):
        return None
    (mask,) = struct.unpack_from("=I", answer, _MASK_AT)
    memory, offset = struct.unpack_from("=II", answer, _DIOALIGN_AT)
    return (memory, offset) if mask & _STATX_DIOALIGN and memory and offset else None


def block_size(fd: int) -> int:
    """Return the logical block size of a block device. Raises OSError."""
    return int(struct.unpack("=I", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def reserve(fd: int, offset: int, length: int, *, grow: bool) -> None:
    """Have the file's blocks for a range, where its filesystem can; with `grow` it is that long from then on.

    Raises OSError.
    """
    if _libc.fallocate(fd, 0 if grow else _KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
