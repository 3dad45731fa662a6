"""How late the event loop is: what a daemon that is too busy shows first."""

from __future__ import annotations

import asyncio

from peermem.telemetry.metrics import Metrics


async def watch_event_loop(metrics: Metrics, interval: float = 0.25) -> None:
    """Measure how late the running event loop is, every `interval` seconds, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval
        await asyncio.sleep(interval)
        metrics.event_loop_lag(max(0.0, clock() - due))
