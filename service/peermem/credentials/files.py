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

from peermem.credentials.base import Credentials, Source
from peermem.credentials.trial import BadPair, Pair
from peermem.credentials.watched import Watched, read_small


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """PEM files: the certificate and those between it and an authority, its key, the authorities."""

    certificate: Path
    key: Path
    ca: Path
    every: float = 1.0
    """Seconds between two looks."""

    async def first(self) -> Pair:
        """See Source."""
        return await asyncio.to_thread(self._read)

    async def follow(self, credentials: Credentials) -> None:
        """See Source."""
        watched = Watched(self.certificate, self.key, self.ca)
        while True:
            try:
                credentials.offer(await asyncio.to_thread(self._read))
            except (BadPair, OSError) as error:
                credentials.refused(str(error))
            await watched.change(self.every)

    def _read(self) -> Pair:
        certificate, key, roots = (read_small(path) for path in (self.certificate, self.key, self.ca))
        return Pair(certificate, key, roots)

    def close(self) -> None:
        """See Source."""


if TYPE_CHECKING:
    _: type[Source] = CredentialFiles
