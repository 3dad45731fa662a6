"""The tables of devices in the configuration, one for each kind.

Rules of this file: those of `config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct

from peermem.config_values import BarOffset, BarSize, DeviceSize, Name, PciAddress
from peermem.core.node import ADOPTED, ADOPTED_DMABUF, P2PMEM
from peermem.strict_toml import Contradiction


class Memfd(Struct, frozen=True, forbid_unknown_fields=True):
    """Host memory that stands in for a BAR."""

    name: Name
    """Unique on the node."""
    size: DeviceSize
    """Bytes in all."""
    kind: Literal["memfd"] = "memfd"


class PciResource(Struct, frozen=True, forbid_unknown_fields=True):
    """A range of a PCI function's BAR, which the CPU copies."""

    name: Name
    """Unique on the node."""
    address: PciAddress
    """Of the function."""
    bar: Annotated[int, Meta(ge=0, le=5)]
    """Number of the BAR."""
    offset: BarOffset = BarOffset(0)
    """Of its first byte in the BAR."""
    size: BarSize | None = None
    """Bytes in all; None: the rest of the BAR."""
    kind: Literal["pci_resource"] = "pci_resource"


class Cuda(Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU of NVIDIA's."""

    name: Name
    """Unique on the node."""
    address: PciAddress
    """Of its PCI function."""
    size: DeviceSize
    """Bytes that regions may take of its memory; they are taken at once, when it is first used or tried."""
    adopt: bool = True
    """Let jobs of this node make regions of memory that they have on it."""
    kind: Literal["cuda"] = "cuda"


class Rocm(Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU of AMD's."""

    name: Name
    """Unique on the node."""
    address: PciAddress
    """Of its PCI function."""
    size: DeviceSize
    """Bytes that regions may take of its memory; they are taken at once, when it is first used or tried."""
    adopt: bool = True
    """Let jobs of this node make regions of memory that they have on it."""
    kind: Literal["rocm"] = "rocm"


class Udmabuf(Struct, frozen=True, forbid_unknown_fields=True):
    """Host memory as dma-bufs, which stands in for that of a device that exports its own."""

    name: Name
    """Unique on the node."""
    size: DeviceSize
    """Bytes in all."""
    kind: Literal["udmabuf"] = "udmabuf"


class BarRange(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a BAR."""

    offset: BarOffset
    """Of its first byte in the BAR."""
    size: BarSize
    """Bytes."""


class Vfio(Struct, frozen=True, forbid_unknown_fields=True):
    """Ranges of a BAR of a PCI function that vfio-pci holds, exported as dma-bufs."""

    name: Name
    """Unique on the node."""
    address: PciAddress
    """Of the function."""
    bar: Annotated[int, Meta(ge=0, le=5)]
    """Number of the BAR."""
    ranges: tuple[BarRange, ...] = ()
    """Which parts of it are memory; none: all of it."""
    bind: bool = False
    """Take the function from its driver for vfio-pci, and give it back at the end."""
    kind: Literal["vfio"] = "vfio"


AnyDevice = Memfd | PciResource | Cuda | Rocm | Udmabuf | Vfio


def device_contradictions(devices: tuple[AnyDevice, ...]) -> Iterator[Contradiction]:
    """Yield what of devices does not go together, with the key that it is about."""
    names = [device.name for device in devices]
    for name in (name for name in (ADOPTED, ADOPTED_DMABUF) if name in names):
        yield "device", f"device has the name {name}, which stands for memory that jobs hand in. Choose another."
    for name in names:
        if name.startswith(P2PMEM):
            yield "device", f"device has the name {name}; {P2PMEM} begins the names of p2pmem pools. Choose another."
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "device", f"device has the name {name} more than once. Give each device its own."
    gpus = [device.address for device in devices if isinstance(device, Cuda | Rocm)]
    for address in sorted({address for address in gpus if gpus.count(address) > 1}):
        yield "device", f"device has the GPU at {address} more than once. Make one device of it."
    on_pci = [device.address for device in devices if isinstance(device, PciResource | Vfio)]
    for device in (device for device in devices if isinstance(device, Vfio)):
        if on_pci.count(device.address) > 1:
            yield (
                "device",
                f"device {device.name} has PCI function {device.address}, as another one has. vfio gives a function "
                "out as a whole: make one device of it.",
            )
        ends = [(each.offset, each.offset + each.size) for each in sorted(device.ranges, key=lambda each: each.offset)]
        if any(end > start for (_, end), (start, _) in pairwise(ends)):
            yield "device", f"device {device.name} has ranges that overlap. Set them apart."
    for one, other in combinations([device for device in devices if isinstance(device, PciResource)], 2):
        if (one.address, one.bar) == (other.address, other.bar) and _overlap(one, other):
            yield (
                "device",
                f"device {other.name} overlaps {one.name} in BAR {one.bar} of {one.address}. Set them apart.",
            )


def _overlap(one: PciResource, other: PciResource) -> bool:
    low, high = sorted((one, other), key=lambda device: device.offset)
    return low.size is None or low.offset + low.size > high.offset
