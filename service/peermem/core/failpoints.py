"""Named points of the daemon at which a test has something go wrong.

Rules of this file:

* `POINTS` is the whole list: what is passed there, and how. A test compares it with the code.
* All are off until a test turns them on, in this process or by a configuration that says in loud words that its
  daemon breaks on purpose. Off, a point costs one look at an empty table.
* Pure: what happens at a point is what whoever turned it on handed in (`failing.py` for a daemon).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from peermem.core.errors import InvalidField, PeermemError
from peermem.core.units import parse_duration


class Kind(Enum):
    """How a point is passed."""

    STEP = "step"
    """`hit`: the action may raise, end the process, or stop the whole daemon for a while."""
    WAIT = "wait"
    """`reach`: as a step, and whoever passes may be stopped alone."""
    CHOICE = "choice"
    """`chosen`: the code itself does something wrong, which the table tells."""


@dataclass(frozen=True, slots=True)
class Point:
    """One of the points."""

    kind: Kind
    what: str
    """What is about to happen there, or what goes wrong if it is chosen."""


POINTS: Mapping[str, Point] = {
    "region.allocate": Point(Kind.WAIT, "A device is asked for a new region's memory."),
    "region.register": Point(Kind.WAIT, "A new region's memory is made known to the fabrics."),
    "region.made": Point(Kind.WAIT, "The caller is told of the region that it asked for."),
    "region.end": Point(Kind.WAIT, "The transfers of a region that ends are failed."),
    "region.let_go": Point(Kind.WAIT, "The grants on a region that ends are revoked: no transfer uses it any more."),
    "region.close": Point(Kind.WAIT, "The memory of a region that ends is given back: no grant opens it any more."),
    "device.lost": Point(Kind.CHOICE, "A device with regions counts as vanished."),
    "transfer.begin": Point(Kind.WAIT, "A transfer that was accepted gets its links and grants."),
    "transfer.prepared": Point(Kind.WAIT, "A transfer with all its links and grants posts its first slice."),
    "slice.post": Point(Kind.CHOICE, "A slice is flushed instead of posted, as by a link that has just ended."),
    "slice.landed": Point(Kind.STEP, "A slice that is in place is counted."),
    "slice.mend": Point(Kind.WAIT, "A leg whose slices came back looks for a link and a grant to post them again."),
    "transfer.moved": Point(Kind.WAIT, "All slices of a transfer are in place; devices and checksums are next."),
    "transfer.verify": Point(Kind.WAIT, "The checksum of a leg's bytes at the far end is asked for."),
    "staging.copy": Point(Kind.WAIT, "A staged slice is copied into or out of its staging buffer."),
    "staging.corrupt": Point(Kind.CHOICE, "A byte in a staging buffer of this node is changed."),
    "relay.create": Point(Kind.WAIT, "Another node is asked to run a transfer."),
    "relay.follow": Point(Kind.WAIT, "The report of the node that runs a transfer is asked for."),
    "link.open": Point(Kind.WAIT, "A link to another node is opened."),
    "link.accept": Point(Kind.STEP, "A link of another node is accepted or rebuilt."),
    "link.fence": Point(Kind.WAIT, "The far end is asked to end a grant, so that nothing is written late."),
    "fence.skip": Point(Kind.CHOICE, "A fence counts as up although the far end was not asked to end the grant."),
    "link.close": Point(Kind.WAIT, "A link to another node is closed."),
    "grant.acquire": Point(Kind.WAIT, "Another node is asked for a grant."),
    "grant.make": Point(Kind.WAIT, "A grant on a region of this node is made."),
    "grant.release": Point(Kind.WAIT, "A grant on a region of this node is revoked."),
    "grant.keep": Point(Kind.CHOICE, "A grant of this node is not revoked, although whoever asked is told that it is."),
    "grant.forget": Point(Kind.CHOICE, "A grant that this node holds and needs no more is not given back."),
    "tcp.dial": Point(Kind.WAIT, "A rail of a tcp link is connected."),
    "tcp.send": Point(Kind.STEP, "Bytes are sent on a rail; an OSError breaks the rail."),
    "tcp.receive": Point(Kind.STEP, "Bytes are received on a rail; an OSError breaks the rail."),
    "tcp.corrupt": Point(Kind.CHOICE, "A byte of what came over tcp is changed, when all of the slice is in memory."),
}

Act = Callable[[], Awaitable[None] | None]
"""What happens at a point: raise, or return what to wait for, or None to go on."""


@dataclass(slots=True)
class _Trigger:
    act: Act
    skip: int
    times: int | None

    def due(self) -> bool:
        """Whether it is time: call once for each passage."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True


