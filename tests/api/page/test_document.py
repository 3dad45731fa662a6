"""What the page is told: of brokers with real fabrics, on a machine of the tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path as File
from typing import Any

import pytest

from peermem.api.http import Health
from peermem.api.page import document as documents
from peermem.broker.broker import Broker
from peermem.core.identity import ANONYMOUS
from peermem.core.region import Lease, RegionRequest
from peermem.core.types import LeaseKind
from peermem.directory.base import NodeEntry
from tests.api.page.doubled import Shown, shown
from tests.broker.support import eventually, outcome, region, start, whole
from tests.doubles import Host

HOSTILE = "<script>alert(1)</script>\u202e&quot;"


async def document(it: Shown) -> Mapping[str, Any]:
    """Return the document as a browser gets it."""
    assert it.page.facts is not None
    made: Mapping[str, Any] = json.loads(json.dumps(await it.page.facts()))
    return made


async def test_the_node(tmp_path: File) -> None:
    async with shown("", tmp_path) as it:
        it.health.append(Health(False, ("It starts.",), ("A note.",)))
        node = (await document(it))["node"]
        assert (node["name"], node["epoch"], node["ready"]) == ("gpu-01", "epoch-gpu-01", False)
        assert (node["reasons"], node["notes"]) == (["It starts."], ["A note."])
        assert [(each["kind"], each["error"]) for each in node["fabrics"]] == [("tcp", None), ("local", None)]


async def test_pairs_have_the_verdicts_that_trials_gave(tmp_path: File) -> None:
    async with shown("gpu_server", tmp_path) as it:
        await it.prove("gpu0")
        pairs = (await document(it))["pairs"]
        found = {(each["device"], each["nic"], each["path"]): each for each in pairs}
        near, far = found["gpu0", "mlx5_0/1", "DMABUF"], found["gpu0", "mlx5_4/1", "DMABUF"]
        assert (near["state"], near["reason"]) == ("works", "")
        assert near["write"] > 1e9
        assert (far["state"], far["reason"], far["write"]) == ("fails", "PROBE_FAILED", 0.0)
        assert "REM_ACCESS_ERR" in far["message"]
        assert found["gpu0", "mlx5_4/1", "STAGED"]["state"] == "works"
        down = found["gpu0", "mlx5_11/1", "DMABUF"]
        assert (down["state"], down["reason"]) == ("fails", "PORT_DOWN")
        untried = found["gpu1", "mlx5_0/1", "DMABUF"]
        assert (untried["state"], untried["write"]) == ("untried", 0.0)
        assert "turns around below the root complex" in untried["detail"]


async def test_of_pci_functions_those_on_the_way_are_told(tmp_path: File) -> None:
    async with shown("gpu_server", tmp_path) as it:
        made = await document(it)
        functions = {each["address"]: each for each in made["pci"]["functions"]}
        assert functions["0000:19:00.0"]["bridges"] == ["0000:17:01.0", "0000:16:00.0", "0000:15:01.0"]
        assert functions["0000:39:01.0"]["redirects"] is True
        assert functions["0000:17:01.0"]["redirects"] is False
        assert "0000:1c:00.0" not in functions  # a drive that is no device
        assert made["devices"]["total"] == len(made["devices"]["listed"]) == 10
        (nic,) = [each for each in made["nics"]["listed"] if each["error"]]
        assert (nic["name"], nic["error"]["reason"]) == ("mlx5_11/1", "PORT_DOWN")


async def test_regions_as_they_are_called(tmp_path: File) -> None:
    async with shown("", tmp_path) as it:
        labels = {f"key{at:02}": "value" for at in range(12)} | {"a": HOSTILE, "b": "x" * 500}
        request = RegionRequest("one", 4096, "bar0", "", labels, Lease(LeaseKind.TTL, 60.0))
        await it.host.broker.create_region(ANONYMOUS, None, request)
        (made,) = (await document(it))["regions"]["listed"]
        assert (made["name"], made["length"], made["device"], made["path"]) == ("one", 4096, "bar0", "HOST")
        assert (made["owner"], made["lease"], made["state"], made["users"]) == ("anonymous", "ttl", "READY", 0)
        assert made["labels"]["a"] == HOSTILE
        assert len(made["labels"]["b"]) == 120
        assert (len(made["labels"]), made["more_labels"]) == (8, 6)
        assert made["expires_at"] > made["created_at"]


async def test_of_many_regions_those_in_use_come_first_and_then_the_newest(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "REGIONS", 4)
    async with shown("", tmp_path) as it:
        made = [await region(it.host, 4096, f"r{at}") for at in range(9)]
        it.host.local.hold = True
        running = await start(it.host, whole(made[1], made[2]))
        regions = (await document(it))["regions"]
        assert regions["total"] == 9
        assert [each["name"] for each in regions["listed"]] == ["r1", "r8", "r7", "r6"]
        assert regions["listed"][0]["users"] == 1
        it.host.local.hold = False
        it.host.local.let_go()
        await outcome(running)


async def test_transfers_that_run_and_those_that_ended(tmp_path: File) -> None:
    async with shown("", tmp_path) as it:
        one, two = await region(it.host, 65536, "one"), await region(it.host, 65536, "two")
        await outcome(await start(it.host, whole(one, two)))
        it.host.local.hold = True
        running = await start(it.host, whole(two, one))
        async with asyncio.timeout(10):
            while not it.host.local.held:  # noqa: ASYNC110  what is waited for is not an event
                await asyncio.sleep(0)
        made = await document(it)
        (now,) = made["transfers"]["listed"]
        assert (now["source"], now["destination"]) == ("nodes/gpu-01/regions/two", "nodes/gpu-01/regions/one")
        assert (now["state"], now["done"], now["total"], now["duration"]) == ("RUNNING", 0, 65536, None)
        (before,) = made["transfers"]["ended"]
        assert (before["state"], before["done"], before["source"]) == ("SUCCEEDED", 65536, str(one.name))
        assert made["links"]["total"] == 2
        assert {(each["node"], each["side"]) for each in made["links"]["listed"]} == {
            ("gpu-01", "opened"),
            ("gpu-01", "accepted"),
        }
        assert sum(each["grants"] for each in made["links"]["listed"]) == 2
        it.host.local.hold = False
        it.host.local.let_go()
        await outcome(running)


async def test_no_key_is_in_it(tmp_path: File) -> None:
    async with shown("", tmp_path) as it:
        one, two = await region(it.host, 65536), await region(it.host, 65536)
        it.host.local.hold = True
        running = await start(it.host, whole(one, two))
        async with asyncio.timeout(10):
            while not it.host.local.held:  # noqa: ASYNC110  what is waited for is not an event
                await asyncio.sleep(0)
        (request,) = it.host.local.links[0].held
        text = json.dumps(await document(it))
        assert str(request.key.rkey) not in text
        assert f"{request.key.rkey:x}" not in text
        it.host.local.hold = False
        it.host.local.let_go()
        await outcome(running)


async def test_the_last_minutes(tmp_path: File) -> None:
    async with shown("", tmp_path) as it:
        one, two = await region(it.host, 65536), await region(it.host, 65536)
        it.host.metrics.history.sample(1.0, 1001.0)
        await outcome(await start(it.host, whole(one, two)))
        it.host.metrics.history.sample(2.0, 1002.0)
        history = (await document(it))["history"]
        assert (history["at"], history["bandwidth"]) == ([1002.0], {"local": [65536.0]})
        assert history["ended"] == {"succeeded": [1.0]}
        assert history["p50"][0] > 0


async def test_of_many_nodes_and_links_those_in_use_are_told(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "NODES", 3)
    monkeypatch.setattr(documents, "LINKS", 2)
    brokers: dict[str, Broker] = {}
    async with shown("", tmp_path, brokers=brokers) as it, AsyncExitStack() as stack:
        other = Host("b", brokers, {})
        await other.open(stack)
        for name in ("a0", "a1", "a2", "b"):
            await it.host.directory.join(NodeEntry(name, f"{name}.test:1"))
        one, two = await region(it.host, 65536, "one"), await region(it.host, 65536, "two")
        await outcome(await start(it.host, whole(one, await region(other, 65536))))  # whose link stays, idle
        nodes = (await document(it))["nodes"]
        assert nodes["total"] == 5
        assert [each["name"] for each in nodes["listed"]] == ["a0", "b", "gpu-01"]
        it.host.local.hold = True
        running = await start(it.host, whole(two, one))
        await eventually(lambda: it.host.local.held > 0)
        links = (await document(it))["links"]
        assert links["total"] == 3
        assert [(each["node"], each["address"], each["grants"]) for each in links["listed"]] == [
            ("gpu-01", "gpu-01.test:1", 1)
        ] * 2
        it.host.local.let_go()
        await outcome(running)
