"""The lab's verdict and its report. Rules of this file:

* Pure: what happened goes in, sentences and data come out.
* Nothing passes by being absent: a suite without a result or without a test, and a test skipped without leave, fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tests.lab.machine import Boot
from tests.lab.results import GuestResult, SuiteResult
from tests.lab.suites import Choice, Suite, limit

_KILLED = 137
_NO_TESTS = 5


def troubles(
    suites: Sequence[Suite], choice: Choice, boots: Mapping[str, Boot], guests: Mapping[str, GuestResult]
) -> list[str]:
    """Return everything that fails the lab, a sentence each; none if it passed."""
    found: list[str] = []
    for release, guest in guests.items():
        if boots[release].trouble:
            found.append(f"{release}: {boots[release].trouble}")
        found += [f"{release}: the kernel says: {line}" for line in guest.fatal_lines]
    ran = False
    for suite in suites:
        result = guests[suite.release].suites.get(suite.name, SuiteResult(suite.name))
        ran = ran or bool(result.tests)
        found += [f"{suite.release} {suite.name}: {trouble}" for trouble in _suite_troubles(suite, choice, result)]
    if not ran and not found:
        found.append("No test ran.")
    return found


def _suite_troubles(suite: Suite, choice: Choice, result: SuiteResult) -> Iterable[str]:
    allowed, last = limit(suite, choice), f" Its last line: {result.last_line}" if result.last_line else ""
    if result.status is None:
        yield f"it left no result.{last}"
        return
    if result.status == _KILLED:
        in_time = result.seconds < allowed
        yield f"it was {'killed' if in_time else f'not over after its limit of {allowed} s, and was ended'}.{last}"
    elif not result.tests and not (choice.pytest and result.status == _NO_TESTS):
        yield f"it ran no test (pytest ended with {result.status}).{last}"
    for test in result.tests:
        if test.outcome in ("failed", "error"):
            yield f"{test.name} {'failed' if test.outcome == 'failed' else 'had an error'}."
        elif test.outcome == "skipped" and test.name not in suite.settings.skips:
            yield f"{test.name} was skipped, which the table of suites does not allow."
    told = any(test.outcome in ("failed", "error") for test in result.tests)
    if result.status not in (0, _NO_TESTS, _KILLED) and result.tests and not told:
        yield f"pytest ended with {result.status} although no test failed."


def build(
    found: Sequence[str], seconds: float, boots: Mapping[str, Boot], guests: Mapping[str, GuestResult]
) -> dict[str, Any]:
    """Return the report as JSON data."""
    return {
        "passed": not found,
        "troubles": list(found),
        "seconds": round(seconds, 1),
        "guests": {release: _guest(boots[release], guest) for release, guest in guests.items()},
    }


def _guest(boot: Boot, guest: GuestResult) -> dict[str, Any]:
    return {
        "facts": guest.facts,
        "seconds": round(boot.seconds, 1),
        "boots": boot.number,
        "ready_seconds": boot.ready and round(boot.ready, 1),
        "kernel_lines": [*guest.fatal_lines, *guest.suspicious_lines],
        "suites": {name: _suite(suite) for name, suite in guest.suites.items()},
    }


def _suite(suite: SuiteResult) -> dict[str, Any]:
    return {
        "status": suite.status,
        "seconds": suite.seconds,
        "tests": [asdict(test) for test in suite.tests],
        "figures": suite.figures,
    }


def summary(report: Mapping[str, Any]) -> str:
    """Return the report in one line."""
    guests = report["guests"].values()
    tests = [test["outcome"] for guest in guests for suite in guest["suites"].values() for test in suite["tests"]]
    counts = ", ".join(f"{tests.count(outcome)} {outcome}" for outcome in dict.fromkeys(sorted(tests)))
    verdict = "passed" if report["passed"] else "FAILED"
    return f"The lab {verdict}: {counts or 'no test ran'} in {report['seconds']} s."
