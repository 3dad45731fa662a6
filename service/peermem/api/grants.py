"""Other daemons make and end grants, by the ExchangeGrants call or on the rails of their link, while it is open.

Rules of this file:

* Each question is one of the link's own node, whatever was asked before: in a call as the caller's connection proves
  it. On rails it is the node that opened the link, whose certificate must still count, and must have been shown a while
  ago at most; a link of which it counts no more is closed.
* Questions are answered when their answers are known, those that are known together in one message.
* So many questions have no answer, or one that is not told yet, at most; then no more are read, and a caller that
  asks too fast, or does not read, is slowed down.
* A call ends after a while; the caller makes another one before.
* What was asked for is done, also when the caller is gone by then. What is granted to nobody ends with its link, or
  when its time is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError

from peermem.api.calls import Context
from peermem.api.identity import spoken_subject
from peermem.broker.serving import Serving
from peermem.broker.vouching import Vouching
from peermem.core.errors import AccessDenied, Internal, InvalidField, MalformedMessage, PeermemError, ShuttingDown
from peermem.core.grant import Wanted
from peermem.core.names import parse_region
from peermem.core.spans import traceparent
from peermem.core.types import GrantedKey
from peermem.fabric.base import CARRIED, Asker
from peermem.telemetry import audit
from peermem.v1 import link_pb2
from peermem.wire import error_to_proto
from peermem.wire_links import grant_to_proto, right_from_proto

T = TypeVar("T")

log = structlog.get_logger(__name__)

_ASKED = 1024
"""Questions of one message, and of one call or rail that wait for their answers."""
_PATIENCE = 1.0
"""Seconds that the end of a call waits for the message that is being sent."""
_RELEASED = 1000
"""Grants of one release."""
_LONGEST = 600.0
"""Seconds of one call: a connection that is too old for its certificate is not kept open by it."""
_CALL = "ExchangeGrants"

CheckLink = Callable[[bytes], None]
"""Returns where the caller may use a link, or there is no such link. Raises AccessDenied, Unauthenticated."""


class GrantExchanges:
    """All that other daemons ask for grants."""

    def __init__(self, serving: Serving, vouching: Vouching) -> None:
        self._serving = serving
        self._vouching = vouching
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        """Answers that are being found or told, and calls that are being served."""

    async def serve(self, context: Context, check_link: CheckLink) -> None:
        """Serve one call until its caller or `close` ends it. Raises InvalidField, MalformedMessage, ShuttingDown."""
        one = _CallExchange(self, context, check_link)
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

    def met(self, asker: Asker) -> Callable[[bytes], None]:
        """Return what takes the messages of a rail; it raises MalformedMessage. See `fabric.base.Met`."""
        return _RailExchange(self, asker, self._serving).take

    def close(self) -> None:
        """End all calls, now and from now on."""
        self._closing.set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` in a task of its own, which is kept alive."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def answer(self, question: link_pb2.GrantQuestion, check_link: CheckLink) -> link_pb2.GrantAnswer:
        """Return the answer to a question; never raises."""
        answer = link_pb2.GrantAnswer(number=question.number)
        try:
            granted = await self._find(question, check_link)
            if granted is not None:
                answer.grant.CopyFrom(grant_to_proto(granted))
        except PeermemError as error:
            answer.error.CopyFrom(error_to_proto(error))
        except Exception:
            log.exception("exchange_defect")
            told = Internal("A question for grants met a defect of the daemon; its log has the details.")
            answer.error.CopyFrom(error_to_proto(told))
        return answer

    async def _find(self, question: link_pb2.GrantQuestion, check_link: CheckLink) -> GrantedKey | None:
        asked = question.WhichOneof("question")
        if asked == "acquire":
            if not question.number:
                raise InvalidField("A question for a grant must have a number.", field="number")
            check_link(question.acquire.link_id)
            return await self._acquire(question.acquire)
        if asked is None:
            raise InvalidField("A question must be to acquire or to release.", field="question")
        if len(question.release.grant_ids) > _RELEASED:
            raise InvalidField(f"grant_ids must hold at most {_RELEASED}.", field="grant_ids")
        check_link(question.release.link_id)
        await self._serving.release(question.release.link_id, question.release.grant_ids)
        return None

    async def _acquire(self, asked: link_pb2.AcquireGrant) -> GrantedKey:
        serving = self._serving
        region, right = parse_region(asked.region, "region"), right_from_proto(asked.right)
        if not asked.length:
            raise InvalidField("length must be at least 1 byte.", field="length")
        node = serving.node_of(asked.link_id, asked.epoch)
        spoken = spoken_subject(asked.subject, "subject")
        subject = await self._vouching.confirmed(node, spoken, region, right)
        parent = traceparent(asked.traceparent)
        wanted = Wanted(region, right, subject, asked.offset, asked.length, asked.staged, parent)
        return await serving.acquire(asked.link_id, asked.epoch, wanted)


class _CallExchange:
    """One call."""

    def __init__(self, exchanges: GrantExchanges, context: Context, check_link: CheckLink) -> None:
        self._exchanges = exchanges
        self._context = context
        self._check_link = check_link
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
        answer = await self._exchanges.answer(question, self._check_link)
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


class _RailExchange:
    """One rail of an accepted link. What is not read there is the fabric's to bound."""

    def __init__(self, exchanges: GrantExchanges, asker: Asker, serving: Serving) -> None:
        self._exchanges = exchanges
        self._asker = asker
        self._serving = serving
        self._count = 0
        """Questions that are not done yet,"""
        self._waiting = 0
        """and those of them that want an answer."""
        self._answers: list[link_pb2.GrantAnswer] = []
        self._telling: asyncio.Handle | None = None

    def take(self, message: bytes) -> None:
        """Begin to answer a message. Raises MalformedMessage."""
        try:
            questions = link_pb2.ExchangeGrantsRequest.FromString(message).questions
        except DecodeError:
            raise MalformedMessage("A message on a rail holds no questions.") from None
        if len(questions) > _ASKED:
            raise MalformedMessage(f"A message on a rail has more than {_ASKED} questions.")
        asked = [question for question in questions if question.number]
        ending = [question for question in questions if not question.number]
        self._waiting += len(asked)
        self._count += len(questions)
        if self._count > _ASKED:
            self._asker.hold(on=True)
        if len(asked) == 1:
            self._exchanges.spawn(self._find(asked[0], ending))
        else:
            for question in questions:
                self._exchanges.spawn(self._find(question, []))

    async def _find(self, question: link_pb2.GrantQuestion, ending: Sequence[link_pb2.GrantQuestion]) -> None:
        """Answer a question, then end what came with it and wants no answer."""
        audit.called(self._asker.remote, _CALL)
        for each in (question, *ending):
            self._found(await self._exchanges.answer(each, self._check_link))

    def _found(self, answer: link_pb2.GrantAnswer) -> None:
        self._count -= 1
        if self._count == _ASKED:
            self._asker.hold(on=False)
        if answer.number:
            self._waiting -= 1
            self._answers.append(answer)
            if not self._waiting:
                self._tell()
            elif self._telling is None:
                self._telling = asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        answers, self._answers = self._answers, []
        self._say(answers)

    def _say(self, answers: Sequence[link_pb2.GrantAnswer]) -> None:
        message = link_pb2.ExchangeGrantsResponse(answers=answers).SerializeToString()
        if len(message) > CARRIED and len(answers) > 1:
            half = len(answers) // 2
            self._say(answers[:half])
            self._say(answers[half:])
        elif answers:
            self._asker.answer(message)

    def _check_link(self, link_id: bytes) -> None:
        """Raises AccessDenied, Unauthenticated."""
        if link_id != self._asker.link_id:
            raise AccessDenied("A rail asks for grants of its own link only.")
        self._serving.check_vouched(link_id)
