import asyncio

import pytest

from peermem.api.once import Once
from peermem.core.errors import DeviceFull, InvalidField, RequestIdReused
from peermem.core.identity import Subject


class Calls:
    """Counts what was really done, and can be held up."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.count += 1
        number = self.count
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return number


async def test_a_repetition_gets_the_first_result() -> None:
    calls, replays = Calls(), []
    once: Once[int] = Once(10, lambda: replays.append(1))
    assert [await once.run(Subject("a"), "id", b"x", calls) for _ in range(3)] == [1, 1, 1]
    assert calls.count == 1
    assert len(replays) == 2


async def test_a_result_that_is_spent_is_made_anew() -> None:
    calls, spent = Calls(), set[int]()
    once: Once[int] = Once(10, is_spent=spent.__contains__)
    assert [await once.run(Subject("a"), "id", b"x", calls) for _ in range(2)] == [1, 1]
    spent.add(1)
    assert await once.run(Subject("a"), "id", b"other", calls) == 2
    assert [await once.run(Subject("a"), "id", b"other", calls), len(once)] == [2, 1]


async def test_other_callers_and_empty_ids_are_other_requests() -> None:
    calls, once = Calls(), Once[int](10)
    assert await once.run(Subject("a"), "id", b"x", calls) == 1
    assert await once.run(Subject("b"), "id", b"x", calls) == 2
    assert await once.run(Subject("a"), "", b"x", calls) == 3
    assert await once.run(Subject("a"), "", b"x", calls) == 4


async def test_other_content_is_refused() -> None:
    calls, once = Calls(), Once[int](10)
    await once.run(Subject("a"), "id", b"x", calls)
    with pytest.raises(RequestIdReused, match="'id'"):
        await once.run(Subject("a"), "id", b"y", calls)
    assert calls.count == 1


async def test_a_repetition_waits_for_the_first() -> None:
    calls, once = Calls(), Once[int](10)
    calls.gate.clear()
    first = asyncio.create_task(once.run(Subject("a"), "id", b"x", calls))
    second = asyncio.create_task(once.run(Subject("a"), "id", b"x", calls))
    await asyncio.sleep(0)
    calls.gate.set()
    assert (await first, await second) == (1, 1)


async def test_a_failure_is_seen_by_all_who_wait_and_then_forgotten() -> None:
    calls, once = Calls(), Once[int](10)
    calls.gate.clear()
    calls.error = DeviceFull("It is full.")
    waiting = [asyncio.create_task(once.run(Subject("a"), "id", b"x", calls)) for _ in range(2)]
    await asyncio.sleep(0)
    calls.gate.set()
    for each in waiting:
        with pytest.raises(DeviceFull):
            await each
    calls.error = None
    assert await once.run(Subject("a"), "id", b"x", calls) == 2
    assert len(once) == 1


async def test_a_caller_that_goes_away_does_not_take_the_result_along() -> None:
    calls, once = Calls(), Once[int](10)
    calls.gate.clear()
    first = asyncio.create_task(once.run(Subject("a"), "id", b"x", calls))
    await asyncio.sleep(0)
    second = asyncio.create_task(once.run(Subject("a"), "id", b"x", calls))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    calls.gate.set()
    assert await second == 1
    assert calls.count == 1


async def test_only_so_many_results_are_kept() -> None:
    calls, once = Calls(), Once[int](3)
    for number in range(10):
        await once.run(Subject("a"), f"id{number}", b"x", calls)
    assert len(once) == 3
    assert await once.run(Subject("a"), "id9", b"x", calls) == 10
    assert await once.run(Subject("a"), "id0", b"x", calls) == 11


async def test_an_endless_id_is_refused() -> None:
    with pytest.raises(InvalidField, match="129"):
        await Once[int](3).run(Subject("a"), "x" * 129, b"", Calls())
