"""What end-to-end tests share: bytes, waiting, and what a daemon's process holds."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from bench.daemons import Daemon

import peermem
from peermem.client.errors import from_call

MIB = 1 << 20
PATIENCE = 30.0


def fault(error: grpc.RpcError) -> peermem.PeermemError:
    """Return what a call failed with, as the client would raise it."""
    return from_call(error, "the daemon")  # type: ignore[arg-type]


def noise(length: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(length)


def eventually(condition: Callable[[], bool], what: str = "it", timeout: float = PATIENCE) -> None:
    """Ask until a condition holds: for what a daemon does by itself and tells nobody."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def moving(transfer: peermem.Transfer) -> None:
    """Wait until bytes of a transfer move."""
    for progress in transfer.watch():
        if progress.bytes_done:
            return


def holdings(daemon: Daemon, node: peermem.Node) -> dict[str, object]:
    """What has to be back at its baseline when nobody uses a daemon any more."""
    info = node.info()
    descriptors: dict[str, int] = {}
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        try:
            kind = os.readlink(entry).split(":")[0]
        except FileNotFoundError:
            continue
        descriptors[kind] = descriptors.get(kind, 0) + 1
    return {
        "regions": info.region_count,
        "bytes": info.region_bytes,
        "transfers": info.running_transfer_count,
        "grants": info.grant_count,
        "memory files": sum(count for kind, count in descriptors.items() if "memfd" in kind),
        "dma-bufs": sum(count for kind, count in descriptors.items() if "dmabuf" in kind),
        "sessions": metric(daemon, "peermem_attach_sessions"),
    }


def metric(daemon: Daemon, name: str) -> float:
    """Return the sum of a metric's samples."""
    lines = [line for line in daemon.scrape().splitlines() if line.split("{")[0].split(" ")[0] == name]
    assert lines, f"{name} is not on the metrics page"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
