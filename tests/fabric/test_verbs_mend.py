"""Queue pairs that a NIC does not start any more, at either end of a link."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable

import pytest

from peermem.core import errors
from peermem.core.types import Path, Rights
from peermem.fabric.verbs_fabric import VerbsFabric
from tests.fabric.nic_double import QP, PyverbsError
from tests.fabric.pyverbs_double import pyverbs
from tests.fabric.support import Connection, FileMemory, eventually

Fabrics = tuple[VerbsFabric, VerbsFabric]
"""The initiating and the serving one."""


@pytest.fixture
async def fabrics() -> AsyncIterator[Fabrics]:
    with pyverbs("nic0", "nic1"):
        fabrics = VerbsFabric(["nic0"]), VerbsFabric(["nic1"])
        for fabric in fabrics:
            await fabric.start()
        yield fabrics
        for fabric in fabrics:
            await fabric.close()
            assert not any(fabric.object_counts().values())


def refuse_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have queue pairs that are reset stay so."""

    def refuse(*_: object) -> None:
        raise PyverbsError(errno.EIO)

    monkeypatch.setattr(QP, "to_init", refuse)


async def test_a_fence_is_up_where_a_silent_rail_can_only_be_reset(
    fabrics: Fabrics, memories: Callable[..., FileMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memories(100)
    await fabrics[1].register(memory, Path.HOST)
    connection = await Connection(*fabrics).open()
    key = await fabrics[1].grant(connection.link_id, memory, 0, 100, Rights.WRITE, 30.0)
    (rail,) = fabrics[1]._target._links[connection.link_id].rails

    async def silent(seconds: float) -> bool:
        return False

    with monkeypatch.context() as broken:
        broken.setattr(rail, "ask", silent)
        refuse_to_start(broken)
        await fabrics[1].revoke(key)
    assert not rail.up
    await connection.close()
    await fabrics[1].unregister(memory)


async def test_a_rail_that_does_not_start_is_tried_again_and_no_new_link_comes_up(
    fabrics: Fabrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await Connection(*fabrics).open()
    (rail,) = fabrics[0]._links.copy().pop().uses(lambda _: True)
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    with monkeypatch.context() as broken:
        refuse_to_start(broken)
        with pytest.raises(errors.NodeUnreachable, match="can't bring a link's queue pairs up"):
            await Connection(*fabrics).open()
        rail.fail()
        await eventually(lambda: connection.events.rails == ["down: its other end does not answer"])
    await eventually(lambda: connection.events.rails[-1] == "up")
    assert faults == []
    await connection.close()
