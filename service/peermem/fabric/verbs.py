"""The only door to pyverbs: its objects under our types, for releases 44 to 65 of rdma-core.

Rules of this file:

* No type, enumeration or exception of pyverbs leaves the files `verbs.py` and `verbs_qp.py`: what fails raises
  VerbsError with an errno.
* Everything is called by one thread, the event loop's, and never waits: that is the one lock of each queue pair
  and completion queue.
* Whoever makes an object closes it, in this order: windows, queue pair, regions, completion queue, domain, device.
  Closing twice is no error, and nothing is left to the garbage collector.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from peermem.core.errors import PyverbsMissing
from peermem.core.gid import Gid
from peermem.fabric.verbs_types import MTUS, Access, DeviceCaps, PortState, VerbsError

_CAP_WINDOWS_2B = 1 << 24
_SOFTWARE = frozenset({0, 0xFFFFFF})
"""Vendors of NICs that nobody sold: rxe gives the latter, and none in older kernels."""
_WITH_IMM = 2
_PORT_ACTIVE = 4
_ETHERNET = 2
_GID_TYPES = {1: "IB/RoCE v1", 2: "RoCE v2"}
_MAX_GIDS = 1024


class _Pyverbs:
    """The library's modules, imported on first use; what differs between its releases is in this class."""

    def __init__(self) -> None:
        handlers, level = list(logging.root.handlers), logging.root.level
        try:
            self.base = import_module("pyverbs.base")
            self.error: type[Exception] = import_module("pyverbs.pyverbs_error").PyverbsError
            self.device = import_module("pyverbs.device")
            self.addr = import_module("pyverbs.addr")
            self.pd = import_module("pyverbs.pd")
            self.mr = import_module("pyverbs.mr")
            self.cq = import_module("pyverbs.cq")
            self.qp = import_module("pyverbs.qp")
            self.wr = import_module("pyverbs.wr")
        finally:  # every release calls logging.basicConfig() when it is imported
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
        # Every object, each work completion among them, asks for its class's logger: remember which that is.
        vars(self.base)["logging"] = SimpleNamespace(getLogger=cache(logging.getLogger))
        self.sge = self.wr.SGE(0, 0, 0)
        self.receive = self.wr.RecvWR(num_sge=1, sg=[self.sge])
        self.receive.num_sge = 0  # the constructor wants one

    @staticmethod
    def open_with_fd(make: Callable[[], Any]) -> tuple[Any, int]:
        """Return what `make` makes, and the descriptor of events that came with it.

        CompChannel.fd exists since release 57; Context has no property for its own in any. The loop's thread is
        the only one that opens such files, so a new one of this kind is the one that was asked for.
        """
        before = _event_fds()
        made = make()
        fd = getattr(made, "fd", None)
        if fd is None:
            fd = max(_event_fds() - before)
        os.set_blocking(fd, False)
        return made, fd


_library: _Pyverbs | None = None


def load() -> None:
    """Import pyverbs. Raises PyverbsMissing."""
    global _library
    if _library is not None:
        return
    try:
        _library = _Pyverbs()
    except ImportError as error:
        raise PyverbsMissing(
            f"The verbs fabric needs pyverbs, which can't be imported: {error}. Install the distribution's "
            "python3-pyverbs for this Python, of the same release as its libibverbs.",
        ) from error


def loaded() -> _Pyverbs:
    """Return the library. Raises PyverbsMissing."""
    load()
    assert _library is not None
    return _library


def close(thing: Any) -> None:
    """Close an object of pyverbs. Up to release 61 and on Python 3.12 or newer, WeakSet.pop lets a KeyError out of
    `close` where a child is being collected (f167dea17): then it is closed once more."""
    try:
        thing.close()
    except KeyError:
        thing.close()


