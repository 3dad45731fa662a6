"""Devices that a running guest has pulled out of its machine and put back. Rules of this file:

* The guest asks by a line of its progress, "!pull NAME" or "!plug NAME", and sees by itself what became of it.
* Only the devices in the table of the machine can be named.
* Memory behind a BAR is given to the machine anew with its device: QEMU 7.2 ends itself when a device takes up memory
  that another one had.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.lab.machine import PLUGS, bar_memory, monitor

SIGN = "!"


def obey(line: str, folder: Path, tell: Callable[[str], None]) -> None:
    """Carry out what a line asks for, by the monitor (QMP) of the machine whose files are in `folder`; `tell` gets why
    it can't be."""
    from qemu.qmp import QMPError
    from qemu.qmp.legacy import QEMUMonitorProtocol  # not at the top: the lab tells what it lacks without any library

    order, _, name = line.removeprefix(SIGN).partition(" ")
    if order not in ("pull", "plug") or name not in PLUGS:
        tell(f"The guest asks for something that there is not: {line}")
        return
    try:
        with QEMUMonitorProtocol(str(monitor(folder))) as connection:
            connection.connect()
            if order == "pull":
                connection.cmd("device_del", id=name)
            else:
                if "memdev" in PLUGS[name]:
                    connection.cmd("object-del", id=PLUGS[name]["memdev"])
                    connection.cmd("object-add", **bar_memory(folder))
                connection.cmd("device_add", id=name, **PLUGS[name])
    except (OSError, EOFError, QMPError) as error:
        tell(f"The machine does not {order} {name}: {error}")
