"""Loads and stores of a real daemon: over the wire, by both clients, repeated, cancelled, and against hostile files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import grpc
import pytest
from bench.daemons import Daemon, daemons

import peermem
from peermem import StorageWay, errors
from peermem.client.facts import Progress
from peermem.v1 import region_pb2, region_pb2_grpc
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, eventually, fault, holdings, metric, noise

LENGTH = 8 * MIB + 4099
DATA = noise(LENGTH)
LARGE = 512 * MIB


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "x").write_bytes(DATA)
    (folder / "read-only").mkdir()
    (folder / "read-only/x").write_bytes(DATA)
    with (folder / "large").open("wb") as large:
        large.truncate(LARGE)
    return folder


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Daemon]:
    places = f'[{{ path = "{files}", write = true }}, {{ path = "{files}/read-only" }}]'
    config = f'[storage]\ndirectories = {places}\nblock = "128KiB"\n{DEVICE}'
    with daemons(tmp_path_factory.mktemp("storage"), ("a", "b"), config) as nodes:
        yield nodes["a"]
        for each in nodes.values():
            assert each.stop() == 0
            check_log(each)


@pytest.fixture
def node(daemon: Daemon) -> Iterator[peermem.Node]:
    """Return a connection; afterwards nothing is held that was not before."""
    with peermem.connect(daemon.target) as node:
        before = holdings(daemon, node) | {"descriptors": descriptors(daemon)}
        yield node
        eventually(lambda: holdings(daemon, node) | {"descriptors": descriptors(daemon)} == before, "the baseline")


def descriptors(daemon: Daemon) -> int:
    """Return how many files of the tests' folders a daemon has open."""
    found = 0
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        try:
            found += "/files" in os.readlink(entry)
        except FileNotFoundError:
            continue
    return found


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_there_and_back(daemon: Daemon, node: peermem.Node, files: Path) -> None:
    steps: list[Progress] = []
    with node.create_region(device="bar0", length="16MiB") as region:
        loaded = region.load(f"{files}/x", checksum=True, progress=steps.append)
        assert bytes(region.map()[:LENGTH]) == DATA
        assert loaded.crc32c == google_crc32c.value(DATA)
        assert (loaded.bytes_done, steps[-1].bytes_done, steps[-1].fraction) == (LENGTH, LENGTH, 1.0)
        stored = region.store(f"{files}/y", length=LENGTH, checksum=True)
        assert (files / "y").read_bytes() == DATA
        assert (stored.way, stored.crc32c) == (loaded.way, loaded.crc32c)
        assert loaded.way in (StorageWay.DIRECT, StorageWay.BUFFERED)
        assert loaded.why
        assert loaded.bandwidth
        region.store(f"{files}/y", offset=0, length=5, file_offset="4KiB")
        assert (files / "y").read_bytes()[4090:4105] == DATA[4090:4096] + DATA[:5] + DATA[4101:4105]
    (files / "y").unlink()
    assert metric(daemon, "peermem_storage_bytes_total") >= 2 * LENGTH


async def test_the_asyncio_client_does_the_same(daemon: Daemon, node: peermem.Node, files: Path) -> None:
    steps: list[Progress] = []
    async with (
        await peermem.aio.connect(daemon.target) as job,
        await job.create_region(device="bar0", length="16MiB") as region,
    ):
        assert (await region.load(f"{files}/x", offset=3, progress=steps.append)).bytes_done == LENGTH
        assert (await region.store(f"{files}/z", offset=3, length=LENGTH)).bytes_done == LENGTH
        assert steps[-1].bytes_total == LENGTH
        with pytest.raises(errors.FileNotFound):
            await region.load(f"{files}/none")
        task = asyncio.create_task(region.load(f"{files}/large"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, errors.OutOfRange)):
            await task
    assert await asyncio.to_thread((files / "z").read_bytes) == DATA
    (files / "z").unlink()


def test_what_is_wrong_is_said(node: peermem.Node, files: Path) -> None:
    before = names(files)
    os.mkfifo(files / "fifo")
    (files / "link").symlink_to("/etc/passwd")
    with node.create_region(device="bar0", length=MIB) as region:
        for path, kind in (
            ("/etc/passwd", errors.StorageForbidden),
            (f"{files}/../files/x", errors.StorageForbidden),
            (f"{files}/link", errors.StorageForbidden),
            (f"{files}/none", errors.FileNotFound),
            (f"{files}/fifo", errors.FileUnusable),
            (str(files), errors.FileUnusable),
            ("x", errors.InvalidField),
            (f"{files}/x", errors.OutOfRange),
        ):
            with pytest.raises(kind) as caught:
                region.load(path)
            assert caught.value.message
        with pytest.raises(errors.FileTooShort):
            region.load(f"{files}/x", file_offset=LENGTH - 1, length=2)
        with pytest.raises(errors.StorageForbidden, match="open to loads only"):
            region.store(f"{files}/read-only/x")
        with pytest.raises(errors.FileNotFound):
            region.store(f"{files}/none", file_offset=0)
        with pytest.raises(errors.OutOfRange):
            region.store(f"{files}/none", offset=MIB)
        with pytest.raises(errors.ZeroLength):
            region.store(f"{files}/none", length=0)
        for wrong in ({"offset": -1}, {"length": -1}):
            with pytest.raises(errors.OutOfRange):
                region.load(f"{files}/x", **wrong)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidField):
            region.load(f"{files}/x", file_offset="much")
        assert region.read() == bytes(MIB)
    for name in ("fifo", "link"):
        (files / name).unlink()
    assert names(files) == before


