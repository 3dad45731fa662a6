"""Credentials from files, which somebody else renews.

Rules of this file:

* Files are looked at again and again, and read when one of them is another than before: no signal, no restart.
* What can't be read or does not pass is told in the log, once for each state of the files, and changes nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials, Source
from peermem.credentials.trial import BadPair, Pair
from peermem.credentials.watched import Watched, read_small

log = structlog.get_logger(__name__)


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
        pair, denied = Watched(self.certificate, self.key, self.ca), Watched(*([self.denied] if self.denied else []))
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


def _until(credentials: Credentials) -> str:
    return f"the one that ends {credentials.now.shown.not_after}"


if TYPE_CHECKING:
    _: type[Source] = CredentialFiles
