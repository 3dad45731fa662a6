"""Transfers of an asyncio program, on one pipeline per node.

Rules of this file:

* The same as in `peermem.client.transfer`, with one task in the place of its thread.
* Nothing here is safe to call from another thread than the loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeAlias

import grpc

from peermem.client import errors, pipeline
from peermem.client.facts import Progress, TransferInfo
from peermem.client.requests import Time, seconds
from peermem.client.tls import Access
from peermem.core.errors import PeermemError
from peermem.v1 import transfer_pb2, transfer_pb2_grpc

Commands: TypeAlias = "asyncio.Queue[transfer_pb2.PipelineTransfersRequest | None]"
Call: TypeAlias = (
    "grpc.aio.StreamStreamCall[transfer_pb2.PipelineTransfersRequest, transfer_pb2.PipelineTransfersResponse]"
)


class Transfer(pipeline.Flight):
    """A transfer that was asked for. Its outcome is what `wait` returns or raises."""

    def __init__(self, owner: Pipeline, tag: int, request: transfer_pb2.CreateTransferRequest) -> None:
        super().__init__(tag, request)
        self._owner = owner
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Transfer {self.name or self.request.request_id} {self.state}>"

    async def wait(self, timeout: Time | None = None) -> TransferInfo:
        """Wait for the end and return its facts.

        Raises the reason where the transfer failed or was cancelled, with `bytes_done` in its
        metadata; Timeout where it still runs after `timeout`.
        """
        await self._until(lambda: self.ended, timeout)
        return self.outcome()

    async def watch(self) -> AsyncIterator[Progress]:
        """Iterate over the progress until the end; a slow reader misses steps, never the last one."""
        seen: transfer_pb2.Transfer | None = None
        ended = False
        while not ended:
            await self._until(partial(self.has_news, seen))
            ended, seen = self.ended, self._latest
            yield self.progress

    __aiter__ = watch

    async def cancel(self, timeout: Time | None = None) -> TransferInfo:
        """Cancel it and wait for the fence: afterwards no byte of it is written any more, anywhere.

        Returns the facts of the ended transfer, which may have succeeded before. Raises the reason
        where it was refused, NodeUnreachable where nobody can tell, and Timeout as `wait` does.
        """
        self._owner.cancel(self)
        await self._until(lambda: self.ended, timeout)
        return self.info()

    def changed(self) -> None:
        """Wake whoever waits, with a new event for the next news."""
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, condition: Callable[[], bool], timeout: Time | None = None) -> None:
        limit = seconds(timeout)
        try:
            async with asyncio.timeout(limit):
                while not condition():
                    await self._news.wait()
        except TimeoutError:
            raise self.still_running(limit or 0.0) from None


class Pipeline:
    """One PipelineTransfers call, opened when it is needed."""

    def __init__(
        self, stub: Callable[[], transfer_pb2_grpc.TransferServiceAsyncStub], access: Access, target: str
    ) -> None:
        """`stub` returns the one to make the next call on."""
        self._stub = stub
        self._access = access
        self._target = target
        self._closed = False
        self._ledger = pipeline.Ledger(partial(Transfer, self))
        self._commands: Commands = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None

    def start(self, request: transfer_pb2.CreateTransferRequest) -> Transfer:
        """Ask for a transfer; what the daemon makes of it is in the transfer's outcome."""
        if self._closed:
            raise errors.closed(self._target)
        transfer = self._ledger.add(request)
        if self._reader is None:
            self._reader = asyncio.create_task(self._run(self._open()), name="peermem-transfers")
        else:
            self._commands.put_nowait(pipeline.create(transfer))
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Ask for a transfer's end; nothing happens where it has ended."""
        transfer.cancelling = True
        if not transfer.ended:
            self._commands.put_nowait(pipeline.cancel(transfer))

    async def close(self) -> None:
        """End the call. Transfers that run go on, without anyone here to hear of them."""
        self._closed = True
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._ledger.fail(errors.closed(self._target))

    def _open(self) -> Call:
        """Open the call and send what is in flight."""
        self._commands.put_nowait(None)
        self._commands = asyncio.Queue()
        for command in self._ledger.commands():
            self._commands.put_nowait(command)
        return self._stub().PipelineTransfers(_drain(self._commands), metadata=self._access.metadata())

    async def _run(self, call: Call) -> None:
        """Read the call, and open it again after each break while transfers are in flight."""
        try:
            while (delay := self._ledger.broken(await self._read(call))) is not None:
                await asyncio.sleep(delay)
                call = self._open()
            self._reader = None
        finally:
            self._commands.put_nowait(None)
            call.cancel()

    async def _read(self, call: Call) -> PeermemError:
        """Hand out the call's events until it ends, and return why it ended."""
        try:
            async for response in call:
                self._ledger.handle(response)
        except grpc.aio.AioRpcError as error:
            return errors.from_call(error, self._target)
        return errors.unreachable(self._target, "it ended the call")


async def _drain(commands: Commands) -> AsyncIterator[transfer_pb2.PipelineTransfersRequest]:
    while (command := await commands.get()) is not None:
        yield command
