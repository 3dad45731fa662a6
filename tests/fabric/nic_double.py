"""A NIC that is a few lines of Python, under pyverbs' names: what is posted is done at once, by the CPU.

Rules of this file:

* It keeps the rules of a real one: keys count within their protection domain, windows for their queue pair, each with
  its range and rights; a queue pair breaks with the first request that fails, and what has something in it can't be
  closed before that.
* Nothing is lost on the way, and nothing takes time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections import deque
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

_OK, _LOC_PROT, _FLUSH, _BIND, _REM_ACCESS, _REM_OP, _RETRY = 0, 4, 5, 6, 10, 11, 12
_REMOTE_WRITE, _REMOTE_READ, _MW_BIND = 2, 4, 16
_SIGNALED = 2


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_LIBC = ctypes.CDLL(None)
_LIBC.process_vm_readv.restype = ctypes.c_ssize_t
_LIBC.process_vm_readv.argtypes = (
    ctypes.c_int,
    *(ctypes.POINTER(_Range), ctypes.c_ulong) * 2,
    ctypes.c_ulong,
)


class PyverbsError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"The NIC refused it. Errno: {code}")
        self.error_code = code


class Nics:
    """All that there is: keys, queue pairs, and what was made, in order."""

    def __init__(self) -> None:
        self.reset(())

    def reset(self, names: tuple[str, ...]) -> None:
        """Have these NICs and nothing else."""
        self.names = names
        self.keys: dict[int, Any] = {}
        self.pairs: dict[int, QP] = {}
        self.numbers = count(1)
        self.fails: dict[str, int] = {}
        """Errno by what is asked for: PD, MR, DmaBufMR or QP."""

    def check(self, kind: str) -> None:
        if code := self.fails.get(kind, 0):
            raise PyverbsError(code)


NICS = Nics()


class Part:
    """Something of a NIC, which can't be closed while something is in it."""

    def __init__(self, *holders: Part) -> None:
        NICS.check(type(self).__name__)
        self.users = 0
        self.is_open = True
        self._holders = holders
        for holder in holders:
            holder.users += 1

    def close(self) -> None:
        if not self.is_open:
            return
        if self.users:
            raise PyverbsError(errno.EBUSY)
        self.is_open = False
        for holder in self._holders:
            holder.users -= 1


class Context(Part):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def query_device(self) -> object:
        return SimpleNamespace(
            phys_port_cnt=1,
            max_qp_wr=1024,
            max_cqe=4096,
            max_qp_rd_atom=16,
            max_qp_init_rd_atom=16,
            device_cap_flags=1 << 24,
            vendor_id=0x15B3,
        )

    def query_device_ex(self) -> object:
        return SimpleNamespace(odp_caps=SimpleNamespace(general_caps=1, rc_odp_caps=0xC))

    def query_port(self, number: int) -> object:
        return SimpleNamespace(state=4, active_mtu=5, lid=0, link_layer=2)

    def query_gid_table(self, most: int) -> list[object]:
        address = f"0000:0000:0000:0000:0000:ffff:0a00:{NICS.names.index(self.name) + 1:04x}"
        return [SimpleNamespace(gid_index=0, gid_str=lambda: address, gid_type=2, port_num=1)]

    def get_async_event(self) -> Any:
        raise PyverbsError(errno.EAGAIN)

    def close(self) -> None:
        if self.is_open:
            super().close()
            os.close(self.fd)


class PD(Part):
    def __init__(self, context: Context) -> None:
        super().__init__(context)


class MW(Part):
    def __init__(self, pd: PD, kind: int) -> None:
        super().__init__(pd)
        assert kind == 2
        self.pd = pd
        self.rkey = next(NICS.numbers) << 8
        self.pair: QP | None = None
        self.address = self.length = self.access = 0
        self._region: Any = None

    def pointer(self, address: int) -> int:
        return int(self._region.pointer(address))

    def bind(self, pair: QP, rkey: int, info: Any) -> int:
        region = info.mr
        if not (self.pd is pair.pd is region.pd and region.access & _MW_BIND and region.is_open):
            return _BIND
        self.pair, self._region = pair, region
        self.address, self.length, self.access = info.address, info.length, info.access
        region.users += 1
        NICS.keys[rkey] = self
        return _OK

    def close(self) -> None:
        if self.is_open:
            super().close()
            NICS.keys.pop(self.rkey + 1, None)
            if self._region is not None:
                self._region.users -= 1


class CompChannel(Part):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def get_cq_event(self, queue: CQ) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            raise PyverbsError(errno.EAGAIN) from None

    def close(self) -> None:
        if self.is_open:
            super().close()
            os.close(self.fd)


class CQ(Part):
    def __init__(self, context: Context, depth: int, _: None, channel: CompChannel) -> None:
        super().__init__(context, channel)
        self._channel = channel
        self._armed = False
        self._done: deque[object] = deque()

    def add(self, wr_id: int, status: int, word: int | None = None) -> None:
        imm = socket.htonl(word) if word is not None else 0
        self._done.append(SimpleNamespace(wr_id=wr_id, status=status, imm_data=imm, wc_flags=2 * (word is not None)))
        if self._armed:
            self._armed = False
            os.eventfd_write(self._channel.fd, 1)

    def poll(self, most: int) -> tuple[int, list[object]]:
        found = [self._done.popleft() for _ in range(min(most, len(self._done)))]
        return len(found), found

    def req_notify(self) -> None:
        self._armed = True

    def ack_events(self, number: int) -> None:
        """Nothing to do."""


