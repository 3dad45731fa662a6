"""TransferService: start, watch and cancel transfers, one per call or many on one stream.

Rules of this file:

* A watcher sees the newest state, not each step: a slow reader costs nothing and misses no outcome.
* A pipeline has at most so many transfers in flight; when it is full it stops reading, and the caller
  is slowed down by the transport.
* A broken watch or pipeline leaves its transfers running: the request_id finds them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from peermem.api.calls import Context, traceparent_of
from peermem.api.identity import Identity
from peermem.api.once import Once
from peermem.api.regions import page_size
from peermem.broker.broker import BIG, Broker
from peermem.broker.runs import Transfer
from peermem.core.errors import Internal, InvalidField, PeermemError, TransferCancelled
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.names import ChildName, parse_transfer
from peermem.core.transfer import TransferFacts
from peermem.telemetry import audit
from peermem.v1 import transfer_pb2, transfer_pb2_grpc
from peermem.wire import duration_from_proto, error_to_proto, transfer_request_from_proto, transfer_to_proto

log = structlog.get_logger(__name__)

_TICK = 0.1
"""Seconds between two reports of progress."""
_FIRST_TICK = 0.02
_MAX_WAIT = 3600.0
_PIPELINE = 1024
"""Transfers in flight on one pipeline."""


class TransferService(transfer_pb2_grpc.TransferServiceServicer):
    """See protos/peermem/v1/transfer.proto."""

    def __init__(
        self,
        broker: Broker,
        identity: Identity,
        created: Once[Transfer],
        max_segments: int,
        refused: Callable[[PeermemError], None],
    ) -> None:
        """`created` remembers the transfers of repeated requests; `refused` is told why a pipeline's did not begin."""
        self.refused = refused
        self._broker = broker
        self._identity = identity
        self._created = created
        self._max_segments = max_segments

    async def CreateTransfer(
        self, request: transfer_pb2.CreateTransferRequest, context: Context
    ) -> transfer_pb2.Transfer:
        """See the contract."""
        wait = duration_from_proto(request.wait, "wait", 0.0, _MAX_WAIT) if request.HasField("wait") else 0.0
        subject = await self._identity.subject(context)
        request.traceparent = request.traceparent or traceparent_of(context)
        transfer = await self.start(subject, request, relayed=self._identity.relayed(context))
        if wait and not transfer.ended.is_set():
            await _ended_within(transfer, wait)
        return transfer_to_proto(transfer.facts)

    async def GetTransfer(self, request: transfer_pb2.GetTransferRequest, context: Context) -> transfer_pb2.Transfer:
        """See the contract."""
        subject = await self._identity.subject(context)
        return transfer_to_proto(self._broker.seen_transfer(subject, parse_transfer(request.name)))

    async def ListTransfers(
        self, request: transfer_pb2.ListTransfersRequest, context: Context
    ) -> transfer_pb2.ListTransfersResponse:
        """See the contract."""
        size = page_size(request.page_size)
        page: list[TransferFacts] = []
        is_shown = self._broker.policy.sees_transfer(await self._identity.subject(context))
        reached = not request.page_token
        for facts in filter(is_shown, self._broker.transfers.newest(running_only=request.running)):
            if reached and len(page) == size:
                return transfer_pb2.ListTransfersResponse(
                    transfers=[transfer_to_proto(entry) for entry in page], next_page_token=page[-1].name.id
                )
            if reached:
                page.append(facts)
            reached = reached or facts.name.id == request.page_token
        if not reached:
            raise InvalidField("page_token is of a transfer that is forgotten by now: start anew.", field="page_token")
        return transfer_pb2.ListTransfersResponse(transfers=[transfer_to_proto(entry) for entry in page])

    async def CancelTransfer(
        self, request: transfer_pb2.CancelTransferRequest, context: Context
    ) -> transfer_pb2.Transfer:
        """See the contract."""
        subject = await self._identity.subject(context)
        return transfer_to_proto(await self._broker.cancel_transfer(subject, parse_transfer(request.name)))

    async def WatchTransfer(
        self, request: transfer_pb2.WatchTransferRequest, context: Context
    ) -> AsyncIterator[transfer_pb2.Transfer]:
        """See the contract."""
        name = parse_transfer(request.name)
        facts = self._broker.seen_transfer(await self._identity.subject(context), name)
        yield transfer_to_proto(facts)
        running = self._broker.transfers.find_running(name)
        while running is not None and not facts.state.ended:
            await _ended_within(running, _TICK)
            before, facts = facts, running.facts
            if facts != before:
                yield transfer_to_proto(facts)

    async def PipelineTransfers(  # type: ignore[override]  # written with context.read and write: half the latency
        self, requests: object, context: Context
    ) -> None:
        """See the contract."""
        await Pipeline(self, self._broker, self._identity, context).serve()

    async def start(
        self, subject: Subject, request: transfer_pb2.CreateTransferRequest, *, relayed: bool = False
    ) -> Transfer:
        """Start the transfer, or return the one that this request started before. Raises PeermemError."""
        audit.asked(request.request_id)  # a pipeline has many in one call
        wanted = transfer_request_from_proto(request, self._max_segments)
        request.ClearField("wait")  # how long the caller waits, and what for, is not part of what is asked for
        request.ClearField("traceparent")
        content = request.SerializeToString(deterministic=True) if request.request_id else b""
        if wanted.weight <= BIG:
            return await self._created.run_now(
                subject,
                request.request_id,
                content,
                lambda: self._broker.start_transfer(subject, wanted, relayed=relayed),
            )
        return await self._created.run(
            subject, request.request_id, content, lambda: self._broker.create_transfer(subject, wanted, relayed=relayed)
        )