_on: dict[str, _Trigger] = {}


def hit(name: str) -> None:
    """Pass a STEP. Raises what was asked for."""
    if _on and (trigger := _on.get(name)) is not None and trigger.due():
        trigger.act()


async def reach(name: str) -> None:
    """Pass a WAIT. Raises what was asked for."""
    if _on and (trigger := _on.get(name)) is not None and trigger.due():
        pause = trigger.act()
        if pause is not None:
            await pause


def chosen(name: str) -> bool:
    """Pass a CHOICE; return whether to do wrong."""
    if _on and (trigger := _on.get(name)) is not None and trigger.due():
        trigger.act()
        return True
    return False


def go_on() -> None:
    """The act of a point at which nothing happens by itself: for choices, and to count passages."""


def turn_on(name: str, act: Act = go_on, *, skip: int = 0, times: int | None = None) -> None:
    """Have `act` happen at a point, after `skip` passages, `times` times (None: always). Raises ValueError for a point
    that there is not."""
    if name not in POINTS:
        raise ValueError(f"there is no failpoint {name!r}")
    _on[name] = _Trigger(act, skip, times)


def turn_off(name: str) -> None:
    """Have nothing happen at a point any more."""
    _on.pop(name, None)


@contextmanager
def turned_on(name: str, act: Act = go_on, *, skip: int = 0, times: int | None = None) -> Iterator[None]:
    """As `turn_on`, for the time of a `with` block."""
    turn_on(name, act, skip=skip, times=times)
    try:
        yield
    finally:
        turn_off(name)


class Deed(Enum):
    """What a configuration can have happen at a point; values are how it is written."""

    RAISE = "raise"
    """Fail for the reason of `core.errors` that is its argument."""
    OSERROR = "oserror"
    """Fail as a system call, with the errno that its argument names, such as ECONNRESET."""
    EXIT = "exit"
    """End the process at once, as SIGKILL does."""
    STOP = "stop"
    """Go on after the duration that is its argument."""
    ON = "on"
    """Do wrong: for choices."""


@dataclass(frozen=True, slots=True)
class FailOrder:
    """A point and what is to happen there, as a configuration asks for it."""

    name: str
    deed: Deed
    argument: str
    skip: int
    times: int | None

    EXPECTED = (
        "POINT=DEED, then *TIMES and +SKIPPED where wanted; a DEED is raise:REASON, oserror:ERRNO, exit, "
        "stop:DURATION or on, such as tcp.send=oserror:ECONNRESET*1+100"
    )

    @staticmethod
    def parse(text: str) -> FailOrder:
        """Return what a text orders. Raises ValueError."""
        found = _ORDER.fullmatch(text)
        if found is None:
            raise ValueError(FailOrder.EXPECTED)
        name, word, argument, times, skip = found.groups(default="")
        point, deed = POINTS.get(name), Deed(word)
        if point is None:
            raise ValueError(f"one of the points {', '.join(POINTS)}")
        if deed not in _DEEDS[point.kind]:
            fitting = ", ".join(each.value for each in Deed if each in _DEEDS[point.kind])
            raise ValueError(f"one of {fitting} for {name}")
        _check_argument(deed, argument)
        return FailOrder(name, deed, argument, int(skip or 0), int(times) if times else None)


_ORDER = re.compile(
    rf"([a-z_.]+)=({'|'.join(deed.value for deed in Deed)})(?::([A-Za-z0-9_.]+))?(?:\*(\d{{1,9}}))?(?:\+(\d{{1,9}}))?",
    re.ASCII,
)
_DEEDS = {
    Kind.STEP: {Deed.RAISE, Deed.OSERROR, Deed.EXIT, Deed.STOP},
    Kind.WAIT: {Deed.RAISE, Deed.OSERROR, Deed.EXIT, Deed.STOP},
    Kind.CHOICE: {Deed.ON, Deed.EXIT, Deed.STOP},
}


def _check_argument(deed: Deed, argument: str) -> None:
    if deed is Deed.RAISE and argument not in PeermemError.by_reason:
        raise ValueError("raise: and a reason of peermem's errors, such as raise:NODE_UNREACHABLE")
    if deed is Deed.OSERROR and not re.fullmatch(r"E[A-Z0-9]+", argument):
        raise ValueError("oserror: and the name of an errno, such as oserror:ECONNRESET")
    if deed is Deed.STOP:
        try:
            parse_duration(argument)
        except (InvalidField, ValueError):
            raise ValueError("stop: and a duration, such as stop:200ms") from None
    if deed in (Deed.EXIT, Deed.ON) and argument:
        raise ValueError(f"{deed.value} without an argument")
