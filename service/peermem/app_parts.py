"""The devices, fabrics and storage that a configuration asks for: made here, started and closed by `app`."""

from __future__ import annotations

import math
from collections.abc import Callable

from peermem.config import AnyDevice, Config, Cuda, Memfd, Rocm, Udmabuf, Verbs, Vfio
from peermem.core.node import ADOPTED, ADOPTED_DMABUF
from peermem.core.types import FabricKind
from peermem.device.base import Device
from peermem.device.cuda import CudaDriver
from peermem.device.dmabuf import AdoptedDmaBufs
from peermem.device.gpu import GpuDevice
from peermem.device.memfd import AdoptedMemory, MemfdDevice
from peermem.device.p2pmem import p2pmem_devices
from peermem.device.pci_resource import PciResourceDevice
from peermem.device.rocm import HipDriver
from peermem.device.udmabuf import UdmabufDevice
from peermem.device.vfio import VfioDevice
from peermem.fabric.base import Fabric, Met
from peermem.fabric.local import LocalFabric
from peermem.fabric.tcp import TcpFabric
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.fabric.verbs_types import Marks, Timing
from peermem.fabric.verbs_types import Settings as VerbsSettings
from peermem.storage.files import LocalStorage
from peermem.storage.places import Place


class Parts:
    """The devices and fabrics that a configuration asks for."""

    def __init__(self, config: Config, lost: Callable[[bytes], None], met: Met) -> None:
        """`lost` gets the ids of accepted links that end by themselves, `met` rails on which something is carried."""
        self.tcp: TcpFabric | None = None
        self.verbs: VerbsFabric | None = None
        self.fabrics: dict[FabricKind, Fabric] = {}
        if config.fabric != "tcp":
            settings = _verbs_settings(config.verbs)
            self.fabrics[FabricKind.VERBS] = self.verbs = VerbsFabric(
                config.verbs.nics, settings=settings, on_link_lost=lost
            )
        if config.fabric != "verbs":
            self.fabrics[FabricKind.TCP] = self.tcp = TcpFabric(
                config.tcp.address,
                advertise=config.tcp.advertise,
                stall_timeout=config.tcp.stall_timeout,
                on_link_lost=lost,
                on_met=met,
            )
        self.fabrics[FabricKind.LOCAL] = LocalFabric(on_link_lost=lost)
        self.devices: dict[str, Device] = {device.name: _device(device) for device in config.devices}
        self.devices |= {device.name: device for device in (p2pmem_devices() if config.p2pmem else ())}
        self.storage = LocalStorage(
            [Place(folder.path, folder.write) for folder in config.storage.directories],
            block=config.storage.block,
            depth=config.storage.depth,
            limit=config.storage.max_running,
        )
        adopted = AdoptedMemory(ADOPTED, config.attach.adopt_limit)
        self.devices |= {ADOPTED: adopted, ADOPTED_DMABUF: AdoptedDmaBufs(ADOPTED_DMABUF, adopted.room)}

    @property
    def addresses(self) -> dict[str, str]:
        """Where the fabrics listen, for the log."""
        return {"tcp": self.tcp.address} if self.tcp is not None else {}


def _device(config: AnyDevice) -> Device:
    if isinstance(config, Memfd):
        return MemfdDevice(config.name, config.size)
    if isinstance(config, Cuda | Rocm):
        driver = CudaDriver if isinstance(config, Cuda) else HipDriver
        return GpuDevice(
            config.kind, config.name, config.address, config.size, lambda: driver(config.address), adopts=config.adopt
        )
    if isinstance(config, Udmabuf):
        return UdmabufDevice(config.name, config.size)
    if isinstance(config, Vfio):
        ranges = [(each.offset, each.size) for each in config.ranges]
        return VfioDevice(config.name, config.address, config.bar, ranges, bind=config.bind)
    return PciResourceDevice(config.name, config.address, config.bar, config.offset, config.size or 0)


def _verbs_settings(config: Verbs) -> VerbsSettings:
    exponent = round(math.log2(config.ack_timeout / _ACK_UNIT))
    timing = Timing(timeout=exponent, retries=config.retries, rnr_retries=7, min_rnr_timer=_RNR_TIMER)
    return VerbsSettings(
        timing=timing,
        mtu=config.mtu or _LARGEST_MTU,
        marks=Marks(config.hop_limit, config.traffic_class, config.service_level),
        gid_index=None if config.gid_index < 0 else config.gid_index,
        queue_pairs=config.queue_pairs,
        stall_timeout=config.stall_timeout,
    )


_ACK_UNIT = 4.096e-6
"""Seconds; NICs wait this times a power of two (IBA 1.4, 9.7.6.1.3)."""
_LARGEST_MTU = 4096
_RNR_TIMER = 12
"""0.64 ms until a SEND is tried again for which no receive was posted (IBA 1.4, 9.7.5.2.8)."""
