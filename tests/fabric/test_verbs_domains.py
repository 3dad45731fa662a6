"""Protection domains: what one subject has of a NIC is of no use to another one, and ends with it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from peermem.core import errors
from peermem.core.types import Path, Ranges, RemoteKey, Rights
from peermem.fabric import verbs_grants, verbs_link, verbs_memory
from peermem.fabric.base import Opcode, Status
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.fabric.verbs_types import Access, Settings, VerbsError
from tests.fabric.nic_double import NICS
from tests.fabric.pyverbs_double import MR, DmaBufMR, Registered, pyverbs
from tests.fabric.support import Connection, FileMemory, eventually
from tests.fabric.test_verbs_memory import OFFSET, ExportedMemory

KIB = 1 << 10
PART = 64 * KIB
LENGTH = 4 * PART
ANN, BEN = "uid:1@a", "uid:2@a"
BOTH = Rights.READ | Rights.WRITE
RANGES = Ranges.single(100, 200, 5000)

Memories = Callable[..., FileMemory]
Fabrics = tuple[VerbsFabric, VerbsFabric]
"""The initiating and the serving one."""


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Registered]]:
    for module in (verbs_memory, verbs_grants, verbs_link):
        monkeypatch.setattr(module, "PART", PART)
    with pyverbs("nic0", "nic1") as library:
        yield library


@pytest.fixture
async def fabrics(memories: Memories) -> AsyncIterator[Fabrics]:
    async with asyncio.timeout(20):
        fabrics = VerbsFabric(["nic0"]), VerbsFabric(["nic1"])
        for fabric in fabrics:
            await fabric.start()
        yield fabrics
        for fabric in fabrics:
            await fabric.close()
            assert not any(fabric.object_counts().values())


@pytest.fixture
def ends(fabrics: Fabrics, memories: Memories) -> tuple[FileMemory, FileMemory]:
    """Memory at each end, which both are of ANN's once it is registered."""
    return memories(LENGTH, 1), memories(LENGTH, 2)


async def registered(fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]) -> None:
    for fabric, memory in zip(fabrics, ends, strict=True):
        await fabric.register(memory, Path.HOST, subject=ANN)


async def closed(*connections: Connection) -> None:
    for connection in connections:
        await connection.link.close()
        await connection.target.hang_up(connection.link_id)
        assert connection.events.faults == []


def counts(fabric: VerbsFabric) -> tuple[int, int, int]:
    """Return the protection domains, registrations and windows that are open."""
    found = fabric.object_counts()
    return found["pd"], found["mr"], found["mw"]


@pytest.mark.parametrize("opcode", list(Opcode))
async def test_a_key_of_one_subject_opens_nothing_for_another_one(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory], opcode: Opcode
) -> None:
    await registered(fabrics, ends)
    ann, ben = [await Connection(*fabrics, subject).open() for subject in (ANN, BEN)]
    before = ends[0].bytes(), ends[1].bytes()
    await ben.link.prepare(ends[0], 0, LENGTH)
    key = await fabrics[1].grant(ann.link_id, ends[1], 0, LENGTH, BOTH, 30.0)
    for part in key.rails[0]:
        assert NICS.keys[part.rkey].pd is not _pd_of(ben)
    assert await ben.events.wait([ben.post(opcode, ends[0], key, RANGES)]) == [Status.REM_ACCESS_ERR]
    assert (ends[0].bytes(), ends[1].bytes()) == before
    assert await ann.events.wait([ann.post(opcode, ends[0], key, RANGES)]) == [Status.SUCCESS]
    await closed(ann, ben)


def _pd_of(connection: Connection) -> object:
    """Return the domain of a link's accepted end."""
    assert isinstance(connection.target, VerbsFabric)
    (rail,) = connection.target._target._links[connection.link_id].rails
    return rail.domain.thing


