"""Daemons without pyverbs, as on a machine without RDMA: what they say, and that they serve over tcp all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.daemons import Daemon, Place, daemons

import peermem
from peermem import FabricKind, errors
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, metric, noise

_SOURCE = Path(peermem.__file__).parents[1]
_HIDDEN = "raise ModuleNotFoundError(\"No module named 'pyverbs'\")\n"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """Nodes `auto` and `other` choose their fabrics, `verbs` insists; pyverbs is hidden from all, if there is one."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "hiding/pyverbs").mkdir(parents=True)
    (folder / "hiding/pyverbs/__init__.py").write_text(_HIDDEN)
    hidden = ("env", f"PYTHONPATH={folder / 'hiding'}:{_SOURCE}")
    places = {
        "auto": Place(prefix=hidden),
        "other": Place(prefix=hidden),
        "verbs": Place(prefix=(*hidden, "PEERMEM_FABRIC=verbs")),
    }
    with daemons(folder, tuple(places), DEVICE, places=places) as running:
        yield running
        for daemon in running.values():
            assert daemon.stop() == 0
            check_log(daemon)


def test_auto_serves_over_tcp_and_says_why(nodes: dict[str, Daemon]) -> None:
    with (
        peermem.connect(nodes["auto"].target) as node,
        peermem.connect(nodes["other"].target) as other,
        node.create_region(device="bar0", length=MIB) as here,
        other.create_region(device="bar0", length=MIB) as there,
    ):
        here.write(noise(MIB))
        info = node.transfer(here, there, checksum=True).wait("30s")
        assert info.fabric is FabricKind.TCP
        assert there.read() == noise(MIB)
        assert here.nics == ()
        for why in (here.why, info.fabric_why):
            assert "pyverbs" in why
            assert "python3-pyverbs" in why
        assert nodes["auto"].log.read_text().count("fabric_unavailable") == 1
        pushed = 'peermem_transfer_bytes_total{device="bar0",direction="push",fabric="tcp",path="HOST"} '
        assert [float(line.removeprefix(pushed)) for line in nodes["auto"].scrape().splitlines() if pushed in line] == [
            MIB
        ]
        with pytest.raises(errors.FabricUnavailable) as caught:
            node.transfer(here, there, fabric="verbs").wait("30s")
        assert "pyverbs" in caught.value.message


def test_preflight_names_what_is_missing(nodes: dict[str, Daemon]) -> None:
    with peermem.connect(nodes["auto"].target) as node:
        found = {verdict.check: verdict.error for verdict in node.preflight()}
        assert isinstance(found["rdma-core"], errors.PyverbsMissing)
        assert node.nics() == [] or all(isinstance(nic.error, errors.PyverbsMissing) for nic in node.nics())


def test_a_daemon_that_insists_starts_and_refuses_regions_with_the_reason(nodes: dict[str, Daemon]) -> None:
    with peermem.connect(nodes["verbs"].target) as node:
        with pytest.raises(errors.PyverbsMissing) as caught:
            node.create_region(device="bar0", length=MIB)
        assert "python3-pyverbs" in caught.value.message
        assert FabricKind.TCP not in node.info().fabrics
        assert node.info().region_count == 0
        assert metric(nodes["verbs"], "peermem_region_bytes") == 0
