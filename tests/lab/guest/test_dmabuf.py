"""dma-bufs of ordinary memory on a real kernel: as a device, handed in by a job, staged where no NIC imports them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from peermem import FabricKind, errors
from peermem.core.types import Path as Way
from tests.descriptors import dma_buf, memory_file
from tests.device.dmabufs import AdoptedTests, UdmabufTests
from tests.lab.guest import nodes
from tests.lab.guest.nodes import MIB, PATIENCE, Lab, noise

DEVICE = "exports"
CONFIG = f'[[device]]\nkind = "udmabuf"\nname = "{DEVICE}"\nsize = "32MiB"\n'
REFUSED = "can't import the dma-buf of exporter udmabuf: its driver imports none (as rxe"


class TestUdmabuf(UdmabufTests):
    pass


class TestAdopted(AdoptedTests):
    pass


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    places = {node: nodes.place(node, CONFIG) for node in nodes.NAMESPACES}
    with nodes.lab(tmp_path_factory.mktemp("dmabuf"), '[transfer]\nlink_idle = "1s"\n', places) as lab:
        yield replace(lab, kinds={**lab.kinds, "udmabuf": nodes.Kind(DEVICE, Way.STAGED)})


@pytest.fixture
def nothing_stays(lab: Lab) -> Iterator[None]:
    """The daemons hold afterwards what they held before, descriptors and all."""
    nodes.until_idle(lab)
    before = {name: nodes.held(lab, name) for name in nodes.NAMESPACES}
    yield
    for name, expected in before.items():
        nodes.until_held(lab, name, expected)


@pytest.mark.parametrize("order", ["push", "pull"])
def test_a_dma_buf_is_staged_to_the_other_node(lab: Lab, order: str) -> None:
    a, b = lab.nodes["a"], lab.nodes["b"]
    with (
        a.create_region(device=DEVICE, length=MIB + 5) as here,
        b.create_region(device=DEVICE, length=MIB + 5) as there,
    ):
        for region in (here, there):
            assert region.path is Way.STAGED
            assert region.nics
            assert region.why.startswith("A dma-buf of exporter udmabuf. ")
            assert REFUSED in region.why
        source, sink = (here, there) if order == "push" else (there, here)
        source.write(noise(source.length))
        info = a.transfer(source, sink, checksum=True).wait(PATIENCE)
        assert (info.fabric, info.path) == (FabricKind.VERBS, Way.STAGED)
        assert sink.read() == noise(source.length)


def test_preflight_says_which_path_works_and_why_not_the_other(lab: Lab) -> None:
    verdicts = [verdict for verdict in lab.nodes["a"].preflight(DEVICE) if verdict.device == DEVICE]
    refused = [verdict.error for verdict in verdicts if verdict.path is Way.DMABUF]
    assert len(refused) == 2
    for error in refused:
        assert isinstance(error, errors.DmaBufUnsupported)
        assert REFUSED in error.message
        assert (error.metadata["exporter"], error.metadata["errno"]) == ("udmabuf", "95")
    staged = [verdict for verdict in verdicts if verdict.path is Way.STAGED]
    assert [verdict.error for verdict in staged] == [None, None]
    assert all(verdict.write_bandwidth for verdict in staged)
    for path, works in ((Way.DMABUF, 0), (Way.STAGED, 2)):
        sample = nodes.sample(lab.daemons["a"], "peermem_path_works", device=DEVICE, path=path.value)
        assert sample == works


@pytest.mark.usefixtures("nothing_stays")
def test_a_job_hands_one_in(lab: Lab) -> None:
    """What it wrote before is there still, though it was tried with; it goes to the other node, and an answer comes."""
    fd = dma_buf(2 * MIB)
    with mmap.mmap(fd, 2 * MIB) as job:
        job[:] = noise(2 * MIB)
        with lab.nodes["a"].adopt(fd) as here, lab.nodes["b"].create_region(device="host", length=2 * MIB) as there:
            assert (here.device, here.length, here.path) == ("adopted-dmabuf", 2 * MIB, Way.STAGED)
            assert REFUSED in here.why
            assert job[:] == noise(2 * MIB)
            os.close(fd)
            assert lab.nodes["a"].transfer(here, there, checksum=True).wait(PATIENCE).path is Way.STAGED
            assert there.read() == noise(2 * MIB)
            there.write(noise(2 * MIB, 8))
            lab.nodes["b"].transfer(there, here).wait(PATIENCE)
            assert job[:] == noise(2 * MIB, 8)
            mapped = here.map()
            mapped[:4] = b"both"
            assert job[:4] == b"both"
            told = [verdict for verdict in lab.nodes["a"].preflight("adopted-dmabuf") if verdict.device]
            assert {(verdict.path, verdict.error is None) for verdict in told} == {
                (Way.DMABUF, False),
                (Way.STAGED, True),
            }


def test_one_that_jobs_map(lab: Lab) -> None:
    with lab.nodes["a"].create_region(device=DEVICE, length=MIB) as region:
        mapped = region.map()
        assert len(mapped) == MIB
        mapped[-1] = 9
        assert region.read(MIB - 1, 1) == b"\x09"
        del mapped


def test_it_moves_over_tcp_as_well(lab: Lab) -> None:
    with (
        lab.nodes["a"].create_region(device=DEVICE, length=MIB) as here,
        lab.nodes["c"].create_region(device="host", length=MIB) as there,
    ):
        here.write(noise(MIB))
        info = lab.nodes["a"].transfer(here, there, checksum=True).wait(PATIENCE)
        assert (info.fabric, info.path) == (FabricKind.TCP, Way.STAGED)
        assert there.read() == noise(MIB)


@pytest.mark.usefixtures("nothing_stays")
def test_what_can_not_be_handed_in(lab: Lab) -> None:
    node = lab.nodes["a"]
    reader, writer = os.pipe()
    fd = dma_buf(4096)
    with pytest.raises(errors.NotAdoptable, match="no memory file and no dma-buf"):
        node.adopt(reader)
    with pytest.raises(errors.NotAdoptable, match="has 4096 bytes and 4097 were asked for"):
        node.adopt(fd, length=4097)
    for closed in (reader, writer, fd):
        os.close(closed)
    with pytest.raises(errors.NotAdoptable, match="Bad file descriptor"):
        node.adopt(fd)
    plain = memory_file(4096, 0)
    with pytest.raises(errors.NotAdoptable, match="can be shrunk"):
        node.adopt(plain)
    os.close(plain)