def test_what_the_caller_raises_ends_the_load(node: peermem.Node, files: Path) -> None:
    def stop(progress: Progress) -> None:
        raise ZeroDivisionError

    region = node.create_region(device="bar0", length=LARGE)
    with pytest.raises(ZeroDivisionError):
        region.load(f"{files}/large", progress=stop)
    region.delete(force=True)  # blocks that are under way may still land


def test_a_call_that_is_broken_off_ends_a_store(daemon: Daemon, node: peermem.Node, files: Path) -> None:
    before = names(files)
    with node.create_region(device="bar0", length=LARGE) as region, grpc.insecure_channel(daemon.target) as channel:
        stub = region_pb2_grpc.RegionServiceStub(channel)
        call = stub.StoreRegion(region_pb2.StoreRegionRequest(name=region.name, path=f"{files}/broken"))
        eventually(lambda: len(names(files)) > len(before), "the store's beginning")
        call.cancel()
        eventually(lambda: names(files) == before, "the end of the store")
        region.delete(force=True)


def test_a_region_that_is_deleted_ends_a_store(node: peermem.Node, daemon: Daemon, files: Path) -> None:
    before = names(files)
    region = node.create_region(device="bar0", length=LARGE)
    with grpc.insecure_channel(daemon.target) as channel:
        stub = region_pb2_grpc.RegionServiceStub(channel)
        call = stub.StoreRegion(region_pb2.StoreRegionRequest(name=region.name, path=f"{files}/deleted"))
        eventually(lambda: len(names(files)) > len(before), "the store's beginning")
        region.delete(force=True)
        try:
            list(call)
        except grpc.RpcError as error:
            ended = fault(error)
            assert isinstance(ended, errors.RegionDeleted)
            assert int(ended.metadata["bytes_done"]) <= LARGE
            assert "as it was before" in ended.message
            assert names(files) == before
        else:  # it was quicker
            (files / "deleted").unlink()


def test_a_repetition_gets_the_first_outcome(daemon: Daemon, node: peermem.Node, files: Path) -> None:
    with node.create_region(device="bar0", length=2 * LENGTH) as region:
        first = node.load_region(region.name, f"{files}/x", request_id="one")
        region.write(b"changed")
        again = node.load_region(region.name, f"{files}/x", request_id="one")
        assert (again, region.read(0, 7)) == (first, b"changed")
        with pytest.raises(errors.RequestIdReused):
            node.load_region(region.name, f"{files}/x", offset=1, request_id="one")
        assert node.store_region(region.name, f"{files}/w", length=7, request_id="one").bytes_done == 7
        with pytest.raises(errors.FileNotFound):
            node.load_region(region.name, f"{files}/late", request_id="two")
        (files / "late").write_bytes(DATA)
        assert node.load_region(region.name, f"{files}/late", request_id="two").bytes_done == LENGTH
    for name in ("w", "late"):
        (files / name).unlink()
    assert metric(daemon, "peermem_idempotent_replays_total") > 0


def test_hostile_numbers_are_refused(daemon: Daemon, node: peermem.Node, files: Path) -> None:
    most = (1 << 64) - 1
    with node.create_region(device="bar0", length=MIB) as region, grpc.insecure_channel(daemon.target) as channel:
        stub = region_pb2_grpc.RegionServiceStub(channel)
        for changes in (
            {"file_offset": most},
            {"length": most},
            {"offset": most},
            {"offset": most, "length": most},
            {"file_offset": (1 << 63) - 2, "length": 1},
        ):
            load = region_pb2.LoadRegionRequest(name=region.name, path=f"{files}/x", **changes)  # type: ignore[arg-type]
            store = region_pb2.StoreRegionRequest(name=region.name, path=f"{files}/x", **changes)  # type: ignore[arg-type]
            for call in (stub.LoadRegion(load), stub.StoreRegion(store)):
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
                assert fault(caught.value).reason in (
                    "INVALID_FIELD",
                    "OUT_OF_RANGE",
                    "FILE_TOO_SHORT",
                    "ZERO_LENGTH",
                    "STORAGE_FULL",
                    "STORAGE_FAILED",
                )
    assert (files / "x").read_bytes() == DATA
