from __future__ import annotations

import pytest

from peermem.client.facts import TransferState
from peermem.client.pipeline import Flight, Ledger
from peermem.core.errors import Internal, NodeUnreachable, NotSupported, PeermemError, RegionNotFound, SessionNotFound
from peermem.v1 import error_pb2, transfer_pb2

from .daemon import event


@pytest.fixture
def ledger() -> Ledger[Flight]:
    return Ledger(Flight)


def start(ledger: Ledger[Flight]) -> Flight:
    return ledger.add(transfer_pb2.CreateTransferRequest(request_id="id"))


def commands(ledger: Ledger[Flight]) -> list[tuple[int, str | None]]:
    return [(command.tag, command.WhichOneof("command")) for command in ledger.commands()]


def test_a_new_flight_knows_nothing(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    assert (flight.name, flight.state, flight.ended) == ("", TransferState.PENDING, False)
    assert (flight.progress.fraction, flight.progress.rate) == (0.0, 0.0)


def test_reports_move_a_flight_on(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_RUNNING, 25))
    assert (flight.name, flight.state, flight.ended) == ("nodes/a/transfers/t1", TransferState.RUNNING, False)
    assert flight.progress.fraction == 0.25
    assert flight.progress.rate > 0
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_SUCCEEDED, 100))
    assert flight.ended
    assert flight.outcome().bytes_done == 100
    assert commands(ledger) == []


def test_a_refused_transfer_raises_its_reason(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    refusal = error_pb2.Error(code=5, reason="REGION_NOT_FOUND", message="No.")
    ledger.handle(transfer_pb2.PipelineTransfersResponse(tag=flight.tag, error=refusal))
    assert flight.state is TransferState.FAILED
    with pytest.raises(RegionNotFound, match=r"No\."):
        flight.outcome()
    with pytest.raises(RegionNotFound):
        flight.info()


def test_a_transfer_that_a_restarted_daemon_refuses_is_lost_from_sight(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_RUNNING, 25))
    refusal = error_pb2.Error(code=5, reason="REGION_NOT_FOUND", message="No such region.")
    ledger.handle(transfer_pb2.PipelineTransfersResponse(tag=flight.tag, error=refusal))
    assert flight.ended
    with pytest.raises(NodeUnreachable, match=r"What came of it is not known.*No such region\.") as caught:
        flight.outcome()
    assert caught.value.metadata["refusal"] == "REGION_NOT_FOUND"


def test_a_failed_transfer_says_how_far_it_came(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    error = error_pb2.Error(reason="NODE_UNREACHABLE", message="Gone.", metadata={"node": "nodes/b"})
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_FAILED, 40, error=error))
    with pytest.raises(NodeUnreachable) as caught:
        flight.outcome()
    assert caught.value.metadata == {
        "node": "nodes/b",
        "transfer": "nodes/a/transfers/t1",
        "bytes_done": "40",
        "bytes_total": "100",
    }


def test_a_failure_without_a_reason_is_a_fault_all_the_same(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_FAILED))
    with pytest.raises(Internal, match="without a reason"):
        flight.outcome()


def test_events_that_mean_nothing_are_dropped(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    ledger.handle(event(999, transfer_pb2.TRANSFER_STATE_SUCCEEDED))
    ledger.handle(transfer_pb2.PipelineTransfersResponse(tag=flight.tag))
    ledger.handle(event(flight.tag, 77))
    assert (flight.state, flight.ended) == (TransferState.UNSPECIFIED, False)


def test_after_a_break_each_flight_is_sent_again(ledger: Ledger[Flight]) -> None:
    ended, cancelled, running = start(ledger), start(ledger), start(ledger)
    ledger.handle(event(ended.tag, transfer_pb2.TRANSFER_STATE_SUCCEEDED, 100))
    cancelled.cancelling = True
    assert ledger.broken(NodeUnreachable("gone")) is not None
    assert commands(ledger) == [(cancelled.tag, "create"), (running.tag, "create"), (cancelled.tag, "cancel")]


def test_without_flights_a_break_is_of_no_account(ledger: Ledger[Flight]) -> None:
    assert ledger.broken(NodeUnreachable("gone")) is None


def test_attempts_end(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    delays = []
    while (delay := ledger.broken(NodeUnreachable("gone"))) is not None:
        delays.append(delay)
    assert delays == sorted(delays)
    assert 1 < sum(delays) < 10
    with pytest.raises(NodeUnreachable):
        flight.outcome()


@pytest.mark.parametrize("fault", [NodeUnreachable("gone"), Internal("ended while being written to")])
def test_a_broken_call_is_worth_another(ledger: Ledger[Flight], fault: PeermemError) -> None:
    start(ledger)
    assert ledger.broken(fault) is not None


def test_news_make_the_attempts_start_over(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    first = ledger.broken(NodeUnreachable("gone"))
    ledger.broken(NodeUnreachable("gone"))
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_RUNNING))
    assert ledger.broken(NodeUnreachable("gone")) == first


def test_a_flight_lost_from_sight_is_not_taken_for_ended(ledger: Ledger[Flight]) -> None:
    flight = start(ledger)
    ledger.handle(event(flight.tag, transfer_pb2.TRANSFER_STATE_RUNNING, 10))
    ledger.fail(NodeUnreachable("gone"))
    for ask in (flight.info, flight.outcome):
        with pytest.raises(NodeUnreachable):
            ask()


@pytest.mark.parametrize("fault", [NotSupported("no"), SessionNotFound("no")])
def test_what_no_attempt_can_mend_fails_at_once(ledger: Ledger[Flight], fault: PeermemError) -> None:
    flight = start(ledger)
    assert ledger.broken(fault) is None
    with pytest.raises(type(fault)):
        flight.outcome()
