"""What came out of a guest. Rules of this file:

* Everything from a guest is read as it is, whole or cut off by a crash: what is missing is None or empty, never an
  exception.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# A line of the kernel that fails the lab, one that is only told, and those that are neither.
_FATAL = re.compile(r"\bBUG\b|\bOops\b|general protection fault|cleanup failed|Out of memory|oom-kill")
_SUSPICIOUS = re.compile(r"\bWARNING: |stall|lockup|blocked for more than|waiting for \S+ to become free")
# An emulated processor stands still while the host does something else.
_HARMLESS = re.compile(r"soft lockup")


@dataclass(frozen=True)
class Case:
    """A test and its outcome: passed, failed, error or skipped."""

    name: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class SuiteResult:
    """What a suite left; `status` is the exit status of its pytest, None if it was never over.

    `last_line` is the last line that it printed: a test's name if it hung in one.
    """

    name: str
    status: int | None = None
    seconds: float = 0.0
    last_line: str = ""
    tests: tuple[Case, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GuestResult:
    """What a guest left: its facts, its suites by name, and the lines of its kernel that matter."""

    facts: dict[str, str]
    suites: dict[str, SuiteResult]
    fatal_lines: tuple[str, ...]
    suspicious_lines: tuple[str, ...]


def unpack(disk: Path, out: Path) -> None:
    """Unpack the files of the archive at the start of a raw disk into `out`, as far as it goes, and nowhere else.

    Debian 12's Python has no filters for `extractall`, which would follow links.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with contextlib.suppress(tarfile.TarError), tarfile.open(disk, "r:") as archive:
        for member in archive:
            place = (out / member.name).resolve()
            source = archive.extractfile(member) if member.isfile() else None
            if source is None or not place.is_relative_to(out.resolve()):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with source, place.open("wb") as target:
                shutil.copyfileobj(source, target)


def read(out: Path, console: Path) -> GuestResult:
    """Read what a guest left in `out` and on its console."""
    facts = dict(line.split("=", 1) for line in _text(out / "facts").splitlines() if "=" in line)
    suites = {folder.name: _read_suite(folder) for folder in sorted(out.glob("*/"))}
    fatal, suspicious = kernel_lines([*_text(out / "dmesg").splitlines(), *_text(console).splitlines()])
    return GuestResult(facts, suites, fatal, suspicious)


def kernel_lines(lines: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the lines of a kernel that fail the lab, and those that are only told; each once."""
    lines = [line.strip() for line in lines]
    fatal = [line for line in lines if _FATAL.search(line) and not _HARMLESS.search(line)]
    suspicious = [line for line in lines if _SUSPICIOUS.search(line) and line not in fatal]
    return tuple(dict.fromkeys(fatal)), tuple(dict.fromkeys(suspicious))


def _read_suite(folder: Path) -> SuiteResult:
    status, milliseconds = _text(folder / "status").strip(), _text(folder / "milliseconds").strip()
    figures = {path.stem: _figure(path) for path in sorted(folder.glob("*.json"))}
    return SuiteResult(
        folder.name,
        int(status) if status.isdigit() else None,
        int(milliseconds) / 1000 if milliseconds.isdigit() else 0.0,
        next((line for line in reversed(_text(folder / "log").splitlines()) if line.strip()), ""),
        _read_tests(folder / "junit.xml"),
        {name: figure for name, figure in figures.items() if figure is not None},
    )


def _read_tests(report: Path) -> tuple[Case, ...]:
    try:
        cases = ElementTree.parse(report).iter("testcase")
    except (OSError, ElementTree.ParseError):
        return ()
    return tuple(Case(case.get("name", ""), _outcome(case), float(case.get("time", 0))) for case in cases)


def _outcome(case: ElementTree.Element) -> str:
    outcomes = {"failure": "failed", "error": "error", "skipped": "skipped"}
    return next((outcome for tag, outcome in outcomes.items() if case.find(tag) is not None), "passed")


def _figure(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
