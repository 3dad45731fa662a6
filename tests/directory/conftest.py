"""One etcd for all tests that leave it as it is; each test has a cluster of its own in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.directory.etcd_server import EtcdServer, etcd_server

_CLUSTERS = itertools.count()


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("etcd") / "shared") as server:
        yield server


@pytest.fixture
def cluster() -> str:
    """The name of a cluster that no other test uses."""
    return f"c{next(_CLUSTERS)}"
