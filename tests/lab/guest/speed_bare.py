"""One end of a reliable connection of bare pyverbs, which the fabric is compared with; a process: see `ends`.

Beside the fabric itself this is the only file that uses pyverbs. It does what a job's own code would: one queue pair,
classic work requests that are made once, several of them outstanding, the completion queue polled all the time.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from importlib import import_module
from time import perf_counter
from typing import Any

from peermem.core.types import Path
from peermem.fabric.base import Opcode
from peermem.memory import HostMemory, Memory
from tests.lab.guest.ends import serve
from tests.lab.guest.speed_memory import OUTSTANDING, PATHS, SLICE, allocate, mark, marks, slices

_GID_INDEX, _MTU_4096, _RC, _SIGNALED = 1, 5, 2, 2
_ALL_ACCESS, _ON_DEMAND = 1 | 2 | 4, 64
_OPCODES = {Opcode.WRITE: 0, Opcode.READ: 4}
_PSN = 7


class BareEnd:
    """A queue pair of a device, with memory of each kind that it is asked for."""

    def __init__(self, device: str) -> None:
        qp, cq = import_module("pyverbs.qp"), import_module("pyverbs.cq")
        self._addr, self._mr, self._wr = (import_module(f"pyverbs.{name}") for name in ("addr", "mr", "wr"))
        self._attr = qp.QPAttr
        self._context = import_module("pyverbs.device").Context(name=device)
        self._domain = import_module("pyverbs.pd").PD(self._context)
        self._queue = cq.CQ(self._context, 4 * OUTSTANDING)
        cap = qp.QPCap(max_send_wr=2 * OUTSTANDING, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        init = qp.QPInitAttr(qp_type=_RC, scq=self._queue, rcq=self._queue, cap=cap, sq_sig_all=1)
        attr = qp.QPAttr(port_num=1)
        attr.qp_access_flags = _ALL_ACCESS
        self._pair = qp.QP(self._domain, init, attr)
        self._memories: dict[str, Memory] = {}
        self._regions: dict[str, Any] = {}

    async def end(self) -> tuple[int, str]:
        return self._pair.qp_num, self._context.query_gid(1, _GID_INDEX).gid

    async def connect(self, number: int, gid: str) -> None:
        attr = self._attr(port_num=1)
        attr.path_mtu, attr.dest_qp_num, attr.sq_psn, attr.rq_psn = _MTU_4096, number, _PSN, _PSN
        attr.max_rd_atomic = attr.max_dest_rd_atomic = 16
        attr.timeout, attr.retry_cnt, attr.rnr_retry, attr.min_rnr_timer = 16, 6, 7, 12
        route = self._addr.GlobalRoute(dgid=self._addr.GID(gid), sgid_index=_GID_INDEX, hop_limit=64)
        attr.ah_attr = self._addr.AHAttr(port_num=1, is_global=1, gr=route)
        self._pair.to_rtr(attr)
        self._pair.to_rts(attr)

    async def key(self, kind: str) -> tuple[int, int]:
        """Return the address and the rkey of memory."""
        await self._memory(kind)
        return self._regions[kind].buf, self._regions[kind].rkey

    async def move(self, opcode: Opcode, key: tuple[int, int], segment: int, count: int) -> float:
        """Move so many slices of host memory, a segment at a time; return the seconds that it took."""
        await self._memory("host")
        sends = [self._send(opcode, key, at, segment) for ranges in slices(segment) for at in ranges.local]
        posted = done = 0
        count *= SLICE // segment
        began = perf_counter()
        while done < count:
            while posted < min(count, done + OUTSTANDING):
                self._pair.post_send(sends[posted % len(sends)])
                posted += 1
            found = self._queue.poll(OUTSTANDING)[1]
            assert all(completion.status == 0 for completion in found)
            done += len(found)
        return perf_counter() - began

    async def registering(self, length: int) -> float:
        """Register so much host memory that nobody has touched yet; return the seconds that it took."""
        memory = HostMemory(length, "speed-large")
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory.view()))
        began = perf_counter()
        region = self._mr.MR(self._domain, length, _ALL_ACCESS, address)
        taken = perf_counter() - began
        region.close()
        memory.close()
        return taken

    def _send(self, opcode: Opcode, key: tuple[int, int], offset: int, length: int) -> Any:
        region, (address, rkey) = self._regions["host"], key
        piece = self._wr.SGE(region.buf + offset, length, region.lkey)
        send = self._wr.SendWR(opcode=_OPCODES[opcode], num_sge=1, sg=[piece], send_flags=_SIGNALED)
        send.set_wr_rdma(rkey, address + offset)
        return send

    async def mark(self, kind: str, segment: int) -> None:
        mark(await self._memory(kind), segment)

    async def marks(self, kind: str, segment: int) -> bytes:
        return marks(await self._memory(kind), segment)

    async def _memory(self, kind: str) -> Memory:
        if kind not in self._memories:
            self._memories[kind] = memory = await allocate(kind)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory.view()))
            access = _ALL_ACCESS | (_ON_DEMAND if PATHS[kind] is Path.P2PDMA else 0)
            self._regions[kind] = self._mr.MR(self._domain, memory.length, access, address)
        return self._memories[kind]


if __name__ == "__main__":
    asyncio.run(serve(BareEnd(sys.argv[1])))
