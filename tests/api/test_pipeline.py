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
async def app(tmp_path: Path) -> AsyncIterator[App]:
    app = App(config(tmp_path))
    await app.start()
    yield app
    await app.stop()


@pytest.fixture
async def transfers(app: App, tmp_path: Path) -> AsyncIterator[transfer_pb2_grpc.TransferServiceAsyncStub]:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/peermem.sock") as channel:
        yield transfer_pb2_grpc.TransferServiceStub(channel)


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


async def test_transfers_that_are_not_begun_are_counted_by_reason(
    transfers: transfer_pb2_grpc.TransferServiceAsyncStub, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = transfer_pb2.CreateTransferRequest()
    ranges = transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0], lengths=[1])
    segment = transfer_pb2.SegmentList(source="nodes/a/regions/x", destination="nodes/a/regions/y", ranges=ranges)
    good = transfer_pb2.CreateTransferRequest(segments=[segment])

    def defect(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    async def asked(request: transfer_pb2.CreateTransferRequest) -> str:
        answers = [
            answer async for answer in transfers.PipelineTransfers(iter([Command(tag=1, create=request)]), timeout=10)
        ]
        return answers[-1].error.reason

    def counted(reason: str) -> float:
        body, _ = app.metrics.render("")
        start = "peermem_transfer_refusals_total{"
        return sum(
            float(line.rpartition(" ")[2])
            for line in body.decode().splitlines()
            if line.startswith(start) and f'reason="{reason}"' in line
        )

    assert await asked(bad) == "INVALID_FIELD"
    assert await asked(good) == "REGION_NOT_FOUND"
    monkeypatch.setattr("peermem.broker.broker.Broker.start_transfer", defect)
    assert await asked(good) == "INTERNAL"
    reasons = "INVALID_FIELD", "REGION_NOT_FOUND", "INTERNAL", "ACCESS_DENIED"
    assert [counted(reason) for reason in reasons] == [1, 1, 1, 0]
