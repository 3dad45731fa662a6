"""Real daemons, started once for all tests that leave them alive."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from bench.daemons import Daemon, daemons

import peermem
from tests.e2e.support import MIB

DEVICE = '[[device]]\nname = "bar0"\nsize = "1GiB"\n'


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """Daemons of nodes a, b and c; at the end they must hold nothing and have met no defect."""
    with daemons(tmp_path_factory.mktemp("trio"), ("a", "b", "c"), DEVICE) as nodes:
        yield nodes
        for daemon in nodes.values():
            with peermem.connect(daemon.target) as node:
                assert [region.name for region in node.regions()] == []
                assert list(node.transfers(running=True)) == []
        for daemon in nodes.values():
            assert daemon.stop() == 0
            check_log(daemon)


def check_log(daemon: Daemon) -> None:
    """No test may make a daemon write of a defect."""
    log = daemon.log.read_text()
    assert "Traceback" not in log, log
    assert "_defect" not in log, log


@pytest.fixture(scope="module")
def a(trio: dict[str, Daemon]) -> Iterator[peermem.Node]:
    with peermem.connect(trio["a"].target) as node:
        yield node


@pytest.fixture(scope="module")
def b(trio: dict[str, Daemon]) -> Iterator[peermem.Node]:
    with peermem.connect(trio["b"].target) as node:
        yield node


@pytest.fixture(scope="module")
def c(trio: dict[str, Daemon]) -> Iterator[peermem.Node]:
    with peermem.connect(trio["c"].target) as node:
        yield node


@pytest.fixture(scope="module")
def channel(trio: dict[str, Daemon]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(trio["a"].grpc) as channel:
        yield channel


@pytest.fixture
def regions(a: peermem.Node, b: peermem.Node) -> Iterator[tuple[peermem.Region, peermem.Region]]:
    with a.create_region(device="bar0", length=MIB) as x, b.create_region(device="bar0", length=MIB) as y:
        yield x, y
