"""One job of a chaos run: moves bytes between regions of its own, and writes down what it asks for and what it sees.

Rules of this file:

* What is asked for is written down before, what was answered after it.
* A transfer that was answered by another run of its daemon than the one that was asked has no known outcome.
* It may be killed at any moment; asked to stop, it ends after the step that it is at.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peermem
from peermem import errors
from tests.chaos.history import Asked, Deleted, Ended, Filled, Gone, Made, Record, Saw, Tried, Wrote
from tests.chaos.impostors import Bait
from tests.chaos.slots import SLOT, Words, fill, look, words
from tests.chaos.strangers import SHARED, Reach, Victim, outcome_of
from tests.chaos.trespass import Rumours, Trespass

SLOTS = 48
"""Of a region."""
_CALL, _TRANSFER, _WAIT = "5s", "6s", "25s"
_ENDLESS = 20.0
"""Seconds of patience with a transfer that no transfer outlasts."""
_GRAVE = 3.5
"""Seconds for which the memory of a deleted region, or of a fenced transfer, is watched: longer than what is late."""
_ATTEMPTS = 3
"""At forbidden things, one after the other."""
_FILL = 80
"""Regions that fill a limit, at most."""


@dataclass(slots=True)
class Held:
    """A region of this job."""

    key: str
    region: peermem.Region
    memory: Words
    is_sink: bool
    request_id: str = ""
    """Of a region that is there for others to try things on, and is used for nothing else."""
    rests_until: float = 0.0
    """Nobody writes it before: what comes late would show."""


@dataclass(slots=True)
class Home:
    """A daemon that this job is connected to."""

    name: str
    node: peermem.Node
    epoch: str
    held: list[Held] = field(default_factory=list)


@dataclass(slots=True)
class Flight:
    """A transfer on its way."""

    op: str
    transfer: peermem.Transfer
    asked: Home
    sink: Held
    first: int
    count: int


class Job:
    """The job."""

    def __init__(
        self, number: int, seed: int, targets: dict[str, dict[str, str]], checksums: bool, out: Path, tls: Path
    ) -> None:
        """`targets` are where each node is reached, `tls` has the certificates of nodes and guests."""
        self._number = number
        self._random = random.Random(seed)
        self._targets = targets
        self._always_checksum = checksums
        self._tls = tls
        self._rumours = Rumours(out.with_suffix(".rumours"))
        self._record = Record(out)
        self._homes: dict[str, Home] = {}
        self._last_transfer = ""
        self._graves: list[tuple[float, str, Words]] = []
        self._next = 0

    def run(self, stopped: Callable[[], bool]) -> None:
        """Take steps until told to stop, then let go of everything."""
        while not stopped():
            self._connect()
            if self._homes:
                self._step()
            else:
                time.sleep(0.05)
        for home in list(self._homes.values()):
            self._leave(home)
        self._record.close()

    def _step(self) -> None:
        homes = list(self._homes.values())
        steps = (self._move, self._inspect, self._delete_one, self._trespass, self._fill_up)
        (step,) = self._random.choices(steps, (80, 8, 6, 8, 2))
        try:
            step(homes)
        except errors.PeermemError:
            self._part()
        self._watch_graves()

    # daemons and regions

    def _connect(self) -> None:
        for name in self._targets.keys() - self._homes.keys():
            with suppress(errors.PeermemError):
                node = peermem.connect(self._targets[name]["socket"], timeout=_CALL)
                try:
                    self._homes[name] = Home(name, node, node.info().epoch)
                except errors.PeermemError:
                    node.close()

    def _part(self) -> None:
        """Something failed that is no transfer: leave the daemons that are not what they were."""
        for home in list(self._homes.values()):
            if self._epoch(home) != home.epoch:
                self._leave(home)

    def _epoch(self, home: Home) -> str:
        try:
            return home.node.info().epoch
        except errors.PeermemError:
            return ""

    def _leave(self, home: Home) -> None:
        for held in home.held:
            self._see(held.key, held.memory)
            self._record.add(Gone, region=held.key)
        home.held.clear()
        del self._homes[home.name]
        home.node.close()

    def _region(self, home: Home, *, is_sink: bool) -> Held:
        for held in home.held:
            if held.is_sink is is_sink and not held.request_id and held.rests_until < time.monotonic():
                return held
        region = home.node.create_region(device="bar0", length=SLOTS * SLOT)
        held = Held(f"{self._number}-{self._count()}", region, words(region.map()), is_sink)
        home.held.append(held)
        self._record.add(Made, region=held.key, node=home.name, slots=SLOTS)
        return held

    def _count(self) -> int:
        self._next += 1
        return self._next

    def _value(self) -> str:
        return f"{(self._number + 1) << 40 | self._count():x}"

    def _write(self, held: Held, first: int, count: int) -> str:
        value = self._value()
        self._record.add(Wrote, region=held.key, first=first, count=count, value=value)
        fill(held.memory, first, count, value)
        return value

    def _see(self, key: str, memory: Words, first: int = 0, count: int = SLOTS) -> None:
        values = look(memory, first, count)
        self._record.add(Saw, region=key, first=first, values=values)

    # steps

    def _move(self, homes: list[Home]) -> None:
        """Move bytes in a few transfers at a time."""
        source_home, sink_home, asked = (self._random.choice(homes) for _ in range(3))
        source, sink = self._region(source_home, is_sink=False), self._region(sink_home, is_sink=True)
        flights = []
        for first, count in self._ranges():
            self._see(sink.key, sink.memory, first, count)  # the last look at what was there
            value = self._write(source, first, count)
            op = f"{self._number}-{self._count()}"
            nodes = (source_home.name, sink_home.name, asked.name)
            self._record.add(Asked, op=op, region=sink.key, first=first, count=count, value=value, nodes=nodes)
            side = slice(first * SLOT, (first + count) * SLOT)
            transfer = asked.node.transfer(
                source.region[side],
                sink.region[side],
                timeout=_TRANSFER,
                checksum=self._always_checksum or self._random.random() < 0.5,
            )
            self._last_transfer = transfer.name
            flights.append(Flight(op, transfer, asked, sink, first, count))
        outcomes = [self._land(flight) for flight in flights]
        if "unknown" in outcomes:
            self._bury(sink_home, sink)
            self._part()

    def _ranges(self) -> Iterator[tuple[int, int]]:
        first = 0
        for _ in range(self._random.randint(1, 3)):
            first += self._random.randint(0, 4)
            count = self._random.choice((1, 1, 2, 8, 14))
            if first + count > SLOTS:
                return
            yield first, count
            first += count

    def _land(self, flight: Flight) -> str:
        """Wait for a transfer's end, or cancel it; write down how it ended, and look at its slots."""
        try:
            self._lose_patience(flight.transfer)
            flight.transfer.wait(_WAIT)
            outcome, reason = "succeeded", ""
        except errors.PeermemError as error:
            outcome, reason = self._failed(flight, error), error.reason
        self._record.add(Ended, op=flight.op, outcome=outcome, reason=reason)
        self._see(flight.sink.key, flight.sink.memory, flight.first, flight.count)
        if outcome == "fenced":
            self._write(flight.sink, flight.first, flight.count)
            flight.sink.rests_until = time.monotonic() + _GRAVE
        return outcome

    def _lose_patience(self, transfer: peermem.Transfer) -> None:
        """Cancel a transfer that does not end soon: what stands still at the far end may be written late."""
        patience = self._random.choice((0.001, 0.005, 0.02, 0.7, 0.9, 1.2, 1.2, _ENDLESS))
        with suppress(errors.PeermemError):
            transfer.wait(patience)
        if not transfer.ended and patience < _ENDLESS:
            with suppress(errors.PeermemError):
                transfer.cancel(_WAIT)

    def _failed(self, flight: Flight, error: errors.PeermemError) -> str:
        lost = {"executed_by", "target", "refusal"} & error.metadata.keys()  # nobody knows what came of it
        if not flight.transfer.ended or lost:
            return "unknown"
        return "fenced" if self._epoch(flight.asked) == flight.asked.epoch else "unknown"

    def _bury(self, home: Home, held: Held) -> None:
        """Delete a region of which it is not known what is written; its memory stays in sight for a while."""
        home.held.remove(held)
        try:
            held.region.delete(force=True)
        except errors.PeermemError:
            self._record.add(Gone, region=held.key)
            return
        self._record.add(Deleted, region=held.key)
        self._see(held.key, held.memory)
        self._write(held, 0, SLOTS)
        self._graves.append((time.monotonic() + _GRAVE, held.key, held.memory))

    def _watch_graves(self) -> None:
        """Look once more at memory that nobody was to write, when its time is over."""
        for home in self._homes.values():
            for held in home.held:
                if 0 < held.rests_until < time.monotonic():
                    held.rests_until = 0.0
                    self._see(held.key, held.memory)
        for grave in list(self._graves):
            until, key, memory = grave
            if time.monotonic() > until:
                self._see(key, memory)
                self._record.add(Gone, region=key)
                self._graves.remove(grave)

    def _inspect(self, homes: list[Home]) -> None:
        for home in homes:
            for held in home.held:
                self._see(held.key, held.memory)

    def _delete_one(self, homes: list[Home]) -> None:
        home = self._random.choice(homes)
        if home.held:
            self._bury(home, self._random.choice(home.held))

    def _trespass(self, homes: list[Home]) -> None:
        """Try some things that nobody may."""
        for _ in range(_ATTEMPTS):
            self._try_one(homes)

    def _try_one(self, homes: list[Home]) -> None:
        """Try something, on a region that is there for this or on one that is used."""
        home, asked = self._random.choice(homes), self._random.choice(homes)
        bait = self._bait(home)
        victim = bait if self._random.random() < 0.6 else self._region(home, is_sink=True)
        reach = {each.name: Reach(each.name, self._targets[each.name], self._tls) for each in homes}
        with Trespass(self._random, reach[home.name], reach[asked.name], self._rumours) as trespass:
            who, attempt = trespass.choose(
                Victim(victim.region.name, bool(victim.request_id), self._last_transfer, "", ""),
                Bait(bait.region.name, f"uid:{os.geteuid()}"),
                list(self._targets),
            )
            since = time.monotonic()
            outcome, reason = outcome_of(attempt.act)
        if self._epoch(home) != home.epoch:
            outcome = "unanswered"  # what it was tried on has gone
        what = f"{attempt.what}, {who}"
        self._record.add(
            Tried, what=what, node=home.name, since=since, outcome=outcome, reason=reason, hinges=attempt.hinges
        )

    def _bait(self, home: Home) -> Held:
        """Return the region of a node that others try things on; it tells of it to other jobs."""
        for held in home.held:
            if held.request_id:
                return held
        request_id = f"bait-{self._number}-{self._count()}-{self._random.getrandbits(32)}"
        region = home.node.create_region(device="bar0", length=SLOT, labels=SHARED, request_id=request_id)
        held = Held(f"{self._number}-{self._count()}", region, words(region.map()), False, request_id)
        home.held.append(held)
        self._record.add(Made, region=held.key, node=home.name, slots=1)
        self._write(held, 0, 1)
        self._rumours.tell(home.name, Victim(region.name, False, self._last_transfer, "", request_id))
        return held

    def _fill_up(self, homes: list[Home]) -> None:
        """Make regions until the node refuses more, or the policy's limit does."""
        home = self._random.choice(homes)
        made: list[peermem.Region] = []
        try:
            made.extend(home.node.create_region(device="bar0", length=4096) for _ in range(_FILL))
        except errors.LimitReached:
            self._record.add(Filled, node=home.name)
        except errors.QuotaExceeded as error:
            self._record.add(
                Tried,
                what="make more regions than the quota, an owner",
                node=home.name,
                since=time.monotonic(),
                outcome="refused",
                reason=error.reason,
                hinges=False,
            )
        for region in made:
            region.delete()


def _become(user: int) -> None:
    """Be another user for every other process, who still reads root's files: Python may lie among them."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, 0)
    ctypes.CDLL(None).setfsuid(0)


def main() -> None:
    """Run the job that the first argument, a JSON object, describes."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    if os.geteuid() != order["user"]:
        _become(order["user"])
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    job = Job(
        order["number"], order["seed"], order["targets"], order["checksums"], Path(order["out"]), Path(order["tls"])
    )
    job.run(lambda: bool(stopping))


if __name__ == "__main__":
    main()
