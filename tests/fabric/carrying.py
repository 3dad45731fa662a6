"""Daemons that meet over rails in fabric tests: what they were told, and what they answer."""

from __future__ import annotations

from collections.abc import Callable

from peermem.core.errors import MalformedMessage
from peermem.fabric.base import Asker


class Daemon:
    """The serving end's: answers each message with itself and a mark, or not at all."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.askers: list[Asker] = []
        self.answers = True

    def met(self, asker: Asker) -> Callable[[bytes], None]:
        """See `fabric.base.Met`."""
        self.askers.append(asker)

        def take(message: bytes) -> None:
            if message == NONSENSE:
                raise MalformedMessage("That makes no sense.")
            self.heard.append(message)
            if self.answers:
                asker.answer(message + MARK)

        return take


MARK = b" heard"
NONSENSE = b"nonsense"
