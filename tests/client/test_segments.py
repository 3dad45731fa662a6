from __future__ import annotations

import array
from typing import Any

import numpy
import pytest

from peermem.client.facts import Lease, RegionInfo, RegionState
from peermem.client.segments import Operand, Plan, Slice, Strided, explicit
from peermem.core.errors import InvalidField, SegmentsMismatch, ZeroLength
from peermem.core.types import LeaseKind, Path
from peermem.v1 import transfer_pb2

A, B, C = (f"nodes/{node}/regions/x" for node in "abc")


def region(name: str, length: int) -> RegionInfo:
    from datetime import UTC, datetime

    lease = Lease(LeaseKind.NONE, None, None)
    return RegionInfo(
        name=name,
        length=length,
        device="bar0",
        owner="uid:0",
        labels={},
        lease=lease,
        path=Path.HOST,
        state=RegionState.READY,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        nics=(),
        why="",
        slurm_job="",
        pod="",
        published=False,
    )


def pairs(source: Any, destination: Any, lengths: dict[str, int] | None = None) -> list[Any]:
    plan = Plan(source, destination, "nodes/a")
    return [unpacked(item) for item in plan.segments(lengths or {})]


def unpacked(item: transfer_pb2.SegmentList) -> tuple[str, str, list[int], list[int], list[int]]:
    ranges = item.ranges
    return (
        item.source,
        item.destination,
        list(ranges.source_offsets),
        list(ranges.destination_offsets),
        list(ranges.lengths),
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (slice(0, 4096), (0, 4096)),
        (slice(None), (0, 8192)),
        (slice(-4096, None), (4096, 4096)),
        (slice(4096, 1 << 40), (4096, 4096)),
        (slice(10, 5), (10, 0)),
    ],
)
def test_slices_count_as_python_counts(key: slice, expected: tuple[int, int]) -> None:
    part = region(A, 8192)[key]
    assert (part.region, part.offset, part.length) == (A, *expected)


def test_a_slice_with_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        region(A, 8192)[0:100:2]


def test_a_single_index_is_refused() -> None:
    with pytest.raises(TypeError, match="slice"):
        region(A, 8192)[0]  # type: ignore[index]


def test_regions_of_equal_length_are_one_pair() -> None:
    assert pairs(region(A, 100), region(B, 100)) == [(A, B, [0], [0], [100])]


def test_unequal_totals_are_refused() -> None:
    with pytest.raises(SegmentsMismatch) as caught:
        pairs(region(A, 100), Slice(B, 0, 99))
    assert caught.value.metadata == {"source_bytes": "100", "destination_bytes": "99"}


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ZeroLength, match=A):
        pairs(region(A, 100)[5:5], region(B, 100))


@pytest.mark.parametrize(("source", "destination"), [([], [Slice(B, 0, 1)]), (None, B), (A, None)])
def test_a_side_without_regions_is_refused(source: Any, destination: Any) -> None:
    with pytest.raises(InvalidField, match="at least one"):
        Plan(source, destination, "nodes/a")


@pytest.mark.parametrize("name", ["nodes/A/regions/x", "nodes/a/transfers/x", "x y", "", "/"])
def test_what_names_no_region_is_refused(name: str) -> None:
    with pytest.raises(InvalidField):
        Plan(name, B, "nodes/a")


def test_a_short_name_is_a_region_of_the_asked_node() -> None:
    assert pairs("x", Slice("y", 8, 4)) == [(A, "nodes/a/regions/y", [0], [8], [4])]


def test_a_name_alone_takes_the_other_sides_length() -> None:
    assert Plan(Slice(A, 10, 5), B, "nodes/a").unknown == []
    assert pairs(Slice(A, 10, 5), B) == [(A, B, [10], [0], [5])]
    assert pairs(A, [Slice(B, 0, 5), Slice(B, 50, 5)]) == [(A, B, [0, 5], [0, 50], [5])]


