import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import NodeUnreachable, Timeout, TransferCancelled
from peermem.core.transfer import State, TransferMachine
from peermem.core.types import Ranges


class Machine(TransferMachine):
    """Each leg has so many slices of 10 bytes."""

    def __init__(self, *legs: int) -> None:
        super().__init__(len(legs), 10 * sum(legs))
        self._slices = [iter([Ranges.single(10 * i, 10 * i, 10) for i in range(count)]) for count in legs]

    def begin(self) -> None:
        self.start(self._slices)


def test_it_succeeds_when_every_slice_is_in_place() -> None:
    transfer = Machine(2, 1)
    assert transfer.take(0) is None, "nothing is posted before the start"
    transfer.begin()
    assert [transfer.take(0) is not None for _ in range(3)] == [True, True, False]
    assert [transfer.take(1) is not None for _ in range(2)] == [True, False]
    for _ in range(3):
        assert not transfer.drained
        transfer.completed(10)
    assert transfer.drained
    assert transfer.finish() is State.SUCCEEDED
    assert transfer.done == transfer.total == 30


def test_after_a_failure_nothing_is_posted_and_what_is_in_flight_comes_back() -> None:
    transfer = Machine(3)
    transfer.begin()
    transfer.take(0)
    transfer.take(0)
    transfer.broken(0, NodeUnreachable("It is gone."), flushed=True)
    assert transfer.state is State.FENCING
    assert transfer.take(0) is None
    assert not transfer.drained
    transfer.completed(10)
    assert transfer.drained
    assert transfer.unfenced == {0}
    assert transfer.finish() is State.FAILED
    assert transfer.done == 10


def test_the_first_failure_is_reported() -> None:
    transfer = Machine(1)
    transfer.fail(Timeout("Too late."))
    transfer.fail(TransferCancelled("By hand."))
    assert transfer.drained
    assert transfer.finish() is State.FAILED
    assert isinstance(transfer.error, Timeout)


def test_a_cancelled_one_is_cancelled() -> None:
    transfer = Machine(1)
    transfer.begin()
    transfer.take(0)
    transfer.fail(TransferCancelled("By hand."))
    transfer.completed(10)
    assert transfer.finish() is State.CANCELLED


def test_a_start_after_the_failure_posts_nothing() -> None:
    transfer = Machine(1)
    transfer.fail(TransferCancelled("By hand."))
    transfer.begin()
    assert transfer.take(0) is None


def test_it_cannot_end_while_slices_are_in_flight() -> None:
    transfer = Machine(1)
    transfer.begin()
    transfer.take(0)
    with pytest.raises(AssertionError, match="in flight"):
        transfer.finish()


def test_a_refused_slice_is_taken_again() -> None:
    transfer = Machine(1)
    transfer.begin()
    first = transfer.take(0)
    assert first is not None
    assert transfer.take(0) is None
    transfer.refused(0, first)
    assert not transfer.drained
    assert transfer.take(0) == first
    assert transfer.take(0) is None
    transfer.completed(10)
    assert transfer.drained


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_whatever_the_order_each_slice_is_in_place_once(legs: list[int], data: st.DataObject) -> None:
    transfer = Machine(*legs)
    transfer.begin()
    in_flight: list[tuple[int, Ranges]] = []
    landed: list[tuple[int, int]] = []
    refusals = 0
    while not transfer.drained:
        taken = [(leg, piece) for leg in range(len(legs)) if (piece := transfer.take(leg)) is not None]
        in_flight += taken
        if in_flight:
            leg, piece = in_flight.pop(data.draw(st.integers(0, len(in_flight) - 1)))
            if refusals < 5 and data.draw(st.booleans()):
                refusals += 1
                transfer.refused(leg, piece)
            else:
                transfer.completed(10)
                landed.append((leg, piece.local[0]))
    assert sorted(landed) == [(leg, 10 * i) for leg, count in enumerate(legs) for i in range(count)]
    assert transfer.finish() is State.SUCCEEDED
