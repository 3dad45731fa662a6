"""Memory as it is registered: what the library is asked for on each path, in which parts, and what is left after."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peermem.core import errors
from peermem.core.types import Path, Rights
from peermem.fabric import verbs, verbs_grants, verbs_memory
from peermem.fabric.verbs_domains import HeldDomain
from peermem.fabric.verbs_grants import Door
from peermem.fabric.verbs_memory import MemoryTable, Registration, check
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_target import Target
from peermem.fabric.verbs_types import Access, Settings, WcStatus
from tests.descriptors import memory_file
from tests.fabric.nic_double import NICS
from tests.fabric.pyverbs_double import DmaBufMR, Registered, nic_port, pyverbs
from tests.fabric.support import FileMemory

KIB = 1 << 10
PART = 64 * KIB
OFFSET = 12 * KIB
ADDRESS = 7 << 40


class ExportedMemory:
    """Memory with a dma-buf, where it begins at OFFSET, and a device address; the CPU does not reach it."""

    fd = None

    def __init__(self, length: int) -> None:
        self.length = length
        self.exported = memory_file(OFFSET + length)
        self.device_address = ADDRESS

    def view(self) -> memoryview:
        raise ValueError("it has no view")

    def dma_buf(self) -> tuple[int, int] | None:
        return self.exported, OFFSET

    def close(self) -> None:
        os.close(self.exported)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Registered]]:
    for module in (verbs_memory, verbs_grants):
        monkeypatch.setattr(module, "PART", PART)
    with pyverbs() as library:
        yield library


@pytest.fixture
def port() -> Iterator[Port]:
    with nic_port() as port:
        yield port
        assert port.nic.device.counts["mr"] == 0


@pytest.mark.parametrize(
    ("path", "on_demand", "fault"),
    [(Path.P2PDMA, False, errors.OnDemandMissing), (Path.STAGED, True, errors.RegistrationRefused)],
)
def test_what_can_not_be_registered_is_not_tried(path: Path, on_demand: bool, fault: type[errors.PeermemError]) -> None:
    with nic_port(on_demand=on_demand) as port, pytest.raises(fault, match=r"nic0/1|staging buffer"):
        check(port, path)


@pytest.mark.parametrize("path", [Path.HOST, Path.P2PDMA, Path.DMABUF, Path.LEGACY_PEER_MEMORY])
def test_what_can_be_is(path: Path, port: Port) -> None:
    check(port, path)


async def test_a_dma_buf_is_imported_in_parts_without_windows(library: type[Registered], port: Port) -> None:
    memory = ExportedMemory(2 * PART + 1)
    registration = Registration(memory, Path.DMABUF)
    await registration.add(port, "uid:1@a")
    assert [(made.where, made.length, made.access) for made in library.made] == [
        ({"fd": memory.exported, "offset": OFFSET}, PART, Access.LOCAL_WRITE),
        ({"fd": memory.exported, "offset": OFFSET + PART}, PART, Access.LOCAL_WRITE),
        ({"fd": memory.exported, "offset": OFFSET + 2 * PART}, 1, Access.LOCAL_WRITE),
    ]
    assert all(isinstance(made, DmaBufMR) for made in library.made)
    assert registration.address == OFFSET
    assert not registration.takes_windows
    domain = port.nic.domains.of("uid:1@a")
    addresses = [registration.part(domain, index).address for index in range(3)]
    assert addresses == [OFFSET, OFFSET + PART, OFFSET + 2 * PART]
    domain.release()
    await registration.close()
    assert not any(made.is_open for made in library.made)
    memory.close()


async def test_a_grant_on_a_dma_buf_is_a_registration_of_just_its_range(library: type[Registered], port: Port) -> None:
    memory = ExportedMemory(PART)
    registration = Registration(memory, Path.DMABUF)
    own = verbs.Domain(port.nic.device)
    region = registration.tight(own, 100, 50, Access.REMOTE_READ)
    made = library.made[-1]
    assert (made.pd, made.where["offset"], made.length) == (own.thing, OFFSET + 100, 50)
    assert region.rkey == made.rkey
    region.close()
    own.close()
    await registration.close()
    memory.close()


@pytest.mark.parametrize(
    ("path", "access"),
    [
        (Path.HOST, Access.LOCAL_WRITE | Access.MW_BIND),
        (Path.P2PDMA, Access(81)),
        (Path.LEGACY_PEER_MEMORY, Access(17)),
    ],
)
async def test_addresses_are_registered_with_windows(
    path: Path, access: Access, library: type[Registered], port: Port
) -> None:
    legacy = path is Path.LEGACY_PEER_MEMORY
    memory = ExportedMemory(PART) if legacy else FileMemory(PART)
    registration = Registration(memory, path)
    await registration.add(port, "uid:1@a")
    assert registration.takes_windows
    assert [made.access for made in library.made] == [access]
    assert (registration.address == ADDRESS) is legacy
    await registration.close()
    memory.close()


@pytest.mark.parametrize("path", [Path.DMABUF, Path.LEGACY_PEER_MEMORY])
def test_memory_that_is_not_of_the_path_is_refused(path: Path) -> None:
    with pytest.raises(errors.RegistrationRefused, match=path.value):
        Registration(FileMemory(4096), path)


async def test_a_refusal_leaves_nothing_registered(library: type[Registered], port: Port) -> None:
    table, memory = MemoryTable(), ExportedMemory(PART)
    NICS.fails["DmaBufMR"] = errno.EOPNOTSUPP
    with pytest.raises(errors.DmaBufUnsupported):
        await table.register(memory, Path.DMABUF, [port])
    assert (len(table), table.needs_domains) == (0, False)
    memory.close()


class TestGrants:
    """Grants on a dma-buf, of a link that stands for one with queue pairs."""

    @pytest.fixture
    async def granting(self, port: Port) -> AsyncIterator[tuple[Target, Any, ExportedMemory]]:
        async def fenced(rails: Sequence[object]) -> None:
            assert rails == link.rails

        table, memory = MemoryTable(), ExportedMemory(PART + 50)
        await table.register(memory, Path.DMABUF, [port])
        rail = _Rail(port, port.nic.domains.of("uid:1@a"))
        link = SimpleNamespace(link_id=b"link", rails=[rail], grants={}, opening=set(), fence=fenced)
        target = Target(cast(Any, None), table, Settings(), time.monotonic, lambda _: None)
        target._links[b"link"] = cast(Any, link)
        yield target, link, memory
        rail.domain.release()
        await table.close()
        memory.close()

    async def test_they_are_registrations_in_the_links_own_domain(
        self, granting: tuple[Target, Any, ExportedMemory], library: type[Registered], port: Port
    ) -> None:
        target, link, memory = granting
        link.rails[0].domain.release()
        link.rails[0].domain = own = port.nic.domains.apart()
        before = len(library.made)
        key = await target.grant(b"link", memory, 100, PART - 60, Rights.WRITE, 30.0)
        made = library.made[before:]
        assert [(one.where["offset"], one.length) for one in made] == [(OFFSET + 100, PART - 100), (OFFSET + PART, 40)]
        assert {(one.pd, one.access) for one in made} == {(own.thing, Access.LOCAL_WRITE | Access.REMOTE_WRITE)}
        assert [part.address for part in key.rails[0]] == [OFFSET + 100, OFFSET + PART]
        await target.revoke(key.rkey)
        assert not any(one.is_open for one in made)

    async def test_a_link_from_before_has_to_be_opened_anew(self, granting: tuple[Target, Any, ExportedMemory]) -> None:
        target, _, memory = granting
        with pytest.raises(errors.LinkNotFound, match="Open a new one"):
            await target.grant(b"link", memory, 0, 1, Rights.READ, 30.0)
        assert target.grant_count == 0


@pytest.mark.parametrize("checks_ranges", [True, False])
async def test_a_window_opens_exactly_the_granted_range(checks_ranges: bool, library: type[Registered]) -> None:
    with nic_port(window_ranges=checks_ranges) as port:
        table, memory, domain = MemoryTable(), FileMemory(2 * PART), port.nic.domains.of("uid:1@a")
        rail = _Rail(port, domain)
        await table.register(memory, Path.HOST, [port], "uid:1@a")
        registration = table.find(memory)
        assert registration is not None
        door, wholes = Door(cast(Any, rail)), len(library.made)
        assert await door.open(registration, PART - 100, PART + 100, Rights.READ)
        start = registration.address + PART - 100
        assert [bound[1:] for bound in rail.bound] == [
            (start, 100, Access.REMOTE_READ),
            (start + 100, PART, Access.REMOTE_READ),
        ]
        assert [(part.address, part.length) for part in door.parts] == [(start, 100), (start + 100, PART)]
        tight = [(made.where["address"], made.length, made.access) for made in library.made[wholes:]]
        assert tight == ([] if checks_ranges else [(start, 100, Access.LOCAL_WRITE | Access.MW_BIND)])
        first, second = (bound[0] for bound in rail.bound)
        assert (first.address, first.length) == ((registration.address, PART) if checks_ranges else (start, 100))
        assert (second.address, second.length) == (registration.address + PART, PART)
        door.close()
        assert port.nic.device.counts["mw"] == 0
        assert not any(made.is_open for made in library.made[wholes:])
        domain.release()
        await table.close()
        memory.close()


class _Rail:
    """Where a queue pair would be: binds succeed, and are written down."""

    is_lost = False

    def __init__(self, port: Port, domain: HeldDomain) -> None:
        self.port, self.domain = port, domain
        self.up = True
        self.free = 1
        self.bound: list[tuple[verbs.MemoryRegion, int, int, Access]] = []

    def bind(
        self,
        window: verbs.Window,
        region: verbs.MemoryRegion,
        address: int,
        length: int,
        access: Access,
        done: Callable[[int], None],
    ) -> None:
        self.bound.append((region, address, length, access))
        done(WcStatus.SUCCESS)


async def test_links_get_domains_once_there_was_memory_without_windows(port: Port) -> None:
    table, host, exported = MemoryTable(), FileMemory(PART), ExportedMemory(PART)
    await table.register(host, Path.HOST, [port])
    assert not table.needs_domains
    await table.register(exported, Path.DMABUF, [port])
    await table.close()
    assert table.needs_domains
    host.close()
    exported.close()