async def test_queue_pairs_registrations_and_windows_of_subjects_are_apart(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    links = [await Connection(*fabrics, subject).open() for subject in (ANN, ANN, BEN)]
    for link in links:
        await link.link.prepare(ends[0], 0, LENGTH)
        await fabrics[1].grant(link.link_id, ends[1], 0, LENGTH, Rights.READ, 30.0)
    assert [fabric.object_counts()["pd"] for fabric in fabrics] == [2, 2]
    of = [_pd_of(link) for link in links]
    assert of[0] is of[1] is not of[2]
    await closed(*links)


async def test_memory_is_registered_for_another_subject_as_far_as_it_needs_it_and_until_it_is_gone(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    assert [counts(fabric) for fabric in fabrics] == [(1, 4, 0)] * 2
    ann = await Connection(*fabrics, ANN).open()
    ben = await Connection(*fabrics, BEN).open()
    assert [counts(fabric) for fabric in fabrics] == [(2, 4, 0)] * 2
    key = await fabrics[1].grant(ben.link_id, ends[1], PART - 1, 2, BOTH, 30.0)
    await ben.link.prepare(ends[0], 3 * PART + 5, 1)
    await ben.link.prepare(ends[0], 3 * PART, PART)
    await ann.link.prepare(ends[0], 0, LENGTH)
    assert counts(fabrics[0]) == (2, 5, 0)
    assert counts(fabrics[1]) == (2, 6, 2)
    assert await ben.events.wait(
        [
            ben.post(Opcode.WRITE, ends[0], key, Ranges.single(3 * PART, 0, 2)),
            ben.post(Opcode.WRITE, ends[0], key, Ranges.single(3 * PART - 1, 0, 2)),
        ]
    ) == [Status.SUCCESS, Status.LOC_PROT_ERR]
    assert ends[1].bytes()[PART - 1 : PART + 1] == ends[0].bytes()[3 * PART : 3 * PART + 2]
    await closed(ben)
    await eventually(lambda: [counts(fabric) for fabric in fabrics] == [(1, 4, 0)] * 2)
    await closed(ann)
    assert [counts(fabric) for fabric in fabrics] == [(1, 4, 0)] * 2  # of memory that is still there
    for fabric, memory in zip(fabrics, ends, strict=True):
        await fabric.unregister(memory)
    assert [counts(fabric) for fabric in fabrics] == [(0, 0, 0)] * 2


async def test_a_dma_buf_is_imported_for_another_subject_as_well(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory], library: type[Registered]
) -> None:
    exported = ExportedMemory(2 * PART)
    await fabrics[0].register(exported, Path.DMABUF, subject=ANN)
    await fabrics[1].register(ends[1], Path.HOST, subject=ANN)
    ben = await Connection(*fabrics, BEN).open()
    await ben.link.prepare(exported, PART + 100, 50)
    (imported,) = [each for each in library.made[2:] if isinstance(each, DmaBufMR)]
    assert imported.pd is not library.made[0].pd
    key = await fabrics[1].grant(ben.link_id, ends[1], 0, 50, Rights.READ, 30.0)
    read = ben.post(Opcode.READ, exported, key, Ranges.single(PART + 100, 0, 50))
    assert await ben.events.wait([read]) == [Status.SUCCESS]
    assert os.pread(exported.exported, 50, OFFSET + PART + 100) == ends[1].bytes()[:50]
    await closed(ben)
    await fabrics[0].unregister(exported)
    exported.close()


async def test_whoever_needs_the_same_memory_at_once_shares_it(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory], library: type[Registered]
) -> None:
    await registered(fabrics, ends)
    ben, before = await Connection(*fabrics, BEN).open(), len(library.made)
    await asyncio.gather(
        *(fabrics[1].grant(ben.link_id, ends[1], 0, LENGTH, BOTH, 30.0) for _ in range(5)),
        *(ben.link.prepare(ends[0], 0, LENGTH) for _ in range(5)),
    )
    assert len(library.made) == before + 2 * LENGTH // PART
    await closed(ben)


