"""What happens to transfers, memory and descriptors when somebody cancels, stops or dies in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from bench.daemons import Daemon, daemons

import peermem
from peermem import errors
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, eventually, holdings, moving

BIG = 384 * MIB
STALL, GRANT, RETRY = 0.5, 2.0, 0.2
BOUND = STALL + GRANT + RETRY + 4.0
"""Seconds until a remote node that stands still is given up, fence and slack of clocks included."""
ENVIRON = {
    "PEERMEM_TCP_STALL_TIMEOUT": "500ms",
    "PEERMEM_TRANSFER_GRANT_TTL": "2s",
    "PEERMEM_TRANSFER_RETRY_FOR": "200ms",
    "PEERMEM_SHUTDOWN_GRACE": "1s",
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    with daemons(tmp_path_factory.mktemp("failures"), ("a", "b", "c"), DEVICE, ENVIRON) as nodes:
        yield nodes
        for daemon in nodes.values():
            assert daemon.stop() == 0
            check_log(daemon)


@pytest.fixture
def a(nodes: dict[str, Daemon]) -> Iterator[peermem.Node]:
    with peermem.connect(nodes["a"].target) as node:
        yield node


@pytest.fixture
def b(nodes: dict[str, Daemon]) -> Iterator[peermem.Node]:
    with peermem.connect(nodes["b"].target) as node:
        yield node


def cancelled(transfer: peermem.Transfer, _: peermem.Region, __: peermem.Region) -> None:
    assert transfer.cancel("30s").state == "CANCELLED"


def timed_out(transfer: peermem.Transfer, _: peermem.Region, __: peermem.Region) -> None:
    with pytest.raises(errors.Timeout):
        transfer.wait("30s")


def source_deleted(transfer: peermem.Transfer, source: peermem.Region, _: peermem.Region) -> None:
    source.delete(force=True)
    with pytest.raises(errors.RegionDeleted):
        transfer.wait("30s")


@pytest.mark.parametrize("end", [cancelled, timed_out, source_deleted])
@pytest.mark.parametrize("runner", ["a", "b", "c"])
def test_no_byte_is_written_after_the_answer(
    nodes: dict[str, Daemon],
    a: peermem.Node,
    b: peermem.Node,
    runner: str,
    end: Callable[[peermem.Transfer, peermem.Region, peermem.Region], None],
) -> None:
    with (
        peermem.connect(nodes[runner].target) as node,
        a.create_region(device="bar0", length=BIG) as source,
        b.create_region(device="bar0", length=BIG) as sink,
    ):
        view = numpy.frombuffer(sink.map(), dtype=numpy.uint8)
        transfer = node.transfer(source, sink, timeout=0.08 if end is timed_out else None)
        if end is not timed_out:
            moving(transfer)
        end(transfer, source, sink)
        view[:] = 0xEE
        if end is not source_deleted:
            node.transfer(source[0:4096], sink[0:4096]).wait("30s")  # behind whatever was on its way
            view[:4096] = 0xEE
        assert b.info().grant_count >= 0  # a turn of the daemon that owns the memory
        assert view.min() == view.max() == 0xEE
        assert transfer.progress.bytes_done < BIG
        del view


def test_a_destination_deleted_in_the_middle(nodes: dict[str, Daemon], a: peermem.Node, b: peermem.Node) -> None:
    with a.create_region(device="bar0", length=BIG) as source:
        sink = b.create_region(device="bar0", length=BIG)
        view = numpy.frombuffer(sink.map(), dtype=numpy.uint8)
        transfer = a.transfer(source, sink)
        moving(transfer)
        sink.delete()
        view[:] = 0xEE
        with pytest.raises(errors.RegionDeleted):
            transfer.wait("30s")
        assert view.min() == 0xEE
        assert next(device for device in b.devices() if device.name == "bar0").region_count == 0


def test_a_region_in_use_is_deleted_only_by_force(a: peermem.Node, b: peermem.Node) -> None:
    with a.create_region(device="bar0", length=BIG) as source, b.create_region(device="bar0", length=BIG) as sink:
        transfer = a.transfer(source, sink)
        moving(transfer)
        with pytest.raises(errors.RegionInUse):
            source.delete()
        transfer.cancel("30s")


@pytest.mark.parametrize("pull", [False, True])
def test_a_remote_node_that_stands_still_is_fenced_out(
    nodes: dict[str, Daemon], a: peermem.Node, b: peermem.Node, pull: bool
) -> None:
    here, there = (a.create_region(device="bar0", length=BIG), b.create_region(device="bar0", length=BIG))
    source, sink = (there, here) if pull else (here, there)
    view = numpy.frombuffer(sink.map(), dtype=numpy.uint8)
    transfer = a.transfer(source, sink)
    moving(transfer)
    os.kill(nodes["b"].pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(errors.NodeUnreachable) as caught:
            transfer.wait("30s")
        assert time.monotonic() - began < BOUND
        assert "nothing moved for" in caught.value.message
        assert 0 < int(caught.value.metadata["bytes_done"]) < BIG
        view[:] = 0xEE
    finally:
        os.kill(nodes["b"].pid, signal.SIGCONT)
    assert a.transfer(source[0:4096], sink[0:4096]).wait("30s").state == "SUCCEEDED"
    view[:4096] = 0xEE
    assert view.min() == view.max() == 0xEE
    del view
    here.delete()
    there.delete()


def test_a_remote_node_that_dies_and_comes_back(nodes: dict[str, Daemon], a: peermem.Node, b: peermem.Node) -> None:
    with a.create_region(device="bar0", length=BIG) as here, peermem.connect(nodes["c"].target) as c:
        there = b.create_region(device="bar0", length=BIG)
        transfer = a.transfer(here, there)
        moving(transfer)
        nodes["b"].kill()
        with pytest.raises(errors.NodeUnreachable) as caught:
            transfer.wait("30s")
        assert 0 < int(caught.value.metadata["bytes_done"]) < BIG
        with pytest.raises(errors.NodeUnreachable):
            a.transfer(here[0:1], peermem.Slice(there.name, 0, 1)).wait("30s")
        nodes["b"].start()
        nodes["b"].ready()
        with peermem.connect(nodes["b"].target) as again, again.create_region(device="bar0", length=4096) as sink:
            here.write(b"after the restart")
            for node in (a, c, again):
                sink.write(bytes(4096))
                assert node.transfer(here[0:4096], sink, checksum=True).wait("30s").state == "SUCCEEDED"
                assert sink.read(0, 17) == b"after the restart"
            with pytest.raises(errors.RegionNotFound):
                a.transfer(here[0:1], peermem.Slice(there.name, 0, 1)).wait("30s")


def test_the_node_that_runs_a_relayed_transfer_is_restarted(
    nodes: dict[str, Daemon], a: peermem.Node, b: peermem.Node
) -> None:
    with a.create_region(device="bar0", length=BIG) as here, peermem.connect(nodes["c"].target) as c:
        transfer = c.transfer(b.create_region(device="bar0", length=BIG), here)
        moving(transfer)
        nodes["b"].kill()
        nodes["b"].start()
        with pytest.raises(errors.NodeUnreachable) as caught:
            transfer.wait("30s")
        assert "restarted" in caught.value.message
        assert 0 < int(caught.value.metadata["bytes_done"]) < BIG
        nodes["b"].ready()


_JOB = """
import os, sys
import peermem
with peermem.connect(sys.argv[1]) as a, peermem.connect(sys.argv[2]) as b:
    x = a.create_region(device="bar0", length="128MiB")
    y = b.create_region(device="bar0", length="128MiB")
    view = x.map()
    fd = os.memfd_create("job", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 1 << 20)
    adopted = a.adopt(fd)
    a.transfer(x, y).wait("30s")
    a.transfer(adopted, y[0:1 << 20]).wait("30s")
    b.transfer(x, y)
    forever = a.transfer(x, y)
    print("busy", flush=True)
    sys.stdin.read()
