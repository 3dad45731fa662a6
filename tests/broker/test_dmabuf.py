"""Memory that is dma-bufs: by NICs that import it, staged where the CPU reaches it, else refused with the reason."""

from __future__ import annotations

import asyncio

import pytest

from peermem import memory
from peermem.core import errors
from peermem.core.identity import ANONYMOUS
from peermem.core.node import ADOPTED_DMABUF
from peermem.core.policy import Action
from peermem.core.region import State as RegionState
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Path
from peermem.fabric.base import Proof
from tests.broker.conftest import NicHost
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB
from tests.reach_doubles import ImportedDevice, ImportedMemory

DATA = bytes(range(256)) * 4096
EXPORTER = "A dma-buf of exporter gpu. "


@pytest.fixture
def gpu(nic_pair: list[NicHost]) -> ImportedDevice:
    """A device of node a."""
    device = ImportedDevice("gpu0", 16 * MIB)
    nic_pair[0].devices["gpu0"] = device
    return device


async def test_a_nic_that_imports_it_moves_it(nic_pair: list[NicHost], gpu: ImportedDevice) -> None:
    a, b = nic_pair
    source, sink = await region(a, MIB, data=DATA, device="gpu0"), await region(b, MIB)
    copies = gpu.copies
    facts = source.facts
    assert (facts.path, facts.nics) == (Path.DMABUF, ("nic0/1",))
    assert facts.why.startswith(EXPORTER)
    moved = await outcome(await start(a, whole(source, sink)))
    assert (moved.state, moved.fabric, moved.path) == (State.SUCCEEDED, FabricKind.VERBS, Path.DMABUF)
    assert gpu.copies == copies
    assert await content(b, sink) == DATA


@pytest.mark.parametrize("order", ["push", "pull"])
async def test_over_tcp_it_is_staged(nic_pair: list[NicHost], gpu: ImportedDevice, order: str) -> None:
    a, b = nic_pair
    here, there = await region(a, MIB, device="gpu0"), await region(b, MIB)
    source, sink, holder = (here, there, a) if order == "push" else (there, here, b)
    with holder.broker.use_region(ANONYMOUS, source.name, Action.WRITE, 0, MIB) as use:
        await use.write(0, DATA)
    moved = await outcome(await start(a, whole(source, sink), fabric=FabricKind.TCP, checksum=True))
    assert (moved.state, moved.path) == (State.SUCCEEDED, Path.STAGED)
    assert here.memory not in a.tcp.registered
    assert await content(b if order == "push" else a, sink) == DATA


async def test_where_no_nic_imports_it_it_is_staged_and_says_why(nic_pair: list[NicHost], gpu: ImportedDevice) -> None:
    a, b = nic_pair
    a.nic.unreachable = {Path.DMABUF}
    source, sink = await region(a, MIB, data=DATA, device="gpu0"), await region(b, MIB)
    assert source.facts.path is Path.STAGED
    assert source.facts.why.startswith(EXPORTER)
    assert source.facts.why.endswith("No better path works: The NIC does not reach it.")
    moved = await outcome(await start(a, whole(source, sink)))
    assert (moved.state, moved.fabric, moved.path) == (State.SUCCEEDED, FabricKind.VERBS, Path.STAGED)
    assert await content(b, sink) == DATA


async def test_what_nothing_reaches_is_refused_with_both_reasons(nic_pair: list[NicHost], gpu: ImportedDevice) -> None:
    a, _ = nic_pair
    gpu.lets_map = False
    a.nic.unreachable = {Path.DMABUF}
    with pytest.raises(errors.ProbeFailed) as caught:
        await region(a, MIB, device="gpu0")
    assert caught.value.message == (
        "The NIC does not reach it. Nor can it be staged: exporter gpu lets the CPU map nothing of it."
    )
    assert gpu.available == gpu.size


async def test_what_only_nics_reach_moves_by_them_alone(nic_pair: list[NicHost], gpu: ImportedDevice) -> None:
    a, b = nic_pair
    gpu.lets_map = False
    source, sink = await region(a, MIB, device="gpu0"), await region(b, MIB)
    assert set(source.fabrics) == {FabricKind.VERBS}
    assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
    error = await failure(await start(a, whole(source, sink), fabric=FabricKind.TCP))
    assert type(error) is errors.FabricUnavailable


async def test_memory_that_its_exporter_took_back_is_revoked(nic_pair: list[NicHost], gpu: ImportedDevice) -> None:
    a, _ = nic_pair
    gone, other = await region(a, MIB, device="gpu0"), await region(a, MIB, device="gpu0")
    assert isinstance(gone.memory, ImportedMemory)
    gone.memory.is_revoked = True
    a.broker.let_go_of_lost_devices()
    await eventually(lambda: gone.facts.state is RegionState.REVOKED and gpu.available == gpu.size - MIB)
    assert other.facts.state is RegionState.READY


@pytest.mark.parametrize("order", ["push", "pull"])
@pytest.mark.parametrize("asked", ["a", "b"])
async def test_memory_that_only_a_nic_finds_taken_back_is_revoked(
    nic_pair: list[NicHost], gpu: ImportedDevice, order: str, asked: str
) -> None:
    """Whether its own NIC can't access it, or the other node can't be given a grant on it."""
    a, b = nic_pair
    gpu.lets_map = False
    gone, other, there = await region(a, MIB, device="gpu0"), await region(a, MIB, device="gpu0"), await region(b, MIB)
    a.nic.taken_back.append(gone.memory)
    source, sink = (gone, there) if order == "push" else (there, gone)
    error = await failure(await start({"a": a, "b": b}[asked], whole(source, sink)))
    assert type(error) is errors.RegionRevoked
    a.broker.let_go_of_lost_devices()
    await eventually(lambda: gone.facts.state is RegionState.REVOKED and gpu.available == gpu.size - MIB)
    assert other.facts.state is there.facts.state is RegionState.READY


async def test_what_was_handed_in_is_tried_itself_and_keeps_its_bytes(nic_pair: list[NicHost]) -> None:
    a, _ = nic_pair
    device = ImportedDevice(ADOPTED_DMABUF, MIB)
    made = await device.allocate(3 * 4096 + 5)
    assert isinstance(made, ImportedMemory)
    memory.write(made.inner, 0, b"what the job wrote")
    for path in device.paths:
        found = await a.broker.proofs.of(device, path, made)
        assert isinstance(found["nic0/1"], Proof)
        assert a.broker.proofs.known(device, path) == found
    assert memory.read(made.inner, 0, made.length) == b"what the job wrote".ljust(made.length, b"\0")
    a.nic.unreachable = {Path.DMABUF}
    again = await asyncio.gather(*(a.broker.proofs.of(device, path, made) for path in device.paths))
    assert [type(found["nic0/1"]) for found in again] == [errors.ProbeFailed, Proof]
    assert device.available == MIB - 4 * 4096
    made.close()
