"""What surrounds every gRPC call: its metrics, and its faults as statuses.

Rules of this file:

* Whoever may not even ask is refused before the handler sees the call.
* A handler raises PeermemError; here it becomes a status with ErrorInfo. Anything else is a defect: it
  is logged with an id, and the caller gets INTERNAL with that id and nothing of the inside.
* Every call is counted under its code, also one that the client broke off.
* Bytes that are no message are the caller's fault, not a defect: whoever looks at them raises MalformedMessage.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from peermem.api.status import to_grpc
from peermem.core import spans
from peermem.core.errors import Internal, MalformedMessage, PeermemError
from peermem.telemetry import audit
from peermem.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic in grpc's stubs only
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Admit: TypeAlias = Callable[[str, str, Context], Awaitable[None]]
"""Is given a call's service and method; raises PeermemError where the caller may not even ask."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handler of every call."""

    def __init__(self, metrics: Metrics, admit: Admit) -> None:
        self._metrics = metrics
        self._admit = admit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return handler
        _, service, method = handler_call_details.method.split("/", 2)
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        inner = getattr(handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: Handler = make(
            self._wrap(inner, service, method),
            request_deserializer=_decoder(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _wrap(self, inner: Callable[..., Any], service: str, method: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(inner):

            async def stream(request: object, context: Context) -> AsyncIterator[object]:
                async with self._guard(service, method, context):
                    _note(request, method, context)
                    async for response in inner(request, context):
                        yield response

            return stream

        async def call(request: object, context: Context) -> object:
            async with self._guard(service, method, context):
                _note(request, method, context)
                return await inner(request, context)
            raise AssertionError("the guard never swallows an error")

        return call

    @asynccontextmanager
    async def _guard(self, service: str, method: str, context: Context) -> AsyncIterator[None]:
        began = time.perf_counter()
        code = "OK"
        try:
            await self._admit(service, method, context)
            yield
        except PeermemError as error:
            code = error.code.name
            await context.abort_with_status(to_grpc(error))
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = getattr(context.code(), "name", "UNKNOWN")
            raise
        except Exception:
            code = "INTERNAL"
            error_id = secrets.token_hex(4)
            log.exception("call_defect", method=f"{service}/{method}", error_id=error_id)
            text = f"{method} met a defect of the daemon; its log has the details under error id {error_id}."
            await context.abort_with_status(to_grpc(Internal(text, error_id=error_id)))
        finally:
            self._metrics.grpc_handled(service, method, code, time.perf_counter() - began)


def traceparent_of(context: Context) -> str:
    """Return the traceparent that a call's metadata have; empty for none."""
    found = [value for key, value in context.invocation_metadata() or () if key == spans.HEADER]
    return spans.traceparent(found[0]) if len(found) == 1 and isinstance(found[0], str) else ""


def _note(request: object, method: str, context: Context) -> None:
    """Note for the audit log who calls, and with which request_id. Raises MalformedMessage."""
    audit.called(context.peer(), method, getattr(request, "request_id", ""))


class _Malformed:
    """What a handler gets in place of a message that could not be decoded."""

    def __getattr__(self, name: str) -> object:
        raise MalformedMessage("The request's bytes are no message of this call.")


def _decoder(decode: Callable[[bytes], object] | None) -> Callable[[bytes], object] | None:
    def decoded(data: bytes) -> object:
        assert decode is not None
        try:
            return decode(data)
        except DecodeError:
            return _Malformed()

    return decoded if decode is not None else None


_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