"""


def test_a_job_that_is_killed_leaves_nothing_behind(nodes: dict[str, Daemon], a: peermem.Node, b: peermem.Node) -> None:
    pairs = [(nodes["a"], a), (nodes["b"], b)]
    eventually(lambda: a.info().grant_count == b.info().grant_count == 0, "the end of earlier grants")
    before = [holdings(daemon, node) for daemon, node in pairs]
    arguments = [sys.executable, "-c", _JOB, nodes["a"].target, nodes["b"].target]
    source = str(Path(peermem.__file__).parents[1])
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source}
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"busy\n"
        assert a.info().region_count == 2
        job.kill()
    eventually(lambda: [holdings(daemon, node) for daemon, node in pairs] == before, "the end of what the job held")


def test_links_that_died_leave_no_descriptors(nodes: dict[str, Daemon], a: peermem.Node, b: peermem.Node) -> None:
    def sockets() -> int:
        folder = Path(f"/proc/{nodes['a'].pid}/fd")
        return sum(1 for entry in folder.iterdir() if entry.is_socket())

    with a.create_region(device="bar0", length=4096) as x:
        before = None
        for _ in range(3):
            with (
                peermem.connect(nodes["b"].target) as node,
                node.create_region(device="bar0", length=4096) as y,
            ):
                assert a.transfer(x, y).wait("30s").state == "SUCCEEDED"
            before = sockets() if before is None else before
            nodes["b"].kill()
            eventually(lambda: a.info().link_count == 0, "the end of the link")
            nodes["b"].start()
            nodes["b"].ready()
        assert before is not None
        assert sockets() <= before
