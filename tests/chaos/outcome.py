"""What a run found, as JSON for programs and a page of text for people.

Rules of this file:

* Only what was seen is told; what was not tried is told as 0.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.chaos.faults import Injected
from tests.chaos.history import Asked, Ended, Event, Filled
from tests.chaos.model import Fault, Verdict
from tests.chaos.slots import SLOT

_POINT = re.compile(r'"point": ?"([a-z_.]+)"')


@dataclass(slots=True)
class Growth:
    """A daemon's own memory and descriptors: when it was warm, from time to time, and at the end."""

    node: str
    bytes: list[int]
    descriptors: list[int]


@dataclass(slots=True)
class Outcome:
    """Everything that a run found."""

    seed: int
    seconds: float
    command: str
    verdict: Verdict
    faults: Counter[str] = field(default_factory=Counter)
    failpoints: Counter[str] = field(default_factory=Counter)
    limits: int = 0
    """Limits that were filled."""
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from the end of a fault to the first transfer that succeeded with what it hit, by kind of fault."""
    growth: list[Growth] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    """What went wrong besides the history: in logs, and jobs that failed."""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.verdict.violations and not self.defects

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        verdict = self.verdict
        wrong = Counter(violation.fault for violation in verdict.violations)
        return {
            "command": self.command,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "faults": dict(self.faults),
            "failpoints": dict(self.failpoints),
            "limits_filled": self.limits,
            "transfers": dict(verdict.outcomes),
            "reasons": dict(verdict.reasons),
            "bytes_verified": verdict.slots_verified * SLOT,
            "fenced_bytes_verified": verdict.fences_verified * SLOT,
            "wrong_or_lost": wrong[Fault.WRONG],
            "late": wrong[Fault.LATE],
            "leaks": wrong[Fault.LEAK],
            "denied_tried": dict(verdict.denied),
            "denied_refused": dict(verdict.refused),
            "allowed_reached": verdict.reached,
            "unanswered": verdict.unanswered,
            "recovery": {kind: [round(each, 3) for each in times] for kind, times in self.recoveries.items()},
            "growth": [
                {"node": each.node, "bytes": each.bytes, "descriptors": each.descriptors} for each in self.growth
            ],
            "violations": [f"{each.fault.value}: {each.where} {each.why}" for each in verdict.violations],
            "defects": self.defects,
        }


def recoveries(injected: Sequence[Injected], events: Iterable[Event]) -> dict[str, list[float]]:
    """Return how long it took, by kind of fault, until a transfer with what was hit succeeded."""
    asked: dict[str, Asked] = {}
    successes: list[tuple[float, float, tuple[str, ...]]] = []
    for event in events:
        if isinstance(event, Asked):
            asked[event.op] = event
        elif isinstance(event, Ended) and event.outcome == "succeeded":
            successes.append((event.at, asked[event.op].at, asked[event.op].nodes))
    times: dict[str, list[float]] = {}
    for fault in injected:
        anew = "killed" in fault.kind or "died" in fault.kind  # what was under way has died with it
        later = (
            at
            for at, since, nodes in successes
            if fault.node in nodes and at > fault.at and (since > fault.at or not anew)
        )
        first = next(later, None)
        if first is not None and "job" not in fault.kind:
            times.setdefault(fault.kind, []).append(first - fault.at)
    return times


def passed_failpoints(logs: Iterable[Path]) -> Counter[str]:
    """Return how often something went wrong on purpose, by the point, as daemons' logs tell."""
    lines = (line for log in logs for line in log.read_text().splitlines())
    return Counter(found[1] for line in lines if '"failpoint"' in line and (found := _POINT.search(line)))


def filled(events: Iterable[Event]) -> int:
    """Return how many limits were filled."""
    return sum(isinstance(event, Filled) for event in events)


def text(outcome: Outcome) -> str:
    """Return it for people."""
    told = outcome.as_json()
    told["recovery"] = {
        kind: f"{len(times)}: median {median(times):.3f} s, worst {max(times):.3f} s"
        for kind, times in outcome.recoveries.items()
    }
    lines = [f"seed {outcome.seed}, {outcome.seconds:.0f} s; again: {outcome.command}"]
    lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in told.items() if name not in _APART]
    lines += [f"WRONG {line}" for line in told["violations"]] + [f"DEFECT {line}" for line in told["defects"]]
    lines.append("All is well." if outcome.is_good else "NOT all is well.")
    return "\n".join(lines)


_APART = {"command", "seed", "seconds", "violations", "defects"}


def write(outcome: Outcome, path: Path) -> None:
    """Write the JSON."""
    path.write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
