"""How a node keeps its name, against an etcd that answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from peermem.directory.base import Changes, Counts
from peermem.directory.etcd_connection import Connection
from peermem.directory.etcd_member import Member
from peermem.directory.records import Keys
from peermem.etcd import rpc_pb2
from tests.directory.conformance import A
from tests.directory.etcd_server import PATIENCE


class _Etcd:
    """Makes every transaction; its revision is how many there were."""

    def __init__(self, on_renewal: Callable[[], None]) -> None:
        self._on_renewal = on_renewal
        self.revision = 0
        self.changed = Changes()

    async def grant(self, ttl: int) -> int:
        return 1

    async def revoke(self, lease: int) -> None:
        pass

    async def renew(self, lease: int, deadline: float) -> None:
        self._on_renewal()

    async def transact(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        self.revision += 1
        self.changed.tell()
        return rpc_pb2.TxnResponse(header=rpc_pb2.ResponseHeader(revision=self.revision), succeeded=True)


async def test_a_name_that_is_lost_during_a_renewal_is_claimed_again_at_once() -> None:
    def on_renewal() -> None:
        if etcd.revision == 1:
            etcd.revision += 1
            member.evicted(etcd.revision)

    etcd = _Etcd(on_renewal)
    member = Member(Keys("/peermem/v1", "x"), 600, "m1", 0, Changes(), Counts())
    member.join(A)
    staying = asyncio.create_task(member.stay(cast("Connection", etcd), lambda: None))
    async with asyncio.timeout(PATIENCE):
        while etcd.revision < 3:
            await etcd.changed.wait()
    staying.cancel()
    await asyncio.gather(staying, return_exceptions=True)
