"""A cache of folders that take long to build. Rules of this file:

* A folder is there whole or not at all: it is built beside its place and renamed.
* Its name carries a hash of everything that went in; another hash makes another folder, and the old one goes.
* The caller holds the cache's lock from the first look until it no longer reads what it got.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Cache:
    """Folders under one root, each built once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs of the lab away from the cache."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep(".building-*")
            yield

    def get(self, name: str, inputs: tuple[str, ...], build: Callable[[Path], None]) -> Path:
        """Return the folder `name` made from `inputs`, calling `build` with an empty folder if there is none."""
        place = self._root / f"{name}-{_digest(inputs)}"
        if not place.exists():
            fresh = Path(tempfile.mkdtemp(prefix=".building-", dir=self._root))
            build(fresh)
            os.sync()
            self._sweep(f"{name}-" + "[0-9a-f]" * 16)
            fresh.rename(place)
        return place

    def _sweep(self, pattern: str) -> None:
        for stale in self._root.glob(pattern):
            shutil.rmtree(stale)


def _digest(inputs: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
