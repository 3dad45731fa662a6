"""A stand-in for the library pyverbs, as far as registrations use it: it registers nothing, keeps the kernel's rules
for dma-bufs, and counts what is open."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import cast

from peermem.fabric import verbs
from peermem.fabric.verbs_domains import Domains
from peermem.fabric.verbs_nic import Port

_DMA_BUF_ACCESS = 1 | 2 | 4 | 8


class PyverbsError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"Failed to register. Errno: {code}")
        self.error_code = code


class Registered:
    """What the library makes."""

    made: list[Registered]
    """In order."""
    fails: dict[str, int]
    """Errno by what is asked for: MR or DmaBufMR."""

    def __init__(self, pd: object, length: int, access: int, **where: int) -> None:
        if code := self.fails.get(type(self).__name__, 0):
            raise PyverbsError(code)
        self.pd, self.length, self.access, self.where = pd, length, access, where
        self.lkey, self.rkey = 2 * len(self.made), 2 * len(self.made) + 1
        self.is_open = True
        self.made.append(self)

    def close(self) -> None:
        self.is_open = False


class MR(Registered):
    def __init__(self, pd: object, length: int, access: int, address: int) -> None:
        super().__init__(pd, length, access, address=address)


class DmaBufMR(Registered):
    def __init__(self, pd: object, length: int, access: int, dmabuf: int, offset: int) -> None:
        if access & ~_DMA_BUF_ACCESS:
            raise PyverbsError(errno.EINVAL)
        super().__init__(pd, length, access, fd=dmabuf, offset=offset)


class MW:
    def __init__(self, pd: object, kind: int) -> None:
        assert kind == 2
        self.rkey = 0x100

    def close(self) -> None:
        """Ends."""


class Context:
    def __init__(self, name: str) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)


class PD:
    def __init__(self, context: object) -> None:
        self.context = context

    def close(self) -> None:
        """Ends."""


@contextmanager
def pyverbs() -> Iterator[type[Registered]]:
    """Have `fabric.verbs` find this library, and nothing of it afterwards."""
    modules: dict[str, dict[str, object]] = {
        "base": {"inc_rkey": lambda rkey: rkey + 1},
        "pyverbs_error": {"PyverbsError": PyverbsError},
        "device": {"Context": Context},
        "addr": {},
        "pd": {"PD": PD},
        "mr": {"MR": MR, "DmaBufMR": DmaBufMR, "MW": MW},
        "cq": {},
        "qp": {},
        "wr": {"SGE": lambda *_: None, "RecvWR": lambda **_: SimpleNamespace()},
    }
    before, library = dict(sys.modules), verbs._library
    for name, content in modules.items():
        module = ModuleType(f"pyverbs.{name}")
        vars(module).update(content)
        sys.modules[f"pyverbs.{name}"] = module
    sys.modules["pyverbs"] = ModuleType("pyverbs")
    verbs._library = None
    Registered.made, Registered.fails = [], {}
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
