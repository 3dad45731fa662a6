"""The verbs fabric where there is no RDMA: on a host without pyverbs, or without a NIC. `test_verbs_link.py` runs it
over a stand-in, and tests/lab over software NICs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

import pytest

from peermem.core.errors import FabricUnavailable, LinkNotFound, NicNotFound, PyverbsMissing
from peermem.core.types import FabricKind, LinkAttributes, Path, QueuePair, RemoteKey, Rights
from peermem.fabric import verbs
from peermem.fabric.verbs_fabric import VerbsFabric
from tests.fabric.support import FileMemory, Recorder

END = QueuePair("rxe0/1", 17, 5, bytes(15) + b"\x01", 0, 4096, 16)


@pytest.fixture
async def fabric() -> AsyncIterator[VerbsFabric]:
    fabric = VerbsFabric()
    await fabric.start()
    assert isinstance(fabric.unavailable, PyverbsMissing | NicNotFound), "this test is for a host without RDMA"
    yield fabric
    await fabric.close()


async def test_it_starts_and_says_what_is_missing(fabric: VerbsFabric) -> None:
    assert dict(fabric.nics) == {}
    assert fabric.unavailable is not None
    assert ("python3-pyverbs" in fabric.unavailable.message) or ("namespace" in fabric.unavailable.message)
    assert (fabric.accepted_count, fabric.grant_count) == (0, 0)
    assert set(fabric.object_counts().values()) == {0}


async def test_a_nic_that_was_asked_for_is_named(fabric: VerbsFabric) -> None:
    wanted = VerbsFabric(["mlx5_0/1"])
    await wanted.start()
    if isinstance(wanted.unavailable, NicNotFound):
        assert list(wanted.nics) == ["mlx5_0/1"]
        assert "mlx5_0/1" in wanted.unavailable.message
    await wanted.close()


async def test_every_use_gives_the_reason(fabric: VerbsFabric) -> None:
    async def exchange(offer: LinkAttributes) -> LinkAttributes:
        raise AssertionError("nothing is offered")

    memory = FileMemory(4096)
    assert fabric.unavailable is not None
    for nics in ((), ("mlx5_0/1",)):
        with pytest.raises((PyverbsMissing, NicNotFound)):
            await fabric.register(memory, Path.HOST, nics)
    with pytest.raises((PyverbsMissing, NicNotFound)):
        await fabric.probe("mlx5_0/1", memory, Path.HOST)
    with pytest.raises(FabricUnavailable, match="no NIC that works"):
        await fabric.connect(exchange, Recorder())
    with pytest.raises(FabricUnavailable, match="no NIC that works"):
        fabric.accept(LinkAttributes(FabricKind.VERBS, 1, queue_pairs=[END]))
    with pytest.raises(LinkNotFound):
        fabric.accept(LinkAttributes(FabricKind.VERBS, 1, b"?" * 16, queue_pairs=[END]))
    with pytest.raises(LinkNotFound):
        await fabric.grant(b"?" * 16, memory, 0, 1, Rights.READ, 1.0)
    await fabric.unregister(memory)
    await fabric.hang_up(b"?" * 16)
    await fabric.revoke(RemoteKey(1, 1))
    memory.close()


async def test_closing_twice_is_no_error(fabric: VerbsFabric) -> None:
    await fabric.close()
    await fabric.close()


def test_trying_to_load_the_library_leaves_logging_alone() -> None:
    before = list(logging.root.handlers), logging.root.level
    with contextlib.suppress(PyverbsMissing):
        verbs.load()
    assert (list(logging.root.handlers), logging.root.level) == before
