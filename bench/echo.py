"""A bare gRPC echo: what no call to a daemon can be faster than.

`python -m bench.echo SOCKET` serves it with grpc.aio, as the daemon does, without anything else: one unary
and one streaming method on bytes. The measurements use gRPC's synchronous client, as peermem.connect does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import grpc

from bench import processes
from bench.figures import Measured, Sample, Shape, sample

ECHO = Shape(192)
"""About the bytes of a request for a transfer."""
_SERVICE = "bench.Echo"
_WARM_UP = 50


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run an echo server in a process of its own; yield its target."""
    socket = folder / "echo.sock"
    with processes.module("bench.echo", str(socket)) as process:
        processes.line(process)
        yield f"unix://{socket}"


def unary(target: str, iterations: int) -> Measured:
    """Measure single calls."""
    with grpc.insecure_channel(target) as channel:
        call: Callable[..., bytes] = channel.unary_unary(f"/{_SERVICE}/Unary")
        return {ECHO: _timed(lambda: call(bytes(ECHO.size), timeout=10), iterations)}


def stream(target: str, iterations: int) -> Measured:
    """Measure messages on an open stream, one after the other."""
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    with grpc.insecure_channel(target) as channel:
        call: Callable[..., Iterator[bytes]] = channel.stream_stream(f"/{_SERVICE}/Stream")
        responses = call(iter(requests.get, None), timeout=60)

        def once() -> bytes:
            requests.put(bytes(ECHO.size))
            return next(responses)

        measured = {ECHO: _timed(once, iterations)}
        requests.put(None)
        assert next(responses, None) is None
        return measured


def _timed(once: Callable[[], bytes], iterations: int) -> Sample:
    times = []
    for _ in range(_WARM_UP + iterations):
        began = perf_counter()
        once()
        times.append(perf_counter() - began)
    return sample(ECHO.size, times[_WARM_UP:])


async def _serve(socket: str) -> None:
    async def unary(request: bytes, _: object) -> bytes:
        return request

    async def stream(_: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
