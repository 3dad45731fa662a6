from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import grpc
import pytest

import peermem
from peermem import errors

from .daemon import Requests, Responses, ScriptedDaemon, event, succeed
from .test_transfer import DST, RUNNING, SRC, SUCCEEDED, hold


async def test_one_call_carries_all_transfers(tmp_path: Path) -> None:
    calls = []

    def count(requests: Requests, context: grpc.ServicerContext) -> Responses:
        calls.append(context)
        return succeed(requests, context)

    with ScriptedDaemon(tmp_path, count) as daemon:
        async with await peermem.aio.connect(daemon.target) as node:
            transfers = [await node.transfer(SRC, DST) for _ in range(100)]
            outcomes = await asyncio.gather(*(transfer.wait("10s") for transfer in transfers))
    assert {outcome.bytes_done for outcome in outcomes} == {100}
    assert len(calls) == 1


async def test_a_broken_call_is_taken_up_again(tmp_path: Path) -> None:
    seen = []

    def breaks(requests: Requests, context: grpc.ServicerContext) -> Responses:
        seen.append(next(requests))
        yield event(seen[0].tag, RUNNING, 10)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def works(requests: Requests, context: grpc.ServicerContext) -> Responses:
        seen.append(next(requests))
        yield event(seen[1].tag, SUCCEEDED, 100)
        yield from succeed(requests, context)

    with ScriptedDaemon(tmp_path, breaks, works) as daemon:
        async with await peermem.aio.connect(daemon.target) as node:
            assert (await (await node.transfer(SRC, DST)).wait("10s")).bytes_done == 100
            assert seen[0] == seen[1]
            assert (await (await node.transfer(SRC, DST)).wait("10s")).bytes_done == 100


async def test_a_call_that_ends_while_idle_is_opened_anew(tmp_path: Path) -> None:
    def once(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield event(next(requests).tag, SUCCEEDED, 100)

    with ScriptedDaemon(tmp_path, once) as daemon:
        async with await peermem.aio.connect(daemon.target) as node:
            for _ in range(5):
                assert (await (await node.transfer(SRC, DST)).wait("10s")).bytes_done == 100


async def test_progress_is_seen_without_waiting(tmp_path: Path) -> None:
    steps = threading.Semaphore(0)

    def slow(requests: Requests, context: grpc.ServicerContext) -> Responses:
        tag = next(requests).tag
        for done in (0, 50, 100):
            yield event(tag, SUCCEEDED if done == 100 else RUNNING, done)
            steps.acquire()

    with ScriptedDaemon(tmp_path, slow) as daemon:
        async with await peermem.aio.connect(daemon.target) as node:
            seen = []
            async for progress in await node.transfer(SRC, DST):
                seen.append(progress.bytes_done)
                steps.release()
    assert seen == [0, 50, 100]


async def test_a_wait_can_end_before_the_transfer(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, hold) as daemon:
        async with await peermem.aio.connect(daemon.target) as node:
            transfer = await node.transfer(SRC, DST)
            with pytest.raises(errors.Timeout, match="still runs"):
                await transfer.wait(0.01)
            assert (await transfer.cancel("10s")).state == "CANCELLED"
            assert transfer.ended


async def test_closing_the_node_ends_waits(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, hold) as daemon:
        node = await peermem.aio.connect(daemon.target)
        transfer = await node.transfer(SRC, DST)
        waiting = asyncio.create_task(transfer.wait())
        await anext(transfer.watch())
        await node.close()
        with pytest.raises(errors.NodeUnreachable, match="closed by this program"):
            await waiting
        with pytest.raises(errors.NodeUnreachable, match="closed by this program"):
            await node.info()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("peermem-")]


async def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.NodeUnreachable, match="start peermemd there"):
        await peermem.aio.connect(f"unix://{tmp_path}/none.sock")


async def test_a_lease_is_renewed_while_the_node_is_open(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, succeed) as daemon:
        daemon.lost.add("nodes/a/regions/x")
        async with await peermem.aio.connect(daemon.target) as node:
            await node.create_region(device="bar0", length=1, name="x", lease=0.03)
            await node.create_region(device="bar0", length=1, name="y", lease=0.03)
            while daemon.renewed[-3:] != [["nodes/a/regions/y"]] * 3:
                assert await asyncio.to_thread(daemon.renewal.acquire, timeout=10)


def test_both_clients_have_the_same_names() -> None:
    for kind, other in (
        (peermem.Node, peermem.aio.Node),
        (peermem.Region, peermem.aio.Region),
        (peermem.Transfer, peermem.aio.Transfer),
    ):
        names = {name for name in dir(kind) if not name.startswith("_")}
        assert names == {name for name in dir(other) if not name.startswith("_")}
