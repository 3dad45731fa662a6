import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import FabricUnavailable, NoCommonNode
from peermem.core.names import ChildName
from peermem.core.plan import Direction, executing_node, legs, slices
from peermem.core.segments import SegmentList, columns
from peermem.core.types import FabricKind, Ranges

TCP, LOCAL, VERBS = FabricKind.TCP, FabricKind.LOCAL, FabricKind.VERBS


def segment(source: str, destination: str) -> SegmentList:
    return columns(ChildName(source, "regions", "s"), ChildName(destination, "regions", "d"), [0], [64], [8])


@pytest.mark.parametrize(
    ("pairs", "here", "node"),
    [
        ([("a", "b")], "a", "a"),
        ([("a", "b")], "b", "b"),
        ([("a", "b")], "c", "a"),
        ([("a", "b"), ("c", "b")], "x", "b"),
        ([("a", "b"), ("c", "a")], "c", "a"),
        ([("b", "b")], "a", "b"),
    ],
)
def test_a_transfer_runs_where_one_end_of_everything_is(pairs: list[tuple[str, str]], here: str, node: str) -> None:
    assert executing_node([segment(*pair) for pair in pairs], here) == node


def test_without_such_a_node_it_is_refused() -> None:
    with pytest.raises(NoCommonNode):
        executing_node([segment("a", "b"), segment("c", "d")], "a")


def test_directions_and_fabrics() -> None:
    push, pull, both = legs([segment("a", "b"), segment("b", "a"), segment("a", "a")], "a", {TCP, LOCAL}, None)
    assert (push.direction, push.fabrics, push.ranges) == (Direction.PUSH, (TCP,), Ranges.single(0, 0, 8))
    assert (push.start, push.length, pull.start, pull.length) == (64, 8, 0, 8)
    assert (pull.direction, pull.fabrics, pull.ranges) == (Direction.PULL, (TCP,), Ranges.single(64, 0, 8))
    assert (both.direction, both.fabrics) == (Direction.LOCAL, (LOCAL,))
    assert (str(pull.local), str(pull.other)) == ("nodes/a/regions/d", "nodes/b/regions/s")


def test_ranges_at_the_far_end_count_from_the_first_byte_that_is_touched_there() -> None:
    here, there = ChildName("a", "regions", "s"), ChildName("b", "regions", "d")
    (leg,) = legs([columns(here, there, [0, 50, 100], [900, 70, 300], [40, 8, 16])], "a", {TCP}, None)
    assert (leg.start, leg.length) == (70, 870)
    assert leg.ranges == Ranges([0, 50, 100], [830, 0, 230], [40, 8, 16], 64)
    (leg,) = legs([columns(there, here, [0, 50], [900, 70], [40, 8])], "a", {TCP}, None)
    assert (leg.start, leg.length, leg.ranges.remote) == (0, 58, [0, 50])


def test_verbs_is_preferred_and_a_wish_is_kept() -> None:
    assert legs([segment("a", "b")], "a", {TCP, VERBS}, None)[0].fabrics == (VERBS, TCP)
    assert legs([segment("a", "b")], "a", {TCP, VERBS}, TCP)[0].fabrics == (TCP,)


@pytest.mark.parametrize(("pair", "wanted"), [(("a", "b"), LOCAL), (("a", "a"), TCP), (("a", "b"), VERBS)])
def test_a_wish_that_cant_be_kept_is_refused(pair: tuple[str, str], wanted: FabricKind) -> None:
    with pytest.raises(FabricUnavailable, match="Leave the choice"):
        legs([segment(*pair)], "a", {TCP, LOCAL}, wanted)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 50),
    st.integers(1, 5),
    st.sampled_from([1, 4]),
)
def test_slices_cover_everything_once_and_keep_the_bounds(
    lengths: list[int], size: int, count: int, alignment: int
) -> None:
    size *= alignment
    local = [100 * i for i in range(len(lengths))]
    remote = [1000 * i for i in range(len(lengths))]
    pieces = list(slices(Ranges(local, remote, lengths, sum(lengths)), size, count, alignment))
    assert not any(start % alignment for piece in pieces for start in (*piece.local, *piece.remote))
    assert all(piece.total == sum(piece.lengths) <= size and len(piece.lengths) <= count for piece in pieces)
    moved = [
        (here + i, there + i)
        for piece in pieces
        for here, there, length in zip(piece.local, piece.remote, piece.lengths, strict=True)
        for i in range(length)
    ]
    wanted = [(here + i, there + i) for here, there, n in zip(local, remote, lengths, strict=True) for i in range(n)]
    assert moved == wanted
