"""ExchangeGrants: other daemons make and end grants over one call for as long as their link is open.

Rules of this file:

* Each question is one of the link's own node, as the caller's connection proves it, whatever was asked before.
* Questions are answered when their answers are known, all those of one turn in one message.
* So many questions have no answer, or one that is not told yet, at most; then no more are read, and a caller that
  asks too fast, or does not read, is slowed down.
* A call ends after a while; the caller makes another one before.
* What was asked for is done, also when the caller is gone by then. What is granted to nobody ends with its link, or
  when its time is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
import structlog

from peermem.api.calls import Context
from peermem.api.identity import spoken_subject
from peermem.broker.serving import Serving
from peermem.broker.vouching import Vouching
from peermem.core.errors import Internal, InvalidField, PeermemError, ShuttingDown
from peermem.core.grant import Wanted
from peermem.core.names import parse_region
from peermem.core.spans import traceparent
from peermem.core.types import GrantedKey
from peermem.v1 import link_pb2
from peermem.wire import error_to_proto
from peermem.wire_links import grant_to_proto, right_from_proto

T = TypeVar("T")

log = structlog.get_logger(__name__)

_ASKED = 1024
"""Questions of one message, and of one call that wait for their answers."""
_PATIENCE = 1.0
"""Seconds that the end of a call waits for the message that is being sent."""
_RELEASED = 1000
"""Grants of one release."""
_LONGEST = 600.0
"""Seconds of one call: a connection that is too old for its certificate is not kept open by it."""

CheckLink = Callable[[bytes, Context], None]
"""Returns where the caller may use a link, or there is no such link. Raises AccessDenied, Unauthenticated."""


class GrantExchanges:
    """All ExchangeGrants calls."""

    def __init__(self, serving: Serving, vouching: Vouching, check_link: CheckLink) -> None:
        self.serving = serving
        self.vouching = vouching
        self.check_link = check_link
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        """Answers that are being found or told, and calls that are being served."""

    async def serve(self, context: Context) -> None:
        """Serve one call until its caller or `close` ends it. Raises InvalidField, MalformedMessage, ShuttingDown."""
        one = _Exchange(self, context)
        exchange = self.spawn(one.serve())
        closing = self.spawn(self._closing.wait())
        try:
            await asyncio.wait([exchange, closing], timeout=_LONGEST, return_when=asyncio.FIRST_COMPLETED)
            if closing.done():
                raise ShuttingDown("This daemon is shutting down; it gives no more grants.")
            if exchange.done():
                await exchange
        finally:
            exchange.cancel()
            closing.cancel()
            await one.end()

    def close(self) -> None:
        """End all calls, now and from now on."""
        self._closing.set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` in a task of its own, which is kept alive."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Exchange:
    """One call."""

    def __init__(self, exchanges: GrantExchanges, context: Context) -> None:
        self._exchanges = exchanges
        self._context = context
        self._room = asyncio.Semaphore(_ASKED)
        self._answers: list[link_pb2.GrantAnswer] = []
        self._finding: set[asyncio.Task[None]] = set()
        self._teller: asyncio.Task[None] | None = None
        self._over = False

    async def serve(self) -> None:
        """Read questions until the caller has no more, and answer them all."""
        while (message := await self._context.read()) is not grpc.aio.EOF:
            if len(message.questions) > _ASKED:
                raise InvalidField(f"questions must hold at most {_ASKED}.", field="questions")
            for question in message.questions:
                await self._room.acquire()
                finding = self._exchanges.spawn(self._answer(question))
                self._finding.add(finding)
                finding.add_done_callback(self._finding.discard)
        await asyncio.gather(*self._finding)
        if self._teller is not None:
            await asyncio.wait([self._teller])

    async def end(self) -> None:
        """Return when no answer is being told, and none will be: gRPC can't end a call in the middle of one."""
        self._over = True
        if self._teller is not None:
            await asyncio.wait([self._teller], timeout=_PATIENCE)  # a caller that does not read is left

    async def _answer(self, question: link_pb2.GrantQuestion) -> None:
        answer = link_pb2.GrantAnswer(number=question.number)
        try:
            granted = await self._find(question)
            if granted is not None:
                answer.grant.CopyFrom(grant_to_proto(granted))
        except PeermemError as error:
            answer.error.CopyFrom(error_to_proto(error))
        except Exception:
            log.exception("exchange_defect")
            told = Internal("A question for grants met a defect of the daemon; its log has the details.")
            answer.error.CopyFrom(error_to_proto(told))
        if not question.number:
            self._room.release()
            return
        self._answers.append(answer)
        if self._teller is None:
            self._teller = self._exchanges.spawn(self._tell())

    async def _tell(self) -> None:
        try:
            while self._answers and not self._over:
                answers, self._answers = self._answers, []
                await self._context.write(link_pb2.ExchangeGrantsResponse(answers=answers))
                for _ in answers:
                    self._room.release()
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            self._over = True  # the caller is gone
        finally:
            self._teller = None

    async def _find(self, question: link_pb2.GrantQuestion) -> GrantedKey | None:
        asked = question.WhichOneof("question")
        if asked == "acquire":
            if not question.number:
                raise InvalidField("A question for a grant must have a number.", field="number")
            return await self._acquire(question.acquire)
        if asked is None:
            raise InvalidField("A question must be to acquire or to release.", field="question")
        if len(question.release.grant_ids) > _RELEASED:
            raise InvalidField(f"grant_ids must hold at most {_RELEASED}.", field="grant_ids")
        self._exchanges.check_link(question.release.link_id, self._context)
        await self._exchanges.serving.release(question.release.link_id, question.release.grant_ids)
        return None

    async def _acquire(self, asked: link_pb2.AcquireGrant) -> GrantedKey:
        serving = self._exchanges.serving
        self._exchanges.check_link(asked.link_id, self._context)
        region, right = parse_region(asked.region, "region"), right_from_proto(asked.right)
        if not asked.length:
            raise InvalidField("length must be at least 1 byte.", field="length")
        node = serving.node_of(asked.link_id, asked.epoch)
        spoken = spoken_subject(asked.subject, "subject")
        subject = await self._exchanges.vouching.confirmed(node, spoken, region, right)
        parent = traceparent(asked.traceparent)
        wanted = Wanted(region, right, subject, asked.offset, asked.length, asked.staged, parent)
        return await serving.acquire(asked.link_id, asked.epoch, wanted)
