"""The orderly end of a broker: what runs ends or fails, then what it owns is closed, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from peermem.broker.runs import Transfer
from peermem.broker.storage import StorageRun
from peermem.core.errors import ShuttingDown

if TYPE_CHECKING:
    from peermem.broker.broker import Broker

log = structlog.get_logger(__name__)

MARGIN = 5.0
"""Seconds that an orderly end may take beyond the time of a grant."""


async def drain(broker: Broker, grace: float, grant_ttl: float) -> None:
    """Wait up to `grace` seconds for what runs to end, then fail it."""
    waits = [each.ended.wait() for each in broker.running()]
    try:
        async with asyncio.timeout(grace):
            await asyncio.gather(*waits)
    except TimeoutError:
        error = ShuttingDown(f"nodes/{broker.node} is shutting down and its grace time of {grace:g} s is over.")
        running = broker.running()
        for each in running:
            each.fail(error)
        await broker.links.close()  # what is on the way to a node that stands still comes back now
        await _await_fences(running, grant_ttl)


async def _await_fences(running: Sequence[Transfer | StorageRun], grant_ttl: float) -> None:
    """Wait for what failed to end, but no longer than any grant lives: after that nothing is written."""
    try:
        async with asyncio.timeout(grant_ttl + MARGIN):
            await asyncio.gather(*(transfer.ended.wait() for transfer in running))
    except TimeoutError:
        log.error("transfers_did_not_end", count=sum(not transfer.ended.is_set() for transfer in running))


async def close(broker: Broker, grant_ttl: float) -> None:
    """End regions, links and grants in that order."""
    try:
        async with asyncio.timeout(grant_ttl + MARGIN):
            await broker.regions.close(ShuttingDown(f"nodes/{broker.node} is shutting down."))
    except TimeoutError:  # what holds them is of a transfer that did not end; the process ends all the same
        log.error("regions_did_not_end", count=len(broker.regions))
    await broker.links.close()
    await broker.serving.close()