@pytest.mark.parametrize(
    ("source", "destination", "unknown"),
    [
        (A, B, [A]),
        (B, A, [A]),
        (B, C, [B]),
        ([A, B], C, [A, B]),
        (A, [B, C], [B, C]),
        ([A, B], [B, C], [A, B, B, C]),
        ([A, Slice(B, 0, 1)], Slice(C, 0, 1), [A]),
    ],
)
def test_lengths_to_ask_for(source: Any, destination: Any, unknown: list[str]) -> None:
    assert Plan(source, destination, "nodes/a").unknown == unknown


def test_lengths_that_were_asked_for_are_used() -> None:
    assert pairs(A, B, {A: 64}) == [(A, B, [0], [0], [64])]
    assert pairs(C, A, {A: 64}) == [(C, A, [0], [0], [64])]


def test_lists_of_different_shapes_are_cut_at_both_edges() -> None:
    assert pairs([Slice(A, 0, 6), Slice(A, 100, 4)], [Slice(B, 0, 5), Slice(B, 50, 5)]) == [
        (A, B, [0, 5, 100], [0, 50, 51], [5, 1, 4])
    ]


def test_each_pair_of_regions_is_one_list() -> None:
    source: list[Operand] = [Slice(A, 0, 4), Slice(B, 0, 4), Slice(A, 8, 4)]
    assert pairs(source, Slice(C, 0, 12)) == [(A, C, [0, 8], [0, 8], [4]), (B, C, [0], [4], [4])]


def test_ten_thousand_slices_are_three_columns() -> None:
    source = [Slice(A, i * 8192, 4096) for i in range(10_000)]
    (packed,) = Plan(source, Slice(B, 0, 4096 * 10_000), "nodes/a").segments({})
    assert len(packed.ranges.source_offsets) == len(packed.ranges.destination_offsets) == 10_000
    assert list(packed.ranges.lengths) == [4096]
    assert packed.ByteSize() < 100_000


@pytest.mark.parametrize(
    "column",
    [[0, 8], (0, 8), range(0, 16, 8), array.array("Q", [0, 8]), numpy.array([0, 8]), iter([0, numpy.uint64(8)])],
    ids=["list", "tuple", "range", "array", "numpy", "iterator"],
)
def test_a_column_is_any_sequence_of_integers(column: Any) -> None:
    (packed,) = explicit([(A, column, B, [1, 2], 4)], "nodes/a")
    assert unpacked(packed) == (A, B, [0, 8], [1, 2], [4])


@pytest.mark.parametrize("lengths", [4, [4, 4], numpy.array([4, 4]), numpy.int64(4)])
def test_equal_lengths_are_sent_once(lengths: Any) -> None:
    (packed,) = explicit([(A, [0, 8], B, [1, 2], lengths)], "nodes/a")
    assert list(packed.ranges.lengths) == [4]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(SegmentsMismatch, match="2 source offsets, 1 destination"):
        explicit([(A, [0, 8], B, [1], 4)], "nodes/a")
    with pytest.raises(SegmentsMismatch, match="3 lengths"):
        explicit([(A, [0, 8], B, [1, 2], [1, 2, 3])], "nodes/a")


@pytest.mark.parametrize("bad", [-1, 1 << 64, "7", 1.5])
def test_numbers_that_are_no_offsets_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidField):
        explicit([(A, [bad], B, [0], [1])], "nodes/a")
    with pytest.raises(InvalidField):
        explicit([Strided(A, B, bad, 1, 1, 1)], "nodes/a")


def test_what_is_no_segment_is_refused() -> None:
    with pytest.raises(InvalidField, match="Strided"):
        explicit([(A, [0], B, [0])], "nodes/a")  # type: ignore[list-item]


def test_strided_ranges_are_one_message() -> None:
    strided = Strided(region(A, 1), "y", length=64, count=10_000, source_stride=128, destination_stride=64)
    (packed,) = explicit([strided], "nodes/a")
    assert packed.WhichOneof("layout") == "strided"
    assert (packed.source, packed.destination) == (A, "nodes/a/regions/y")
    assert (packed.strided.count, packed.strided.source_stride, packed.strided.length) == (10_000, 128, 64)
