from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from peermem.cli import output
from peermem.core.errors import RegionNotFound
from peermem.core.types import Path


@dataclass
class Thing:
    name: str
    path: Path | None
    when: datetime
    labels: dict[str, str]
    sizes: tuple[int, ...]
    _hidden: object = None


THING = Thing("x", Path.HOST, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), {"a": "b"}, (1, 2), object())


def test_json_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"things": [THING]})
    assert json.loads(capsys.readouterr().out) == {
        "things": [
            {
                "name": "x",
                "path": "HOST",
                "when": "2026-01-02T03:04:05+00:00",
                "labels": {"a": "b"},
                "sizes": [1, 2],
            }
        ]
    }


def test_a_fault_is_one_line_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    fault = RegionNotFound("Node a has no region x.", region="x")
    output.print_fault(fault, as_json=False)
    output.print_fault(fault, as_json=True)
    text, document = capsys.readouterr().err.splitlines()
    assert text == "error: Node a has no region x. (REGION_NOT_FOUND)"
    assert json.loads(document) == {
        "error": {
            "reason": "REGION_NOT_FOUND",
            "code": "NOT_FOUND",
            "message": "Node a has no region x.",
            "metadata": {"region": "x"},
        }
    }


def test_a_table_is_not_cut_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    output.print_table(("NAME", "SIZE"), [(long, 5), ("y", None)])
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["NAME", "SIZE"]
    assert first.split() == [long, "5"]
    assert second.split() == ["y", "-"]


def test_a_live_table_is_printed_anew_when_it_changed_where_stdout_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with output.LiveTable(drawn=True) as table:
        for state in ("up", "up", "gone"):
            table.show(("NAME", "STATE"), [("nodes/b", state)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["NAME", "STATE"], ["nodes/b", "up"], ["NAME", "STATE"], ["nodes/b", "gone"]]


def test_a_live_table_is_drawn_in_its_place_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with output.LiveTable(drawn=True) as table:
        for state in ("up", "gone"):
            table.show(("NAME", "STATE"), [("nodes/b", state)])
    drawn = capsys.readouterr().out
    assert "\x1b[1A" in drawn, "the cursor goes up again"
    assert drawn.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        ({}, "-"),
        ({"a": "b"}, "a=b"),
        ({"größe": "\x1b]0;owned\x07"}, r"größe=\x1b]0;owned\x07"),
        ("x\nowner: uid:0", r"x\nowner: uid:0"),
        (("\u202egnp",), r"\u202egnp"),
        (Path.HOST, "HOST"),
        ((1, 2), "1,2"),
        (THING.when, "2026-01-02 03:04:05Z"),
        (0, "0"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert output.cell(value) == text


def test_progress_is_plain_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 2.5, 2.5, 3.0])
    monkeypatch.setattr("peermem.cli.output.time.monotonic", lambda: next(now))
    with output.Meter("put x", quiet=False) as meter:
        meter.show(1 << 20, 4 << 20, 1 << 20)
        meter.show(2 << 20, 4 << 20, 1 << 20)
        meter.show(3 << 20, 4 << 20, 1 << 20)
    assert capsys.readouterr().err.splitlines() == ["put x: 2MiB of 4MiB, 1MiB/s, 2s left"]


def test_a_quiet_meter_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Meter("put x", quiet=True) as meter:
        meter.show(1, None, 0.0)
    assert capsys.readouterr().err == ""


def test_steps_are_plain_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 2.5, 2.5])
    monkeypatch.setattr("peermem.cli.output.time.monotonic", lambda: next(now))
    with output.Steps("preflight", quiet=False) as steps:
        steps.show(1, 3, "kernel")
        steps.show(2, 3, "bar0 with mlx5_0/1")
    assert capsys.readouterr().err.splitlines() == ["preflight: 2 of 3, bar0 with mlx5_0/1"]


def test_a_sentence_is_not_cut_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "word " * 99 + "end."
    output.print_sentence(sentence)
    assert capsys.readouterr().out == f"  {sentence}\n"


def test_what_others_chose_can_not_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("LABELS",), [({"a": "\x1b[2J\rb"},)])
    output.print_facts({"labels": {"a": "\x1b[2J\nstate: READY"}})
    output.print_fault(RegionNotFound("Node a has no region \x1b[2Jx."), as_json=False)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:] == [r"a=\x1b[2J\rb", r"labels: a=\x1b[2J\nstate: READY"]
    assert printed.err == "error: Node a has no region \\x1b[2Jx. (REGION_NOT_FOUND)\n"
