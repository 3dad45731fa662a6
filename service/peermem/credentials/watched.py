"""Small files that somebody else renews: read with a bound, and read again only when they are others than before."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

LARGEST = 1 << 20
"""Bytes of one file."""
State = tuple[tuple[int, ...], ...]


class TooLarge(OSError):
    """A file has more bytes than are read."""


def read_small(path: Path) -> bytes:
    """Return what a file holds. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise TooLarge(f"{path} has more than {LARGEST} bytes")
    return data


class Watched:
    """Files, and what they were like when they were looked at last."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._state = self._look()

    def _look(self) -> State:
        return tuple(map(_state_of, self._paths))

    async def change(self, every: float) -> None:
        """Return when one of them is another than at the last look; `every` is in seconds, between two looks."""
        while not self.changed():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(every)

    def changed(self) -> bool:
        """Whether one of them is another than at the last look."""
        before, self._state = self._state, self._look()
        return self._state != before


def _state_of(path: Path) -> tuple[int, ...]:
    try:
        facts = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    # st_ctime and the mode, because one that could not be read may be mended by chmod and chown alone
    return (facts.st_dev, facts.st_ino, facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
