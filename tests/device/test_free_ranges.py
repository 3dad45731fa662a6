from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peermem.device.free_ranges import FreeRanges


def test_the_first_range_that_fits_is_taken_and_neighbours_become_one() -> None:
    free = FreeRanges(10)
    assert [free.take(length) for length in (4, 3, 3)] == [0, 4, 7]
    assert free.take(1) is None
    free.give_back(0, 4)
    free.give_back(7, 3)
    assert (free.total, free.largest) == (7, 4)
    assert free.take(5) is None
    free.give_back(4, 3)
    assert (free.total, free.largest) == (10, 10)
    assert free.take(10) == 0


def test_nothing_is_taken_of_nothing() -> None:
    free = FreeRanges(0)
    assert (free.take(1), free.total, free.largest) == (None, 0, 0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), max_size=60))
def test_what_is_taken_never_overlaps_and_all_of_it_comes_back(steps: list[tuple[int, int]]) -> None:
    free, held, taken = FreeRanges(20), list[tuple[int, int]](), [False] * 20
    for length, choice in steps:
        start = free.take(length)
        if start is not None:
            assert not any(taken[start : start + length])
            taken[start : start + length] = [True] * length
            held.append((start, length))
        else:
            assert free.largest < length
            back, size = held.pop(choice % len(held))
            taken[back : back + size] = [False] * size
            free.give_back(back, size)
        assert free.total == taken.count(False)
    for back, size in held:
        free.give_back(back, size)
    assert free.take(20) == 0