async def test_a_subject_that_comes_back_while_its_domain_ends_has_another_one(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    ben = await Connection(*fabrics, BEN).open()
    await fabrics[1].grant(ben.link_id, ends[1], 0, LENGTH, BOTH, 30.0)
    first = _pd_of(ben)
    await closed(ben)
    assert counts(fabrics[1])[0] == 2  # it gives its registrations back, with turns of the loop
    again = await Connection(*fabrics, BEN).open()
    key = await fabrics[1].grant(again.link_id, ends[1], 0, LENGTH, BOTH, 30.0)
    assert _pd_of(again) is not first
    await again.link.prepare(ends[0], 0, LENGTH)
    assert await again.events.wait([again.post(Opcode.READ, ends[0], key, RANGES)]) == [Status.SUCCESS]
    await closed(again)
    await eventually(lambda: counts(fabrics[1]) == (1, 4, 0))


async def test_memory_that_goes_while_it_is_registered_for_somebody_leaves_nothing(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    ben = await Connection(*fabrics, BEN).open()
    preparing = asyncio.create_task(ben.link.prepare(ends[0], 0, LENGTH))
    await eventually(lambda: counts(fabrics[0])[1] > 4)
    await fabrics[0].unregister(ends[0])
    await preparing
    assert counts(fabrics[0]) == (1, 0, 0)
    await closed(ben)
    assert counts(fabrics[0]) == (0, 0, 0)


@pytest.mark.parametrize("windows", [True, False])
async def test_a_link_that_closes_at_any_time_while_a_grant_is_made_for_it_leaves_nothing(
    memories: Memories, windows: bool
) -> None:
    fabrics = VerbsFabric(["nic0"]), VerbsFabric(["nic1"], settings=Settings(windows=windows))
    for fabric in fabrics:
        await fabric.start()
    memory = memories(2 * LENGTH)
    await fabrics[1].register(memory, Path.HOST, subject=ANN)
    before, outcomes = counts(fabrics[1]), set[type]()
    for turns in range(100):
        ben = await Connection(*fabrics, BEN).open()
        grant = fabrics[1].grant(ben.link_id, memory, 1, memory.length - 2, BOTH, 30.0)
        granting = asyncio.create_task(grant)
        for _ in range(turns):
            await asyncio.sleep(0)
        await fabrics[1].hang_up(ben.link_id)
        await ben.link.close()
        try:
            outcomes.add(type(await granting))
        except errors.LinkNotFound as error:
            outcomes.add(type(error))
        await eventually(lambda: counts(fabrics[1]) == before)
    assert outcomes == {RemoteKey, errors.LinkNotFound}
    for fabric in fabrics:
        await fabric.close()
        assert not any(fabric.object_counts().values())


async def test_what_a_nic_refuses_to_register_for_one_more_subject_can_go_by_another_fabric(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    ben = await Connection(*fabrics, BEN).open()
    NICS.fails["MR"] = errno.ENOMEM
    with pytest.raises(errors.FabricUnavailable, match=r"one more subject: .* lock .* use tcp") as refused:
        await ben.link.prepare(ends[0], 0, LENGTH)
    assert refused.value.metadata["cause"] == "MEMLOCK_TOO_SMALL"
    with pytest.raises(errors.FabricUnavailable):
        await fabrics[1].grant(ben.link_id, ends[1], 0, LENGTH, BOTH, 30.0)
    NICS.fails.clear()
    await ben.link.prepare(ends[0], 0, LENGTH)
    await closed(ben)
    await eventually(lambda: counts(fabrics[0]) == (1, 4, 0))


@pytest.mark.parametrize("kind", ["PD", "QP"])
async def test_a_nic_without_room_for_one_more_subject_leaves_nothing_of_its_link(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory], kind: str
) -> None:
    await registered(fabrics, ends)
    NICS.fails[kind] = errno.ENOMEM
    with pytest.raises(errors.NodeUnreachable, match="no queue pair for a link"):
        await Connection(*fabrics, BEN).open()
    NICS.fails.clear()
    assert [counts(fabric) for fabric in fabrics] == [(1, 4, 0)] * 2
    if kind == "PD":
        NICS.fails[kind] = errno.ENOMEM
        other = FileMemory(PART)
        with pytest.raises(errors.RegistrationRefused, match="no protection domain"):
            await fabrics[0].register(other, Path.HOST, subject=BEN)
        other.close()


async def test_where_there_are_no_windows_a_grant_needs_no_domain_but_its_rails_own(memories: Memories) -> None:
    initiator, target = VerbsFabric(["nic0"]), VerbsFabric(["nic1"], settings=Settings(windows=False))
    for fabric in (initiator, target):
        await fabric.start()
    memory = memories(LENGTH)
    await target.register(memory, Path.HOST, subject=ANN)
    ben = await Connection(initiator, target, BEN).open()
    key = await target.grant(ben.link_id, memory, 0, LENGTH, Rights.READ, 30.0)
    assert counts(target) == (2, 8, 0)
    made = [NICS.keys[part.rkey] for part in key.rails[0]]
    assert all(isinstance(one, MR) and one.access == Access.LOCAL_WRITE | Access.REMOTE_READ for one in made)
    assert {one.pd for one in made} == {_pd_of(ben)}
    await closed(ben)
    assert counts(target) == (1, 4, 0)
    for fabric in (initiator, target):
        await fabric.close()
        assert not any(fabric.object_counts().values())


async def test_rails_that_break_are_told_of_and_come_back(fabrics: Fabrics) -> None:
    ann = await Connection(*fabrics, ANN).open(2)
    rails = fabrics[0]._links.copy().pop().uses(lambda _: True)
    assert len(rails) == 2
    rails[0].fail()
    assert ann.link.rails_down == 1
    await eventually(lambda: ann.events.rails == ["down: its other end does not answer", "up"])
    assert ann.events.pauses == [0.0]
    assert ann.link.rails_down == 0
    await closed(ann)


async def test_a_rail_that_only_a_refused_request_broke_is_not_told_of(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    ann = await Connection(*fabrics, ANN).open()
    key = await fabrics[1].grant(ann.link_id, ends[1], 0, LENGTH, BOTH, 30.0)
    await fabrics[1].revoke(key)
    assert await ann.events.wait([ann.post(Opcode.WRITE, ends[0], key, RANGES)]) == [Status.REM_ACCESS_ERR]
    await eventually(lambda: ann.link.rails_down == 0)
    assert ann.events.rails == []
    await closed(ann)


async def test_a_rail_that_does_not_come_back_is_told_of_once(
    fabrics: Fabrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await Connection(*fabrics, ANN).open(2)
    rails = fabrics[0]._links.copy().pop().uses(lambda _: True)
    attempts = 0

    def unreachable(*_: object) -> None:
        nonlocal attempts
        attempts += 1
        raise VerbsError("no way there", errno.ENETUNREACH)

    with monkeypatch.context() as broken:
        broken.setattr(rails[0], "connect", unreachable)
        rails[0].fail()
        await eventually(lambda: attempts == 3)
    await eventually(lambda: ann.events.rails[-1] == "up")
    assert len(ann.events.rails) == 2
    await closed(ann)


async def test_nothing_is_kept_of_grants_that_ended_with_their_link(
    fabrics: Fabrics, ends: tuple[FileMemory, FileMemory]
) -> None:
    await registered(fabrics, ends)
    ann = await Connection(*fabrics, ANN).open()
    for _ in range(3):
        await fabrics[1].grant(ann.link_id, ends[1], 0, LENGTH, BOTH, 30.0)
    await fabrics[1].hang_up(ann.link_id)
    assert fabrics[1]._target._ending == {}
    await ann.link.close()


async def test_without_windows_the_loop_turns_between_the_parts_of_a_grant(
    memories: Memories, library: type[Registered]
) -> None:
    initiator, target = VerbsFabric(["nic0"]), VerbsFabric(["nic1"], settings=Settings(windows=False))
    for fabric in (initiator, target):
        await fabric.start()
    memory = memories(LENGTH)
    await target.register(memory, Path.HOST, subject=ANN)
    ben = await Connection(initiator, target, BEN).open()
    before, made = len(library.made), set[int]()
    granting = asyncio.create_task(target.grant(ben.link_id, memory, 0, LENGTH, Rights.READ, 30.0))
    while not granting.done():
        made.add(len(library.made) - before)
        await asyncio.sleep(0)
    assert made == set(range(LENGTH // PART + 1))
    await granting
    await closed(ben)
    for fabric in (initiator, target):
        await fabric.close()
