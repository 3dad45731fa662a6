from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import InvalidField, OutOfRange, PeermemError, SegmentsMismatch, SegmentsOverlap, ZeroLength
from peermem.core.names import ChildName
from peermem.core.segments import SegmentList, Stride, check_count, check_disjoint, columns, merged, strided

A = ChildName("a", "regions", "x")
B = ChildName("b", "regions", "y")
HUGE = (1 << 64) - 1


def pairs(entry: SegmentList) -> list[tuple[int, int, int]]:
    return list(zip(entry.source_offsets, entry.destination_offsets, entry.lengths, strict=True))


def test_one_length_stands_for_all() -> None:
    entry = columns(A, B, [0, 10], [5, 50], [4])
    assert pairs(entry) == [(0, 5, 4), (10, 50, 4)]
    assert (entry.total, entry.count) == (8, 2)


@pytest.mark.parametrize(
    ("sources", "targets", "lengths"), [([0], [0, 1], [1]), ([0, 1], [0], [1, 1]), ([0, 1, 2], [0, 1, 2], [1, 1])]
)
def test_columns_of_different_lengths_are_refused(sources: list[int], targets: list[int], lengths: list[int]) -> None:
    with pytest.raises(SegmentsMismatch, match="as many"):
        columns(A, B, sources, targets, lengths)


@pytest.mark.parametrize(("sources", "lengths"), [([], []), ([0], [0]), ([0, 1], [1, 0])])
def test_no_bytes_are_refused(sources: list[int], lengths: list[int]) -> None:
    with pytest.raises(ZeroLength):
        columns(A, B, sources, sources, lengths)


def test_strides_become_offsets() -> None:
    entry = strided(A, B, Stride(100, 50), Stride(0, 10), 10, 3, 10)
    assert pairs(entry) == [(100, 0, 10), (150, 10, 10), (200, 20, 10)]


def test_a_source_may_be_read_again_and_again() -> None:
    assert pairs(strided(A, B, Stride(7, 0), Stride(0, 4), 4, 2, 10)) == [(7, 0, 4), (7, 4, 4)]


def test_strides_that_touch_on_both_sides_are_one_range_of_any_count() -> None:
    entry = strided(A, B, Stride(8, 4), Stride(0, 4), 4, 1 << 40, 10)
    assert pairs(entry) == [(8, 0, 4 << 40)]
    assert entry.count == 1 << 40


def test_strided_lists_are_checked() -> None:
    with pytest.raises(ZeroLength):
        strided(A, B, Stride(0, 1), Stride(0, 1), 0, 5, 10)
    with pytest.raises(ZeroLength):
        strided(A, B, Stride(0, 1), Stride(0, 1), 1, 0, 10)
    with pytest.raises(SegmentsOverlap, match="below its length"):
        strided(A, B, Stride(0, 8), Stride(0, 7), 8, 2, 10)
    with pytest.raises(InvalidField, match="above the 10"):
        strided(A, B, Stride(0, 9), Stride(0, 9), 8, 11, 10)
    with pytest.raises(InvalidField, match="Split it"):
        check_count(11, 10)


@pytest.mark.parametrize("offset", [5, 1 << 32, HUGE // 2 - 8])
def test_a_range_outside_its_region_is_refused_whatever_its_size(offset: int) -> None:
    entry = columns(A, B, [0, offset], [0, 100], [4, 4])
    with pytest.raises(OutOfRange) as caught:
        entry.check_inside(A, 8)
    assert caught.value.metadata["reach"] == str(offset + 4)
    entry.check_inside(B, 104)
    with pytest.raises(OutOfRange):
        entry.check_inside(B, 103)


@pytest.mark.parametrize(("offset", "length"), [(HUGE, 1), (0, HUGE), (HUGE, HUGE), (1 << 62, 1 << 62)])
def test_what_no_memory_can_have_is_refused(offset: int, length: int) -> None:
    with pytest.raises(OutOfRange, match="no region has"):
        columns(A, B, [offset], [0], [length])
    with pytest.raises(OutOfRange, match="no region has"):
        strided(A, B, Stride(0, offset), Stride(0, HUGE), max(length, 8), 2, 10)


def test_both_sides_in_one_region_are_checked() -> None:
    with pytest.raises(OutOfRange):
        columns(A, A, [0], [90], [20]).check_inside(A, 100)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=6),
    st.booleans(),
)
def test_overlap_is_refused_exactly_where_bytes_are_touched_twice(
    segments: list[tuple[int, int, int]], one_region: bool
) -> None:
    target = A if one_region else B
    lists = [columns(A, target, [source], [destination], [length]) for source, destination, length in segments]
    written: set[int] = set()
    clash = False
    for _, destination, length in segments:
        touched = set(range(destination, destination + length))
        clash |= bool(touched & written)
        written |= touched
    if one_region:
        clash |= any(written & set(range(source, source + length)) for source, _, length in segments)
    try:
        check_disjoint(lists)
    except SegmentsOverlap:
        assert clash
    else:
        assert not clash


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=20))
def test_merging_moves_the_same_bytes_in_the_same_order(gaps: list[tuple[int, int, int]]) -> None:
    here = there = 0
    local, remote, lengths = [], [], []
    for gap_here, gap_there, length in gaps:
        local.append(here := here + (gap_here if gap_here > 5 else 0))
        remote.append(there := there + (gap_there if gap_there > 5 else 0))
        lengths.append(length)
        here, there = here + length, there + length
    ranges = merged(local, remote, lengths)

    def moves(columns: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        return [(source + i, target + i) for source, target, length in columns for i in range(length)]

    assert moves(list(zip(ranges.local, ranges.remote, ranges.lengths, strict=True))) == moves(
        list(zip(local, remote, lengths, strict=True))
    )
    assert ranges.total == sum(lengths)
    ends = list(zip(ranges.local, ranges.remote, ranges.lengths, strict=True))
    for (source, target, length), (next_source, next_target, _) in pairwise(ends):
        assert (source + length, target + length) != (next_source, next_target)


def test_every_refusal_is_a_fault_with_a_sentence() -> None:
    with pytest.raises(PeermemError, match=r"\.$"):
        columns(A, B, [0], [0], [0])
