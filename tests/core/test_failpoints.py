from __future__ import annotations

import re
from pathlib import Path

import pytest

from peermem.core import failpoints
from peermem.core.failpoints import POINTS, Deed, FailOrder, Kind, chosen, hit, reach, turned_on

ROOT = Path(__file__).parents[2]
CALLS = {"hit": Kind.STEP, "reach": Kind.WAIT, "chosen": Kind.CHOICE}
CALL = re.compile(r"\b(hit|reach|chosen)\(\"([a-z_.]+)\"\)")


def text_of(folder: str) -> list[str]:
    return [path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_table_lists_what_is_passed_and_how() -> None:
    passed = {name: CALLS[call] for text in text_of("service/peermem") for call, name in CALL.findall(text)}
    assert passed == {name: point.kind for name, point in POINTS.items()}


def test_every_point_is_turned_on_by_a_test() -> None:
    named = {name for text in text_of("tests/broker") for name in re.findall(r"\"([a-z_]+\.[a-z_]+)\"", text)}
    assert POINTS.keys() - named == set()


async def test_nothing_happens_while_a_point_is_off() -> None:
    hit("tcp.send")
    await reach("link.open")
    assert not chosen("slice.post")
    with turned_on("slice.post"):
        assert chosen("slice.post")
        assert not chosen("tcp.corrupt")
    assert not chosen("slice.post")


def fail() -> None:
    raise RuntimeError("as told")


async def test_it_happens_after_so_many_passages_so_many_times() -> None:
    with turned_on("tcp.send", fail, skip=2, times=1):
        hit("tcp.send")
        hit("tcp.send")
        with pytest.raises(RuntimeError, match="as told"):
            hit("tcp.send")
        hit("tcp.send")
    with turned_on("link.open", fail), pytest.raises(RuntimeError, match="as told"):
        await reach("link.open")
    with turned_on("device.lost", skip=1, times=2):
        assert [chosen("device.lost") for _ in range(4)] == [False, True, True, False]


async def test_who_waits_is_alone() -> None:
    passed = []

    async def wait() -> None:
        passed.append("waits")

    with turned_on("link.open", wait):
        await reach("link.open")
    assert passed == ["waits"]


def test_a_point_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        failpoints.turn_on("link.nothing")


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("slice.post=on", FailOrder("slice.post", Deed.ON, "", 0, None)),
        ("tcp.send=oserror:ECONNRESET*1+100", FailOrder("tcp.send", Deed.OSERROR, "ECONNRESET", 100, 1)),
        ("link.open=raise:NODE_UNREACHABLE", FailOrder("link.open", Deed.RAISE, "NODE_UNREACHABLE", 0, None)),
        ("region.end=stop:200ms+3", FailOrder("region.end", Deed.STOP, "200ms", 3, None)),
        ("slice.landed=exit*1", FailOrder("slice.landed", Deed.EXIT, "", 0, 1)),
    ],
)
def test_an_order_as_it_is_written(text: str, order: FailOrder) -> None:
    assert FailOrder.parse(text) == order


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "POINT=DEED"),
        ("tcp.send", "POINT=DEED"),
        ("tcp.send=explode", "POINT=DEED"),
        ("tcp.nothing=exit", "one of the points region.allocate"),
        ("tcp.send=on", "raise, oserror, exit, stop for tcp.send"),
        ("slice.post=raise:INTERNAL", "exit, stop, on for slice.post"),
        ("link.open=raise:NOTHING", "a reason"),
        ("tcp.send=oserror:reset", "errno"),
        ("tcp.send=stop", "a duration"),
        ("tcp.send=stop:soon", "a duration"),
        ("tcp.send=exit:1", "without an argument"),
    ],
)
def test_an_order_that_is_none_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FailOrder.parse(text)
