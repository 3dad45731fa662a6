"""Bytes between nodes over verbs: every kind of memory, every way to ask, every size, compared byte by byte."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy
import pytest

import peermem
from peermem import FabricKind, Path, Region, TransferInfo, errors
from tests.e2e.support import eventually
from tests.lab.guest import nodes
from tests.lab.guest.conftest import Figures
from tests.lab.guest.nodes import MIB, PATIENCE, Lab, noise, sample

KINDS = ("memfd", "p2pmem", "staged")
ORDERS = {"push": ("a", "b", "a"), "pull": ("b", "a", "a"), "third party": ("a", "b", "c")}
"""Nodes of the source and of the destination, and the one that is asked."""
LENGTHS = (1, 4095, 4096, 4097, 65_537, MIB)
PAGE = 4096
VERBS = FabricKind.VERBS

orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, figures: Figures) -> Iterator[Lab]:
    begun = time.monotonic()
    with nodes.lab(tmp_path_factory.mktemp("nodes")) as lab:
        figures("three_daemons_ready", {"seconds": time.monotonic() - begun})
        yield lab
        for node in lab.nodes.values():
            assert [region.name for region in node.regions()] == []


@contextmanager
def two(lab: Lab, order: str, source: str, sink: str, length: int) -> Iterator[tuple[Region, Region, peermem.Node]]:
    """Make a source and a destination of these kinds; yield them with the node that is asked."""
    here, there, asked = (lab.nodes[name] for name in ORDERS[order])
    with (
        here.create_region(device=lab.kinds[source].device, length=length) as x,
        there.create_region(device=lab.kinds[sink].device, length=length) as y,
    ):
        yield x, y, asked


def fill(region: Region, data: bytes) -> None:
    """Write all of a region, in the quickest way there is."""
    try:
        region.map()[: len(data)] = data
    except errors.NotMappable:
        region.write(data)


def content(region: Region) -> bytes:
    """Return all of a region as the CPU sees it: a mapping of the test's own where a job can have one."""
    try:
        return bytes(region.map())
    except errors.NotMappable:
        return region.read()


def as_executed(lab: Lab, info: TransferInfo) -> TransferInfo:
    """Return the facts of a transfer at the node that ran it."""
    if not info.executed_by:
        return info
    return lab.nodes[info.executed_by.split("/")[1]].get_transfer(info.executed_by)


def path_of(lab: Lab, order: str, source: str, sink: str, *, within: bool) -> Path:
    """Return the path of a transfer. rxe of Linux 6.15 to 7.3 misplaces what begins within a page of memory that it
    registered on demand (`__rxe_odp_mr_copy` leaves the offset out): that is staged."""
    if "staged" in (source, sink) or (within and "p2pmem" in (source, sink)):
        return Path.STAGED
    return lab.kinds[sink if order == "pull" else source].path


