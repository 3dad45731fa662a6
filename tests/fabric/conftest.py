from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fabric.support import MIB, Clock, FileMemory


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lost() -> list[bytes]:
    """Ids of accepted links that ended by themselves."""
    return []


@pytest.fixture
def memories() -> Iterator[Callable[..., FileMemory]]:
    made: list[FileMemory] = []

    def make(length: int = 4 * MIB, seed: int | None = None) -> FileMemory:
        made.append(FileMemory(length, seed))
        return made[-1]

    yield make
    for memory in made:
        memory.close()  # fails when the fabric still holds a slice
