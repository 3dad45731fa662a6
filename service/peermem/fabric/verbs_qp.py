"""A reliable connection of pyverbs under our types, through the extended interface or the classic one.

Rules of this file:

* As in `verbs.py`; above all, one thread: pyverbs holds the GIL and a spinlock from `wr_start` to `wr_complete`,
  so that a second thread at the same queue pair could stop the process for good.
* Objects for work requests are made once and used again: releases up to 64 leak each one's list (829cd7252).
* No payload is posted inline: the CPU would read it, and device memory may vanish.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from peermem.fabric.verbs import CompletionQueue, Domain, MemoryRegion, Owned, Window, fault, faults, loaded
from peermem.fabric.verbs_types import MTUS, Access, Path, Piece, Timing, VerbsError, WrOpcode

_MTU_CODES = {size: code for code, size in MTUS.items()}
_RC = 2  # IBV_QPT_RC
_SIGNALED = 2  # IBV_SEND_SIGNALED
_EX_MASK = 1 | 64  # IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS
_EX_OPS = 1 | 8 | 16 | 256  # IBV_QP_EX_WITH_RDMA_WRITE | SEND_WITH_IMM | RDMA_READ | BIND_MW
_RESET, _STATE = 0, 1  # IBV_QPS_RESET, IBV_QP_STATE
_NO_EXTENDED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class QueuePair(Owned):
    """A reliable connection. It is made in RESET; `prepare`, receives and `connect` bring it up."""

    kind = "qp"

    def __init__(self, domain: Domain, queue: CompletionQueue, sends: int, receives: int, extended: bool) -> None:
        """`extended` asks for the extended interface, where the device has it. Raises VerbsError."""
        self._library = library = loaded()
        self._error, self._sge = library.error, library.sge
        cap = library.qp.QPCap(max_send_wr=sends, max_recv_wr=receives, max_send_sge=1, max_recv_sge=1)
        self._extended = extended and domain.device.extended
        made = self._make_extended(domain, queue, cap) if self._extended else None
        if made is None:
            self._extended = False
            init = library.qp.QPInitAttr(qp_type=_RC, scq=queue.thing, rcq=queue.thing, cap=cap, sq_sig_all=0)
            with faults():
                made = library.qp.QP(domain.thing, init)
        super().__init__(domain.device, made)
        self.number: int = made.qp_num

    def _make_extended(self, domain: Domain, queue: CompletionQueue, cap: Any) -> Any:
        init = self._library.qp.QPInitAttrEx(
            qp_type=_RC,
            scq=queue.thing,
            rcq=queue.thing,
            cap=cap,
            pd=domain.thing,
            comp_mask=_EX_MASK,
            send_ops_flags=_EX_OPS,
        )
        try:
            with faults():
                return self._library.qp.QPEx(domain.device.context, init)
        except VerbsError as error:
            if error.errno not in _NO_EXTENDED:
                raise
            domain.device.extended = False
            return None

    def prepare(self, port: int, access: Access) -> None:
        """From RESET to INIT: receives can be posted. Raises VerbsError."""
        attr = self._library.qp.QPAttr(port_num=port)
        attr.qp_access_flags = int(access)
        with faults():
            self._thing.to_init(attr)

    def connect(self, path: Path, number: int, psns: tuple[int, int], reads: tuple[int, int], timing: Timing) -> None:
        """From INIT to RTS: packets flow. `psns` and `reads` are this end's and the other end's. Raises VerbsError."""
        attr = self._library.qp.QPAttr(port_num=path.port)
        attr.path_mtu = _MTU_CODES[path.mtu]
        attr.dest_qp_num = number
        attr.sq_psn, attr.rq_psn = psns
        attr.max_rd_atomic, attr.max_dest_rd_atomic = reads[1], reads[0]
        attr.timeout, attr.retry_cnt = timing.timeout, timing.retries
        attr.rnr_retry, attr.min_rnr_timer = timing.rnr_retries, timing.min_rnr_timer
        attr.ah_attr = self._address(path)
        with faults():
            self._thing.to_rtr(attr)
            self._thing.to_rts(attr)

    def _address(self, path: Path) -> Any:
        addr = self._library.addr
        if not path.is_global:
            return addr.AHAttr(port_num=path.port, dlid=path.remote_lid, sl=path.marks.service_level)
        route = addr.GlobalRoute(
            dgid=addr.GID(path.remote_gid.hex(":", 2)),
            sgid_index=path.gid_index,
            hop_limit=path.marks.hop_limit,
            traffic_class=path.marks.traffic_class,
        )
        return addr.AHAttr(port_num=path.port, dlid=path.remote_lid, sl=path.marks.service_level, is_global=1, gr=route)

    def reset(self) -> None:
        """To RESET: when this returns nothing moves any more, and nothing that was posted will complete.

        Raises VerbsError.
        """
        with faults():
            self._thing.modify(self._library.qp.QPAttr(qp_state=_RESET), _STATE)

    def post_receives(self, wr_id: int, count: int) -> None:
        """Await `count` messages without payload. Raises VerbsError."""
        receive = self._library.receive
        receive.wr_id = wr_id
        with faults():
            for _ in range(count):
                self._thing.post_recv(receive)

    def move(self, opcode: WrOpcode, pieces: Sequence[Piece], wr_id: int) -> None:
        """Post WRITEs or READs, of which the last one is signalled. Raises VerbsError, and has posted none then."""
        if not self._extended:
            self._post([self._classic(opcode, wr_id, piece) for piece in pieces])
            return
        qp, sge, last = self._thing, self._sge, pieces[-1]
        start = qp.wr_rdma_write if opcode is WrOpcode.RDMA_WRITE else qp.wr_rdma_read
        try:  # not `_batch`: this is called most
            qp.wr_start()
            try:
                qp.wr_id = wr_id
                qp.wr_flags = 0
                for piece in pieces:
                    if piece is last:
                        qp.wr_flags = _SIGNALED
                    sge.addr, sge.length, sge.lkey, remote_address, rkey = piece
                    start(rkey, remote_address)
                    qp.wr_set_sge(sge)
            except BaseException:
                qp.wr_abort()
                raise
            qp.wr_complete()
        except self._error as error:
            raise fault(error) from None

    def tell(self, word: int, flags: int, wr_id: int) -> None:
        """Post a message of 32 bits and no payload, signalled. Raises VerbsError."""
        if not self._extended:
            send = self._send(WrOpcode.SEND_WITH_IMM, wr_id, _SIGNALED | flags, socket.htonl(word))
            send.num_sge = 0  # the constructor wants one
            self._post([send])
            return
        qp = self._thing

        def fill() -> None:
            qp.wr_id = wr_id
            qp.wr_flags = _SIGNALED | flags
            qp.wr_send_imm(word)  # to network order here, unlike SendWR
            qp.wr_set_sge_list(0, [])

        self._batch(fill)

    def bind(self, window: Window, region: MemoryRegion, address: int, length: int, access: Access, wr_id: int) -> None:
        """Post the bind of a window to a range of a region, signalled. Raises VerbsError."""
        info = self._library.mr.MWBindInfo(region.thing, address, length, int(access))
        if not self._extended:
            send = self._library.wr.SendWR(wr_id=wr_id, opcode=int(WrOpcode.BIND_MW), send_flags=_SIGNALED)
            send.set_bind_wr(window.thing, info)
            self._post([send])
            return
        qp = self._thing

        def fill() -> None:
            qp.wr_id = wr_id
            qp.wr_flags = _SIGNALED
            qp.wr_bind_mw(window.thing, window.rkey, info)

        self._batch(fill)

    def _batch(self, fill: Callable[[], None]) -> None:
        """Post what `fill` adds, all or nothing."""
        qp = self._thing
        try:
            qp.wr_start()
            try:
                fill()
            except BaseException:
                qp.wr_abort()
                raise
            qp.wr_complete()
        except self._error as error:
            raise fault(error) from None

    def _send(self, opcode: WrOpcode, wr_id: int, flags: int, imm: int = 0) -> Any:
        return self._library.wr.SendWR(
            wr_id=wr_id, opcode=int(opcode), num_sge=1, imm_data=imm, sg=[self._sge], send_flags=flags
        )

    def _classic(self, opcode: WrOpcode, wr_id: int, piece: Piece) -> Any:
        sge = self._sge
        sge.addr, sge.length, sge.lkey, remote_address, rkey = piece
        send = self._send(opcode, wr_id, 0)
        send.set_wr_rdma(rkey, remote_address)
        return send

    def _post(self, sends: list[Any]) -> None:
        """Post a list, of which the last one is signalled. Each request has a copy of the one SGE, freed by `close`:
        there is no other way to set it, and releases up to 64 never free it themselves."""
        for one, following in pairwise(sends):
            one.next_wr = following  # a bare pointer: `sends` keeps it alive
        sends[-1].send_flags |= _SIGNALED
        try:
            with faults():
                self._thing.post_send(sends[0])
        finally:
            for send in sends:
                send.close()
