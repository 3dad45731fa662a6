from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.lab import report
from tests.lab.machine import Boot
from tests.lab.results import Case, GuestResult, SuiteResult
from tests.lab.suites import Choice, Settings, Suite

SUITE = Suite("verbs", "trixie", Settings(seconds=30, skips=("test_cloud",)))
BOOT = Boot("", 20.0, 9.0, 9.1)
GOOD = SuiteResult("verbs", 0, 3.0, "1 passed", (Case("test_write", "passed", 0.5),), {"write": {"mib_per_s": 71.5}})


def troubles(
    *suites: SuiteResult, boot: Boot = BOOT, fatal: tuple[str, ...] = (), choice: Choice | None = None
) -> list[str]:
    guest = GuestResult({"kernel": "7.3.4"}, {suite.name: suite for suite in suites}, fatal, ())
    return report.troubles([SUITE], choice or Choice(), {"trixie": boot}, {"trixie": guest})


def with_outcome(outcome: str, name: str = "test_write", status: int = 0) -> SuiteResult:
    return replace(GOOD, status=status, tests=(*GOOD.tests, Case(name, outcome, 0.0)))


def test_a_suite_that_passed_is_no_trouble() -> None:
    assert troubles(GOOD) == []


def test_a_skip_that_the_table_allows_is_no_trouble() -> None:
    assert troubles(with_outcome("skipped", "test_cloud")) == []


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (with_outcome("failed", status=1), "test_write failed"),
        (with_outcome("error", status=1), "test_write had an error"),
        (with_outcome("skipped"), "was skipped"),
        (replace(GOOD, status=1), "although no test failed"),
        (replace(GOOD, status=5, tests=()), "ran no test"),
        (replace(GOOD, status=0, tests=()), "ran no test"),
        (replace(GOOD, status=4, tests=(), last_line="no module"), "ended with 4). Its last line: no module"),
        (
            replace(GOOD, status=137, tests=(), seconds=30.2, last_line="test_hang"),
            "limit of 30 s, and was ended. Its last",
        ),
        (replace(GOOD, status=137, tests=(), seconds=4.0), "was killed"),
        (replace(GOOD, status=None, tests=()), "left no result"),
        (replace(GOOD, name="another"), "left no result"),
    ],
)
def test_what_fails_a_suite(result: SuiteResult, told: str) -> None:
    [trouble] = troubles(result)
    assert trouble.startswith("trixie verbs: ")
    assert told in trouble


def test_a_guest_that_ended_early_fails_the_lab() -> None:
    assert troubles(GOOD, boot=replace(BOOT, trouble="It hung.")) == ["trixie: It hung."]


def test_a_line_of_the_kernel_fails_the_lab() -> None:
    assert troubles(GOOD, fatal=("BUG: bad page",)) == ["trixie: the kernel says: BUG: bad page"]


def test_a_choice_of_tests_may_leave_a_suite_empty_but_not_all() -> None:
    empty = replace(GOOD, status=5, tests=())
    assert troubles(empty, choice=Choice(pytest=("-k", "x"))) == ["No test ran."]


def test_the_report_is_json_with_every_figure() -> None:
    guest = GuestResult({"kernel": "7.3.4"}, {"verbs": GOOD}, (), ("WARNING: odd",))
    data = json.loads(json.dumps(report.build([], 40.04, {"trixie": BOOT}, {"trixie": guest})))
    assert data["passed"]
    assert data["guests"]["trixie"]["facts"] == {"kernel": "7.3.4"}
    assert data["guests"]["trixie"]["kernel_lines"] == ["WARNING: odd"]
    assert data["guests"]["trixie"]["suites"]["verbs"]["figures"] == {"write": {"mib_per_s": 71.5}}
    assert report.summary(data) == "The lab passed: 1 passed in 40.0 s."


def test_the_summary_counts_each_outcome() -> None:
    guest = GuestResult({}, {"verbs": with_outcome("failed")}, (), ())
    data = report.build(["trouble"], 40.0, {"trixie": BOOT}, {"trixie": guest})
    assert report.summary(data) == "The lab FAILED: 1 failed, 1 passed in 40.0 s."
