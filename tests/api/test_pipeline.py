"""The pipeline of transfers, as a program that makes mistakes uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from peermem import errors
from peermem.app import App
from peermem.client.errors import from_call
from peermem.v1 import transfer_pb2, transfer_pb2_grpc
from tests.test_app import config

Command = transfer_pb2.PipelineTransfersRequest


@pytest.fixture
async def transfers(tmp_path: Path) -> AsyncIterator[transfer_pb2_grpc.TransferServiceAsyncStub]:
    app = App(config(tmp_path))
    await app.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/peermem.sock") as channel:
        yield transfer_pb2_grpc.TransferServiceStub(channel)
    await app.stop()


@pytest.mark.parametrize("answers", [1, 8])
async def test_a_mistake_is_told_also_while_an_answer_is_being_written(
    transfers: transfer_pb2_grpc.TransferServiceAsyncStub, answers: int
) -> None:
    """A status that met a message on its way was never sent, and the caller waited for ever."""
    refused = [Command(tag=tag, create=transfer_pb2.CreateTransferRequest()) for tag in range(answers)]
    for _ in range(10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in transfers.PipelineTransfers(iter([*refused, Command()]), timeout=10):
                pass
        assert isinstance(from_call(caught.value, "the daemon"), errors.InvalidField)
