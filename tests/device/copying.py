"""What the tests of BAR ranges share: a device on a tree of ordinary files, and its copying processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from peermem.device.base import Copier, DeviceMemory
from tests.descriptors import until

MIB = 1 << 20


def processes(parent: int = os.getpid()) -> list[int]:
    """Return the copying processes of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (folder / "status").read_text(), (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if f"\nPPid:\t{parent}\n" in status and b"word_copier.py" in command:
            found.append(int(folder.name))
    return found


def copier(made: DeviceMemory) -> Copier:
    assert made.copier is not None
    return made.copier


async def stopped(pid: int) -> None:
    """Stop a process, so that what is asked of it stays unanswered."""
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text())