class Pipeline:
    """One PipelineTransfers call."""

    def __init__(self, service: TransferService, broker: Broker, identity: Identity, context: Context) -> None:
        self._service = service
        self._broker = broker
        self._identity = identity
        self._context = context
        self._subject = ANONYMOUS
        self._running: dict[int, Transfer] = {}
        self._starting: dict[int, bool] = {}
        """Tags whose transfer is about to start, and whether it has been cancelled already."""
        self._room = asyncio.Semaphore(_PIPELINE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()

    async def serve(self) -> None:
        """Read commands until the caller has no more, then let the transfers end and be reported."""
        self._subject = await self._identity.subject(self._context)
        try:
            while True:
                message = await self._context.read()
                if message is grpc.aio.EOF:
                    break
                await self._command(message)
            await asyncio.gather(*self._tasks)
        except PeermemError:
            async with self._writing:  # a status that meets a message on its way is never sent
                self._stop()
            raise
        finally:
            self._stop()

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _command(self, message: transfer_pb2.PipelineTransfersRequest) -> None:
        if message.HasField("cancel"):
            self._cancel(message.tag)
        elif not message.HasField("create"):
            raise InvalidField("A pipeline's message needs create or cancel.", field="command")
        elif message.tag in self._starting or message.tag in self._running:
            raise InvalidField(f"Tag {message.tag} is in use on this pipeline.", field="tag")
        else:
            await self._room.acquire()
            self._starting[message.tag] = False
            task = asyncio.get_running_loop().create_task(self._carry(message.tag, message.create))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled():
            task.exception()  # a caller that went away; serve() ends by itself

    async def _carry(self, tag: int, request: transfer_pb2.CreateTransferRequest) -> None:
        try:
            # asked again for each: a session, token or certificate may have ended since the pipeline began
            self._subject = await self._identity.subject(self._context)
            transfer = await self._service.start(self._subject, request)
        except PeermemError as error:
            await self._refuse(tag, error)
            return
        except Exception:
            log.exception("pipeline_defect", tag=tag)
            await self._refuse(tag, Internal("The transfer met a defect of the daemon; its log has the details."))
            return
        del request  # it may be large, and the transfer long
        self._running[tag] = transfer
        if self._starting.pop(tag):
            self._cancel(tag)
        tick = _FIRST_TICK
        sent: TransferFacts | None = None
        while not await _ended_within(transfer, tick):
            tick = _TICK
            if transfer.facts != sent:
                sent = transfer.facts
                await self._report(tag, sent)
        del self._running[tag]
        await self._report(tag, transfer.facts)

    async def _refuse(self, tag: int, error: PeermemError) -> None:
        del self._starting[tag]
        self._service.refused(error)
        await self._send(transfer_pb2.PipelineTransfersResponse(tag=tag, error=error_to_proto(error)))

    async def _report(self, tag: int, facts: TransferFacts) -> None:
        await self._send(transfer_pb2.PipelineTransfersResponse(tag=tag, transfer=transfer_to_proto(facts)))

    async def _send(self, response: transfer_pb2.PipelineTransfersResponse) -> None:
        async with self._writing:
            await self._context.write(response)

    def _cancel(self, tag: int) -> None:
        transfer = self._running.get(tag)
        if tag in self._starting:
            self._starting[tag] = True
        elif transfer is not None:
            name: ChildName = transfer.facts.name
            self._broker.policy.check_transfer(self._subject, transfer.facts)
            transfer.fail(TransferCancelled(f"{name} was cancelled by {self._subject}.", transfer=name))


async def _ended_within(transfer: Transfer, seconds: float) -> bool:
    """Wait for the end, but at most so long; return whether it has ended."""
    if transfer.ended.is_set():
        return True
    try:
        async with asyncio.timeout(seconds):
            await transfer.ended.wait()
    except TimeoutError:
        return False
    return True
