"""The section of RESULTS.md that tells what the lab measured."""

from __future__ import annotations

from typing import Any

from bench import lab
from bench.sections import section_of, with_section

BAR = {
    "name": "verbs, WRITE, 1 MiB each",
    "unit": "bytes/s",
    "bound": 0.9,
    "at_least": True,
    "reference": "ib_write_bw",
    "figure": 72 << 20,
    "reference_figure": 75 << 20,
    "rounds": [0.93, 0.99],
    "ratio": 0.96,
    "met": True,
}
HELD = {"rss": 1 << 20, "malloc": 1000, "files": 3, "objects": {"pd": 1}, "kernel": []}
SOAK = {"registrations": 7000, "operations": 10000, "seconds": 60.0, "before": HELD, "after": HELD | {"rss": 2 << 20}}
TIMES = {"p50": 0.002, "p99": 0.004, "slowest": 0.1}
ALONE = {"bytes": 1 << 30, "seconds": 2.0, "longest_turn": 0.02}
AWAKE = {"bare": TIMES, "idle": TIMES, "registering": TIMES, "p99_ratio": 1.0, "fabric_alone": ALONE}


def report(**suites: dict[str, Any]) -> dict[str, Any]:
    facts = {"kernel": "7.3", "python": "3.13.5", "rdma-core": "56.1"}
    return {
        "guests": {
            "trixie": {"facts": facts, "suites": {name: {"figures": figures} for name, figures in suites.items()}}
        }
    }


def test_a_bar_is_told_as_met_or_not() -> None:
    slow = BAR | {"name": "slow", "ratio": 0.5, "met": False}
    text = lab.section([report(speed={"a": BAR, "b": slow})])
    assert "with Linux 7.3, Python 3.13.5, rdma-core 56.1.\n\n1 of 2 bars are met." in text
    assert "| verbs, WRITE, 1 MiB each | 72.0 MiB/s | 75.0 MiB/s (ib_write_bw) | 0.96 |" in text
    assert "| 0.93 to 0.99 | at least 0.9 | met |" in text
    assert "| 0.50 | 0.93 to 0.99 | at least 0.9 | NOT MET |" in text
    assert text.endswith("The soak was not run.\n")


def test_awake_and_a_later_report_of_the_soak() -> None:
    figures = {"awake": AWAKE}
    text = lab.section([report(speed=figures), report(soak={"soak": SOAK})])
    assert "| a daemon, idle | 2.0ms | 4.0ms | 100.0ms |" in text
    assert "7,000 registrations and 10,000 operations" in text
    assert "grew by 1024 KiB" in text
    assert "of them are the same as before" in text
    lost = SOAK | {"after": HELD | {"files": 4}}
    assert "NOT THE SAME AS before" in lab.section([report(soak={"soak": lost})])


def test_sections_are_replaced_and_kept() -> None:
    lab_heading, other = lab.HEADING, "## Between tenants"
    first = with_section("# Results\n\nAll.\n", lab_heading, f"{lab_heading}\n\nOld.\n")
    assert first == "# Results\n\nAll.\n\n## In the lab\n\nOld.\n"
    both = with_section(first, other, f"{other}\n\nFair.\n")
    assert both == f"{first}\n## Between tenants\n\nFair.\n"
    new = with_section(both, lab_heading, f"{lab_heading}\n\nNew.\n")
    assert new == "# Results\n\nAll.\n\n## In the lab\n\nNew.\n\n## Between tenants\n\nFair.\n"
    assert section_of(new, lab_heading) == "## In the lab\n\nNew.\n"
    assert section_of(new, other) == "## Between tenants\n\nFair.\n"
    assert with_section("# None\n", other, section_of("# None\n", other)) == "# None\n"
