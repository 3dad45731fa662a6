from __future__ import annotations

from collections.abc import Callable

import pytest

from peermem.core.errors import LinkNotFound
from peermem.core.types import RemoteKey, Rights
from peermem.fabric.grants import Grant, GrantTable
from tests.fabric.support import Clock, FileMemory

LINK, OTHER = b"l" * 16, b"o" * 16


@pytest.fixture
def memory(memories: Callable[..., FileMemory]) -> FileMemory:
    return memories(1000)


@pytest.fixture
def table(clock: Clock) -> GrantTable:
    table = GrantTable(clock)
    table.open_link(LINK)
    table.open_link(OTHER)
    return table


def find(
    table: GrantTable, key: RemoteKey, right: Rights = Rights.READ, offset: int = 0, length: int = 1
) -> Grant | None:
    return table.find(LINK, key.rkey, right, [offset], [length])


def test_a_grant_gives_its_rights_on_its_range(table: GrantTable, memory: FileMemory) -> None:
    key = table.grant(LINK, memory, 100, 50, Rights.READ, 10.0)
    grant = find(table, key, Rights.READ, 0, 50)
    assert grant is not None
    assert (grant.memory, grant.offset, key.length) == (memory, 100, 50)
    assert find(table, key, Rights.READ, 49, 1) is grant
    assert find(table, key, Rights.READ, 49, 2) is None
    assert find(table, key, Rights.READ, 50, 1) is None
    assert find(table, key, Rights.READ, -1, 1) is None
    assert find(table, key, Rights.READ, 2**64 - 1, 2) is None
    assert find(table, key, Rights.READ, 0, 0) is None
    assert find(table, key, Rights.WRITE) is None


def test_every_range_counts(table: GrantTable, memory: FileMemory) -> None:
    key = table.grant(LINK, memory, 0, 100, Rights.READ | Rights.WRITE, 10.0)
    assert table.find(LINK, key.rkey, Rights.WRITE, [0, 50, 99], [10, 50, 1]) is not None
    assert table.find(LINK, key.rkey, Rights.WRITE, [0, 50, 99], [10, 50, 2]) is None


def test_it_is_of_no_use_to_another_link(table: GrantTable, memory: FileMemory) -> None:
    key = table.grant(OTHER, memory, 0, 100, Rights.READ, 10.0)
    assert find(table, key) is None


def test_it_ends_by_time(table: GrantTable, memory: FileMemory, clock: Clock) -> None:
    key = table.grant(LINK, memory, 0, 100, Rights.READ, 10.0)
    grant = find(table, key)
    clock.ahead = 10.0
    assert grant is not None
    assert not grant.usable()
    assert find(table, key) is None


def test_it_ends_by_revocation(table: GrantTable, memory: FileMemory) -> None:
    key = table.grant(LINK, memory, 0, 100, Rights.READ, 10.0)
    grant = find(table, key)
    table.revoke(key)
    table.revoke(key)
    assert grant is not None
    assert not grant.usable()
    assert find(table, key) is None
    assert len(table) == 0


def test_it_ends_with_its_link(table: GrantTable, memory: FileMemory) -> None:
    key = table.grant(LINK, memory, 0, 100, Rights.READ, 10.0)
    table.grant(OTHER, memory, 0, 100, Rights.READ, 10.0)
    grant = find(table, key)
    table.close_link(LINK)
    table.close_link(LINK)
    assert grant is not None
    assert not grant.usable()
    assert len(table) == 1
    with pytest.raises(LinkNotFound):
        table.grant(LINK, memory, 0, 100, Rights.READ, 10.0)
    table.revoke(key)


@pytest.mark.parametrize(("offset", "length"), [(0, 1001), (1000, 1), (-1, 2), (0, 0)])
def test_only_what_is_there_can_be_granted(table: GrantTable, memory: FileMemory, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="are no range"):
        table.grant(LINK, memory, offset, length, Rights.READ, 10.0)
    assert len(table) == 0


def test_keys_differ_and_are_not_shown(table: GrantTable, memory: FileMemory) -> None:
    keys = [table.grant(LINK, memory, 0, 1, Rights.READ, 10.0) for _ in range(100)]
    assert len({key.rkey for key in keys}) == 100
    assert str(keys[0].rkey) not in repr(find(table, keys[0]))
