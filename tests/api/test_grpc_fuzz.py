"""Any message on any call of the contract: an answer in time, for a reason of the contract, and never a defect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from peermem import errors
from peermem.app import App
from peermem.client.errors import from_call
from peermem.v1 import link_pb2, node_pb2, region_pb2, transfer_pb2
from tests.fuzzing import fuzz, tried
from tests.test_app import config

METHODS: Sequence[MethodDescriptor] = [
    method
    for module in (node_pb2, region_pb2, transfer_pb2, link_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
PATIENCE = 10.0
OURS = {fault.code.name for fault in errors.PeermemError.by_reason.values()} - {"INTERNAL", "UNKNOWN"}

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
_EDGES = {
    FieldDescriptor.CPPTYPE_INT32: [0, 1, -1, 1 << 30, -(1 << 31), (1 << 31) - 1],
    FieldDescriptor.CPPTYPE_INT64: [0, 1, -1, 1 << 40, -(1 << 63), (1 << 63) - 1],
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 2, 16, 17, 4096, U32],
    FieldDescriptor.CPPTYPE_UINT64: [0, 1, 4096, 1 << 20, 1 << 63, U64],
}
_TEXTS = st.one_of(
    st.sampled_from(
        [
            *("", "nodes/a", "nodes/a/regions/r", "nodes/a/regions/s", "nodes/b/regions/r", "nodes/a/transfers/t"),
            *(
                "bar0",
                "adopted",
                "/etc/passwd",
                "/",
                "../x",
                "anonymous",
                "uid:0",
                "uid:0@b",
                "nodes/",
                "\0",
                "x" * 5000,
            ),
        ]
    ),
    st.text(max_size=20),
)


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of one field, many of them at the edges."""
    kind = field.cpp_type
    if kind in _EDGES:
        edges = _EDGES[kind]
        return st.one_of(st.sampled_from(edges), st.integers(min(edges), max(edges)))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-1, 9)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return _TEXTS if field.type == FieldDescriptor.TYPE_STRING else st.binary(max_size=40)
    assert field.message_type is not None
    return messages(field.message_type)


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor) -> Message:
    """Messages with any of their fields."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.integers(0, 3)) == 0:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(_TEXTS, _TEXTS, max_size=3)))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalars(field), max_size=3)))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(scalars(field)))
        else:
            setattr(message, field.name, draw(scalars(field)))
    return message


def _wrote_to_an_ended_call(error: grpc.aio.AioRpcError) -> bool:
    """Whether a write met the end of its call: gRPC for Python then says INTERNAL of its own, and loses the answer."""
    return error.code() is grpc.StatusCode.INTERNAL and "SendMessageOperation" in (error.debug_error_string() or "")


@dataclass
class Door:
    """A daemon in this process, and bytes into it."""

    runner: asyncio.Runner
    app: App
    channel: grpc.aio.Channel

    def ask(self, method: MethodDescriptor, requests: Sequence[bytes]) -> None:
        """Call, and see how it ends."""
        self.runner.run(self._ask(method, requests))

    async def _ask(self, method: MethodDescriptor, requests: Sequence[bytes]) -> None:
        path = f"/{method.containing_service.full_name}/{method.name}"
        error: grpc.aio.AioRpcError | None = None
        try:
            await self._call(path, method, requests)
        except grpc.aio.AioRpcError as caught:
            error = caught
        if error is not None and not _wrote_to_an_ended_call(error):
            fault = from_call(error, "the daemon")
            assert error.code().name in OURS, f"{method.name}: {error.code()} {error.details()}"
            assert not isinstance(fault, errors.Timeout), f"{method.name} did not answer"
            assert fault.message

    async def _call(self, path: str, method: MethodDescriptor, requests: Sequence[bytes]) -> None:
        raw: Any = self.channel  # without message classes, bytes go as they are
        if method.client_streaming and method.server_streaming:
            async for _ in raw.stream_stream(path)(_each(requests), timeout=PATIENCE):
                pass
        elif method.client_streaming:
            await raw.stream_unary(path)(_each(requests), timeout=PATIENCE)
        elif method.server_streaming:
            async for _ in raw.unary_stream(path)(requests[0], timeout=PATIENCE):
                pass
        else:
            await raw.unary_unary(path)(requests[0], timeout=PATIENCE)


async def _each(requests: Sequence[bytes]) -> AsyncIterator[bytes]:
    for request in requests:
        yield request


async def _opened(folder: Path) -> tuple[App, grpc.aio.Channel]:
    app = App(config(folder))
    await app.start()
    return app, grpc.aio.insecure_channel(f"unix:{folder}/peermem.sock")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A daemon with a region, which has met no defect at the end."""
    with asyncio.Runner() as runner:
        app, channel = runner.run(_opened(tmp_path_factory.mktemp("fuzzed")))
        door = Door(runner, app, channel)
        region = region_pb2.CreateRegionRequest(region_id="r", device="bar0", length=8192)
        create = next(method for method in METHODS if method.name == "CreateRegion")
        door.ask(create, [region.SerializeToString()])
        yield door
        page = app.metrics.render()[0].decode()
        runner.run(channel.close())
        runner.run(app.stop())
        assert not [line for line in page.splitlines() if 'grpc_code="INTERNAL"' in line and not line.endswith(" 0.0")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@fuzz(25)
@given(data=st.data())
def test_any_message_is_answered(door: Door, method: MethodDescriptor, data: st.DataObject) -> None:
    requests = data.draw(
        st.lists(messages(method.input_type), min_size=1, max_size=3 if method.client_streaming else 1)
    )
    for _ in requests:
        tried("gRPC messages")
    door.ask(method, [request.SerializeToString() for request in requests])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@fuzz(10)
@given(data=st.data())
def test_any_bytes_are_answered(door: Door, method: MethodDescriptor, data: st.DataObject) -> None:
    whole = data.draw(messages(method.input_type)).SerializeToString()
    changed = bytearray(whole + data.draw(st.binary(max_size=20)))
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4)):
        if changed:
            changed[position % len(changed)] = value
    tried("gRPC bytes")
    door.ask(method, [bytes(changed)])
