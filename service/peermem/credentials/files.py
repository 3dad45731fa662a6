"""Credentials from files, which somebody else renews.

Rules of this file:

* Files are looked at again and again, and read when one of them is another than before: no signal, no restart.
* What can't be read or does not pass is told in the log, once for each state of the files, and changes nothing.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials, Source
from peermem.credentials.trial import BadPair, Pair

log = structlog.get_logger(__name__)

_LARGEST = 1 << 20
"""Bytes of one file."""
State = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """PEM files: the certificate and those between it and an authority, its key, the authorities."""

    node: str
    pattern: NodePattern
    certificate: Path
    key: Path
    ca: Path
    denied: Path | None
    """What counts no more (core.spiffe.Denied); None for nothing."""
    every: float = 1.0
    """Seconds between two looks."""

    async def open(self) -> Credentials:
        """See Source."""
        return await asyncio.to_thread(self._open)

    def _open(self) -> Credentials:
        return Credentials(self.node, self.pattern, self._pair(), read_denied(self.denied))

    async def follow(self, credentials: Credentials) -> None:
        """See Source."""
        pair, denied = _Watched((self.certificate, self.key, self.ca)), _Watched((self.denied,) if self.denied else ())
        while True:
            await asyncio.sleep(self.every)
            try:
                if pair.changed():
                    credentials.offer(await asyncio.to_thread(self._pair))
            except (BadPair, OSError) as error:
                log.error("certificate_refused", file=str(self.certificate), cause=str(error), kept=_until(credentials))
            try:
                if denied.changed():
                    credentials.deny(await asyncio.to_thread(read_denied, self.denied))
            except (BadPair, OSError) as error:
                log.error("denied_refused", file=str(self.denied), cause=str(error))

    def _pair(self) -> Pair:
        certificate, key, roots = (read_small(path) for path in (self.certificate, self.key, self.ca))
        return Pair(certificate, key, roots)


def read_denied(path: Path | None) -> Denied:
    """Return what a file denies. Raises BadPair, OSError."""
    try:
        return Denied.parse(read_small(path).decode("ascii")) if path else Denied()
    except ValueError as error:
        raise BadPair(f"{path}: {error}") from None


def read_small(path: Path) -> bytes:
    """Return what a file holds. Raises BadPair, OSError."""
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise BadPair(f"{path} has more than {_LARGEST} bytes")
    return data


def _until(credentials: Credentials) -> str:
    return f"the one that ends {credentials.now.shown.not_after}"


class _Watched:
    """Files, and what they were like when they were looked at last."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._state = self._look()

    def _look(self) -> State:
        return tuple(map(_state_of, self._paths))

    def changed(self) -> bool:
        """Whether one of them is another than at the last look."""
        before, self._state = self._state, self._look()
        return self._state != before


def _state_of(path: Path) -> tuple[int, ...]:
    try:
        facts = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


if TYPE_CHECKING:
    _: type[Source] = CredentialFiles
