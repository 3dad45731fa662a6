"""Transfers of a synchronous program, on one pipeline per node.

Rules of this file:

* One call carries all transfers of a node object; it is opened by the first and again after a break.
* One thread reads the call and hands news to whoever waits, so progress is fresh without anyone waiting.
* Each opening has a queue of its own: what gRPC still takes from the old one is lost on purpose, because
  every flight of the ledger is sent again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Protocol, TypeAlias

import grpc

from peermem.client import errors, pipeline
from peermem.client.facts import Progress, TransferInfo
from peermem.client.requests import Time, seconds
from peermem.client.tls import Access
from peermem.core.errors import PeermemError
from peermem.v1 import transfer_pb2, transfer_pb2_grpc

Commands: TypeAlias = "SimpleQueue[transfer_pb2.PipelineTransfersRequest | None]"


class Call(Protocol):
    """An open PipelineTransfers call."""

    def __iter__(self) -> Iterator[transfer_pb2.PipelineTransfersResponse]: ...

    def cancel(self) -> bool:
        """End the call."""


class Transfer(pipeline.Flight):
    """A transfer that was asked for. Its outcome is what `wait` returns or raises."""

    def __init__(self, owner: Pipeline, tag: int, request: transfer_pb2.CreateTransferRequest) -> None:
        super().__init__(tag, request)
        self._owner = owner
        self._news = threading.Condition(threading.Lock())

    def __repr__(self) -> str:
        return f"<Transfer {self.name or self.request.request_id} {self.state}>"

    def wait(self, timeout: Time | None = None) -> TransferInfo:
        """Wait for the end and return its facts.

        Raises the reason where the transfer failed or was cancelled, with `bytes_done` in its
        metadata; Timeout where it still runs after `timeout`.
        """
        self._until(lambda: self._ended, timeout)
        return self.outcome()

    def watch(self) -> Iterator[Progress]:
        """Iterate over the progress until the end; a slow reader misses steps, never the last one."""
        seen: transfer_pb2.Transfer | None = None
        ended = False
        while not ended:
            self._until(partial(self.has_news, seen))
            ended, seen = self._ended, self._latest
            yield self.progress

    __iter__ = watch

    def cancel(self, timeout: Time | None = None) -> TransferInfo:
        """Cancel it and wait for the fence: afterwards no byte of it is written any more, anywhere.

        Returns the facts of the ended transfer, which may have succeeded before. Raises the reason
        where it was refused, NodeUnreachable where nobody can tell, and Timeout as `wait` does.
        """
        self._owner.cancel(self)
        self._until(lambda: self._ended, timeout)
        return self.info()

    def changed(self) -> None:
        """Wake whoever waits."""
        with self._news:
            self._news.notify_all()

    def _until(self, condition: Callable[[], bool], timeout: Time | None = None) -> None:
        limit = seconds(timeout)
        with self._news:
            if not self._news.wait_for(condition, limit):
                raise self.still_running(limit or 0.0)


class Pipeline:
    """One PipelineTransfers call, opened when it is needed."""

    def __init__(self, stub: Callable[[], transfer_pb2_grpc.TransferServiceStub], access: Access, target: str) -> None:
        """`stub` returns the one to make the next call on."""
        self._stub = stub
        self._access = access
        self._target = target
        self._lock = threading.Condition()
        self._closed = False
        self._ledger = pipeline.Ledger(partial(Transfer, self))
        self._commands: Commands = SimpleQueue()
        self._call: Call | None = None
        self._reader: threading.Thread | None = None

    def start(self, request: transfer_pb2.CreateTransferRequest) -> Transfer:
        """Ask for a transfer; what the daemon makes of it is in the transfer's outcome."""
        with self._lock:
            if self._closed:
                raise errors.closed(self._target)
            transfer = self._ledger.add(request)
            if self._reader is None:
                call = self._open()
                self._reader = threading.Thread(target=self._run, args=(call,), name="peermem-transfers", daemon=True)
                self._reader.start()
            else:
                self._commands.put(pipeline.create(transfer))
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Ask for a transfer's end; nothing happens where it has ended."""
        with self._lock:
            transfer.cancelling = True
            if not transfer.ended:
                self._commands.put(pipeline.cancel(transfer))

    def close(self) -> None:
        """End the call. Transfers that run go on, without anyone here to hear of them."""
        with self._lock:
            self._closed = True
            reader, call = self._reader, self._call
            self._commands.put(None)
            self._lock.notify_all()
        if call is not None:
            call.cancel()
        if reader is not None:
            reader.join()

    def _open(self) -> Call:
        """Open the call and send what is in flight; the lock is held."""
        self._commands.put(None)
        self._commands = SimpleQueue()
        for command in self._ledger.commands():
            self._commands.put(command)
        self._call = self._stub().PipelineTransfers(iter(self._commands.get, None), metadata=self._access.metadata())
        return self._call

    def _run(self, call: Call | None) -> None:
        """Read the call, and open it again after each break while transfers are in flight."""
        while call is not None:
            fault = self._read(call)
            with self._lock:
                delay = None if self._closed else self._ledger.broken(fault)
                if delay is not None:
                    self._lock.wait_for(lambda: self._closed, delay)
                if self._closed:
                    self._ledger.fail(errors.closed(self._target))
                if self._closed or delay is None:
                    self._reader = self._call = call = None
                    self._commands.put(None)
                else:
                    call = self._open()

    def _read(self, call: Call) -> PeermemError:
        """Hand out the call's events until it ends, and return why it ended."""
        try:
            for response in call:
                self._ledger.handle(response)
        except grpc.RpcError as error:
            return errors.from_call(error, self._target)  # type: ignore[arg-type]
        return errors.unreachable(self._target, "it ended the call")
