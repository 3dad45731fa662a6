from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

import peermem
from peermem import errors
from peermem.v1 import transfer_pb2

from .daemon import Requests, Responses, ScriptedDaemon, event, succeed

SRC = peermem.Slice("x", 0, 100)
DST = peermem.Slice("y", 0, 100)
RUNNING = transfer_pb2.TRANSFER_STATE_RUNNING
SUCCEEDED = transfer_pb2.TRANSFER_STATE_SUCCEEDED
CANCELLED = transfer_pb2.TRANSFER_STATE_CANCELLED


def hold(requests: Requests, context: grpc.ServicerContext) -> Responses:
    """Report each transfer as running, and end it when it is cancelled."""
    for request in requests:
        if request.WhichOneof("command") == "create":
            yield event(request.tag, RUNNING, 10)
        else:
            yield event(request.tag, CANCELLED, 10)


def test_one_call_carries_all_transfers(tmp_path: Path) -> None:
    calls = []

    def count(requests: Requests, context: grpc.ServicerContext) -> Responses:
        calls.append(context)
        return succeed(requests, context)

    with ScriptedDaemon(tmp_path, count) as daemon, peermem.connect(daemon.target) as node:
        transfers = [node.transfer(SRC, DST) for _ in range(100)]
        assert {transfer.wait("10s").bytes_done for transfer in transfers} == {100}
    assert len(calls) == 1


def test_many_threads_share_the_pipeline(tmp_path: Path) -> None:
    done: list[str] = []
    with ScriptedDaemon(tmp_path, succeed) as daemon, peermem.connect(daemon.target) as node:

        def work() -> None:
            done.extend(node.transfer(SRC, DST).wait("10s").state for _ in range(50))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(done) == 400


def test_a_broken_call_is_taken_up_again(tmp_path: Path) -> None:
    seen = []

    def breaks(requests: Requests, context: grpc.ServicerContext) -> Responses:
        seen.append(next(requests))
        yield event(seen[0].tag, RUNNING, 10)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def works(requests: Requests, context: grpc.ServicerContext) -> Responses:
        seen.append(next(requests))
        yield event(seen[1].tag, SUCCEEDED, 100)
        yield from succeed(requests, context)

    with ScriptedDaemon(tmp_path, breaks, works) as daemon, peermem.connect(daemon.target) as node:
        assert node.transfer(SRC, DST).wait("10s").bytes_done == 100
        assert seen[0] == seen[1]
        assert seen[0].create.request_id
        assert node.transfer(SRC, DST).wait("10s").bytes_done == 100


def test_a_call_that_ends_while_idle_is_opened_anew(tmp_path: Path) -> None:
    def once(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield event(next(requests).tag, SUCCEEDED, 100)

    with ScriptedDaemon(tmp_path, once) as daemon, peermem.connect(daemon.target) as node:
        for _ in range(5):
            assert node.transfer(SRC, DST).wait("10s").bytes_done == 100


def test_a_daemon_without_pipelines_is_told_apart_from_one_that_is_gone(tmp_path: Path) -> None:
    def refuse(requests: Requests, context: grpc.ServicerContext) -> Responses:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "no")
        yield from ()

    with (
        ScriptedDaemon(tmp_path, refuse) as daemon,
        peermem.connect(daemon.target) as node,
        pytest.raises(errors.NotSupported),
    ):
        node.transfer(SRC, DST).wait("10s")


def test_progress_is_seen_without_waiting(tmp_path: Path) -> None:
    steps = threading.Semaphore(0)

    def slow(requests: Requests, context: grpc.ServicerContext) -> Responses:
        tag = next(requests).tag
        for done in (0, 50, 100):
            yield event(tag, SUCCEEDED if done == 100 else RUNNING, done)
            steps.acquire()

    with ScriptedDaemon(tmp_path, slow) as daemon, peermem.connect(daemon.target) as node:
        transfer = node.transfer(SRC, DST)
        seen = []
        for progress in transfer:
            seen.append(progress.bytes_done)
            steps.release()
        assert seen == [0, 50, 100]
        assert (transfer.name, transfer.state, transfer.progress.fraction) == ("nodes/a/transfers/t1", "SUCCEEDED", 1.0)
        assert list(transfer.watch())[-1].bytes_done == 100


def test_a_wait_can_end_before_the_transfer(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, hold) as daemon, peermem.connect(daemon.target) as node:
        transfer = node.transfer(SRC, DST)
        next(transfer.watch())
        with pytest.raises(errors.Timeout, match="still runs") as caught:
            transfer.wait(0.01)
        assert caught.value.metadata["state"] == "RUNNING"
        assert not transfer.ended
        assert transfer.cancel("10s").state == "CANCELLED"


def test_cancel_waits_for_the_fence(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, hold) as daemon, peermem.connect(daemon.target) as node:
        transfer = node.transfer(SRC, DST)
        assert (transfer.cancel("10s").state, transfer.ended) == ("CANCELLED", True)
        assert transfer.cancel("10s").bytes_done == 10


def test_closing_the_node_ends_waits(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, hold) as daemon:
        node = peermem.connect(daemon.target)
        transfer = node.transfer(SRC, DST)
        next(transfer.watch())
        node.close()
        with pytest.raises(errors.NodeUnreachable, match="closed by this program"):
            transfer.wait("10s")
        for use in (node.info, lambda: node.transfer(SRC, DST)):
            with pytest.raises(errors.NodeUnreachable, match="closed by this program"):
                use()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("peermem-")]


def test_faults_of_the_request_are_raised_before_any_call(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, succeed) as daemon, peermem.connect(daemon.target) as node:
        with pytest.raises(errors.SegmentsMismatch):
            node.transfer(SRC, peermem.Slice("y", 0, 99))
        with pytest.raises(errors.InvalidField):
            node.transfer(SRC, DST, fabric="ether")


def test_columns_and_strided_ranges(tmp_path: Path) -> None:
    seen = []

    def look(requests: Requests, context: grpc.ServicerContext) -> Responses:
        for request in requests:
            seen.append(request.create)
            yield event(request.tag, SUCCEEDED, 100)

    strided = peermem.Strided("x", "y", length=1, count=5, source_stride=2, destination_stride=1)
    with ScriptedDaemon(tmp_path, look) as daemon, peermem.connect(daemon.target) as node:
        node.transfer(segments=[("x", [0], "y", [0], [1]), strided], checksum=True, timeout="5s", request_id="r").wait()
    assert [item.WhichOneof("layout") for item in seen[0].segments] == ["ranges", "strided"]
    assert (seen[0].checksum, seen[0].timeout.seconds, seen[0].request_id) == (True, 5, "r")
