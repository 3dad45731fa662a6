from __future__ import annotations

import pytest

from peermem.client.leases import BATCH, Schedule


def test_nothing_to_renew() -> None:
    schedule = Schedule()
    assert schedule.delay(0) is None
    assert schedule.take_due(0) == []


def test_a_lease_is_due_at_each_third_of_its_time() -> None:
    schedule = Schedule()
    schedule.add("x", 30, now=100)
    schedule.add("y", 60, now=100)
    assert schedule.delay(100) == pytest.approx(10)
    assert schedule.take_due(109) == []
    assert schedule.take_due(110) == ["x"]
    assert schedule.delay(110) == pytest.approx(10)
    assert schedule.take_due(120) == ["x", "y"]


def test_a_late_renewal_is_due_at_once() -> None:
    schedule = Schedule()
    schedule.add("x", 30, now=0)
    assert schedule.delay(1000) == 0.0


def test_a_dropped_region_is_forgotten() -> None:
    schedule = Schedule()
    schedule.add("x", 30, now=0)
    schedule.drop("x")
    schedule.drop("never seen")
    assert schedule.delay(0) is None


def test_a_call_renews_no_more_than_the_contract_allows() -> None:
    schedule = Schedule()
    for number in range(BATCH + 1):
        schedule.add(f"r{number}", 3, now=0)
    assert len(schedule.take_due(1)) == BATCH
    assert len(schedule.take_due(1)) == 1
