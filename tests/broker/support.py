"""Short words for the requests of broker tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from peermem.broker.regions import Region
from peermem.broker.runs import Transfer
from peermem.core.errors import PeermemError
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.policy import Action
from peermem.core.region import Lease, RegionRequest
from peermem.core.segments import SegmentList, columns
from peermem.core.transfer import State, TransferFacts, TransferRequest
from peermem.core.types import FabricKind
from tests.doubles import PATIENCE, Host


async def region(
    host: Host, length: int, name: str = "", lease: Lease | None = None, data: bytes = b"", device: str = "bar0"
) -> Region:
    """Make a region of nobody's, with `data` at its start."""
    made = await host.broker.create_region(ANONYMOUS, None, RegionRequest(name, length, device, "", {}, lease))
    if data:
        with host.broker.use_region(ANONYMOUS, made.name, Action.WRITE, 0, len(data)) as use:
            await use.write(0, data)
    return made


async def content(host: Host, made: Region) -> bytes:
    """Return a region's bytes, as its node reads them."""
    with host.broker.use_region(ANONYMOUS, made.name, Action.READ, 0, made.memory.length) as use:
        return await use.read(0, made.memory.length)


def whole(source: Region, destination: Region) -> SegmentList:
    """The list that copies all of `source` to the start of `destination`."""
    return columns(source.name, destination.name, (0,), (0,), (source.memory.length,))


async def start(
    host: Host,
    *lists: SegmentList,
    timeout: float | None = None,
    checksum: bool = False,
    fabric: FabricKind | None = None,
    subject: Subject = ANONYMOUS,
) -> Transfer:
    return await host.broker.create_transfer(subject, TransferRequest(lists, timeout, checksum, fabric), relayed=False)


async def outcome(transfer: Transfer) -> TransferFacts:
    async with asyncio.timeout(PATIENCE):
        await transfer.ended.wait()
    await asyncio.sleep(0)  # who asked is told before it is counted and its grants are given back
    return transfer.facts


async def failure(transfer: Transfer) -> PeermemError:
    """Wait for a transfer that must fail, and return why it did."""
    facts = await outcome(transfer)
    assert facts.state is State.FAILED
    assert facts.error is not None
    return facts.error


async def eventually(condition: Callable[[], bool]) -> None:
    """Give the loop turns until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for is not an event
            await asyncio.sleep(0.001)
