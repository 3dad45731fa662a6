"""The file of what counts no more, which somebody else edits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from peermem.core.spiffe import Denied
from peermem.credentials.base import Credentials
from peermem.credentials.trial import BadPair
from peermem.credentials.watched import Watched, read_small

log = structlog.get_logger(__name__)


def read_denied(path: Path) -> Denied:
    """Return what a file denies. Raises BadPair, OSError."""
    try:
        return Denied.parse(read_small(path).decode("ascii"))
    except ValueError as error:
        raise BadPair(f"{path}: {error}") from None


async def follow_denied(path: Path, credentials: Credentials, every: float = 1.0) -> None:
    """Put what the file says in force whenever it is another; `every` is in seconds, between two looks.

    What can't be read changes nothing, and is told in the log.
    """
    watched = Watched(path)
    while True:
        try:
            credentials.deny(await asyncio.to_thread(read_denied, path))
        except (BadPair, OSError) as error:
            log.error("denied_refused", file=str(path), cause=str(error))
        await watched.change(every)
