"""What the tool prints: tables for people, JSON for programs, progress for the patient.

Rules of this file:

* JSON keys are the client's attribute names; sizes are integers of bytes, durations are seconds as
  numbers, times are ISO 8601 in UTC, enums are their values.
* Tables are cut to no width where stdout is not a terminal.
* What others chose, such as a label, can't move the cursor or forge a line: what is not printable is escaped.
* Progress is drawn on a terminal; elsewhere it is a plain line every few seconds, and with --json nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from textwrap import fill
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import peermem
from peermem.core.errors import PeermemError
from peermem.core.units import format_size

_PLAIN_INTERVAL = 2.0
_UNBOUNDED = 10_000


def plain(value: Any) -> Any:
    """Return `value` in the types of JSON."""
    if isinstance(value, PeermemError):
        return {
            "reason": value.reason,
            "code": value.code.name,
            "message": value.message,
            "metadata": dict(value.metadata),
        }
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name[0] != "_"}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def print_json(value: object, *, on_a_line: bool = False) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(plain(value), indent=None if on_a_line else 2))


def print_fault(fault: PeermemError, as_json: bool) -> None:
    """Print a fault to stderr."""
    line = json.dumps({"error": plain(fault)}) if as_json else f"error: {_printable(fault.message)} ({fault.reason})"
    click.echo(line, err=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headings to stdout; None is a dash, numbers go to the right."""
    _stdout().print(_table(columns, rows))


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    lines = [[cell(value) for value in row] for row in rows]
    for index, heading in enumerate(columns):
        right = bool(lines) and all(line[index][:1].isdigit() for line in lines)
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def print_facts(facts: Mapping[str, object]) -> None:
    """Print one thing's facts, a line each, to stdout."""
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        click.echo(f"{key + ':':<{width}}{cell(value)}")


def print_sentence(text: str) -> None:
    """Print a sentence of any length, indented, to stdout."""
    width = _stdout().width
    click.echo(fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def cell(value: object) -> str:
    """Return `value` as people read it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}Z"
    if isinstance(value, Mapping):
        return ",".join(_printable(f"{key}={item}") for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ",".join(map(cell, value)) or "-"
    return _printable(str(value))


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def rate(value: float | None) -> str | None:
    """Return bytes per second as people read them."""
    return None if value is None else f"{format_size(int(value))}/s"


class LiveTable:
    """A table that is drawn again in its place; where stdout is no terminal, it is printed anew when it changed."""

    def __init__(self, *, drawn: bool) -> None:
        """Unless it is `drawn` it is printed, as if stdout were no terminal."""
        console = _stdout()
        self._live = Live(console=console, auto_refresh=False) if drawn and console.is_terminal else None
        self._last: tuple[Sequence[str], list[Sequence[object]]] | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show these rows now."""
        now = (columns, list(rows))
        if self._live is not None:
            self._live.update(_table(*now), refresh=True)
        elif now != self._last:
            print_table(*now)
            sys.stdout.flush()
        self._last = now


def _stdout() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_UNBOUNDED)


class _Progress:
    """Shows how far something is, on stderr. `quiet` shows nothing."""

    def __init__(self, what: str, quiet: bool, *columns: ProgressColumn) -> None:
        self._what = what
        self._quiet = quiet
        self._columns = columns
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._next = time.monotonic() + _PLAIN_INTERVAL

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                *self._columns,
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._what, total=None, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, done: int, total: int | None, note: str, line: str) -> None:
        """Move the bar and set its note; without one print the line, if the last one is some time ago."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif not self._quiet and time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_INTERVAL
            click.echo(f"{self._what}: {line}", err=True)


class Meter(_Progress):
    """Shows how many bytes something has moved."""

    def __init__(self, what: str, quiet: bool) -> None:
        note = TextColumn("{task.fields[note]}")
        super().__init__(what, quiet, DownloadColumn(binary_units=True), note, TimeRemainingColumn())

    def show(self, done: int, total: int | None, speed: float) -> None:
        """Show `done` of `total` bytes; a total of None is not known."""
        whole = f" of {format_size(total)}" if total else ""
        left = f", {(total - done) / speed:.0f}s left" if total and speed else ""
        self._draw(done, total, rate(speed) or "", f"{format_size(done)}{whole}, {rate(speed)}{left}")

    def follow(self, progress: peermem.Progress) -> None:
        """Show how far a transfer, load or store is."""
        self.show(progress.bytes_done, progress.bytes_total or None, progress.rate)


class Steps(_Progress):
    """Shows how many steps of something are done."""

    def __init__(self, what: str, quiet: bool) -> None:
        super().__init__(what, quiet, MofNCompleteColumn(), TextColumn("{task.fields[note]}"))

    def show(self, done: int, total: int, last: str) -> None:
        """Show `done` of `total` steps, of which `last` was the last."""
        self._draw(done, total, last, f"{done} of {total}, {last}")
