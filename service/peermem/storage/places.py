"""The places that the configuration opens to loads and stores, and how a path in one of them is opened.

Rules of this file:

* The operator's own paths are trusted as they are; below them a path is resolved by the kernel (openat2), which
  follows no symbolic link and leaves the folder by no name.
* A file is looked at before it is opened (O_PATH): to open a FIFO would wait, and to open a tape would wind it.
* What was looked at is what is opened, whatever happens to its name meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from peermem.core.errors import (
    FileNotFound,
    FileUnusable,
    InvalidField,
    LimitReached,
    PeermemError,
    StorageFailed,
    StorageForbidden,
    StorageFull,
)
from peermem.storage import kernel

_LONGEST = 4095
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFLNK: "a symbolic link",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, or a single file or block device, as the configuration names it."""

    path: str
    """Absolute, without `.`, `..` or a slash at its end."""
    write: bool
    """Whether stores may use it."""


class Places:
    """All places."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = sorted(places, key=lambda place: len(place.path), reverse=True)

    def pin(self, path: str, *, write: bool) -> tuple[int, os.stat_result]:
        """Return a descriptor (O_PATH) of a file or block device, and what it is.

        Raises InvalidField, StorageForbidden, FileNotFound, FileUnusable, LimitReached, KernelTooOld.
        """
        place, below = self._place(path, write)
        pinned = _open(path, place, below, os.O_PATH)
        try:
            info = os.fstat(pinned)
            kind = stat.S_IFMT(info.st_mode)
            if kind == stat.S_IFLNK:
                raise refused(path, OSError(errno.ELOOP, ""))
            if kind not in (stat.S_IFREG, stat.S_IFBLK):
                raise FileUnusable(
                    f"{path} is {_KINDS.get(kind, 'of an unknown kind')}. Name a file or a block device.", path=path
                )
        except BaseException:
            os.close(pinned)
            raise
        return pinned, info

    def folder(self, path: str) -> tuple[int, str]:
        """Return a descriptor of the folder of a file that is to be made, and its name there. Raises as `pin`."""
        place, below = self._place(path, write=True)
        parent, name = os.path.split(below)
        if not below:
            place, name = os.path.split(os.path.realpath(place))
        return _open(path, place, parent, os.O_RDONLY | os.O_DIRECTORY), name

    def _place(self, path: str, write: bool) -> tuple[str, str]:
        """Return the place of a path, and the path below it."""
        if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > _LONGEST:
            raise InvalidField(
                f"path {path[:80]!r} must be an absolute path on the region's node, of at most {_LONGEST} bytes.",
                field="path",
            )
        parts = [part for part in path.split("/") if part not in ("", ".")]
        whole = f"/{'/'.join(parts)}"
        found = [place for place in self._places if f"{whole}/".startswith(f"{place.path.rstrip('/')}/")]
        if not found or ".." in parts:
            known = ", ".join(sorted(place.path for place in self._places)) or "none"
            raise StorageForbidden(
                f"{path} is in no directory that loads and stores may use, which are: {known}. Name a file in one of "
                "them, without '..', or add its directory to storage.directories.",
                path=path,
            )
        if write and not found[0].write:
            raise StorageForbidden(
                f"{path} is in {found[0].path}, which is open to loads only. Store elsewhere, or set write = true in "
                "storage.directories.",
                path=path,
            )
        return found[0].path, whole[len(found[0].path) :].strip("/")


def _open(path: str, place: str, below: str, flags: int) -> int:
    """Open what is below a place, or the place itself; `path` is the whole for errors."""
    try:
        if not below:
            return os.open(place, flags | os.O_CLOEXEC)
        folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return kernel.open_beneath(folder, below, flags)
        finally:
            os.close(folder)
    except OSError as error:
        raise refused(path, error) from error


def refused(path: str, error: OSError) -> PeermemError:
    """Return what an error of the kernel at a file means."""
    number, cause = error.errno, os.strerror(error.errno) if error.errno else str(error)
    if number == errno.ENAMETOOLONG:
        return InvalidField(f"path {path[:80]!r} has a name that is longer than the filesystem takes.", field="path")
    if number in (errno.ENOENT, errno.ENOTDIR):
        return FileNotFound(f"{path} does not exist on this node ({cause}). Correct the path.", path=path)
    if number in (errno.ELOOP, errno.EXDEV):
        return StorageForbidden(
            f"{path} is, or passes, a symbolic link, which loads and stores don't follow. Name the file itself.",
            path=path,
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "Give its user the permission, or mount it for that"
        if number == errno.EROFS:
            fix = "Mount it for writing, or name its folder in ReadWritePaths= of the daemon's systemd unit"
        return StorageForbidden(f"The daemon may not open {path} ({cause}). {fix}.", path=path)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(
            f"{path} can't take the bytes ({cause}). Free space, or raise the quota or the limit of a file's size.",
            path=path,
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return LimitReached(f"{path} can't be opened ({cause}). Raise the daemon's LimitNOFILE.", path=path)
    if number in (errno.EBUSY, errno.ETXTBSY, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        return FileUnusable(
            f"{path} can't be opened ({cause}): it is mounted, run or otherwise in use, or has no device. End that.",
            path=path,
        )
    return StorageFailed(f"{path} failed ({cause}). Look into the kernel's log of this node.", path=path)
