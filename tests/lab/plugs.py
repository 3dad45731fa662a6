"""Devices that a running guest has pulled out of its machine and put back. Rules of this file:

* The guest asks by a line of its progress, "!pull NAME" or "!plug NAME", and sees by itself what became of it.
* Only the devices in the table of the machine can be named.
* Memory behind a BAR is given to the machine anew with its device: QEMU 7.2 ends itself when a device takes up memory
  that another one had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.lab.machine import PLUGS, bar_memory, monitor

SIGN = "!"

Command = tuple[str, dict[str, object]]


def obey(line: str, folder: Path, tell: Callable[[str], None]) -> None:
    """Carry out what a line asks for, by the monitor (QMP) of the machine whose files are in `folder`; `tell` gets why
    it can't be."""
    from qemu.qmp import QMPError  # not at the top: the lab tells what it lacks without any library

    order, _, name = line.removeprefix(SIGN).partition(" ")
    if order not in ("pull", "plug") or name not in PLUGS:
        tell(f"The guest asks for something that there is not: {line}")
        return
    try:
        asyncio.run(_execute(monitor(folder), list(_commands(order, name, folder))))
    except (OSError, EOFError, QMPError) as error:
        tell(f"The machine does not {order} {name}: {error}")


def _commands(order: str, name: str, folder: Path) -> Iterator[Command]:
    if order == "pull":
        yield "device_del", {"id": name}
        return
    words = dict(PLUGS[name])
    if "memdev" in words:
        yield "object-del", {"id": words["memdev"]}
        yield "object-add", dict(bar_memory(folder))
    yield "device_add", {"id": name, **words}


async def _execute(socket: Path, commands: list[Command]) -> None:
    from qemu.qmp import QMPClient

    client = QMPClient()
    await client.connect(str(socket))
    try:
        for command, arguments in commands:
            await client.execute(command, arguments)
    finally:
        await client.disconnect()
