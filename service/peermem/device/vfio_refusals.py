"""Why a PCI function can't be used through vfio: from what the kernel answers to a reason with its fix."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Sequence
from pathlib import Path

from peermem.core.errors import (
    BarClaimed,
    DeviceForbidden,
    DeviceLost,
    InvalidField,
    KernelTooOld,
    LimitReached,
    PeermemError,
)
from peermem.core.units import format_size
from peermem.device.bar_memory import Range
from peermem.device.vfio_driver import VFIO, driver
from peermem.device.vfio_function import NotViable, VfioFunction


def refusal(device: str, folder: Path, dev: Path, error: OSError) -> PeermemError:
    """Return what it means that a function can't be opened or mapped."""
    what = f"Device {device} can't be opened"
    group = _group(folder)
    if isinstance(error, NotViable):
        others = ", ".join(f"{name} (driver {held})" for name, held in _held_by_others(folder)) or "others"
        return BarClaimed(
            f"{what}: its IOMMU group {group} has {others}, which vfio gives out only together. Give those functions "
            f"to {VFIO} as well, or move the card to a slot with a group of its own.",
            device=device,
        )
    if not folder.exists():
        return DeviceLost(f"Device {device} is not there: there is no PCI function {folder.name}.", device=device)
    if not group and error.errno == errno.ENOENT:
        return KernelTooOld(
            f"{what}: no IOMMU is in use for PCI function {folder.name}, and vfio needs one. Switch it on in the "
            "firmware and boot with intel_iommu=on (AMD's is on by itself).",
            device=device,
        )
    if error.errno == errno.EBUSY:
        return BarClaimed(f"{what}: another process has it. End that, such as a virtual machine.", device=device)
    if error.errno in (errno.EACCES, errno.EPERM):
        return DeviceForbidden(
            f"{what}: the daemon may not use {dev}/vfio/{group} ({error.strerror}). Give its user read and write "
            "access, pass it into the container, and see in the kernel's log whether the IOMMU can remap interrupts.",
            device=device,
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return LimitReached(
            f"{what}: {error.strerror}. Raise the daemon's limit of open files (LimitNOFILE), or delete regions.",
            device=device,
        )
    return DeviceLost(
        f"{what}: {error.strerror or error}. Load vfio_iommu_type1, and see the kernel's log.", device=device
    )


def not_with_vfio(device: str, folder: Path) -> PeermemError:
    """Return the reason where another driver, or none, holds the function."""
    if not folder.exists():
        return DeviceLost(
            f"Device {device} is not there: there is no PCI function {folder.name}. Correct the address, or bring the "
            "function back.",
            device=device,
        )
    held = driver(folder)
    holder = f"driver {held} holds" if held else "no driver holds"
    return BarClaimed(
        f"Device {device} can't be opened: {holder} PCI function {folder.name}, not {VFIO}. Bind it (echo {VFIO} > "
        f"{folder}/driver_override, unbind it, echo {folder.name} > /sys/bus/pci/drivers_probe), or set bind = true in "
        "its [[device]] table.",
        device=device,
        driver=held,
    )


def not_bound(device: str, folder: Path, error: OSError) -> PeermemError:
    """Return the reason for which a function can't be given to vfio-pci."""
    if not folder.exists():
        return not_with_vfio(device, folder)
    return DeviceForbidden(
        f"Device {device} can't be bound to {VFIO}: {error.strerror or error}. Load that module, run the daemon as "
        "root with /sys mounted for writing, or bind the function by hand.",
        device=device,
    )


def not_exported(device: str, error: OSError) -> PeermemError:
    """Return the reason for which there is no dma-buf of a range."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return LimitReached(
            f"No dma-buf of device {device} can be made: {error.strerror}. Raise the daemon's limit of open files "
            "(LimitNOFILE), or delete regions.",
            device=device,
        )
    return KernelTooOld(
        f"This kernel exports no dma-buf of device {device} ({error.strerror}). Run Linux 6.19 or newer with "
        "CONFIG_VFIO_PCI_DMABUF.",
        device=device,
    )


def checked(device: str, folder: Path, bar: int, function: VfioFunction, ranges: Sequence[Range]) -> Sequence[Range]:
    """Return the ranges of a BAR that are meant, all of it for none. Raises InvalidField, DeviceLost, OSError."""
    window = function.bar(bar)
    whole = window.size // mmap.PAGESIZE * mmap.PAGESIZE
    if not whole or not window.is_mappable:
        raise DeviceLost(
            f"Device {device} is not there: vfio maps no BAR {bar} of {folder.name} of at least a page. Name one that "
            "it does.",
            device=device,
        )
    for offset, size in ranges:
        if offset + size > whole:
            raise InvalidField(
                f"Device {device} is to have {format_size(size)} at offset {offset} of BAR {bar} of {folder.name}, "
                f"which has {format_size(window.size)}. Correct the ranges in its [[device]] table.",
                device=device,
            )
    return ranges or [(0, whole)]


def _group(folder: Path) -> str:
    """Return the number of the function's IOMMU group; empty without an IOMMU."""
    try:
        return (folder / "iommu_group").readlink().name
    except OSError:
        return ""


def _held_by_others(folder: Path) -> list[tuple[str, str]]:
    """Return the functions of the same group that a driver other than vfio-pci holds, with it."""
    found = []
    for other in sorted((folder / "iommu_group/devices").glob("*")):
        held = driver(other)
        if held not in ("", VFIO, "pcieport"):
            found.append((other.name, held))
    return found
