"""What a daemon that breaks on purpose does at its failpoints."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peermem
from peermem import failing
from peermem.config import load
from peermem.core import errors
from peermem.core.failpoints import FailOrder, chosen, hit, reach
from tests.configs import problems, write

LOUD = "break_on_purpose = true\n"


@pytest.fixture
def orders() -> Iterator[list[FailOrder]]:
    made: list[FailOrder] = []
    yield made
    failing.turn_off(made)


def turn_on(orders: list[FailOrder], *texts: str) -> None:
    orders += [FailOrder.parse(text) for text in texts]
    failing.turn_on(orders)


async def test_it_fails_as_told(orders: list[FailOrder]) -> None:
    turn_on(orders, "link.open=raise:LIMIT_REACHED", "tcp.send=oserror:EPIPE*1", "slice.post=on*1")
    with pytest.raises(errors.LimitReached, match=r"Failpoint link\.open"):
        await reach("link.open")
    with pytest.raises(OSError, match="pipe") as caught:
        hit("tcp.send")
    assert caught.value.errno == errno.EPIPE
    hit("tcp.send")
    assert [chosen("slice.post"), chosen("slice.post")] == [True, False]
    failing.turn_off(orders)
    await reach("link.open")


async def test_it_stops_for_a_while(orders: list[FailOrder]) -> None:
    turn_on(orders, "link.open=stop:1ms", "slice.landed=stop:1ms")
    await reach("link.open")
    hit("slice.landed")


def test_an_errno_that_there_is_not(orders: list[FailOrder]) -> None:
    with pytest.raises(ValueError, match="no errno ENOTHING"):
        turn_on(orders, "tcp.send=oserror:ENOTHING")


def test_it_dies_at_once() -> None:
    program = (
        "from peermem import failing\nfrom peermem.core.failpoints import FailOrder, hit\n"
        "failing.turn_on([FailOrder.parse('slice.landed=exit+1')])\n"
        "hit('slice.landed'); print('once', flush=True); hit('slice.landed'); print('twice')\n"
    )
    source = str(Path(peermem.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": source}, capture_output=True, check=False)
    assert done.returncode == failing.EXIT_CODE
    assert b"once" in done.stdout
    assert b"twice" not in done.stdout
    assert b"failpoint" in done.stdout + done.stderr, "it is logged before"


def test_a_configuration_has_to_say_so_in_loud_words(tmp_path: Path) -> None:
    file = write(tmp_path, 'failpoints = ["slice.post=on"]\n')
    (problem,) = problems(file)
    assert "break_on_purpose is false" in problem
    assert problems(write(tmp_path, ""), {"PEERMEM_FAILPOINTS": '["slice.post=on"]'}) != []
    loud = load(write(tmp_path, LOUD), {"PEERMEM_FAILPOINTS": '["slice.post=on", "tcp.send=exit"]'})
    assert loud.failpoints == ("slice.post=on", "tcp.send=exit")
    (problem,) = problems(write(tmp_path, LOUD + 'failpoints = ["slice.post=boom"]\n'))
    assert "POINT=DEED" in problem
