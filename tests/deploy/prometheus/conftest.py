"""Two real daemons to which everything happened that rules, dashboard and pages speak of, as far as it can here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bench.daemons import Daemon, Place, daemons

import peermem
from peermem import errors
from tests.certificates import Authority
from tests.e2e.conftest import check_log
from tests.e2e.test_tls import table

_SETTINGS = '[[device]]\nname = "bar0"\nsize = "64MiB"\n[storage]\ndirectories = []\n'
_SIZE = 1 << 20


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """Nodes a and b, over TLS."""
    folder, authority = tmp_path_factory.mktemp("watched"), Authority()
    places = {node: Place(config=table(authority.node(node).write(folder / f"tls-{node}"))) for node in ("a", "b")}
    with daemons(folder, tuple(places), _SETTINGS, places=places) as running:
        yield running
        for daemon in running.values():
            assert daemon.stop() == 0
            check_log(daemon)


@pytest.fixture(scope="session")
def pages(pair: dict[str, Daemon]) -> list[str]:
    """The metrics pages of both, after transfers of each kind, failures and refusals."""
    with (
        peermem.connect(pair["a"].target) as a,
        peermem.connect(pair["b"].target) as b,
        a.create_region(device="bar0", length=_SIZE) as here,
        a.create_region(device="bar0", length=_SIZE) as aside,
        b.create_region(device="bar0", length=_SIZE) as there,
    ):
        for source, sink in ((here, there), (there, here), (here, aside)):
            a.transfer(source, sink).wait("30s")
        with pytest.raises(errors.FabricUnavailable):
            a.transfer(here, there, fabric="verbs").wait("30s")
        with pytest.raises(errors.PeermemError):
            here.load("/nowhere")
        with pytest.raises(errors.RegionNotFound):
            a.region("nodes/a/regions/nobody")
    return [daemon.scrape() for daemon in pair.values()]