class QP(Part):
    """A reliable connection with the extended interface."""

    def __init__(self, context: Context, init: Any) -> None:
        super().__init__(context, init.pd, init.scq)
        self.pd = init.pd
        self.queue: CQ = init.scq
        self.qp_num = next(NICS.numbers)
        NICS.pairs[self.qp_num] = self
        self.access = self.there = 0
        self.is_up = False
        self.wr_id = self.wr_flags = 0
        self._receives: deque[int] = deque()
        self._posted: list[list[Any]] = []

    def to_init(self, attr: Any) -> None:
        self.access = attr.qp_access_flags

    def to_rtr(self, attr: Any) -> None:
        self.there = attr.dest_qp_num

    def to_rts(self, attr: Any) -> None:
        self.is_up = True

    def modify(self, attr: Any, mask: int) -> None:
        assert attr.qp_state == 0
        self.is_up = False
        self._receives.clear()

    def post_recv(self, receive: Any) -> None:
        self._receives.append(receive.wr_id)

    def wr_start(self) -> None:
        self._posted = []

    def wr_abort(self) -> None:
        self._posted = []

    def wr_rdma_write(self, rkey: int, address: int) -> None:
        self._posted.append([self.wr_id, self.wr_flags, "write", rkey, address])

    def wr_rdma_read(self, rkey: int, address: int) -> None:
        self._posted.append([self.wr_id, self.wr_flags, "read", rkey, address])

    def wr_set_sge(self, sge: Any) -> None:
        self._posted[-1] += [sge.addr, sge.length, sge.lkey]

    def wr_send_imm(self, word: int) -> None:
        self._posted.append([self.wr_id, self.wr_flags, "send", word])

    def wr_set_sge_list(self, number: int, sges: list[object]) -> None:
        assert number == len(sges) == 0

    def wr_bind_mw(self, window: MW, rkey: int, info: Any) -> None:
        self._posted.append([self.wr_id, self.wr_flags, "bind", window, rkey, info])

    def wr_complete(self) -> None:
        for wr_id, flags, what, *rest in self._posted:
            status = self._do(what, rest) if self.is_up else _FLUSH
            if status != _OK:
                self.is_up = False
            if status != _OK or flags & _SIGNALED:
                self.queue.add(wr_id, status)

    def _do(self, what: str, rest: list[Any]) -> int:
        if what == "bind":
            window, rkey, info = rest
            return int(window.bind(self, rkey, info))
        there = NICS.pairs.get(self.there)
        if there is None or not there.is_up:
            return _RETRY
        if what == "send":
            there.queue.add(there._receives.popleft(), _OK, rest[0])
            return _OK
        return self._move(there, what == "write", *rest)

    def _move(self, there: QP, writes: bool, rkey: int, far: int, near: int, length: int, lkey: int) -> int:
        local, remote = NICS.keys.get(lkey), NICS.keys.get(rkey)
        if local is None or local.pd is not self.pd or not _within(local, near, length):
            return _LOC_PROT
        needed = _REMOTE_WRITE if writes else _REMOTE_READ
        if remote is None or remote.pd is not there.pd or getattr(remote, "pair", there) is not there:
            return _REM_ACCESS
        if not _within(remote, far, length) or not remote.access & there.access & needed:
            return _REM_ACCESS
        here, there_now = (local.pointer(near), _LOC_PROT), (remote.pointer(far), _REM_OP)
        (source, no_source), (sink, no_sink) = (here, there_now) if writes else (there_now, here)
        buffer = ctypes.create_string_buffer(length)
        if not _copied(source, ctypes.addressof(buffer), length):
            return no_source
        return _OK if _copied(ctypes.addressof(buffer), sink, length) else no_sink

    def close(self) -> None:
        if self.is_open:
            bound = [key for key in NICS.keys.values() if getattr(key, "pair", None) is self]
            if bound:
                raise PyverbsError(errno.EBUSY)
            super().close()
            NICS.pairs.pop(self.qp_num, None)


def _copied(source: int, sink: int, length: int) -> bool:
    """Copy; return False, instead of ending the process, where either is not there."""
    here, there = _Range(sink, length), _Range(source, length)
    return bool(_LIBC.process_vm_readv(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == length)


def _within(region: Any, address: int, length: int) -> bool:
    return bool(region.address <= address and address + length <= region.address + region.length)


class MWBindInfo:
    def __init__(self, mr: Any, address: int, length: int, access: int) -> None:
        self.mr, self.address, self.length, self.access = mr, address, length, access


class SGE:
    def __init__(self, addr: int, length: int, lkey: int) -> None:
        self.addr, self.length, self.lkey = addr, length, lkey


class QPAttr:
    def __init__(self, port_num: int = 1, qp_state: int = 0) -> None:
        self.port_num, self.qp_state = port_num, qp_state


def modules() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the modules of the library by name, but for memory regions."""
    anything = SimpleNamespace
    yield "base", {"inc_rkey": lambda rkey: rkey + 1}
    yield "pyverbs_error", {"PyverbsError": PyverbsError}
    devices = lambda: [SimpleNamespace(name=name.encode()) for name in NICS.names]  # noqa: E731
    yield "device", {"Context": Context, "get_device_list": devices}
    yield "addr", {"AHAttr": anything, "GlobalRoute": anything, "GID": str}
    yield "pd", {"PD": PD}
    yield "cq", {"CompChannel": CompChannel, "CQ": CQ}
    yield "qp", {"QPCap": anything, "QPInitAttrEx": anything, "QPEx": QP, "QPAttr": QPAttr}
    yield "wr", {"SGE": SGE, "RecvWR": lambda **_: SimpleNamespace()}
