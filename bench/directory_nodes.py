"""Simulated nodes for `bench.directory`: many clients of the directory in one process, told what to do over a pipe."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import structlog

from peermem.core.names import ChildName
from peermem.core.node import NodeDevice
from peermem.core.region import PublishedRegion
from peermem.core.types import FabricKind, Path
from peermem.directory.base import Changes, Counts, NodeEntry
from peermem.directory.etcd import EtcdDirectory, Settings
from peermem.directory.etcd_connection import Connection as EtcdConnection
from peermem.directory.etcd_connection import Fault, connect
from peermem.directory.etcd_member import Member
from peermem.directory.records import Keys

_LOCAL = 32
"""Directories that are opened at the same time in one process."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process simulates."""

    settings: Settings
    first: int
    count: int
    regions: int
    """Of each node."""
    watching: int
    """Nodes of these that follow the others, as all do in a cluster; the others are known, renew and publish only."""


def entry(number: int) -> NodeEntry:
    """Return what a node with eight NICs and eight GPUs says of itself."""
    return NodeEntry(
        node=f"sim-{number:05}",
        address=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:7470",
        epoch=os.urandom(8).hex(),
        version="0.1.0",
        fabrics=(FabricKind.VERBS, FabricKind.TCP, FabricKind.LOCAL),
        nics=tuple(f"mlx5_{index}/1" for index in range(8)),
        devices=tuple(NodeDevice(f"gpu{index}", "cuda", 80 << 30) for index in range(8)),
    )


def region(node: int, number: int, regions: int) -> PublishedRegion:
    """Return a region with two labels: each `model` is that of a thousandth of all, each `step` of a hundredth."""
    whole = node * regions + number
    name = ChildName(f"sim-{node:05}", "regions", f"r-{number}")
    labels = {"model": f"m{whole % 1000}", "step": str(whole % 100)}
    return PublishedRegion(name, 1 << 30, "cuda", Path.DMABUF, labels)


def run(pipe: Connection, share: Share) -> None:
    """Do what comes over the pipe, until it is closed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(_Nodes(pipe, share).serve())


class Quiet:
    """A node that is in the directory as any other one, and does not follow the others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._changes = Changes()
        keys = Keys(settings.prefix, settings.cluster)
        self._member = Member(keys, settings.lease, settings.machine, settings.max_published, self._changes, Counts())
        self._connection: EtcdConnection | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._stay())

    async def _stay(self) -> None:
        while True:
            with suppress(Fault):
                self._connection = await connect(self._settings.endpoints[0], self._settings.proof)
                try:
                    await self._member.stay(self._connection, lambda: None)
                finally:
                    await self._connection.close()
            await asyncio.sleep(1)

    async def join(self, entry: NodeEntry) -> None:
        self._member.join(entry)

    def publish(self, region: PublishedRegion) -> None:
        self._member.publish(region)

    @property
    def has_joined(self) -> bool:
        return self._member.lease is not None

    @property
    def unwritten(self) -> int:
        return self._member.unwritten

    async def changed(self) -> None:
        await self._changes.wait()

    async def leave(self) -> None:
        await self._member.leave()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class _Nodes:
    def __init__(self, pipe: Connection, share: Share) -> None:
        self._pipe = pipe
        self._share = share
        self._numbers = range(share.first, share.first + share.count)
        self._nodes: dict[int, EtcdDirectory | Quiet] = {}

    async def serve(self) -> None:
        while True:
            try:
                order, *arguments = await asyncio.to_thread(self._pipe.recv)
            except EOFError:
                return
            self._pipe.send(await getattr(self, order)(*arguments))

    async def open(self) -> None:
        """Connect all."""
        gate = asyncio.Semaphore(_LOCAL)

        async def one(number: int) -> None:
            async with gate:
                follows = number - self._share.first < self._share.watching
                directory = EtcdDirectory(self._share.settings) if follows else Quiet(self._share.settings)
                await directory.open()
                self._nodes[number] = directory

        await asyncio.gather(*map(one, self._numbers))

    async def join(self, known: int) -> tuple[float, float]:
        """Have all join; return when all had, and when all knew so many nodes."""
        for number, directory in self._nodes.items():
            await directory.join(entry(number))
        await self._until(_has_joined)
        joined = time.monotonic()
        return joined, await self.knows(known)

    async def knows(self, known: int) -> float:
        """Return when all know so many nodes."""
        await self._until(lambda each: isinstance(each, Quiet) or len(each.nodes()) == known)
        return time.monotonic()

    async def publish(self) -> float:
        """Publish all regions; return when all were written."""
        for number, directory in self._nodes.items():
            for index in range(self._share.regions):
                directory.publish(region(number, index, self._share.regions))
        await self._until(_has_written)
        return time.monotonic()

    async def leave(self, count: int) -> None:
        """Have the last ones leave."""
        for number in list(self._nodes)[-count:]:
            directory = self._nodes.pop(number)
            await directory.leave()
            await directory.close()

    async def counts(self) -> dict[str, int]:
        """Return what happened to all of them together."""
        told = [each.status().counts for each in self._nodes.values() if isinstance(each, EtcdDirectory)]
        names = ("renewals", "failed_renewals", "lost_leases", "resumes", "listings")
        return {name: sum(getattr(each, name) for each in told) for name in names}

    async def _until(self, condition: Callable[[EtcdDirectory | Quiet], Any]) -> None:
        async def one(directory: EtcdDirectory | Quiet) -> None:
            while not condition(directory):
                await directory.changed()

        await asyncio.gather(*map(one, self._nodes.values()))


def _has_joined(each: EtcdDirectory | Quiet) -> bool:
    return each.has_joined if isinstance(each, Quiet) else each.status().lease_left is not None


def _has_written(each: EtcdDirectory | Quiet) -> bool:
    return not (each.unwritten if isinstance(each, Quiet) else each.status().unwritten)


def shares(settings: Settings, nodes: int, regions: int, watching: int, processes: int) -> Iterable[Share]:
    """Yield what each process simulates."""
    for index in range(processes):
        first, end = nodes * index // processes, nodes * (index + 1) // processes
        yield Share(replace(settings, machine=f"p{index}"), first, end - first, regions, watching // processes)
