"""Asks another daemon for grants, and for their end: over an ExchangeGrants call, or on the rails of the grants' link.

Rules of this file:

* What is asked for in one turn of the loop goes out in few messages. What is given back goes with the next question, or
  a moment later, so that moving one thing after the other takes one message each.
* A caller that is gone gets no grant: one that comes for it nevertheless is given back.
* When what carries them breaks, every question without an answer fails; the next one is asked elsewhere.
* On rails, which show no certificate, nothing is asked for any more a while after this daemon showed its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError

from peermem.core.errors import MalformedMessage
from peermem.remote.connection import Connection
from peermem.v1 import link_pb2
from peermem.wire import error_from_proto


class Lost(Exception):
    """Questions can't be carried (any more); whether one was answered is not known."""


class Carrier(Protocol):
    """What carries questions to another daemon."""

    def send(self, questions: Sequence[link_pb2.GrantQuestion]) -> None:
        """Send them now or in a moment. Raises Lost."""


class GrantExchange:
    """Questions on one carrier, and their answers."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._loop = asyncio.get_running_loop()
        self._last = 0
        self._asked: dict[int, tuple[asyncio.Future[link_pb2.GrantAnswer], bytes, float]] = {}
        """What waits for each answer, of which link it is, and until when; the ones with less time first."""
        self._missed: dict[int, bytes] = {}
        """Of which link each answer is that may still come, though nobody waits for it any more; the oldest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._given_back: list[link_pb2.GrantQuestion] = []
        self._lingering: asyncio.TimerHandle | None = None
        """Set while something that is given back waits for company."""

    @property
    def waiting(self) -> list[asyncio.Future[link_pb2.GrantAnswer]]:
        """What waits for an answer."""
        return [asked for asked, *_ in self._asked.values() if not asked.done()]

    async def acquire(self, question: link_pb2.AcquireGrant, timeout: float) -> link_pb2.Grant:
        """Return a grant. Raises what the other daemon answers, TimeoutError, Lost, and what `fail` was given."""
        answer = await self._ask(link_pb2.GrantQuestion(acquire=question), question.link_id, timeout)
        return answer.grant

    async def release(self, link_id: bytes, grant_ids: Sequence[int], timeout: float) -> None:
        """Return when grants have ended. Raises as `acquire`."""
        release = link_pb2.ReleaseGrants(link_id=link_id, grant_ids=grant_ids)
        await self._ask(link_pb2.GrantQuestion(release=release), link_id, timeout)

    def give_back(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        """Have grants ended; nobody waits for it."""
        release = link_pb2.ReleaseGrants(link_id=link_id, grant_ids=grant_ids)
        self._given_back.append(link_pb2.GrantQuestion(release=release))
        if self._lingering is None:
            self._lingering = self._loop.call_later(_LINGER, self.flush)

    def flush(self) -> None:
        """Send what is given back."""
        with suppress(Lost):  # these grants end with their link, or when their time is over
            self._send([])

    def _send(self, questions: list[link_pb2.GrantQuestion]) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
            questions, self._given_back = questions + self._given_back, []
        if questions:
            self._carrier.send(questions)

    async def _ask(self, question: link_pb2.GrantQuestion, link_id: bytes, timeout: float) -> link_pb2.GrantAnswer:
        self._last += 1
        question.number = self._last
        self._send([question])
        asked: asyncio.Future[link_pb2.GrantAnswer] = self._loop.create_future()
        over_at = self._loop.time() + timeout
        self._asked[question.number] = asked, link_id, over_at
        if self._timer is None:
            self._timer = self._loop.call_at(over_at, self._look)
        try:
            answer = await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled() and asked.exception() is None:
                self._unwanted(asked.result(), link_id)
            raise
        finally:
            if self._asked.pop(question.number, None) is not None:
                self._miss(question.number, link_id)
        if answer.HasField("error"):
            raise error_from_proto(answer.error)
        return answer

    def _miss(self, number: int, link_id: bytes) -> None:
        self._missed[number] = link_id
        if len(self._missed) > _MISSED:
            del self._missed[next(iter(self._missed))]

    def _look(self) -> None:
        """Give up on answers whose time is over, and look again when the next one's is."""
        self._timer = None
        for asked, _, over_at in self._asked.values():
            if asked.done():
                continue
            if over_at > self._loop.time():
                self._timer = self._loop.call_at(over_at, self._look)
                return
            asked.set_exception(TimeoutError())

    def take(self, answers: Iterable[link_pb2.GrantAnswer]) -> None:
        """Answers came."""
        for answer in answers:
            if answer.number in self._asked:
                asked, link_id, _ = self._asked.pop(answer.number)
                if asked.done():  # whoever waited for it is gone
                    self._unwanted(answer, link_id)
                else:
                    asked.set_result(answer)
            elif (link := self._missed.pop(answer.number, None)) is not None:
                self._unwanted(answer, link)

    def _unwanted(self, answer: link_pb2.GrantAnswer, link_id: bytes) -> None:
        if answer.HasField("grant"):
            self.give_back(link_id, [answer.grant.grant_id])

    def fail(self, cause: Exception | None) -> None:
        """No answer is known to come any more; without a `cause`, whoever waits is cancelled. One that comes all the
        same is nobody's."""
        for asked in self.waiting:
            if cause is not None:
                asked.set_exception(cause)
            else:
                asked.cancel()

    def close(self) -> None:
        """Nothing comes any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._lingering is not None:
            self._lingering.cancel()
        self._asked.clear()
        self._missed.clear()


class GrantCall:
    """An ExchangeGrants call; a `Carrier`."""

    def __init__(self, connection: Connection) -> None:
        """Begin it."""
        self._connection = connection
        self._call = connection.links.ExchangeGrants()
        self._loop = asyncio.get_running_loop()
        self._over_at = self._loop.time() + _LONGEST
        self._questions: list[link_pb2.GrantQuestion] = []
        self._writer: asyncio.Task[None] | None = None
        self.exchange = GrantExchange(self)
        self._reader = self._loop.create_task(self._read())

    @property
    def is_over(self) -> bool:
        """Whether the call broke or was closed."""
        return self._reader.done()

    def serves(self, connection: Connection) -> bool:
        """Whether to ask on it while `connection` is the one to make calls on."""
        return self._connection is connection and not self.is_over and self._loop.time() < self._over_at

    def send(self, questions: Sequence[link_pb2.GrantQuestion]) -> None:
        """See Carrier."""
        self._questions += questions
        if self._writer is None:
            self._writer = self._loop.create_task(self._write())

    async def _write(self) -> None:
        """Send what is asked for; a call must not be cancelled while it writes, so that no caller does it itself."""
        try:
            while self._questions:
                questions, self._questions = self._questions[:_AT_ONCE], self._questions[_AT_ONCE:]
                await self._call.write(link_pb2.ExchangeGrantsRequest(questions=questions))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._questions = []  # the reader tells why
        finally:
            self._writer = None

    async def _read(self) -> None:
        cause: grpc.aio.AioRpcError | None = None
        try:
            with self._connection.used():
                while isinstance(message := await self._call.read(), link_pb2.ExchangeGrantsResponse):
                    self.exchange.take(message.answers)
        except grpc.aio.AioRpcError as error:
            cause = error
        finally:  # also when the call was cancelled, by `close` or with its connection
            self.exchange.fail(cause)
            self.exchange.close()

    async def close(self) -> None:
        """End the call when what was asked for is answered, and what was given back is sent."""
        self.exchange.flush()
        if waiting := self.exchange.waiting:
            await asyncio.wait(waiting)
        if self._writer is not None:
            await asyncio.wait([self._writer])
        self._call.cancel()
        await asyncio.wait([self._reader])


class GrantRails:
    """The rails of one link; a `Carrier` and a `remote.base.Ear`."""

    def __init__(self, carry: Callable[[bytes], bool]) -> None:
        """`carry` sends a message to the far end, if it can."""
        self._carry = carry
        self._loop = asyncio.get_running_loop()
        self._over_at = 0.0
        self._questions: list[link_pb2.GrantQuestion] = []
        self._turn: asyncio.Handle | None = None
        """Set in a turn of the loop in which something was sent: more of it waits for the turn's end."""
        self.exchange = GrantExchange(self)
        self.vouched()

    def vouched(self) -> None:
        """This daemon is about to show its certificate, by a call about the link."""
        self._over_at = self._loop.time() + _LONGEST

    @property
    def serves(self) -> bool:
        """Whether to ask on them."""
        return self._loop.time() < self._over_at

    def send(self, questions: Sequence[link_pb2.GrantQuestion]) -> None:
        """See Carrier."""
        if self._turn is not None:
            self._questions += questions
        else:
            self._say(questions)
            self._turn = self._loop.call_soon(self._turn_over)

    def _turn_over(self) -> None:
        self._turn = None
        if self._questions:
            questions, self._questions = self._questions, []
            self._turn = self._loop.call_soon(self._turn_over)
            try:
                self._say(questions)
            except Lost as error:
                self.exchange.fail(error)

    def _say(self, questions: Sequence[link_pb2.GrantQuestion]) -> None:
        """Raises Lost."""
        message = link_pb2.ExchangeGrantsRequest(questions=questions).SerializeToString()
        if len(message) > _LARGEST and len(questions) > 1:
            half = len(questions) // 2
            self._say(questions[:half])
            self._say(questions[half:])
        elif not self._carry(message):
            raise Lost

    def heard(self, message: bytes) -> None:
        """See Ear."""
        try:
            response = link_pb2.ExchangeGrantsResponse.FromString(message)
        except DecodeError:
            raise MalformedMessage("What the other daemon answers on a rail is no answer.") from None
        self.exchange.take(response.answers)

    def broke(self) -> None:
        """See Ear."""
        self.exchange.fail(Lost())

    def close(self) -> None:
        """The link is over."""
        self.exchange.flush()
        self.broke()
        self.exchange.close()


_LONGEST = 300.0
"""Seconds of one call, or on rails since a call: well below those after which the other daemon ends it."""
_LINGER = 0.01
"""Seconds that what is given back waits for a question to go with."""
_MISSED = 4096
"""Answers that nobody waits for any more, of which those that come all the same are given back."""
_AT_ONCE = 1024
"""Questions of one message, at most."""
_LARGEST = 64 << 10
"""Bytes of one message on rails, if it has more than one question."""
