"""A stand-in for the library pyverbs: it keeps the kernel's rules for registrations, and counts what is open. What is
not about memory regions is in `nic_double.py`."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import cast

from peermem.fabric import verbs
from peermem.fabric.verbs_domains import Domains
from peermem.fabric.verbs_nic import Port
from tests.fabric import nic_double
from tests.fabric.nic_double import NICS, PD, Part, PyverbsError

_DMA_BUF_ACCESS = 1 | 2 | 4 | 8


class Registered(Part):
    """What the library makes."""

    made: list[Registered]
    """In order."""

    def __init__(self, pd: PD, address: int, length: int, access: int, where: dict[str, int]) -> None:
        super().__init__(pd)
        self.pd, self.address, self.length, self.access, self.where = pd, address, length, access, where
        self.lkey = self.rkey = next(NICS.numbers) << 8
        NICS.keys[self.lkey] = self
        self.made.append(self)

    def pointer(self, address: int) -> int:
        """Return where the CPU finds what has this address for the NIC."""
        return address

    def close(self) -> None:
        super().close()
        NICS.keys.pop(self.lkey, None)


class MR(Registered):
    def __init__(self, pd: PD, length: int, access: int, address: int) -> None:
        super().__init__(pd, address, length, access, {"address": address})


class DmaBufMR(Registered):
    def __init__(self, pd: PD, length: int, access: int, dmabuf: int, offset: int) -> None:
        if access & ~_DMA_BUF_ACCESS:
            raise PyverbsError(errno.EINVAL)
        super().__init__(pd, offset, length, access, {"fd": dmabuf, "offset": offset})
        self._mapping: mmap.mmap | None = None

    def pointer(self, address: int) -> int:
        if self._mapping is None:
            self._mapping = mmap.mmap(self.where["fd"], 0)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping)) + address


@contextmanager
def pyverbs(*nics: str) -> Iterator[type[Registered]]:
    """Have `fabric.verbs` find this library, with these NICs, and nothing of it afterwards."""
    before, library = dict(sys.modules), verbs._library
    modules = dict(nic_double.modules()) | {
        "mr": {"MR": MR, "DmaBufMR": DmaBufMR, "MW": nic_double.MW, "MWBindInfo": nic_double.MWBindInfo}
    }
    for name, content in modules.items():
        module = ModuleType(f"pyverbs.{name}")
        vars(module).update(content)
        sys.modules[f"pyverbs.{name}"] = module
    sys.modules["pyverbs"] = ModuleType("pyverbs")
    verbs._library = None
    Registered.made = []
    NICS.reset(nics)
    try:
        yield Registered
    finally:
        sys.modules.clear()
        sys.modules.update(before)
        verbs._library = library


@contextmanager
def nic_port(*, on_demand: bool = True, windows: bool = True, window_ranges: bool = True) -> Iterator[Port]:
    """A port of a NIC that is not here, as far as registrations look at it."""
    device = verbs.Device("nic0")
    caps = SimpleNamespace(on_demand=on_demand, windows=windows, window_ranges=window_ranges)
    nic = _Nic(device, Domains(device), caps)
    yield cast(Port, SimpleNamespace(name="nic0/1", nic=nic))
    assert device.counts["pd"] == 0
    device.close()


@dataclass(eq=False)
class _Nic:
    device: verbs.Device
    domains: Domains
    caps: SimpleNamespace
