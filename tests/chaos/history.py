"""What happened, as one line of JSON for each event: written by jobs that may be killed, read by whoever checks.

Rules of this file:

* A line is in the kernel's hands before the next thing is done, so a job that is killed loses none.
* Times are those of the host's monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    at: float


@dataclass(frozen=True, slots=True)
class Made(Event):
    """A region was made, all zeros."""

    region: str
    node: str
    slots: int


@dataclass(frozen=True, slots=True)
class Wrote(Event):
    """The job itself wrote slots of a region, which nobody else may."""

    region: str
    first: int
    count: int
    value: str


@dataclass(frozen=True, slots=True)
class Asked(Event):
    """A transfer into slots of a region was asked for."""

    op: str
    region: str
    first: int
    count: int
    value: str
    nodes: tuple[str, ...]
    """Those of the source, of the destination, and the one that was asked."""


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """A transfer was answered: succeeded, fenced (failed or cancelled), or unknown."""

    op: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Saw(Event):
    """Slots were looked at, from `first` on."""

    region: str
    first: int
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deleted(Event):
    """The deletion of a region was answered; the job still maps it."""

    region: str


@dataclass(frozen=True, slots=True)
class Gone(Event):
    """A region is out of sight: its daemon died or its job ended."""

    region: str


@dataclass(frozen=True, slots=True)
class Tried(Event):
    """Somebody tried something at a node that no policy allows, or that the one of the moment decides."""

    what: str
    node: str
    since: float
    """When it began."""
    outcome: str
    """refused, reached or unanswered."""
    reason: str
    hinges: bool
    """Whether it is allowed where guests may read what is shared."""


@dataclass(frozen=True, slots=True)
class Governed(Event):
    """The policy of a node, by whether guests may read what is shared; None while it changes."""

    node: str
    guests_read: bool | None


@dataclass(frozen=True, slots=True)
class Filled(Event):
    """A limit of a node was filled: it refused more."""

    node: str


@dataclass(frozen=True, slots=True)
class Held(Event):
    """What a daemon holds when everybody is gone, and what it held at its start."""

    node: str
    baseline: dict[str, float]
    now: dict[str, float]


KINDS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Made, Wrote, Asked, Ended, Saw, Deleted, Gone, Tried, Governed, Filled, Held)
}


class Record:
    """Where a process writes its events."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def add(self, kind: type[Event], **facts: object) -> None:
        """Write an event that happened now."""
        event = kind(time.monotonic(), **facts)
        line = json.dumps({"kind": kind.__name__, **asdict(event)})
        os.write(self._fd, line.encode() + b"\n")

    def close(self) -> None:
        """Write no more."""
        os.close(self._fd)


def parse(line: str) -> Event:
    """Return the event of a line. Raises ValueError, KeyError or TypeError for what is none."""
    facts: dict[str, Any] = json.loads(line)
    kind = KINDS[facts.pop("kind")]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return kind(**fields)


def read(paths: Sequence[Path]) -> Iterator[Event]:
    """Return the events of several processes in the order in which they happened."""
    whole = (path.read_text().rpartition("\n")[0] for path in paths)  # the last line may be about to be written
    events = [parse(line) for text in whole for line in text.splitlines()]
    yield from sorted(events, key=lambda event: event.at)
