"""Directories on etcd for tests, and waiting for what they come to know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from peermem.core.names import ChildName
from peermem.core.node import NodeDevice
from peermem.core.region import PublishedRegion
from peermem.core.types import FabricKind, Path
from peermem.directory.base import Directory, NodeEntry
from peermem.directory.etcd import EtcdDirectory, Settings
from tests.directory.etcd_server import PATIENCE

PREFIX = "/peermem/v1"
FULL = NodeEntry(
    "a",
    "10.0.0.1:7470",
    "e1",
    "0.1.0",
    (FabricKind.VERBS, FabricKind.TCP),
    ("mlx5_0/1",),
    (NodeDevice("gpu0", "cuda", 1 << 36),),
)


def settings(endpoint: str, cluster: str, **changes: object) -> Settings:
    made = Settings([endpoint], PREFIX, cluster, lease=20, max_published=1000, machine="m1")
    return replace(made, **changes)  # type: ignore[arg-type]


def region(name: str, node: str = "a", **labels: str) -> PublishedRegion:
    return PublishedRegion(ChildName(node, "regions", name), 4096, "memfd", Path.HOST, labels)


@asynccontextmanager
async def opened(chosen: Settings, entry: NodeEntry | None = None) -> AsyncIterator[EtcdDirectory]:
    """Open a directory, which leaves and closes at the end; with an entry, it joins."""
    directory = EtcdDirectory(chosen)
    await directory.open()
    try:
        if entry is not None:
            await directory.join(entry)
            await until(directory, lambda: directory.status().lease_left is not None)
        yield directory
    finally:
        await directory.leave()
        await directory.close()


async def until(directory: Directory, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Wait until a condition on a directory holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await directory.changed()
