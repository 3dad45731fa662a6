"""Loads and stores of a broker: who may, how they begin and end, and what they hold."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import google_crc32c
import pytest

from peermem.broker.storage import StorageRun
from peermem.core import errors
from peermem.core.errors import PeermemError
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.names import ChildName
from peermem.core.policy import OPEN
from peermem.core.storage import Order, StorageFacts, StorageRequest
from peermem.storage.files import LocalStorage
from peermem.storage.places import Place
from tests.broker.support import content, eventually, region
from tests.descriptors import open_files
from tests.doubles import MIB, PATIENCE, Host
from tests.policies import policy, rule
from tests.reach_doubles import StagedDevice
from tests.storage.support import BLOCK, DATA, SIZE, best_way


class StorageHost(Host):
    """A broker with a folder of files, and the device bar1 whose copies can be held back."""

    def __init__(self, folder: Path, limit: int = 2) -> None:
        self.staged = StagedDevice("bar1", 64 * MIB)
        storage = LocalStorage([Place(str(folder), write=True)], block=BLOCK, depth=2, limit=limit)
        super().__init__("a", {}, {}, devices={"bar1": self.staged}, storage=storage)

    def sample(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        page = self.metrics.render()[0].decode().splitlines()
        found = [line.rsplit(" ", 1) for line in page if line.startswith(f"{name}{{")]
        return sum(float(value) for series, value in found if wanted <= set(series[len(name) + 1 : -1].split(",")))


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[StorageHost]:
    """Check, too, that nothing is left: no region in use, no descriptor."""
    (tmp_path / "x").write_bytes(DATA)
    async with AsyncExitStack() as stack:
        made = StorageHost(tmp_path)
        await made.open(stack)
        before = open_files()
        yield made
        assert made.broker.storage.running() == []
        for left in list(made.broker.regions):
            await made.broker.delete_region(ANONYMOUS, left.name, force=False)
        assert open_files() <= before
    assert (made.device.available, made.staged.available) == (made.device.size, made.staged.size)


def wanted(order: Order, name: ChildName, path: Path | str, **changes: object) -> StorageRequest:
    fields = {"region_offset": 0, "file_offset": None, "length": 0, "checksum": False} | changes
    return StorageRequest(order=order, region=name, path=str(path), **fields)  # type: ignore[arg-type]


async def outcome(host: Host, request: StorageRequest, subject: Subject = ANONYMOUS) -> StorageFacts:
    """Carry one out. Raises why it failed."""
    run = StorageRun(subject, request)
    with host.broker.storage.watched(run):
        async with asyncio.timeout(PATIENCE):
            await run.ended.wait()
    if run.error is not None:
        raise run.error
    return run.facts


@pytest.mark.parametrize("device", ["bar0", "bar1"])
async def test_there_and_back_with_checksums(host: StorageHost, tmp_path: Path, device: str) -> None:
    made = await region(host, 2 * MIB, device=device)
    loaded = await outcome(host, wanted(Order.LOAD, made.name, tmp_path / "x", region_offset=7, checksum=True))
    assert (loaded.bytes_done, loaded.bytes_total, loaded.crc32c) == (SIZE, SIZE, google_crc32c.value(DATA))
    assert (await content(host, made))[7 : SIZE + 7] == DATA
    stored = await outcome(
        host, wanted(Order.STORE, made.name, tmp_path / "y", region_offset=7, length=SIZE, checksum=True)
    )
    assert (tmp_path / "y").read_bytes() == DATA
    assert stored.crc32c == loaded.crc32c
    assert stored.duration
    assert stored.way is not None
    await asyncio.sleep(0)
    for order in ("load", "store"):
        assert host.sample("peermem_storage_bytes_total", operation=order) == SIZE
        labels = {"operation": order, "outcome": "succeeded"}
        assert host.sample("peermem_storage_operations_total", **labels) == 1
    if device == "bar0":
        assert loaded.way is stored.way or loaded.way is not best_way(tmp_path)  # the load begins within a word


async def test_all_of_a_region_and_of_a_file_without_a_length(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 5000, data=DATA[:5000])
    assert (await outcome(host, wanted(Order.STORE, made.name, tmp_path / "y", region_offset=10))).bytes_total == 4990
    assert (tmp_path / "y").read_bytes() == DATA[10:5000]
    assert (await outcome(host, wanted(Order.LOAD, made.name, tmp_path / "y", file_offset=90))).bytes_total == 4900


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"region_offset": 1 << 20, "length": 1}, errors.OutOfRange),
        ({"region_offset": 1 << 20}, errors.OutOfRange),
        ({"length": (1 << 20) + 1}, errors.OutOfRange),
        ({"file_offset": SIZE + 1}, errors.ZeroLength),
        ({"file_offset": SIZE - 1, "length": 2}, errors.FileTooShort),
        ({}, errors.OutOfRange),
    ],
)
async def test_loads_that_do_not_fit(
    host: StorageHost, tmp_path: Path, changes: dict[str, int], kind: type[PeermemError]
) -> None:
    made = await region(host, MIB)
    with pytest.raises(kind):
        await outcome(host, wanted(Order.LOAD, made.name, tmp_path / "x", **changes))
    assert await content(host, made) == bytes(MIB)


async def test_what_can_not_begin(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, MIB)
    with pytest.raises(errors.RegionNotFound):
        await outcome(host, wanted(Order.LOAD, ChildName("a", "regions", "none"), tmp_path / "x"))
    with pytest.raises(errors.WrongNode):
        await outcome(host, wanted(Order.LOAD, ChildName("b", "regions", "x"), tmp_path / "x"))
    with pytest.raises(errors.StorageForbidden):
        await outcome(host, wanted(Order.STORE, made.name, "/etc/passwd"))
    assert host.sample("peermem_storage_failures_total", operation="store", reason="STORAGE_FORBIDDEN") == 1
    await host.broker.drain(1.0)
    with pytest.raises(errors.ShuttingDown):
        await outcome(host, wanted(Order.LOAD, made.name, tmp_path / "x"))


@pytest.mark.parametrize(("order", "needed"), [(Order.LOAD, "write load"), (Order.STORE, "read store")])
async def test_the_policy_is_asked_about_the_region_and_the_file(
    host: StorageHost, tmp_path: Path, order: Order, needed: str
) -> None:
    made = await region(host, 2 * MIB)
    files = f'files = ["{tmp_path}"]'
    everything = "read write manage load store"
    for missing in needed.split():
        rights = everything.replace(missing, "")
        await host.broker.go_by(policy(rule("r", "anonymous", rights, files)))
        with pytest.raises(errors.AccessDenied, match=f"may not {missing} "):
            await outcome(host, wanted(order, made.name, tmp_path / "x"))
    await host.broker.go_by(policy(rule("r", "anonymous", needed, f'files = ["{tmp_path}/y"]')))
    with pytest.raises(errors.AccessDenied, match="Have the operator of nodes/a"):
        await outcome(host, wanted(order, made.name, tmp_path / "x"))
    assert host.sample("peermem_authorization_denials_total", reason="file") == 2
    await host.broker.go_by(policy(rule("r", "anonymous", needed, files)))
    await outcome(host, wanted(order, made.name, tmp_path / "x"))
    await host.broker.go_by(OPEN)


async def held_back(host: StorageHost, run: StorageRun, stack: ExitStack) -> asyncio.Event:
    """Begin a load or store of bar1 and hold it back in the middle; set the event to let it go on."""
    host.staged.gate = gate = asyncio.Event()
    stack.enter_context(host.broker.storage.watched(run))
    await eventually(lambda: host.staged.waiting > 0)
    return gate


@pytest.mark.parametrize("order", Order)
async def test_a_region_that_is_deleted_ends_it_first(host: StorageHost, tmp_path: Path, order: Order) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    run = StorageRun(ANONYMOUS, wanted(order, made.name, tmp_path / "x"))
    with ExitStack() as stack:
        gate = await held_back(host, run, stack)
        with pytest.raises(errors.RegionInUse):
            await host.broker.delete_region(ANONYMOUS, made.name, force=False)
        deleting = asyncio.create_task(host.broker.delete_region(ANONYMOUS, made.name, force=True))
        await eventually(lambda: run.error is not None)
        assert not deleting.done()
        gate.set()
        await deleting
        assert run.ended.is_set()
    assert isinstance(run.error, errors.RegionDeleted)
    assert int(run.error.metadata["bytes_done"]) <= 2 * BLOCK
    assert "bytes were moved" in run.error.message
    assert ("is as it was before" in run.error.message) is (order is Order.STORE)
    assert (tmp_path / "x").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["x"]


async def test_a_device_that_vanishes_ends_it(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    host.staged.vanished = True
    with pytest.raises(errors.RegionRevoked):
        await outcome(host, wanted(Order.LOAD, made.name, tmp_path / "x"))


async def test_it_ends_with_its_last_watcher(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    run = StorageRun(ANONYMOUS, wanted(Order.LOAD, made.name, tmp_path / "x"))
    with ExitStack() as one:
        gate = await held_back(host, run, one)
        with host.broker.storage.watched(run):
            one.close()
            assert run.error is None
        assert isinstance(run.error, errors.TransferCancelled)
    gate.set()
    await run.settled()
    assert run.facts.bytes_done <= 2 * BLOCK
    assert host.sample("peermem_storage_operations_total", operation="load", outcome="cancelled") == 1
    assert host.sample("peermem_storage_failures_total") == 0


async def test_a_store_in_place_that_fails_says_what_is_there(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    run = StorageRun(ANONYMOUS, wanted(Order.STORE, made.name, tmp_path / "x", file_offset=100, length=MIB))
    with ExitStack() as stack:
        (await held_back(host, run, stack)).set()
        run.fail(errors.RegionDeleted("It ended."))
        await run.settled()
    assert run.error is not None
    assert run.error.message.endswith(
        f"Bytes 100 to {100 + MIB} of {tmp_path}/x hold old bytes, new ones, or a mix of both."
    )


async def test_so_many_at_the_same_time(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    request = wanted(Order.LOAD, made.name, tmp_path / "x")
    with ExitStack() as stack:
        gate = await held_back(host, StorageRun(ANONYMOUS, request), stack)
        second = StorageRun(ANONYMOUS, request)
        stack.enter_context(host.broker.storage.watched(second))
        with pytest.raises(errors.LimitReached, match="max_running"):
            await outcome(host, request)
        gate.set()
        await eventually(lambda: host.broker.storage.running() == [])
    assert await outcome(host, request)


async def test_bytes_that_changed_meanwhile_are_found(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    host.staged.forgets = True
    with pytest.raises(errors.ChecksumMismatch, match="CRC32C"):
        await outcome(host, wanted(Order.LOAD, made.name, tmp_path / "x", checksum=True))


async def test_draining_lets_it_end_and_then_fails_it(host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 2 * MIB, device="bar1")
    request = wanted(Order.LOAD, made.name, tmp_path / "x")
    runs = [StorageRun(ANONYMOUS, request) for _ in range(2)]
    with ExitStack() as stack:
        gate = await held_back(host, runs[0], stack)
        stack.enter_context(host.broker.storage.watched(runs[1]))
        draining = asyncio.create_task(host.broker.drain(0.01))
        await eventually(lambda: all(run.error is not None for run in runs))
        assert not draining.done()
        gate.set()
        await draining
    assert {type(run.error) for run in runs} == {errors.ShuttingDown}
