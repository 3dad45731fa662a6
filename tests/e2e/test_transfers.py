"""What a job sees of transfers that go well, or are refused: real daemons through the real client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy
import pytest
from bench.daemons import Daemon

import peermem
from peermem import errors
from tests.e2e.support import MIB, metric, moving, noise


@pytest.mark.parametrize("size", [1, 4096, 3 * MIB + 11])
def test_each_direction_moves_the_same_bytes(a: peermem.Node, b: peermem.Node, c: peermem.Node, size: int) -> None:
    data = noise(size)
    with (
        a.create_region(device="bar0", length=size) as here,
        b.create_region(device="bar0", length=size) as there,
        a.create_region(device="bar0", length=size) as back,
    ):
        here.write(data)
        for node, source, sink, direction, fabric in (
            (a, here, there, "PUSH", "tcp"),
            (a, there, back, "PULL", "tcp"),
            (a, here, back, "LOCAL", "local"),
            (c, here, there, "RELAYED", "tcp"),
            (c, there, back, "RELAYED", "tcp"),
            (b, here, there, "PULL", "tcp"),
        ):
            sink.write(bytes(size))
            info = node.transfer(source, sink, checksum=True).wait("30s")
            assert (info.state, info.direction, info.fabric) == ("SUCCEEDED", direction, peermem.FabricKind(fabric))
            assert (info.bytes_total, info.bytes_done, info.segment_count) == (size, size, 1)
            assert info.crc32c == google_crc32c.value(data)
            assert sink.read() == data
            assert bool(info.executed_by) == (direction == "RELAYED")


def test_ten_thousand_scattered_segments_by_each_way(a: peermem.Node, b: peermem.Node, c: peermem.Node) -> None:
    count, size = 10_000, 100
    order = numpy.random.default_rng(1).permutation(count)
    with (
        a.create_region(device="bar0", length=count * size) as x,
        b.create_region(device="bar0", length=count * size) as y,
    ):
        data = numpy.frombuffer(noise(count * size), dtype=numpy.uint8).reshape(count, size)
        x.write(data.tobytes())
        scattered = numpy.empty_like(data)
        scattered[order] = data
        for node in (a, b, c):
            y.write(bytes(y.length))
            info = node.transfer(segments=[(x, numpy.arange(count) * size, y, order * size, size)], checksum=True).wait(
                "60s"
            )
            assert info.segment_count == count
            assert info.crc32c == google_crc32c.value(data.tobytes())
            assert y.read() == scattered.tobytes()


def test_strided_and_several_region_pairs(a: peermem.Node, b: peermem.Node) -> None:
    data = noise(64_000)
    with (
        a.create_region(device="bar0", length=64_000) as x,
        b.create_region(device="bar0", length=64_000) as y,
        b.create_region(device="bar0", length=32_000) as z,
    ):
        x.write(data)
        info = a.transfer(
            segments=[
                (x, [0], y, [0], [64_000]),
                peermem.Strided(x, z, length=32, count=1000, source_stride=64, destination_stride=32),
            ],
            checksum=True,
        ).wait("30s")
        picked = b"".join(data[start : start + 32] for start in range(0, 64_000, 64))
        assert (y.read(), z.read()) == (data, picked)
        assert info.segment_count == 1001
        assert info.crc32c == google_crc32c.value(data + picked)


def test_a_hundred_transfers_at_once(a: peermem.Node, b: peermem.Node) -> None:
    size = 4096
    with (
        a.create_region(device="bar0", length=100 * size) as x,
        b.create_region(device="bar0", length=100 * size) as y,
    ):
        x.write(noise(x.length))
        transfers = [a.transfer(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(100)]
        assert {transfer.wait("30s").state for transfer in transfers} == {peermem.TransferState.SUCCEEDED}
        assert y.read() == x.read()


def test_progress_grows_to_the_total_also_through_a_relay(a: peermem.Node, b: peermem.Node, c: peermem.Node) -> None:
    with (
        a.create_region(device="bar0", length=256 * MIB) as x,
        b.create_region(device="bar0", length=256 * MIB) as y,
    ):
        for node in (a, c):
            seen = [progress.bytes_done for progress in node.transfer(x, y).watch()]
            assert seen == sorted(seen)
            assert seen[-1] == 256 * MIB


def test_cancel_through_the_relay_ends_it_where_it_runs(a: peermem.Node, b: peermem.Node, c: peermem.Node) -> None:
    with (
        a.create_region(device="bar0", length=384 * MIB) as x,
        b.create_region(device="bar0", length=384 * MIB) as y,
    ):
        transfer = c.transfer(x, y)
        moving(transfer)
        info = transfer.cancel("30s")
        assert info.state == "CANCELLED"
        assert info.executed_by
        there = a.get_transfer(info.executed_by)
        assert there.state == "CANCELLED"
        assert there.bytes_done == info.bytes_done < y.length
        with pytest.raises(errors.TransferCancelled):
            transfer.wait()


def test_a_timeout_ends_a_transfer(a: peermem.Node, b: peermem.Node, c: peermem.Node) -> None:
    with (
        a.create_region(device="bar0", length=256 * MIB) as x,
        b.create_region(device="bar0", length=256 * MIB) as y,
    ):
        for node in (a, b, c):
            with pytest.raises(errors.Timeout) as caught:
                node.transfer(x, y, timeout=0.01).wait("30s")
            assert int(caught.value.metadata["bytes_done"]) < y.length


def test_a_fabric_is_used_or_refused(a: peermem.Node, b: peermem.Node) -> None:
    with (
        a.create_region(device="bar0", length=4096) as x,
        a.create_region(device="bar0", length=4096) as y,
        b.create_region(device="bar0", length=4096) as z,
    ):
        assert a.transfer(x, z, fabric="tcp").wait("30s").fabric is peermem.FabricKind.TCP
        assert a.transfer(x, y, fabric="local").wait("30s").fabric is peermem.FabricKind.LOCAL
        for sink, fabric in ((z, "local"), (y, "tcp"), (z, "verbs")):
            with pytest.raises(errors.FabricUnavailable):
                a.transfer(x, sink, fabric=fabric).wait("30s")


def test_overlapping_ranges_of_one_region_are_refused_and_others_are_moved(a: peermem.Node) -> None:
    with a.create_region(device="bar0", length=8192) as x:
        x.write(noise(4096))
        a.transfer(x[0:4096], x[4096:8192]).wait("30s")
        assert x.read(4096, 4096) == noise(4096)
        with pytest.raises(errors.SegmentsOverlap):
            a.transfer(x[0:4096], x[4095:8191]).wait("30s")
        with pytest.raises(errors.SegmentsOverlap):
            a.transfer([x[0:10], x[20:30]], [x[100:110], x[109:119]]).wait("30s")


def test_one_request_id_is_one_transfer(trio: dict[str, Daemon], a: peermem.Node, b: peermem.Node) -> None:
    with a.create_region(device="bar0", length=4096) as x, b.create_region(device="bar0", length=4096) as y:
        before = metric(trio["a"], "peermem_idempotent_replays_total")
        with ThreadPoolExecutor(8) as pool:
            transfers = list(pool.map(lambda _: a.transfer(x, y, request_id="same-transfer"), range(8)))
        assert len({transfer.wait("30s").name for transfer in transfers}) == 1
        assert metric(trio["a"], "peermem_idempotent_replays_total") == before + 7
        with pytest.raises(errors.RequestIdReused):
            a.transfer(x[0:1], y[0:1], request_id="same-transfer").wait("30s")
