"""The audit log: its lines, what it leaves out, and where it goes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.origin import Origin
from peermem.telemetry import audit, logs
from peermem.telemetry.audit import Audit, AuditFile, Decisions

USER = Subject("uid:7", ("gid:1",), "b")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Logs of which nothing below an error is written; the process is put back as it was in the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.set_up("error", "json", stream)
    yield stream
    root.handlers[:], root.level = before
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert line.pop("timestamp").endswith("Z")
    return found


def test_a_decision_is_one_line_whatever_the_level_of_logs_is(stream: io.StringIO) -> None:
    audit.called("ipv4:10.0.0.2:5000", "GetRegion", "request-1" + "x" * 500)
    audit.of_process(4711, Origin(slurm_job="77"))
    Audit("all").decided(USER, "read", "nodes/a/regions/x", "team-a", allowed=True)
    (line,) = lines(stream.getvalue())
    assert line == {
        "logger": "audit",
        "level": "info",
        "event": "decision",
        "outcome": "allowed",
        "subject": "uid:7@b",
        "action": "read",
        "resource": "nodes/a/regions/x",
        "rule": "team-a",
        "remote": "ipv4:10.0.0.2:5000",
        "pid": 4711,
        "call": "GetRegion",
        "request": "request-1" + "x" * 119,
        "slurm_job": "77",
    }


@pytest.mark.parametrize(("decisions", "expected"), [("all", ["allowed", "denied"]), ("denied", ["denied"])])
def test_which_decisions_are_written(stream: io.StringIO, decisions: Decisions, expected: list[str]) -> None:
    log = Audit(decisions)
    log.decided(USER, "read", "x", "r", allowed=True)
    log.decided(USER, "write", "x", "built-in:deny", allowed=False)
    assert [line["outcome"] for line in lines(stream.getvalue())] == expected


def test_what_is_decided_again_for_one_transfer_is_one_line(stream: io.StringIO) -> None:
    log = Audit("all")
    for under in (b"link", b"link", b"other"):
        log.decided(USER, "read", "x", "r", allowed=True, under=under)
    assert len(lines(stream.getvalue())) == 2
    log.decided(USER, "read", "x", "s", allowed=True, under=b"link")
    log.decided(ANONYMOUS, "read", "x", "r", allowed=True, under=b"link")
    log.decided(USER, "write", "x", "r", allowed=True, under=b"link")
    assert len(lines(stream.getvalue())) == 5
    for _ in range(2):
        log.decided(USER, "read", "x", "r", allowed=True)
        log.decided(USER, "read", "x", "built-in:deny", allowed=False, under=b"link")
    assert len(lines(stream.getvalue())) == 9
    for number in range(5000):
        log.decided(USER, "read", number, "r", allowed=True, under=b"link")
    assert len(log._repeated) <= 4096


def test_what_is_decided_after_its_grant_was_over_is_another_line(stream: io.StringIO) -> None:
    now = 100.0
    log = Audit("all", again=30.0, clock=lambda: now)
    for pause in (15.0, 15.0, 15.0, 31.0, 15.0):
        log.decided(USER, "read", "x", "r", allowed=True, under=b"link")
        now += pause
    assert len(lines(stream.getvalue())) == 2


async def test_each_task_has_its_own_caller(stream: io.StringIO) -> None:
    log = Audit("all")

    async def ask(name: str) -> None:
        audit.called("unix:", name)
        audit.asked(f"request of {name}")
        await asyncio.sleep(0)
        await asyncio.create_task(decide(name))

    async def decide(name: str) -> None:
        log.decided(USER, name, "x", "r", allowed=True)

    await asyncio.gather(ask("first"), ask("second"))
    for line in lines(stream.getvalue()):
        assert (line["call"], line["request"]) == (line["action"], f"request of {line['action']}")


def test_a_file_of_its_own(stream: io.StringIO, tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    file = AuditFile(path, lambda: pytest.fail("it was not written"))
    log = Audit("all", file)
    log.decided(USER, "read", "forged\n{}", "r", allowed=True)
    path.rename(tmp_path / "audit.log.1")
    log.decided(USER, "write", "x", "r", allowed=True)
    path.rename(tmp_path / "audit.log.2")
    path.write_text("")
    log.decided(USER, "manage", "x", "r", allowed=True)
    file.close()
    written = [lines((tmp_path / name).read_text()) for name in ("audit.log.1", "audit.log.2", "audit.log")]
    assert [[line["action"] for line in text] for text in written] == [["read"], ["write"], ["manage"]]
    Audit("all").decided(USER, "read", "forged\n{}", "r", allowed=True)
    assert lines(stream.getvalue()) == written[0]
    assert (tmp_path / "audit.log.1").stat().st_mode & 0o777 == 0o600


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AuditFile(tmp_path / "none" / "audit.log", lambda: None)


def test_a_file_that_can_not_be_written_any_more_is_counted_and_told_once(stream: io.StringIO, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    failures: list[None] = []
    file = AuditFile(folder / "audit.log", lambda: failures.append(None))
    log = Audit("all", file)
    folder.rename(tmp_path / "elsewhere")
    for _ in range(3):
        log.decided(USER, "read", "x", "r", allowed=True)
    (told,) = lines(stream.getvalue())
    assert (told["event"], told["cause"]) == ("audit_not_written", "No such file or directory")
    assert len(failures) == 3
    folder.mkdir()
    log.decided(USER, "write", "x", "r", allowed=True)
    (written,) = lines((folder / "audit.log").read_text())
    assert (written["action"], len(failures)) == ("write", 3)
    file.close()


def test_a_full_disk_is_a_failure() -> None:
    failures: list[None] = []
    file = AuditFile(Path("/dev/full"), lambda: failures.append(None))
    Audit("all", file).decided(USER, "read", "x", "r", allowed=True)
    file.close()
    assert len(failures) == 1


def test_a_line_that_was_cut_off_spoils_no_other_one(tmp_path: Path) -> None:
    failures: list[None] = []
    path = tmp_path / "audit.log"
    file = AuditFile(path, lambda: failures.append(None))
    log = Audit("all", file)
    log.decided(USER, "read", "whole", "r", allowed=True)
    most, whole = resource.getrlimit(resource.RLIMIT_FSIZE), path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, most[1]))  # as a disk that fills up in the midst of a line
    try:
        log.decided(USER, "read", "cut", "r", allowed=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert (path.stat().st_size, len(failures)) == (whole + 20, 1)
    for name in ("first", "second"):
        log.decided(USER, "read", name, "r", allowed=True)
    file.close()
    before, _, *after = path.read_text().splitlines()
    assert [line["resource"] for line in lines("\n".join((before, *after)))] == ["whole", "first", "second"]
    assert len(failures) == 1
