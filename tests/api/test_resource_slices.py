"""What Kubernetes is told of a node's devices, against a small API server and Kubernetes' own strict schema."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from peermem.api.api_server import ApiCallError
from peermem.api.resource_slices import SlicePublisher
from peermem.app import App
from peermem.config import Kubernetes
from peermem.config_values import FilePath, HttpsUrl, KubernetesNode
from peermem.core.node import ADOPTED, DeviceFacts
from peermem.core.resource_slice import MAX_DEVICES, slice_object, slice_spec
from peermem.core.topology import PciFunction
from peermem.core.types import Path as Way
from tests.api_server import FakeApiServer
from tests.certificates import Authority
from tests.descriptors import until
from tests.test_app import config

NODE, NAME = "worker-7", "worker-7-peermem"
BAR = DeviceFacts("cmb0", "p2pmem", 64 << 20, 1 << 20, Way.P2PDMA, 3, "0000:41:00.0", ("mlx5_0/1", "mlx5_1/1"), "Why.")
HOST = DeviceFacts("host0", "memfd", 1 << 30, 1 << 30, Way.HOST, 0)
JOBS = DeviceFacts(ADOPTED, "adopted", 1 << 30, 1 << 30, Way.HOST, 0)
FUNCTIONS = {"0000:41:00.0": PciFunction("0000:41:00.0", "pci0000:40", (), 1, 0, 0, 0)}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(tmp_path, Authority()).serving() as server:
        yield server


class Devices:
    """What a node has now."""

    def __init__(self) -> None:
        self.now = [BAR, HOST, JOBS]

    async def spec(self) -> dict[str, Any]:
        return slice_spec(NODE, self.now, FUNCTIONS)


@asynccontextmanager
async def publishing(server: FakeApiServer, devices: Devices, node: str = NODE) -> AsyncIterator[SlicePublisher]:
    client = server.client()
    try:
        yield SlicePublisher(client, node, devices.spec, 0.01)
    finally:
        await client.close()


def test_a_slice_tells_where_devices_are_and_what_reaches_them() -> None:
    spec = slice_spec(NODE, [HOST, JOBS, BAR], FUNCTIONS)
    assert kubernetes_validate.validate(slice_object(NODE, "uid", spec, 1), "1.37", strict=True) == "1.37"
    cmb, host = spec["devices"]
    assert (cmb["name"], host["name"]) == ("cmb0", "host0")
    assert cmb["attributes"] == {
        "kind": {"string": "p2pmem"},
        "path": {"string": "P2PDMA"},
        "reached": {"bool": True},
        "nics": {"string": "mlx5_0/1 mlx5_1/1"},
        "resource.kubernetes.io/pcieRoot": {"string": "pci0000:40"},
        "resource.kubernetes.io/pciBusID": {"string": "0000:41:00.0"},
        "resource.kubernetes.io/numaNode": {"int": 1},
    }
    assert cmb["capacity"] == {"memory": {"value": "67108864"}}
    assert host["attributes"]["reached"] == {"bool": False}
    assert [taint["effect"] for device in spec["devices"] for taint in device["taints"]] == ["NoSchedule"] * 2


def test_a_slice_stays_within_the_bounds_of_the_api() -> None:
    nics = tuple(f"a-rather-long-name-{number}/1" for number in range(16))
    many = [DeviceFacts(f"bar{n}", "vfio", 1, 1, Way.DMABUF, 0, "", nics) for n in range(MAX_DEVICES + 1)]
    spec = slice_spec(NODE, many, {})
    assert len(spec["devices"]) == MAX_DEVICES
    text = spec["devices"][0]["attributes"]["nics"]["string"]
    assert len(text) <= 64
    assert set(text.split()) <= set(nics)


@pytest.mark.parametrize("taints", [True, False])
async def test_it_is_written_when_something_changed_and_only_then(server: FakeApiServer, taints: bool) -> None:
    server.taints = taints
    devices = Devices()
    async with publishing(server, devices) as publisher:
        for _ in range(2):
            await publisher.publish()
            assert server.slices[NAME]["metadata"]["resourceVersion"] == "1"
        devices.now = [HOST]
        await publisher.publish()
        written = server.slices[NAME]
        assert [device["name"] for device in written["spec"]["devices"]] == ["host0"]
        assert (written["spec"]["pool"]["generation"], written["metadata"]["resourceVersion"]) == (2, "2")
        assert written["metadata"]["ownerReferences"][0]["uid"] == "uid-of-worker-7"
        await publisher.withdraw()
        assert server.slices == {}
        await publisher.withdraw()


async def test_a_slice_that_somebody_took_away_or_changed_is_put_right(server: FakeApiServer) -> None:
    async with publishing(server, Devices()) as publisher:
        await publisher.publish()
        server.slices[NAME]["spec"]["devices"] = []
        await publisher.publish()
        assert len(server.slices[NAME]["spec"]["devices"]) == 2
        server.slices.clear()
        await publisher.publish()
        assert len(server.slices[NAME]["spec"]["devices"]) == 2


@pytest.mark.parametrize(
    ("method", "node", "cause"),
    [
        ("POST", NODE, "it answered 403 to POST .*; the daemon's ClusterRole has to allow it"),
        ("GET", NODE, "it answered 403 to GET"),
        ("", "worker-8", "it knows no node worker-8: set kubernetes.publish_as"),
    ],
)
async def test_what_keeps_it_from_being_published_is_said(
    server: FakeApiServer, method: str, node: str, cause: str
) -> None:
    server.forbids = method
    async with publishing(server, Devices(), node) as publisher:
        with pytest.raises(ApiCallError, match=cause):
            await publisher.publish()


async def test_it_is_published_as_soon_as_it_can_be(server: FakeApiServer) -> None:
    server.forbids = "POST"
    async with publishing(server, Devices()) as publisher:
        tending = asyncio.create_task(publisher.tend())
        await asyncio.sleep(0)
        server.forbids = ""
        await until(lambda: NAME in server.slices)
        tending.cancel()


async def test_a_daemon_publishes_its_devices_and_takes_them_away_at_its_end(
    server: FakeApiServer, tmp_path: Path
) -> None:
    place = Kubernetes(
        api_server=HttpsUrl(server.url),
        ca=FilePath(f"{tmp_path}/ca.pem"),
        token=FilePath(f"{tmp_path}/own"),
        publish_as=KubernetesNode(NODE),
    )
    app = App(config(tmp_path, kubernetes=place))
    await app.start()
    await until(lambda: NAME in server.slices)
    (device,) = server.slices[NAME]["spec"]["devices"]
    assert (device["name"], device["attributes"]["kind"]) == ("bar0", {"string": "memfd"})
    await app.stop()
    assert server.slices == {}
