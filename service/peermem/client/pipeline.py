"""Transfers in flight on one PipelineTransfers call: what was asked, what is known, what to do after a break.

Rules of this file:

* No I/O and no locks: the shells bring both, and hear of news through `Flight.changed`.
* A flight leaves the ledger with its outcome, and every flight gets one: from the daemon, or a fault.
* After a break each flight is sent again as it was: its request_id makes the daemon take up the same transfer. One that
  a restarted daemon refuses then, although it had been accepted, is lost from sight: what was written is not known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

from peermem.client import errors, tracing
from peermem.client.facts import Progress, TransferInfo, TransferState, transfer_state
from peermem.core.errors import Internal, NodeUnreachable, PeermemError, Timeout
from peermem.core.spans import Span
from peermem.v1 import transfer_pb2

_BACKOFF = (0.05, 0.2, 0.8, 2.0)
"""Seconds before each attempt to open the pipeline again; the daemon may be restarting."""

_MENDABLE = (NodeUnreachable, Internal)
"""Faults of a call after which another may work: gRPC says INTERNAL when a call ends while it is being written to."""


class Flight:
    """One transfer as its pipeline knows it."""

    def __init__(self, tag: int, request: transfer_pb2.CreateTransferRequest) -> None:
        self.tag = tag
        self.request = request
        self._span = _begin(request)
        self.cancelling = False
        self._latest: transfer_pb2.Transfer | None = None
        self._fault: PeermemError | None = None
        self._ended = False
        self._started = self._updated = time.monotonic()

    @property
    def name(self) -> str:
        """nodes/{node}/transfers/{transfer}; empty until the daemon has reported it."""
        return self._latest.name if self._latest else ""

    @property
    def state(self) -> TransferState:
        """Where it is in its life, as last reported; FAILED where the daemon refused it."""
        if self._latest is not None and not self._fault:
            return transfer_state(self._latest)
        return TransferState.FAILED if self._fault else TransferState.PENDING

    @property
    def ended(self) -> bool:
        """Whether its outcome is known here."""
        return self._ended

    @property
    def progress(self) -> Progress:
        """How far it is, as last reported."""
        if self._latest is None:
            return Progress(0, 0, 0.0)
        elapsed = max(self._updated - self._started, 1e-6)
        return Progress(self._latest.bytes_done, self._latest.bytes_total, self._latest.bytes_done / elapsed)

    def has_news(self, seen: transfer_pb2.Transfer | None) -> bool:
        """Return whether there is more to know than the report `seen`."""
        return self._ended or self._latest is not seen

    def outcome(self) -> TransferInfo:
        """Return the facts of the ended transfer. Raises the reason where it did not succeed."""
        if self._fault is not None or self._latest is None:
            raise self._fault or Internal("The outcome of the transfer was asked for before its end.")
        info = TransferInfo.from_proto(self._latest)
        if info.state is TransferState.SUCCEEDED:
            return info
        error = info.error or Internal(f"Transfer {info.name} ended as {info.state} without a reason.")
        metadata = {"transfer": info.name, "bytes_done": str(info.bytes_done), "bytes_total": str(info.bytes_total)}
        raise PeermemError.restore(error.reason, error.message, {**error.metadata, **metadata})

    def info(self) -> TransferInfo:
        """Return the facts as last reported. Raises the reason where the transfer was refused or is lost from sight."""
        if self._fault is not None or self._latest is None:
            return self.outcome()
        return TransferInfo.from_proto(self._latest)

    def still_running(self, waited: float) -> Timeout:
        """Return the fault for a wait that ended before the transfer."""
        return Timeout(
            f"Transfer {self.name or self.request.request_id} still runs after {waited:g} s of waiting; "
            "wait again, or cancel it.",
            transfer=self.name,
            state=self.state,
            bytes_done=self.progress.bytes_done,
        )

    def report(self, transfer: transfer_pb2.Transfer) -> None:
        """Take news of the daemon."""
        self._updated = time.monotonic()
        self._latest = transfer
        self._ended = transfer_state(transfer).ended
        if self._ended:
            told = errors.from_proto(transfer.error) if transfer.HasField("error") else None
            self._span.note(transfer=transfer.name, done=transfer.bytes_done)
            self._span.end(told)
        self.changed()

    def fail(self, fault: PeermemError) -> None:
        """End it here: it was refused, or its daemon can't be reached any more."""
        self._fault = fault
        self._ended = True
        self._span.end(fault)
        self.changed()

    def changed(self) -> None:
        """Tell whoever waits that there is news; for the shells to override."""


F = TypeVar("F", bound=Flight)


class Ledger(Generic[F]):
    """The flights of one pipeline, by tag."""

    def __init__(self, make: Callable[[int, transfer_pb2.CreateTransferRequest], F]) -> None:
        self._make = make
        self._tags = count(1)
        self._flights: dict[int, F] = {}
        self._breaks = 0

    def add(self, request: transfer_pb2.CreateTransferRequest) -> F:
        """Return a new flight."""
        flight = self._make(next(self._tags), request)
        self._flights[flight.tag] = flight
        return flight

    def commands(self) -> list[transfer_pb2.PipelineTransfersRequest]:
        """Return what has to be sent on a newly opened pipeline."""
        flights = list(self._flights.values())
        return [create(flight) for flight in flights] + [cancel(flight) for flight in flights if flight.cancelling]

    def handle(self, response: transfer_pb2.PipelineTransfersResponse) -> None:
        """Take one event; one for an unknown tag is of a flight that ended, and is dropped."""
        self._breaks = 0
        flight = self._flights.get(response.tag)
        if flight is None:
            return
        event = response.WhichOneof("event")
        if event == "error":
            fault = errors.from_proto(response.error)
            flight.fail(errors.forgotten(flight.name, fault) if flight.name else fault)
        elif event == "transfer":
            flight.report(response.transfer)
        if flight.ended:
            self._flights.pop(response.tag, None)

    def broken(self, fault: PeermemError) -> float | None:
        """Take the end of the call; return the seconds to wait before it is opened again, None for not at all.

        Without another attempt every flight fails.
        """
        if not self._flights:
            return None
        if isinstance(fault, _MENDABLE) and self._breaks < len(_BACKOFF):
            self._breaks += 1
            return _BACKOFF[self._breaks - 1]
        self.fail(fault)
        return None

    def fail(self, fault: PeermemError) -> None:
        """End every flight."""
        self._breaks = 0
        flights = list(self._flights.values())
        self._flights.clear()
        for flight in flights:
            flight.fail(fault)


def _begin(request: transfer_pb2.CreateTransferRequest) -> Span:
    """Begin what a trace of the job holds of a transfer, and have its request say so."""
    first = request.segments[0] if request.segments else transfer_pb2.SegmentList()
    span = tracing.begin("peermem.transfer", source=first.source, destination=first.destination)
    if span.traceparent:
        request.traceparent = span.traceparent
    return span


def create(flight: Flight) -> transfer_pb2.PipelineTransfersRequest:
    """Return the command that starts a flight."""
    return transfer_pb2.PipelineTransfersRequest(tag=flight.tag, create=flight.request)


def cancel(flight: Flight) -> transfer_pb2.PipelineTransfersRequest:
    """Return the command that cancels a flight."""
    return transfer_pb2.PipelineTransfersRequest(tag=flight.tag, cancel=transfer_pb2.PipelineCancel())
