"""Logs: their form, what they hide, and that everything takes one way out."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
import structlog

from peermem.telemetry import logs

Format = Literal["auto", "text", "json"]
SetUp = Callable[..., io.StringIO]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def set_up() -> Iterator[SetUp]:
    """Set logs up, and put the process back as it was in the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def into(format: Format = "json", level: str = "info", stream: io.StringIO | None = None) -> io.StringIO:
        stream = stream or io.StringIO()
        logs.set_up(level, format, stream)
        return stream

    yield into
    root.handlers[:], root.level = before
    logging.captureWarnings(False)
    structlog.reset_defaults()


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_of_json(set_up: SetUp) -> None:
    stream = set_up()
    structlog.get_logger("peermem.broker").info("transfer_ended", outcome="succeeded", bytes=5)
    (event,) = events(stream)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(event.pop("timestamp"))).total_seconds() < 60
    assert event == {
        "event": "transfer_ended",
        "level": "info",
        "logger": "peermem.broker",
        "outcome": "succeeded",
        "bytes": 5,
    }


def test_an_event_is_one_line_of_text(set_up: SetUp) -> None:
    stream = set_up("text")
    structlog.get_logger("peermem.broker").warning("link_down", node="b")
    (line,) = stream.getvalue().splitlines()
    assert "[warning" in line
    assert "link_down" in line
    assert "node='b'" in line


@pytest.mark.parametrize(("stream", "is_json"), [(Terminal(), False), (io.StringIO(), True)])
def test_auto_is_text_on_a_terminal_only(set_up: SetUp, stream: io.StringIO, is_json: bool) -> None:
    set_up("auto", stream=stream)
    structlog.get_logger("x").info("started")
    assert stream.getvalue().startswith("{") == is_json


def test_nothing_below_the_level_is_written(set_up: SetUp) -> None:
    stream = set_up(level="warning")
    structlog.get_logger("x").info("started")
    logging.getLogger("asyncio").info("started")
    assert stream.getvalue() == ""
    stream = set_up(level="debug")
    structlog.get_logger("x").debug("started")
    assert len(events(stream)) == 1


def test_libraries_and_warnings_take_the_same_way(set_up: SetUp) -> None:
    stream = set_up()
    logging.getLogger("aiohttp.server").error("it broke: %s", "so")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    library, warning = events(stream)
    assert (library["event"], library["logger"], library["level"]) == ("it broke: so", "aiohttp.server", "error")
    assert "DeprecationWarning: old" in warning["event"]


def test_setting_up_again_replaces_what_was(set_up: SetUp) -> None:
    first, second = set_up(), set_up()
    structlog.get_logger("x").info("started")
    assert first.getvalue() == ""
    assert len(events(second)) == 1


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize("name", ["secret", "token", "rkey", "lkey", "password", "link_secret", "Session-Token"])
def test_fields_named_like_secrets_are_hidden(set_up: SetUp, format: Format, name: str) -> None:
    stream = set_up(format)
    structlog.get_logger("x").info("link_opened", **{name: "hunter2"}, inner={"list": [{name: "hunter2"}]}, node="b")
    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count(logs.MASK) == 2
    assert "link_opened" in stream.getvalue()


def test_a_field_without_end_is_cut(set_up: SetUp) -> None:
    stream = set_up()
    loop: list[object] = []
    loop.append(loop)
    structlog.get_logger("x").info("started", loop=loop)
    assert logs.MASK in stream.getvalue()


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_traceback_shows_no_variables(set_up: SetUp, format: Format) -> None:
    stream = set_up(format)
    held = "".join(["hun", "ter2"])
    try:
        raise RuntimeError(f"{len(held)} bytes")
    except RuntimeError:
        structlog.get_logger("x").exception("defect")
        logging.getLogger("y").exception("defect")
    assert stream.getvalue().count("RuntimeError: 7 bytes") == 2
    assert "hunter2" not in stream.getvalue()


@pytest.mark.parametrize("format", ["json", "text"])
def test_what_a_caller_sent_cannot_forge_a_line(set_up: SetUp, format: Format) -> None:
    stream = set_up(format)
    structlog.get_logger("x").info("region_created", owner="a\n2026 [info] forged\x1b[2J")
    logging.getLogger("aiohttp.server").warning("bad line %s", "a\nforged\x1b[2J")
    assert len(stream.getvalue().splitlines()) == 2
    assert "\x1b" not in stream.getvalue()
