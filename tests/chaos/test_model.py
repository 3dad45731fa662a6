"""The checker itself: it finds what is planted in a history, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.history import (
    Asked,
    Deleted,
    Ended,
    Event,
    Gone,
    Governed,
    Held,
    Made,
    Record,
    Saw,
    Tried,
    Wrote,
    read,
)
from tests.chaos.model import ZERO, Fault, Model, Verdict

NODES = ("a", "b", "a")


def history(*events: Event) -> Verdict:
    return Model().follow([Made(0.0, "r", "b", 4), *events])


def asked(op: str, value: str, first: int = 0, count: int = 2) -> Asked:
    return Asked(1.0, op, "r", first, count, value, NODES)


def tried(at: float, outcome: str, *, hinges: bool = False) -> Tried:
    return Tried(at, "read a region", "b", at - 0.5, outcome, "", hinges)


def faults(verdict: Verdict) -> list[Fault]:
    return [violation.fault for violation in verdict.violations]


def test_a_history_in_which_all_is_well() -> None:
    verdict = history(
        Saw(0.5, "r", 0, (ZERO,) * 4),
        asked("1", "v"),
        Saw(1.5, "r", 0, ("half", ZERO, ZERO, ZERO)),
        Ended(2.0, "1", "succeeded", ""),
        Saw(3.0, "r", 0, ("v", "v", ZERO, ZERO)),
        asked("2", "w"),
        Ended(4.0, "2", "fenced", "TIMEOUT"),
        Saw(5.0, "r", 0, ("w", "rest of it", ZERO, ZERO)),
        Wrote(6.0, "r", 0, 2, "mine"),
        Saw(7.0, "r", 0, ("mine", "mine", ZERO, ZERO)),
        tried(8.0, "refused"),
        Held(9.0, "b", {"sockets": 3}, {"sockets": 3, "regions": 0}),
    )
    assert verdict.violations == []
    assert (verdict.slots_verified, verdict.fences_verified) == (2, 4 + 2 + 2 + 2 + 4)
    assert verdict.outcomes == {"succeeded": 1, "fenced": 1}
    assert verdict.reasons == {"TIMEOUT": 1}
    assert (verdict.denied, verdict.refused) == ({"read a region": 1}, {"read a region": 1})


def test_a_planted_lost_byte_is_found() -> None:
    verdict = history(asked("1", "v"), Ended(2.0, "1", "succeeded", ""), Saw(3.0, "r", 0, ("v", "v but for a byte")))
    assert faults(verdict) == [Fault.WRONG]
    assert "r slot 1" in verdict.violations[0].where


@pytest.mark.parametrize("end", ["fenced", "cancelled by deletion"])
def test_a_planted_late_write_is_found(end: str) -> None:
    answer: Event = Ended(2.0, "1", "fenced", "TRANSFER_CANCELLED") if end == "fenced" else Deleted(2.0, "r")
    verdict = history(asked("1", "v"), answer, Wrote(3.0, "r", 0, 2, "mine"), Saw(4.0, "r", 0, ("mine", "v")))
    assert faults(verdict) == [Fault.LATE]


def test_a_late_write_between_two_looks_is_found() -> None:
    verdict = history(
        asked("1", "v"),
        Ended(2.0, "1", "fenced", "TIMEOUT"),
        Saw(3.0, "r", 0, ("v", "half")),
        Saw(4.0, "r", 0, ("v", "v")),
    )
    assert faults(verdict) == [Fault.LATE]


def test_a_write_where_nobody_was_to_write_is_found() -> None:
    verdict = history(asked("1", "v"), Ended(2.0, "1", "succeeded", ""), Saw(3.0, "r", 2, (ZERO, "v")))
    assert faults(verdict) == [Fault.LATE]


def test_an_operation_without_an_outcome_may_do_as_it_likes() -> None:
    verdict = history(
        asked("1", "v"),
        Ended(2.0, "1", "unknown", "NODE_UNREACHABLE"),
        Saw(3.0, "r", 0, (ZERO, "v")),
        Saw(4.0, "r", 0, ("v", "v")),
        asked("never answered", "w"),
        Saw(5.0, "r", 0, ("v", "w")),
        Gone(6.0, "r"),
        Saw(7.0, "r", 0, ("what", "ever")),
    )
    assert verdict.violations == []


def test_a_planted_leak_is_found() -> None:
    verdict = history(Held(9.0, "b", {"grants": 0, "sockets": 4}, {"grants": 1, "sockets": 4}))
    assert faults(verdict) == [Fault.LEAK]
    assert "1 grants" in verdict.violations[0].why


def test_somebody_who_reached_what_is_denied_is_found() -> None:
    assert faults(history(tried(1.0, "reached"))) == [Fault.REACHED]


def test_what_the_policy_decides_is_judged_by_the_one_in_force() -> None:
    changes = (Governed(2.0, "b", guests_read=True), Governed(6.0, "b", None), Governed(7.0, "b", guests_read=False))
    well = history(
        tried(1.5, "reached", hinges=True),  # nothing is known of the policy yet
        changes[0],
        tried(2.1, "refused", hinges=True),  # it began before
        tried(4.0, "reached", hinges=True),
        tried(4.5, "unanswered", hinges=True),
        changes[1],
        tried(6.9, "reached", hinges=True),
        changes[2],
        tried(7.4, "reached", hinges=True),
        tried(8.0, "refused", hinges=True),
    )
    assert well.violations == []
    assert (well.reached, well.denied.total(), well.refused.total(), well.unanswered) == (1, 1, 1, 5)
    assert faults(history(changes[0], tried(4.0, "refused", hinges=True))) == [Fault.REFUSED]
    assert faults(history(changes[2], tried(9.0, "reached", hinges=True))) == [Fault.REACHED]


def test_histories_of_several_processes_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    records = [Record(tmp_path / name) for name in ("one", "two")]
    records[0].add(Made, region="r", node="b", slots=4)
    records[1].add(Governed, node="b", guests_read=True)
    records[0].add(Asked, op="1", region="r", first=0, count=2, value="v", nodes=NODES)
    records[1].add(Held, node="b", baseline={}, now={})
    for record in records:
        record.close()
    events = list(read([tmp_path / "one", tmp_path / "two"]))
    assert [type(event) for event in events] == [Made, Governed, Asked, Held]
    assert isinstance(events[2], Asked)
    assert events[2].nodes == NODES
