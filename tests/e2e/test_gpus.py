"""Regions on GPUs, through real daemons with drivers that are compiled for it: staged over tcp, and both ways."""

from __future__ import annotations

import ctypes.util
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

import peermem
from peermem.core import errors
from peermem.core.types import LeaseKind
from peermem.core.types import Path as Way
from peermem.v1 import region_pb2
from tests.client.processes import Cluster, eventually
from tests.client.tensors_double import Allocation
from tests.descriptors import memory_file
from tests.device.fake_gpu import FakeGpu, folder

MIB = 1 << 20
SIZE = 24 * MIB + 4096
_FUNCTIONS = Path("/sys/bus/pci/devices")
FUNCTION = next((path.name for path in sorted(_FUNCTIONS.glob("*"))), "")
"""A PCI function that the daemon finds on this machine, which plays the GPU."""


@pytest.fixture(scope="module", params=["cuda", "rocm"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        pytest.importorskip("cuda.bindings", reason="the package cuda-bindings (peermem[cuda]) is not installed")
    if not FUNCTION:
        pytest.skip("this machine has no PCI function to play the GPU")
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def vendor(kind: str) -> Iterator[str]:
    vendor = {"cuda": "cuda", "rocm": "hip"}[kind]
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("FAKE_GPU_ADDRESS", FUNCTION)
        yield vendor


@pytest.fixture(scope="module")
def cluster(kind: str, vendor: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    gpu = f'{{ name = "gpu0", kind = "{kind}", address = "{FUNCTION}", size = "64MiB" }}'
    environ = {"LD_LIBRARY_PATH": str(folder(vendor))}
    with Cluster(tmp_path_factory.mktemp("gpus"), "a", "b", devices=gpu, environ=environ) as cluster:
        yield cluster


@pytest.fixture
def a(cluster: Cluster) -> Iterator[peermem.Node]:
    with peermem.connect(cluster.target("a")) as node:
        yield node


@pytest.fixture
def b(cluster: Cluster) -> Iterator[peermem.Node]:
    with peermem.connect(cluster.target("b")) as node:
        yield node


@pytest.fixture
def gpu(vendor: str) -> FakeGpu:
    """This process's GPU, where a job has its memory."""
    return FakeGpu(vendor)


def test_bytes_go_from_gpu_to_gpu_and_back(a: peermem.Node, b: peermem.Node) -> None:
    source, target = a.create_region(device="gpu0", length=SIZE), b.create_region(device="gpu0", length=SIZE)
    assert (source.path, source.device) == (Way.STAGED, "gpu0")
    data = numpy.random.default_rng(7).bytes(SIZE)
    source.write(data)
    a.transfer(source, target.name, checksum=True).wait("60s")
    assert target.read() == data
    a.transfer(target.name, source[0:SIZE], checksum=True).wait("60s")
    source.delete()
    target.delete()


def test_a_tensor_is_attached_and_moved_both_ways(a: peermem.Node, b: peermem.Node, gpu: FakeGpu) -> None:
    memory, offset = Allocation(gpu, 4 * MIB), MIB + 512
    tensor = memory.tensor(offset, MIB // 2)
    data, more = os.urandom(2 * MIB), os.urandom(2 * MIB)
    memory.write(offset - 1, b"<" + data + b">")
    with a.attach(tensor, labels={"layer": "3"}) as region, b.create_region(device="bar0", length=2 * MIB) as far:
        assert (region.device, region.length, region.lease.kind) == ("gpu0", 2 * MIB, LeaseKind.SESSION)
        assert region.labels == {"layer": "3"}
        a.transfer(region, far.name, checksum=True).wait("30s")
        assert far.read() == data
        far.write(more)
        b.transfer(far, region.name, checksum=True).wait("30s")
    assert memory.read(offset - 1, 2 * MIB + 2) == b"<" + more + b">"
    memory.free()


async def test_the_asyncio_client_attaches_too(cluster: Cluster, gpu: FakeGpu) -> None:
    memory = Allocation(gpu, MIB)
    memory.write(0, b"hello")
    node = await peermem.aio.connect(cluster.target("a"))
    region = await node.attach(memory.tensor(0, MIB // 4))
    assert await region.read(0, 5) == b"hello"
    await node.close()
    memory.free()


def test_a_tensor_of_numpy_in_a_memory_file(a: peermem.Node) -> None:
    fd = memory_file(8192)
    with mmap.mmap(fd, 0) as mapping:
        array = numpy.frombuffer(mapping, dtype=numpy.float32)
        with a.attach(array) as region:
            region.write(numpy.full(2048, 0.5, numpy.float32).tobytes())
            assert (region.device, region.length) == ("adopted", 8192)
            assert array[7] == 0.5
        del array
    os.close(fd)


def test_a_job_that_ends_gives_its_memory_back(cluster: Cluster, b: peermem.Node, gpu: FakeGpu) -> None:
    memory = Allocation(gpu, MIB)
    with peermem.connect(cluster.target("a")) as job:
        name = job.attach(memory.tensor(0, 1024)).name
    with peermem.connect(cluster.target("a")) as other:
        eventually(lambda: name not in {region.name for region in other.regions()})
    memory.free()


class TestRefusals:
    @pytest.fixture
    def handle(self, gpu: FakeGpu) -> Iterator[bytes]:
        memory = Allocation(gpu, MIB)
        yield memory.handle()
        memory.free()

    def test_handles_of_nothing(self, a: peermem.Node, gpu: FakeGpu) -> None:
        for handle in (bytes(64), b"short", os.urandom(64)):
            with pytest.raises(errors.NotAdoptable):
                create(a, region_pb2.GpuMemory(device="gpu0", handle=handle))
        with pytest.raises(errors.InvalidField):
            create(a, region_pb2.GpuMemory(device="gpu0"))

    def test_ranges_outside(self, a: peermem.Node, handle: bytes) -> None:
        for offset, length in ((MIB, 1), (0, MIB + 1), ((1 << 64) - 1, 1), (1, (1 << 64) - 1)):
            with pytest.raises(errors.NotAdoptable, match=f"{MIB} bytes"):
                create(a, region_pb2.GpuMemory(device="gpu0", handle=handle, offset=offset), length)

    @pytest.mark.parametrize(("device", "fault"), [("bar0", errors.NotSupported), ("gpu7", errors.DeviceNotFound)])
    def test_devices_that_are_no_gpu(
        self, a: peermem.Node, handle: bytes, device: str, fault: type[errors.PeermemError]
    ) -> None:
        with pytest.raises(fault, match=device):
            create(a, region_pb2.GpuMemory(device=device, handle=handle))

    def test_a_caller_without_a_session(self, cluster: Cluster, handle: bytes) -> None:
        with (
            peermem.connect(cluster.target("a"), attach=False) as stranger,
            pytest.raises(errors.SessionNotFound, match="attach socket"),
        ):
            create(stranger, region_pb2.GpuMemory(device="gpu0", handle=handle))

    def test_a_gpu_that_the_daemon_does_not_have(
        self, a: peermem.Node, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = Allocation(gpu, MIB)
        monkeypatch.setenv("FAKE_GPU_ADDRESS", "0000:99:00.0")
        with pytest.raises(errors.DeviceNotFound, match=r"0000:99:00\.0"):
            a.attach(memory.tensor(0, 4))
        memory.free()

    def test_memory_that_no_daemon_can_share(self, a: peermem.Node) -> None:
        with pytest.raises(errors.NotAdoptable, match="this process alone"):
            a.attach(numpy.ones(1 << 16))

    def test_without_an_attach_socket(self, cluster: Cluster) -> None:
        with peermem.connect(cluster.target("a"), attach=False) as node, pytest.raises(errors.NotMappable):
            node.attach(numpy.ones(4))


def create(node: peermem.Node, gpu: region_pb2.GpuMemory, length: int = 0) -> None:
    node._create(region_pb2.CreateRegionRequest(gpu=gpu, length=length))


@pytest.mark.parametrize("missing", ["cuda", "rocm"])
def test_without_its_driver_a_gpu_disturbs_nothing_else(missing: str, tmp_path: Path) -> None:
    if ctypes.util.find_library({"cuda": "cuda", "rocm": "amdhip64"}[missing]):
        pytest.skip("this machine has such a driver")
    gpu = f'{{ name = "gpu0", kind = "{missing}", address = "0000:99:00.0", size = "1GiB" }}'
    with Cluster(tmp_path, "a", devices=gpu) as cluster, peermem.connect(cluster.target("a")) as node:
        with pytest.raises(errors.GpuDriverMissing, match=r"container pass it in|peermem\[cuda\]"):
            node.create_region(device="gpu0", length=4096)
        with node.create_region(device="bar0", length=4096) as region:
            region.write(b"undisturbed")
            assert region.read(0, 11) == b"undisturbed"
        assert [(device.name, device.available) for device in node.devices()] == [
            ("adopted", 1 << 30),
            ("adopted-dmabuf", 1 << 30),
            ("bar0", 1 << 30),
            ("gpu0", 1 << 30),
        ]


def test_nothing_is_left(a: peermem.Node) -> None:
    eventually(lambda: not list(a.regions()))
    device = next(device for device in a.devices() if device.name == "gpu0")
    assert device.available == device.size
