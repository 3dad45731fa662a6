"""Idempotency by request_id: a repeated request gets the first one's result.

Rules of this file:

* A request is known by who sent it, which call it was and its request_id; other content under the
  same id is refused.
* A repetition that comes while the first runs waits for the first. A caller that goes away meanwhile
  leaves the call running: a repetition may be on its way.
* A call that failed is forgotten: the next try runs again.
* At most so many results are kept; the oldest ended ones are forgotten first.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from peermem.core.errors import InvalidField, RequestIdReused
from peermem.core.identity import Subject

T = TypeVar("T")

_MAX_ID = 128


@dataclass(slots=True)
class _Entry(Generic[T]):
    digest: bytes
    result: asyncio.Future[T]


class Once(Generic[T]):
    """Remembers the results of one kind of call."""

    def __init__(
        self,
        keep: int,
        replayed: Callable[[], None] = lambda: None,
        is_spent: Callable[[T], bool] = lambda result: False,
    ) -> None:
        """Keep `keep` results; `replayed` is called for each repetition. A result that `is_spent` meanwhile, because
        what it stands for failed, is forgotten."""
        self._keep = keep
        self._replayed = replayed
        self._is_spent = is_spent
        self._entries: OrderedDict[tuple[str, str], _Entry[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def run(self, subject: Subject, request_id: str, content: bytes, call: Callable[[], Awaitable[T]]) -> T:
        """Return the first result for this request, calling `call` if there is none.

        Raises RequestIdReused, InvalidField, and what `call` raises.
        """
        if not request_id:
            return await call()
        key, digest = (str(subject), request_id), _digest(content)
        known = self._known(key, digest)
        return await asyncio.shield(known if known is not None else self._first(key, digest, call))

    async def run_now(self, subject: Subject, request_id: str, content: bytes, call: Callable[[], T]) -> T:
        """Do as `run` where `call` waits for nothing."""
        if not request_id:
            return call()
        key, digest = (str(subject), request_id), _digest(content)
        known = self._known(key, digest)
        if known is not None:
            return await asyncio.shield(known)
        result = call()
        self._entries[key] = _Entry(digest, _done(result))
        self._tidy()
        return result

    def _known(self, key: tuple[str, str], digest: bytes) -> asyncio.Future[T] | None:
        """Return the result of this request if it came before. Raises RequestIdReused, InvalidField."""
        request_id = key[1]
        if len(request_id) > _MAX_ID:
            raise InvalidField(f"request_id has {len(request_id)} characters; at most {_MAX_ID}.", field="request_id")
        known = self._entries.get(key)
        if known is None or (known.result.done() and self._is_spent(known.result.result())):
            return None
        if known.digest != digest:
            raise RequestIdReused(
                f"request_id {request_id!r} was used for another request. Use a fresh one.", request_id=request_id
            )
        self._replayed()
        return known.result

    def _first(self, key: tuple[str, str], digest: bytes, call: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        result = asyncio.ensure_future(call())
        self._entries[key] = _Entry(digest, result)
        result.add_done_callback(lambda done: self._settled(key, done))
        return result

    def _settled(self, key: tuple[str, str], result: asyncio.Future[T]) -> None:
        failed = result.cancelled() or result.exception() is not None
        entry = self._entries.get(key)
        if entry is not None and entry.result is result:
            if failed:
                del self._entries[key]
            else:
                entry.result = _done(result.result())  # without the task, and all that it knew
        self._tidy()

    def _tidy(self) -> None:
        if len(self._entries) > self._keep:
            ended = (known for known, entry in self._entries.items() if entry.result.done())
            for oldest in list(islice(ended, len(self._entries) - self._keep)):
                del self._entries[oldest]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _done(result: T) -> asyncio.Future[T]:
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    done.set_result(result)
    return done