def _event_fds() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "[infinibandevent]" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Turn what pyverbs raises into VerbsError."""
    try:
        yield
    except loaded().error as error:
        raise fault(error) from None


def fault(error: Exception) -> VerbsError:
    """Return what pyverbs raised as ours."""
    return VerbsError(str(error), max(0, abs(getattr(error, "error_code", 0))))


def device_names() -> list[str]:
    """Return the RDMA devices in this network namespace. Raises PyverbsMissing."""
    library = loaded()
    try:
        return [found.name.decode() for found in library.device.get_device_list()]
    except library.error:  # no RDMA subsystem is loaded
        return []


class Owned:
    """An object of a device, counted there while it is open."""

    kind = ""

    def __init__(self, device: Device, thing: Any) -> None:
        self.device = device
        self._thing = thing
        device.counts[self.kind] += 1

    @property
    def thing(self) -> Any:
        """What pyverbs knows it as; for this file and `verbs_qp.py` only."""
        return self._thing

    def close(self) -> None:
        """Give it back. Raises VerbsError, unless the device is gone, and all that was on it."""
        if self._thing is not None:
            self.device.release(self._thing)
            self._thing = None
            self.device.counts[self.kind] -= 1


class Device:
    """An opened device."""

    def __init__(self, name: str) -> None:
        """Raises VerbsError."""
        self.name = name
        with faults():
            self._context, self.event_fd = _Pyverbs.open_with_fd(lambda: loaded().device.Context(name=name))
        self.is_lost = False
        """Whether its driver or the kernel took it away; the owner is told so by an event."""
        self.counts: Counter[str] = Counter()
        """Open objects by kind: pd, mr, mw, cq, qp."""
        self.extended = True
        """Whether queue pairs have the extended interface; found out by the first one."""

    @property
    def context(self) -> Any:
        """For this file only."""
        return self._context

    def caps(self) -> DeviceCaps:
        """Ask the device what it can do. Raises VerbsError."""
        with faults():
            basic = self._context.query_device()
            odp = None
            with contextlib.suppress(loaded().error):
                odp = self._context.query_device_ex().odp_caps
        return DeviceCaps(
            ports=basic.phys_port_cnt,
            max_wr=basic.max_qp_wr,
            max_cqe=basic.max_cqe,
            reads_served=basic.max_qp_rd_atom,
            reads_sent=basic.max_qp_init_rd_atom,
            windows=bool(basic.device_cap_flags & _CAP_WINDOWS_2B),
            window_ranges=basic.vendor_id not in _SOFTWARE,
            on_demand=odp is not None and bool(odp.general_caps & 1) and odp.rc_odp_caps & 0xC == 0xC,
        )

    def port(self, number: int) -> PortState:
        """Ask a port for its state. Raises VerbsError."""
        with faults():
            port = self._context.query_port(number)
        return PortState(
            port.state == _PORT_ACTIVE, MTUS.get(port.active_mtu, 1024), port.lid, port.link_layer == _ETHERNET
        )

    def gids(self, port: int) -> list[Gid]:
        """Return a port's addresses. Raises VerbsError."""
        with faults():
            entries = self._context.query_gid_table(_MAX_GIDS)
        return [
            Gid(entry.gid_index, bytes.fromhex(entry.gid_str().replace(":", "")), _GID_TYPES.get(entry.gid_type, ""))
            for entry in entries
            if entry.port_num == port
        ]

    def next_event(self) -> int | None:
        """Take one asynchronous event; None when there is none. Acknowledged at once: what it is about can only be
        destroyed then, and pyverbs does not say what that is."""
        try:
            event = self._context.get_async_event()
        except loaded().error:  # release 65 still loses the errno
            return None
        kind = int(event.event_type)
        event.ack()
        return kind

    def release(self, thing: Any) -> None:
        """Close an object of pyverbs that is on this device. Raises VerbsError, unless the device is gone."""
        try:
            with faults():
                close(thing)
        except VerbsError:
            if not self.is_lost:
                raise

    def close(self) -> None:
        """Raises VerbsError, unless the device is gone."""
        self.release(self._context)


class Domain(Owned):
    """A protection domain."""

    kind = "pd"

    def __init__(self, device: Device) -> None:
        """Raises VerbsError."""
        with faults():
            super().__init__(device, loaded().pd.PD(device.context))


class MemoryRegion(Owned):
    """Registered memory. Its owner keeps the memory mapped until this is closed."""

    kind = "mr"

    def __init__(self, domain: Domain, address: int, length: int, access: Access) -> None:
        """Raises VerbsError. An address is always given: without one pyverbs allocates memory, and leaks it."""
        with faults():
            super().__init__(domain.device, self._register(domain, address, length, access))
        self.address = address
        self.length = length
        self.lkey: int = self._thing.lkey
        self.rkey: int = self._thing.rkey

    def _register(self, domain: Domain, address: int, length: int, access: Access) -> Any:
        return loaded().mr.MR(domain.thing, length, int(access), address)


class DmaBufRegion(MemoryRegion):
    """A registered range of a dma-buf. Its addresses count from the dma-buf's first byte; the kernel holds the dma-buf
    until this is closed, whatever becomes of the descriptor. It takes no memory windows."""

    def __init__(self, domain: Domain, fd: int, offset: int, length: int, access: Access) -> None:
        """`fd` stays the caller's. Raises VerbsError."""
        self._fd = fd
        super().__init__(domain, offset, length, access)

    def _register(self, domain: Domain, address: int, length: int, access: Access) -> Any:
        return loaded().mr.DmaBufMR(domain.thing, length, int(access), dmabuf=self._fd, offset=address)


class Window(Owned):
    """A memory window of type 2, bound once and closed: libibverbs does not update its key when it is bound, so that
    a second bind through SendWR would give the same key again. `close` ends every access through it."""

    kind = "mw"

    def __init__(self, domain: Domain) -> None:
        """Raises VerbsError."""
        library = loaded()
        with faults():
            super().__init__(domain.device, library.mr.MW(domain.thing, 2))
            self.rkey: int = library.base.inc_rkey(self._thing.rkey)
            """What its bind makes valid."""


class CompletionQueue(Owned):
    """A completion queue with a channel of its own: pyverbs can't acknowledge another queue's events."""

    kind = "cq"

    def __init__(self, device: Device, depth: int) -> None:
        """Raises VerbsError."""
        library = loaded()
        self._error = library.error
        with faults():
            self._channel, self.fd = _Pyverbs.open_with_fd(lambda: library.cq.CompChannel(device.context))
            try:
                super().__init__(device, library.cq.CQ(device.context, depth, None, self._channel))
            except library.error:
                close(self._channel)
                raise

    def poll(self, count: int) -> Sequence[tuple[int, int, int | None]]:
        """Take up to `count` completions: number of the request, status, and what a SEND brought. Raises VerbsError."""
        try:  # not `faults`: this is called most
            found = self._thing.poll(count)[1]
        except self._error as error:
            raise fault(error) from None
        return found and [
            (wc.wr_id, wc.status, socket.ntohl(wc.imm_data) if wc.wc_flags & _WITH_IMM else None) for wc in found
        ]

    def arm(self) -> None:
        """Let `fd` become readable with the next completion. Those that are there already don't count: poll."""
        with faults():
            self._thing.req_notify()

    def acknowledge(self) -> None:
        """Take an event off `fd`, if there is one."""
        try:
            self._channel.get_cq_event(self._thing)
        except loaded().error:
            return
        self._thing.ack_events(1)

    def close(self) -> None:
        """See Owned."""
        super().close()
        self.device.release(self._channel)
