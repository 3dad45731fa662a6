"""The client against real daemons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timedelta

import numpy
import pytest

import peermem
from peermem import errors

from .processes import Cluster, eventually


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), "a", "b") as cluster:
        yield cluster


@pytest.fixture
def a(cluster: Cluster) -> Iterator[peermem.Node]:
    with peermem.connect(cluster.target("a")) as node:
        yield node


@pytest.fixture
def b(cluster: Cluster) -> Iterator[peermem.Node]:
    with peermem.connect(cluster.target("b")) as node:
        yield node


def test_what_a_node_tells(a: peermem.Node) -> None:
    assert (a.name, a.info().name) == ("nodes/a", "nodes/a")
    assert [node.name for node in a.nodes()] == ["nodes/a", "nodes/b"]
    assert {device.name: device.size for device in a.devices()}["bar0"] == 1 << 30
    assert a.nics() == []
    assert a.info("nodes/b").name == "nodes/b"
    assert [verdict.check for verdict in a.preflight("bar0")][:2] == ["kernel", "lockdown"]


def test_a_mapped_region_is_written_by_numpy_and_read_by_a_remote_node(a: peermem.Node, b: peermem.Node) -> None:
    with a.create_region(device="bar0", length="1MiB") as source, b.create_region(device="bar0", length="1MiB") as sink:
        view = numpy.frombuffer(source.map(), dtype=numpy.uint32)
        view[:] = numpy.arange(len(view), dtype=numpy.uint32)
        outcome = a.transfer(source, sink, checksum=True).wait("30s")
        assert (outcome.state, outcome.bytes_done, outcome.direction) == ("SUCCEEDED", 1 << 20, "PUSH")
        assert outcome.fabric is peermem.FabricKind.TCP
        assert outcome.crc32c is not None
        assert outcome.bandwidth
        assert bytes(sink.map()) == view.tobytes()
        assert sink.read(4, 8) == view[1:3].tobytes()


def test_slices_lists_and_columns(a: peermem.Node) -> None:
    with a.create_region(device="bar0", length=64) as x, a.create_region(device="bar0", length=64) as y:
        x.write(bytes(range(64)))
        a.transfer(x[-4:], y[:4]).wait("30s")
        a.transfer([x[0:2], x[8:14]], [y[4:8], y[8:12]]).wait("30s")
        a.transfer(segments=[(x, numpy.array([32, 40]), y, [60, 50], 2)]).wait("30s")
        assert y.read(0, 12) == bytes([60, 61, 62, 63, 0, 1, 8, 9, 10, 11, 12, 13])
        assert (y.read(60, 2), y.read(50, 2)) == (bytes([32, 33]), bytes([40, 41]))


def test_ten_thousand_segments(a: peermem.Node, b: peermem.Node) -> None:
    count, size = 10_000, 64
    with (
        a.create_region(device="bar0", length=count * size * 2) as x,
        b.create_region(device="bar0", length=count * size) as y,
    ):
        x.map()[:] = os.urandom(x.length)
        outcome = a.transfer([x[i : i + size] for i in range(0, x.length, 2 * size)], y).wait("60s")
        assert outcome.segment_count == count
        expected = numpy.frombuffer(x.map(), dtype=numpy.uint8).reshape(count, 2, size)[:, 0, :].tobytes()
        assert bytes(y.map()) == expected


def test_any_node_takes_a_transfer_between_others(cluster: Cluster, a: peermem.Node, b: peermem.Node) -> None:
    with b.create_region(device="bar0", length=4096) as x, b.create_region(device="bar0", length=4096) as y:
        x.write(b"third party")
        assert a.transfer(x, y).wait("30s").direction == "RELAYED"
        assert y.read(0, 11) == b"third party"


def test_a_memory_file_of_a_job_becomes_a_region(a: peermem.Node) -> None:
    fd = os.memfd_create("job", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, 8192)
        with a.adopt(fd) as region:
            region.write(b"seen by the job", 4096)
            assert os.pread(fd, 15, 4096) == b"seen by the job"
            assert (region.length, region.device) == (8192, "adopted")
    finally:
        os.close(fd)


def test_a_region_of_a_session_ends_with_it(cluster: Cluster, b: peermem.Node) -> None:
    with peermem.connect(cluster.target("b")) as job:
        held = job.create_region(device="bar0", length=4096)
        kept = job.create_region(device="bar0", length=4096, lease="none")
        assert held.lease.kind is peermem.LeaseKind.SESSION
    eventually(lambda: held.name not in {region.name for region in b.regions()})
    b.delete_region(kept.name)


def test_a_lease_is_renewed_past_its_time(a: peermem.Node) -> None:
    region = a.create_region(device="bar0", length=4096, lease="1s")
    first = region.lease.expire_time
    assert first is not None
    eventually(lambda: _expiry(region) - first > timedelta(seconds=1))
    assert region.renew().expire_time
    region.delete()


def _expiry(region: peermem.Region) -> datetime:
    expires = region.refresh().lease.expire_time
    assert expires is not None
    return expires


def test_regions_are_listed_over_pages_and_by_label(a: peermem.Node) -> None:
    names = {a.create_region(device="bar0", length=1, labels={"page": "x"}).name for _ in range(1003)}
    plain = a.create_region(device="bar0", length=1)
    found = list(a.regions(labels={"page": "x"}))
    assert {region.name for region in found} == names
    assert len(found) == 1003
    assert found[0].labels == {"page": "x"}
    plain.delete()


def test_published_regions_are_found_by_label(a: peermem.Node) -> None:
    labels = {"run": "published"}
    with (
        a.create_region(device="bar0", length=64, name="pub-0", labels=labels, publish=True) as first,
        a.create_region(device="bar0", length=64, name="pub-1", labels=labels | {"x": "y"}, publish=True),
        a.create_region(device="bar0", length=64, name="pub-2", labels=labels) as quiet,
    ):
        assert (first.published, quiet.published) == (True, False)
        found = list(a.find_regions(labels))
        assert [each.name for each in found] == ["nodes/a/regions/pub-0", "nodes/a/regions/pub-1"]
        assert (found[0].length, found[0].device_kind, found[0].path) == (64, "memfd", peermem.Path.HOST)
        assert [each.labels for each in a.find_regions({"x": "y"})] == [labels | {"x": "y"}]
        a.transfer(found[0].name, found[1].name).wait("30s")
    assert list(a.find_regions()) == []


def test_a_cancelled_transfer_says_how_far_it_came(a: peermem.Node, b: peermem.Node) -> None:
    with (
        a.create_region(device="bar0", length="256MiB") as x,
        b.create_region(device="bar0", length="256MiB") as y,
    ):
        transfer = a.transfer(x, y, timeout="60s")
        outcome = transfer.cancel("60s")
        assert outcome.state in ("CANCELLED", "SUCCEEDED")
        if outcome.state == "CANCELLED":
            with pytest.raises(errors.TransferCancelled) as caught:
                transfer.wait()
            assert int(caught.value.metadata["bytes_done"]) < x.length
        assert not list(a.transfers(running=True))
        assert a.get_transfer(transfer.name).state == outcome.state
        assert a.cancel_transfer(transfer.name).state == outcome.state


def test_faults_of_the_daemon_arrive_typed(a: peermem.Node) -> None:
    with a.create_region(device="bar0", length=4096, name="typed", request_id="one") as x:
        with pytest.raises(errors.RegionExists):
            a.create_region(device="bar0", length=4096, name="typed")
        with pytest.raises(errors.RequestIdReused):
            a.create_region(device="bar0", length=8192, name="typed", request_id="one")
        assert a.create_region(device="bar0", length=4096, name="typed", request_id="one").name == x.name
        with pytest.raises(errors.OutOfRange):
            a.transfer(peermem.Slice(x.name, 4000, 100), peermem.Slice(x.name, 0, 100)).wait("30s")
        with pytest.raises(errors.SegmentsOverlap):
            a.transfer(x[0:100], x[50:150]).wait("30s")
        with pytest.raises(errors.OutOfRange):
            x.read(4096, 1)
        with pytest.raises(errors.DeviceFull):
            a.create_region(device="bar0", length="1TiB")
        with pytest.raises(errors.DeviceNotFound):
            a.create_region(device="none", length=1)
        with pytest.raises(errors.RegionNotFound):
            a.transfer(x, "nodes/a/regions/none").wait("30s")
        with pytest.raises(errors.WrongNode) as caught:
            a.region("nodes/b/regions/x")
        assert caught.value.metadata["address"]


async def test_the_asyncio_client_does_the_same(cluster: Cluster) -> None:
    async with (
        await peermem.aio.connect(cluster.target("a")) as a,
        await peermem.aio.connect(cluster.address("b")) as b,
        await a.create_region(device="bar0", length="1MiB") as x,
        await b.create_region(device="bar0", length="1MiB") as y,
    ):
        (await x.map())[:5] = b"async"
        transfer = await a.transfer(x, y, checksum=True)
        async for progress in transfer:
            assert progress.bytes_total in (0, 1 << 20)
        assert (await transfer.wait()).bytes_done == 1 << 20
        assert await y.read(0, 5) == b"async"
        await y.write(b"back", 100)
        assert (await y.refresh()).length == 1 << 20
        assert x.name in [region.name async for region in a.regions()]
        async with await a.create_region(device="bar0", length=64, labels={"of": "aio"}, publish=True) as told:
            assert [region.name async for region in a.find_regions({"of": "aio"})] == [told.name]
        with pytest.raises(errors.NotMappable):
            await y.map()
        with pytest.raises(errors.RegionNotFound):
            await a.region("none")
        assert [node.name for node in await a.nodes()] == ["nodes/a", "nodes/b"]
