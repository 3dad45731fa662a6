"""The page that tells what was broken and what held."""

from __future__ import annotations

from collections import Counter

from bench.reliability import page

from tests.chaos.faults import Injected
from tests.chaos.history import Asked, Ended, Event
from tests.chaos.model import Fault, Verdict, Violation
from tests.chaos.outcome import Growth, Outcome, recoveries, text
from tests.chaos.slots import SLOT


def outcome(seed: int) -> Outcome:
    verdict = Verdict(outcomes=Counter(succeeded=10, fenced=2), slots_verified=3, fences_verified=5)
    verdict.denied.update({"read a region, a guest": 4})
    verdict.refused.update({"read a region, a guest": 4})
    return Outcome(
        seed,
        60.2,
        f"python -m tests.chaos --seed {seed} --seconds 60",
        verdict,
        faults=Counter({"daemon killed": 3, "links reset": 2}),
        failpoints=Counter({"tcp.send": 4}),
        limits=1,
        recoveries={"links reset": [0.1, 0.4], "daemon killed": [1.5]},
        growth=[Growth("a", [50 << 20, 52 << 20, 51 << 20], [40, 41, 40])],
    )


def test_the_page_adds_up_what_the_reports_tell() -> None:
    reports = [outcome(1).as_json(), outcome(2).as_json()]
    plants = [{"command": "plant it", "plant": "no-fence", "what": "none", "found_after": [3.0, None, 5.0]}]
    told = page(reports, reports[0], {"command": "make fuzz EXAMPLES=300", "inputs": {"tcp hello": 1200}}, plants)
    for line in (
        "$ python -m tests.chaos --seed 2 --seconds 60",
        "| daemon killed | 6 |",
        "| tcp.send | 8 |",
        "| succeeded | 20 |",
        f"| acknowledged bytes that were read again and right | {6 * SLOT:,} |",
        "| slots written late | 0 |",
        "| denied attempts refused | 8 |",
        "| read a region, a guest | 8 | 8 |",
        "| links reset | 4 | 0.25 s | 0.40 s |",
        "| a | 50.0 MiB, 52.0 MiB | 51.0 MiB | 40 | 40 |",
        "$ plant it",
        "| no-fence | none | 3 | 2 | 4.0 s | 5.0 s |",
        "$ make fuzz EXAMPLES=300",
        "| tcp hello | 1,200 |",
    ):
        assert line in told.splitlines()


def test_what_was_not_measured_is_told_so() -> None:
    told = page([outcome(1).as_json()], None, None)
    assert "Not measured: `make soak" in told
    assert "Not counted: `FUZZ_REPORT" in told
    assert "Not tried: `make chaos" in told


def test_an_outcome_says_what_is_wrong() -> None:
    found = outcome(7)
    assert found.is_good
    assert "All is well." in text(found)
    assert "links reset': '2: median 0.250 s, worst 0.400 s" in text(found)
    found.verdict.violations.append(Violation(Fault.LATE, "r slot 1", 3.0, "holds v instead of mine"))
    found.defects.append("a: Traceback")
    assert not found.is_good
    assert "WRONG late write: r slot 1 holds v instead of mine" in text(found)
    assert "DEFECT a: Traceback" in text(found)
    assert found.as_json()["late"] == 1


def test_recovery_is_the_first_success_with_what_was_hit() -> None:
    events: list[Event] = [
        Asked(0.5, "old", "r", 0, 1, "v", ("a", "b", "a")),
        Asked(0.6, "elsewhere", "r", 0, 1, "v", ("a", "c", "a")),
        Ended(1.2, "elsewhere", "succeeded", ""),
        Ended(1.5, "old", "succeeded", ""),
        Asked(2.0, "new", "r", 0, 1, "v", ("b", "a", "b")),
        Ended(3.0, "new", "succeeded", ""),
    ]
    reset, killed, job = (Injected(kind, "b", 1.0) for kind in ("links reset", "daemon killed", "job killed"))
    assert recoveries([reset, killed, job], events) == {"links reset": [0.5], "daemon killed": [2.0]}
