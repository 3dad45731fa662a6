"""The model: what slots of a region may hold, and what of a history contradicts it.

Rules of this file:

* Pure. A region belongs to one job, which writes down what it asks for before it asks.
* A slot is known, open while an operation that writes it has no outcome, or fenced: whatever it held at the first look
  after the answer it holds until somebody is asked to write it again.
* An operation without a known outcome leaves its slots open until their region was deleted.
* What was tried is judged by the policy that was in force all the while; while it changed, both outcomes are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from tests.chaos.history import Asked, Deleted, Ended, Event, Gone, Governed, Held, Made, Saw, Tried, Wrote

ZERO = "zero"
"""What a slot of a new region holds."""


class Fault(Enum):
    """What can be wrong."""

    WRONG = "wrong or lost bytes"
    """Acknowledged bytes are not there, or others are."""
    LATE = "late write"
    """Something was written after a fence, or by nobody who was asked."""
    LEAK = "leak"
    """A daemon holds something for nobody."""
    REACHED = "reached what is denied"
    """Somebody reached what the policy denies."""
    REFUSED = "refused what is allowed"
    """The policy allows it, and it was denied."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that is wrong."""

    fault: Fault
    where: str
    at: float
    why: str


@dataclass(slots=True)
class _Slot:
    value: str | None = ZERO
    """None: open or fenced."""
    writers: set[str] = field(default_factory=set)
    """Operations without an outcome."""
    acknowledged: bool = False
    """Whether the value is of a transfer that was told to have succeeded, and has not been seen yet."""


@dataclass(slots=True)
class Verdict:
    """What a history amounts to."""

    violations: list[Violation] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    """Transfers by outcome."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Failed transfers by reason."""
    slots_verified: int = 0
    """Acknowledged slots that were looked at and right."""
    fences_verified: int = 0
    """Looks at slots that nobody was to write, and that were unchanged."""
    denied: Counter[str] = field(default_factory=Counter)
    """What was tried that the policy denied, and was answered."""
    refused: Counter[str] = field(default_factory=Counter)
    """How much of it was refused."""
    reached: int = 0
    """What strangers tried that the policy of the moment allowed, and reached."""
    unanswered: int = 0
    """What was tried and got no answer, because something was broken, or while the policy changed."""


class Model:
    """Follows one history."""

    def __init__(self) -> None:
        self.verdict = Verdict()
        self._regions: dict[str, list[_Slot]] = {}
        self._ops: dict[str, Asked] = {}
        self._policies: dict[str, Governed] = {}

    def follow(self, events: Iterable[Event]) -> Verdict:
        """Take events in their order; return the verdict so far."""
        for event in events:
            self._take(event)
        return self.verdict

    def _take(self, event: Event) -> None:
        match event:
            case Made():
                self._regions[event.region] = [_Slot() for _ in range(event.slots)]
            case Wrote():
                for slot in self._slots(event.region, event.first, event.count):
                    slot.value, slot.acknowledged = event.value, False
            case Asked():
                self._ops[event.op] = event
                for slot in self._slots(event.region, event.first, event.count):
                    slot.value = None
                    slot.writers.add(event.op)
            case Ended():
                self._end(event)
            case Saw():
                self._see(event)
            case Deleted():
                for slot in self._regions[event.region]:
                    slot.writers.clear()
            case Gone():
                self._regions.pop(event.region, None)
            case Tried():
                self._try(event)
            case Governed():
                self._policies[event.node] = event
            case Held():
                self._hold(event)

    def _slots(self, region: str, first: int, count: int) -> list[_Slot]:
        return self._regions.get(region, [])[first : first + count]

    def _end(self, event: Ended) -> None:
        asked = self._ops.pop(event.op)
        self.verdict.outcomes[event.outcome] += 1
        if event.reason:
            self.verdict.reasons[event.reason] += 1
        if event.outcome == "unknown":
            return
        for slot in self._slots(asked.region, asked.first, asked.count):
            slot.writers.discard(event.op)
            if event.outcome == "succeeded" and not slot.writers:
                slot.value, slot.acknowledged = asked.value, True

    def _see(self, event: Saw) -> None:
        for number, (slot, value) in enumerate(
            zip(self._slots(event.region, event.first, len(event.values)), event.values, strict=False), event.first
        ):
            if slot.writers:
                continue
            if slot.value not in (None, value):
                fault = Fault.WRONG if slot.acknowledged else Fault.LATE
                why = f"holds {value} instead of {slot.value}"
                self._violate(fault, f"{event.region} slot {number}", event.at, why)
            elif slot.acknowledged:
                self.verdict.slots_verified += 1
            elif slot.value is not None:
                self.verdict.fences_verified += 1
            slot.value, slot.acknowledged = value, False

    def _try(self, event: Tried) -> None:
        allowed, refused = self._allows(event), event.outcome == "refused"
        if allowed is None or event.outcome == "unanswered":
            self.verdict.unanswered += 1
        elif not allowed:
            self.verdict.denied[event.what] += 1
            self.verdict.refused[event.what] += refused
            if not refused:
                self._violate(Fault.REACHED, event.what, event.at, f"was not refused by {event.node}")
        elif refused:
            self._violate(Fault.REFUSED, event.what, event.at, f"was refused by {event.node}: {event.reason}")
        else:
            self.verdict.reached += 1

    def _allows(self, event: Tried) -> bool | None:
        """Return whether the policy allowed it all the while; None where it changed."""
        if not event.hinges:
            return False
        policy = self._policies.get(event.node)
        return policy.guests_read if policy is not None and policy.at <= event.since else None

    def _hold(self, event: Held) -> None:
        for what, count in event.now.items():
            if count > event.baseline.get(what, 0.0):
                why = f"holds {count:g} {what}, and {event.baseline.get(what, 0.0):g} at its start"
                self._violate(Fault.LEAK, event.node, event.at, why)

    def _violate(self, fault: Fault, where: str, at: float, why: str) -> None:
        self.verdict.violations.append(Violation(fault, where, at, why))
