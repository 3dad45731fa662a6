"""Which kernel driver holds a PCI function: giving one to vfio-pci, and back.

Rules of this file:

* Nothing is bound but by `bind`, which the configuration has to ask for; what it took it gives back by `give_back`.
* `driver_override` names the driver for this one function, and no other of its kind.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

VFIO = "vfio-pci"


def driver(folder: Path) -> str:
    """Return the driver of the function at `folder` of sysfs; empty for none."""
    try:
        return (folder / "driver").readlink().name
    except OSError:
        return ""


def bind(folder: Path) -> str:
    """Give a function to vfio-pci; return the driver that had it before. Raises OSError. May take seconds."""
    before = driver(folder)
    (folder / "driver_override").write_text(VFIO)
    _probe_anew(folder)
    if driver(folder) != VFIO:
        (folder / "driver_override").write_text("\n")
        with suppress(OSError):
            _probe_anew(folder)
        raise OSError(f"the kernel gave it to {driver(folder) or 'no driver'}")
    return before


def give_back(folder: Path, before: str) -> None:
    """Take a function from vfio-pci, and have the kernel choose a driver if it had one before. Raises OSError."""
    (folder / "driver_override").write_text("\n")
    if driver(folder) == VFIO:
        (folder / "driver" / "unbind").write_text(folder.name)
    if before:
        (folder.parents[1] / "drivers_probe").write_text(folder.name)


def _probe_anew(folder: Path) -> None:
    if driver(folder):
        (folder / "driver" / "unbind").write_text(folder.name)
    (folder.parents[1] / "drivers_probe").write_text(folder.name)
