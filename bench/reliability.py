"""`python -m bench.reliability CHAOS... [--plants REPORT...] [--soak REPORT] [--fuzz REPORT]`: writes RELIABILITY.md.

Rules of this file:

* Every figure is of a report that `tests.chaos --report` or FUZZ_REPORT wrote; what was not tried is told so.
* Nothing in it names the machine or a path; each section names the command that makes its figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Report = Mapping[str, Any]

_PAGE = Path(__file__).parent / "RELIABILITY.md"

_DEADLINES: Sequence[tuple[str, str, str]] = (
    ("a daemon", "another one's OpenLink, AcquireGrant, CreateTransfer, GetNode", "5 s a call"),
    (
        "a daemon",
        "another one's ReleaseGrants and CloseLink",
        "2 s an attempt; a fence is asked for until the grant's time is over",
    ),
    ("a daemon", "another one's CopyStaged, Flush, Checksum, CancelTransfer", "120 s a call"),
    (
        "a daemon",
        "the report of a transfer that another one runs",
        "asked for anew after 10 s of silence, given up after 10 s without contact",
    ),
    ("a daemon", "a gRPC connection", "5 s to connect; pings every 10 s while calls run, answered within 5 s"),
    ("the tcp fabric", "a rail's connection and its welcome", "5 s"),
    ("the tcp fabric", "the hello of who connects; all rails of a link", "5 s; 10 s"),
    ("the tcp fabric", "a rail with work on which nothing moves", "`tcp.stall_timeout` (10 s)"),
    ("the tcp fabric", "an idle connection whose host vanished", "60 s"),
    ("the verbs fabric", "a link with work on which nothing moves", "`verbs.stall_timeout` (10 s)"),
    ("a transfer", "its first link, and another one after a break, while nothing moves", "`transfer.retry_for` (10 s)"),
    ("a transfer that failed", "its fence", "the time of its grants, `transfer.grant_ttl` (30 s), and 1 s"),
    ("a transfer", "its end", "the `timeout` that it was asked for with; without one, as long as bytes move"),
    ("a region's end", "its transfers", "their fences"),
    (
        "the daemon's end",
        "transfers, then fences, then calls",
        "`shutdown.grace` (20 s), then `transfer.grant_ttl` and 5 s, then 1 s",
    ),
    ("a job", "a call; the report of a transfer", "30 s; pings every 20 s, answered within 10 s"),
)

_RUNS = """\
Three daemons on one host (tcp fabric, memory files as devices) that reach each other only over wires that can be
stalled and cut, and three jobs that move bytes between regions of their own, on orders to any of the three, and write
down what they ask for and see. Faults follow each other after 0.1 to 0.7 s. A checker goes through the histories:
acknowledged bytes have to be there, bytes whose transfer failed, was cancelled or whose region was deleted must not
change after the answer, and when everybody is gone every daemon holds what it held at its start. What has no known
outcome (its daemon or its job died) is not judged until its region was deleted.
The daemons know each other by certificates, and each has a policy with quotas that is changed and broken while they
run. Jobs (each a user of its own, where the run is root's) also try what no policy allows, or only the one of the
moment: the checker judges by the policy that was in force all the while."""

_PLANTED = """\
That the checker notices what it looks for is tried with defects that are planted in the daemons, by failpoints that no
configuration has without `break_on_purpose`, or by a policy that is none. A run is over when the checker has found the
defect. Whose grants are not ended also have to be deaf to the end of links, which would end the grants as well. How
soon a defect is found hangs on how much moves meanwhile: on a machine that is busy with other work a run of 30 s may be
too short. Without chance, late slices are let in and fenced out by `tests/chaos/test_late_slices.py`."""

_RECOVERY = """\
From the end of the fault (a killed daemon is ready again, a wire is open again) to the end of the first transfer that
succeeded with the node that was hit; where a daemon died, of one that was asked for after that. Other faults may have
come between."""


def page(chaos: Sequence[Report], soak: Report | None, fuzz: Report | None, plants: Sequence[Report] = ()) -> str:
    """Return the page."""
    parts = [
        "# What was broken, and what held",
        "Made by `python -m bench.reliability` from the reports of the commands below.",
        "## Faults",
        _RUNS,
        _commands(report["command"] for report in chaos),
        _verdict(chaos),
        _table(("fault", "injected"), sorted(_sum(chaos, "faults").items())),
        "What daemons did wrong because a failpoint told them to:",
        _table(("failpoint", "passed"), sorted(_sum(chaos, "failpoints").items())),
        "What was tried that the policy denies, by what and by whom (as a guest: with a certificate over TLS; as "
        "nobody: on the unix socket without a session; as an impostor: with the certificate of another node):",
        _table(("attempt", "tried", "refused"), _denied(chaos)),
        "How transfers ended:",
        _table(("outcome", "transfers"), sorted(_sum(chaos, "transfers").items())),
        "## Planted defects",
        _PLANTED,
        _planted(plants),
        "## Recovery",
        _RECOVERY,
        _table(("after", "faults", "median", "worst"), _recoveries(chaos)),
        "## Growth",
        _growth(soak),
        "## Malformed input",
        _inputs(fuzz),
        "## Deadlines",
        "Nothing waits for another process without a bound:",
        _table(("what waits", "for what", "at most"), _DEADLINES),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(chaos: Sequence[Report]) -> str:
    total = {name: sum(report[name] for report in chaos) for name in _TOTALS}
    return _table(
        ("what", "count"),
        [
            ("runs", len(chaos)),
            ("seconds", round(sum(report["seconds"] for report in chaos))),
            ("acknowledged bytes that were read again and right", f"{total['bytes_verified']:,}"),
            ("bytes behind a fence that were read again and unchanged", f"{total['fenced_bytes_verified']:,}"),
            ("slots with wrong or lost bytes", total["wrong_or_lost"]),
            ("slots written late", total["late"]),
            ("leaks", total["leaks"]),
            ("limits of a daemon that were filled", total["limits_filled"]),
            ("denied attempts tried", _sum(chaos, "denied_tried").total()),
            ("denied attempts refused", _sum(chaos, "denied_refused").total()),
            ("attempts that the policy of the moment allowed", total["allowed_reached"]),
            ("attempts without an answer, or while the policy changed", total["unanswered"]),
        ],
    )


_TOTALS = (
    *("bytes_verified", "fenced_bytes_verified", "wrong_or_lost", "late", "leaks"),
    *("limits_filled", "allowed_reached", "unanswered"),
)


def _planted(plants: Sequence[Report]) -> str:
    if not plants:
        return "Not tried: `make chaos ARGS='--plant NAME --seeds 10 --report REPORT'`."
    found: dict[tuple[str, str], list[float | None]] = {}
    for report in plants:
        found.setdefault((report["plant"], report["what"]), []).extend(report["found_after"])
    rows = []
    for (name, what), each in sorted(found.items()):
        times = [time for time in each if time is not None]
        middle, worst = (f"{median(times):.1f} s", f"{max(times):.1f} s") if times else ("-", "-")
        rows.append((name, what, len(each), len(times), middle, worst))
    commands = _commands(report["command"] for report in plants)
    return "\n\n".join((commands, _table(("plant", "what is wrong", "runs", "found", "median", "worst"), rows)))


def _denied(chaos: Sequence[Report]) -> Iterable[tuple[object, ...]]:
    refused = _sum(chaos, "denied_refused")
    for what, count in sorted(_sum(chaos, "denied_tried").items()):
        yield what, count, refused[what]


def _recoveries(chaos: Sequence[Report]) -> Iterable[tuple[object, ...]]:
    times: dict[str, list[float]] = {}
    for report in chaos:
        for kind, each in report["recovery"].items():
            times.setdefault(kind, []).extend(each)
    for kind, each in sorted(times.items()):
        yield kind, len(each), f"{median(each):.2f} s", f"{max(each):.2f} s"


def _growth(soak: Report | None) -> str:
    if soak is None:
        return "Not measured: `make soak ARGS='--report REPORT'`."
    rows = [
        (
            each["node"],
            ", ".join(map(_mib, _some(each["bytes"][:-1]))),
            _mib(each["bytes"][-1]),
            each["descriptors"][0],
            each["descriptors"][-1],
        )
        for each in soak["growth"]
    ]
    head = ("daemon", "memory, from when it is warm", "at the end", "descriptors, warm", "at the end")
    faults, transfers = sum(soak["faults"].values()), sum(soak["transfers"].values())
    text = (
        f"{soak['seconds']:.0f} s with {faults} faults, in which no daemon was ended; {transfers:,} transfers, "
        f"{soak['bytes_verified']:,} bytes verified, {soak['wrong_or_lost'] + soak['late']} wrong, lost or late, "
        f"{soak['leaks']} leaks. Memory is RssAnon after the first 20 s, at equal distances after that, and when "
        "everybody is gone; what is remembered of ended transfers (`transfer.keep_ended`) is part of it:"
    )
    return "\n\n".join((_commands([soak["command"]]), text, _table(head, rows)))


def _some(values: Sequence[int]) -> Sequence[int]:
    """Return some of many, at equal distances, the first one and the last one among them."""
    gaps = min(_COLUMNS, len(values)) - 1
    return [values[round(index * (len(values) - 1) / gaps)] for index in range(gaps + 1)] if gaps else values


_COLUMNS = 8


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _inputs(fuzz: Report | None) -> str:
    if fuzz is None:
        return "Not counted: `FUZZ_REPORT=REPORT make fuzz`."
    return "\n\n".join(
        (
            _commands([fuzz["command"]]),
            "Each was answered in time, for a reason of the contract or by its connection's end; no defect was met.",
            _table(("parser", "inputs tried"), [(name, f"{count:,}") for name, count in fuzz["inputs"].items()]),
        )
    )


def _sum(reports: Iterable[Report], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[name])
    return total


def _commands(commands: Iterable[str]) -> str:
    lines = "\n".join(f"$ {command}" for command in commands)
    return f"```console\n{lines}\n```"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("chaos", nargs="+", type=Path, help="reports of `python -m tests.chaos --report`")
    parser.add_argument("--plants", nargs="*", type=Path, default=[], help="reports of runs with `--plant`")
    parser.add_argument("--soak", type=Path, help="report of a soak")
    parser.add_argument("--fuzz", type=Path, help="what FUZZ_REPORT named in `make fuzz`")
    options = parser.parse_args(arguments)
    chaos = [json.loads(path.read_text()) for path in options.chaos]
    soak, fuzz = (json.loads(path.read_text()) if path else None for path in (options.soak, options.fuzz))
    plants = [json.loads(path.read_text()) for path in options.plants]
    _PAGE.write_text(page(chaos, soak, fuzz, plants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
