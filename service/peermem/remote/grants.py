"""The ExchangeGrants call: asks another daemon for grants, and for their end.

Rules of this file:

* What is asked for in one turn of the loop goes out in one message. What is given back goes with the next question,
  or a moment later, so that moving one thing after the other takes one message each.
* A caller that is gone gets no grant: one that comes for it nevertheless is given back.
* When the call breaks every question fails with its cause; the next one has a new call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from peermem.remote.connection import Connection
from peermem.v1 import link_pb2
from peermem.wire import error_from_proto


class GrantExchange:
    """One call."""

    def __init__(self, connection: Connection) -> None:
        """Begin it."""
        self._connection = connection
        self._call = connection.links.ExchangeGrants()
        self._loop = asyncio.get_running_loop()
        self._over_at = self._loop.time() + _LONGEST
        self._last = 0
        self._asked: dict[int, tuple[asyncio.Future[link_pb2.GrantAnswer], bytes]] = {}
        """What waits for each answer, and of which link it is."""
        self._questions: list[link_pb2.GrantQuestion] = []
        self._writer: asyncio.Task[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        """Set while something that is given back waits for company."""
        self._reader = self._loop.create_task(self._read())

    @property
    def is_over(self) -> bool:
        """Whether the call broke or was closed."""
        return self._reader.done()

    def serves(self, connection: Connection) -> bool:
        """Whether to ask on it while `connection` is the one to make calls on."""
        return self._connection is connection and not self.is_over and self._loop.time() < self._over_at

    async def acquire(self, question: link_pb2.AcquireGrant, timeout: float) -> link_pb2.Grant:
        """Return a grant. Raises what the other daemon answers, TimeoutError, and AioRpcError or CancelledError when
        the call ends before."""
        answer = await self._ask(link_pb2.GrantQuestion(acquire=question), question.link_id, timeout)
        return answer.grant

    async def release(self, link_id: bytes, grant_ids: Sequence[int], timeout: float) -> None:
        """Return when grants have ended. Raises as `acquire`."""
        release = link_pb2.ReleaseGrants(link_id=link_id, grant_ids=grant_ids)
        await self._ask(link_pb2.GrantQuestion(release=release), link_id, timeout)

    def give_back(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        """Have grants ended; nobody waits for it."""
        release = link_pb2.ReleaseGrants(link_id=link_id, grant_ids=grant_ids)
        self._questions.append(link_pb2.GrantQuestion(release=release))
        if self._lingering is None and self._writer is None:
            self._lingering = self._loop.call_later(_LINGER, self._write_soon)

    async def _ask(self, question: link_pb2.GrantQuestion, link_id: bytes, timeout: float) -> link_pb2.GrantAnswer:
        self._last += 1
        question.number = self._last
        asked: asyncio.Future[link_pb2.GrantAnswer] = self._loop.create_future()
        self._asked[question.number] = asked, link_id
        self._questions.append(question)
        self._write_soon()
        try:
            async with asyncio.timeout(timeout):
                answer = await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled() and asked.exception() is None:
                self._unwanted(asked.result(), link_id)
            raise
        if answer.HasField("error"):
            raise error_from_proto(answer.error)
        return answer

    def _write_soon(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
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
                    for answer in message.answers:
                        self._take(answer)
        except grpc.aio.AioRpcError as error:
            cause = error
        finally:  # also when the call was cancelled, by `close` or with its connection
            self._fail(cause)

    def _take(self, answer: link_pb2.GrantAnswer) -> None:
        if answer.number not in self._asked:
            return
        asked, link_id = self._asked.pop(answer.number)
        if asked.done():  # whoever waited for it is gone
            self._unwanted(answer, link_id)
        else:
            asked.set_result(answer)

    def _unwanted(self, answer: link_pb2.GrantAnswer, link_id: bytes) -> None:
        if answer.HasField("grant"):
            self.give_back(link_id, [answer.grant.grant_id])

    def _fail(self, cause: grpc.aio.AioRpcError | None) -> None:
        asked, self._asked = self._asked, {}
        for each, _ in asked.values():
            if not each.done() and cause is not None:
                each.set_exception(cause)
            else:
                each.cancel()

    async def close(self) -> None:
        """End the call when what was asked for is answered, and what was given back is sent."""
        if self._questions:
            self._write_soon()
        if waiting := [asked for asked, _ in self._asked.values() if not asked.done()]:
            await asyncio.wait(waiting)
        if self._writer is not None:
            await asyncio.wait([self._writer])
        self._call.cancel()
        await asyncio.wait([self._reader])


_LONGEST = 300.0
"""Seconds of one call: well below those after which the other daemon ends it."""
_LINGER = 0.001
"""Seconds that what is given back waits for a question to go with."""
_AT_ONCE = 1024
"""Questions of one message, at most."""
