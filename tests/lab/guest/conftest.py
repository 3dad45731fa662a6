"""What every test in the guest can ask for."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from peermem.core import types
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.fabric.verbs_types import Settings
from tests.fabric.support import FileMemory
from tests.lab.guest.fabric_node import LENGTH, FarNode, far_process
from tests.lab.guest.wires import QUICK, Wire, Wired

Figures = Callable[[str, Any], None]


@pytest.fixture(scope="session")
def out() -> Path:
    """Return the suite's folder, all of which comes out of the guest."""
    return Path(os.environ["PEERMEM_LAB_OUT"])


@pytest.fixture(scope="session")
def figures(out: Path) -> Figures:
    """Return what writes figures into the lab's report: `figures("write_64KiB", {"mib_per_s": 71.0})`."""

    def write(name: str, figure: Any) -> None:
        (out / f"{name}.json").write_text(json.dumps(figure, indent=2))

    return write


@pytest.fixture(scope="session")
def soak_share() -> float:
    """Return how much of a soak to do: 1.0, or 0.1 in an ordinary run of the lab."""
    return float(os.environ["PEERMEM_LAB_SOAK"])


@pytest.fixture(scope="module")
def far_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with far_process(tmp_path_factory.mktemp("far")) as (path, _process):
        yield path


@pytest.fixture
def wired(far_socket: Path) -> Wired:
    @asynccontextmanager
    async def open_wire(settings: Settings) -> AsyncIterator[Wire]:
        fabric, local, far = VerbsFabric(settings=settings), FileMemory(LENGTH, seed=1), FarNode(far_socket)
        await far.restart(settings)
        await fabric.start()
        try:
            await fabric.register(local, types.Path.HOST)
            wire = await Wire(fabric, far, local).open()
            yield wire
            await wire.link.close()
            assert wire.events.faults == []
        finally:
            await fabric.close()
            local.close()

    return open_wire


@pytest.fixture
async def wire(wired: Wired) -> AsyncIterator[Wire]:
    async with wired(QUICK) as wire:
        yield wire