@pytest.mark.parametrize(
    ("order", "source", "sink"),
    [(order, source, sink) for order in ("push", "pull") for source in KINDS for sink in KINDS]
    + [("third party", kind, kind) for kind in KINDS],
)
def test_every_length_lands_where_it_belongs(lab: Lab, order: str, source: str, sink: str) -> None:
    length = 2 * MIB
    with two(lab, order, source, sink, length) as (x, y, asked):
        data, expected = noise(length, 1), bytearray(noise(length, 2))
        fill(x, data)
        fill(y, bytes(expected))
        transfers, at = [], 0
        for gap, lengths in ((0, (1, 4097, 65_537)), (1021, LENGTHS)):  # at a page's start, then within pages
            for size in lengths:
                read, write = at + gap, at + 3 * gap
                transfer = asked.transfer(x[read : read + size], y[write : write + size], checksum=True)
                transfers.append((transfer, path_of(lab, order, source, sink, within=gap > 0)))
                expected[write : write + size] = data[read : read + size]
                at = -(-(write + size) // PAGE) * PAGE
        for transfer, path in transfers:
            info = as_executed(lab, transfer.wait(PATIENCE))
            assert (info.fabric, info.direction) == (VERBS, "PULL" if order == "pull" else "PUSH")
            assert info.path is path
            assert info.fabric_why.startswith("verbs reaches both regions.")
        assert content(y) == expected


@pytest.mark.parametrize(
    ("order", "source", "sink"),
    [
        ("push", "memfd", "memfd"),
        ("push", "p2pmem", "memfd"),
        ("pull", "memfd", "p2pmem"),
        ("push", "p2pmem", "p2pmem"),
        ("pull", "p2pmem", "p2pmem"),
    ],
)
def test_a_large_transfer(lab: Lab, order: str, source: str, sink: str, figures: Figures) -> None:
    """The nodes share a pool that two regions of 32 MiB do not quite fit into."""
    pool = next(device for device in lab.nodes["a"].devices() if device.kind == "p2pmem")
    length = pool.available // 2 // PAGE * PAGE if source == sink == "p2pmem" else 32 * MIB
    with two(lab, order, source, sink, length) as (x, y, asked):
        data = noise(length)
        fill(x, data)
        info = asked.transfer(x, y).wait(PATIENCE)
        assert info.fabric is VERBS
        assert content(y) == data
        assert info.bandwidth
        figures(f"{order}_{source}_to_{sink}", {"bytes": length, "mib_per_s": info.bandwidth / MIB})


@pytest.mark.parametrize("order", ["push", "pull"])
@pytest.mark.parametrize(("source", "sink"), [("memfd", "p2pmem"), ("p2pmem", "p2pmem"), ("p2pmem", "memfd")])
def test_offsets_within_a_page_of_the_pool(lab: Lab, order: str, source: str, sink: str) -> None:
    with two(lab, order, source, sink, 128 << 10) as (x, y, asked):
        data = noise(x.length)
        fill(x, data)
        info = as_executed(lab, asked.transfer(x[3:70_000], y[4095:74_092]).wait(PATIENCE))
        assert (info.fabric, info.path) == (VERBS, Path.STAGED)
        assert content(y) == bytes(4095) + data[3:70_000] + bytes(y.length - 74_092)


@pytest.mark.parametrize(
    ("order", "source", "sink", "size"),
    [
        ("push", "p2pmem", "p2pmem", PAGE),
        ("third party", "p2pmem", "p2pmem", 61),
        ("pull", "memfd", "staged", 61),
        ("push", "memfd", "memfd", 61),
    ],
)
def test_thousands_of_segments(lab: Lab, order: str, source: str, sink: str, size: int) -> None:
    count, cell = 1024, -(-size // 64) * 64
    shuffled = numpy.random.default_rng(3).permutation(count)
    with two(lab, order, source, sink, 2 * count * cell) as (x, y, asked):
        data = noise(2 * count * cell)
        fill(x, data)
        half = count * cell
        info = asked.transfer(
            segments=[
                peermem.Strided(x, y, length=size, count=count, source_stride=cell, destination_stride=cell),
                (x, half + numpy.arange(count) * cell, y, half + shuffled * cell, size),
            ],
            checksum=True,
        ).wait(PATIENCE)
        assert info.segment_count == 2 * count
        cells = numpy.frombuffer(data, dtype=numpy.uint8).reshape(2, count, cell).copy()
        cells[:, :, size:] = 0
        expected = numpy.empty_like(cells)
        expected[0], expected[1, shuffled] = cells[0], cells[1]
        assert content(y) == expected.tobytes()


def test_transfers_of_all_nodes_at_once(lab: Lab) -> None:
    size = 256 << 10
    with ExitStack() as stack:
        running = []
        for number, (kind, order) in enumerate((kind, order) for kind in KINDS for order in ORDERS):
            x, y, asked = stack.enter_context(two(lab, order, kind, KINDS[number % 3], size))
            fill(x, noise(size, number))
            running.append((asked.transfer(x, y, checksum=True), y, number))
        for transfer, y, number in running:
            transfer.wait(PATIENCE)
            assert content(y) == noise(size, number)


@pytest.mark.parametrize("node", ["a", "b"])
def test_the_bar_itself_holds_the_bytes(lab: Lab, node: str) -> None:
    order = "push" if node == "b" else "pull"
    with two(lab, order, "memfd", "staged", nodes.BAR_BYTES) as (x, y, asked):
        data = noise(x.length)
        fill(x, data)
        asked.transfer(x, y).wait(PATIENCE)
        assert nodes.bar_bytes(node) == data


@pytest.mark.parametrize("kind", KINDS)
def test_regions_and_metrics_say_which_way_bytes_went(lab: Lab, kind: str) -> None:
    labels = {"direction": "push", "fabric": "verbs", "path": lab.kinds[kind].path.value}
    bytes_before = sample(lab.daemons["a"], "peermem_transfer_bytes_total", **labels)
    ended_before = sample(lab.daemons["a"], "peermem_transfers_total", outcome="succeeded", **labels)
    with two(lab, "push", kind, "memfd", 12_345) as (x, y, asked):
        asked.transfer(x, y).wait(PATIENCE)
        assert set(x.nics) == {"rxe1/1", "rxe1b/1"}
        assert set(y.nics) == {"rxe2/1", "rxe2b/1"}
        assert x.path is lab.kinds[kind].path
        assert x.why
    assert sample(lab.daemons["a"], "peermem_transfer_bytes_total", **labels) == bytes_before + 12_345
    assert sample(lab.daemons["a"], "peermem_transfers_total", outcome="succeeded", **labels) == ended_before + 1


def test_tcp_beside_verbs_where_it_is_asked_for(lab: Lab) -> None:
    with two(lab, "push", "p2pmem", "p2pmem", MIB) as (x, y, asked):
        fill(x, noise(MIB))
        info = asked.transfer(x, y, fabric="tcp", checksum=True).wait(PATIENCE)
        assert info.fabric is FabricKind.TCP
        assert info.fabric_why == "tcp is the only fabric for this pair, or was asked for."
        assert content(y) == noise(MIB)
        assert asked.transfer(x, y, fabric="verbs").wait(PATIENCE).fabric is VERBS


def test_a_node_without_a_nic_is_reached_over_tcp(lab: Lab) -> None:
    a, c = lab.nodes["a"], lab.nodes["c"]
    with a.create_region(device=nodes.HOST, length=MIB) as x, c.create_region(device=nodes.HOST, length=MIB) as y:
        assert (y.nics, "no RDMA NIC" in y.why) == ((), True)
        fill(x, noise(MIB))
        info = a.transfer(x, y, checksum=True).wait(PATIENCE)
        assert info.fabric is FabricKind.TCP
        assert "verbs did not reach" in info.fabric_why
        assert content(y) == noise(MIB)
        with pytest.raises(errors.FabricUnavailable):
            a.transfer(x, y, fabric="verbs").wait(PATIENCE)


def test_tcp_while_the_nics_are_down_and_verbs_again_after(lab: Lab) -> None:
    labels = {"direction": "push", "fabric": "tcp", "path": "HOST"}
    before = sample(lab.daemons["a"], "peermem_transfer_bytes_total", **labels)
    a, b = lab.nodes["a"], lab.nodes["b"]
    with two(lab, "push", "memfd", "memfd", MIB) as (x, y, _):
        fill(x, noise(MIB))
        with nodes.nics_down("b"):
            eventually(lambda: all(nic.state != "ACTIVE" for nic in b.nics()), "the ports down")
            # by the link of before, which is found dead: a transfer stays on the fabric by which it began
            with suppress(errors.NodeUnreachable, errors.FabricUnavailable):
                a.transfer(x[:PAGE], y[:PAGE]).wait(PATIENCE)
            info = a.transfer(x, y, checksum=True).wait(PATIENCE)
            assert info.fabric is FabricKind.TCP
            assert "verbs did not reach" in info.fabric_why
            with b.create_region(device=nodes.HOST, length=MIB) as late:
                assert late.nics == ()
                assert "not active" in late.why
                assert a.transfer(x, late).wait(PATIENCE).fabric is FabricKind.TCP
        assert "fabric_passed_over" in lab.daemons["a"].log.read_text()
        assert sample(lab.daemons["a"], "peermem_transfer_bytes_total", **labels) >= before + 2 * MIB
        eventually(lambda: a.transfer(x, y).wait(PATIENCE).fabric is VERBS, "verbs again")


@pytest.mark.parametrize("side", ["source", "sink"])
@orders
def test_ranges_outside_a_region_are_refused(lab: Lab, order: str, side: str) -> None:
    with two(lab, order, "p2pmem", "p2pmem", 8192) as (x, y, asked):
        beyond = {"source": (1, 0), "sink": (0, 1)}[side]
        with pytest.raises(errors.OutOfRange):
            asked.transfer(segments=[(x, [beyond[0]], y, [beyond[1]], [8192])]).wait(PATIENCE)
        assert content(y) == bytes(8192)
