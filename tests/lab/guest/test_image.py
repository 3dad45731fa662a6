"""The container image in the guest: daemons from its own root filesystem, with its own Python and verbs libraries, move
bytes over RDMA NICs. They have the rights of the unprivileged manifests: root with CAP_IPC_LOCK and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from peermem import FabricKind
from tests.deploy.containers import container
from tests.lab.guest import nodes
from tests.lab.guest.conftest import Figures
from tests.lab.guest.nodes import MIB, PATIENCE, Lab, command, noise

pytestmark = pytest.mark.timeout(400)

DISK = Path("/dev/vdb")
RIGHTS = "-all,+ipc_lock"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount the image."""
    place = tmp_path_factory.mktemp("image")
    with ExitStack() as stack:
        command("mount", "-o", "ro", str(DISK), str(place))
        stack.callback(command, "umount", str(place))
        yield place


@pytest.fixture(scope="module")
def lab(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("nodes")
    inside = container(root, folder, user=0, capabilities=RIGHTS)
    places = {
        name: replace(place, prefix=(*place.prefix, *inside), program=("/usr/local/bin/peermemd",), patience=300.0)
        for name, place in ((name, nodes.place(name)) for name in nodes.HOSTS)
    }
    with nodes.lab(folder, places=places) as lab:
        yield lab


@pytest.mark.parametrize(("source", "sink"), [("memfd", "memfd"), ("p2pmem", "memfd"), ("memfd", "p2pmem")])
def test_it_moves_bytes_over_its_nics(lab: Lab, source: str, sink: str, figures: Figures) -> None:
    data = noise(4 * MIB)
    with (
        lab.nodes["a"].create_region(device=lab.kinds[source].device, length=len(data)) as x,
        lab.nodes["b"].create_region(device=lab.kinds[sink].device, length=len(data)) as y,
    ):
        x.write(data)
        info = lab.nodes["a"].transfer(x, y, checksum=True).wait(PATIENCE)
        assert (info.fabric, info.path) == (FabricKind.VERBS, lab.kinds[source].path)
        assert y.read() == data
        assert info.bandwidth
        figures(f"{source}_to_{sink}", {"bytes": len(data), "mib_per_s": info.bandwidth / MIB})


def test_it_is_the_image_that_runs_and_with_few_rights(lab: Lab, root: Path) -> None:
    for daemon in lab.daemons.values():
        assert os.stat(f"/proc/{daemon.pid}/root/usr").st_dev == DISK.stat().st_rdev
        status = dict(line.split(":\t") for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines()[:60])
        assert int(status["CapEff"], 16) == 1 << 14
        if daemon.node != "c":
            assert "pyverbs" in Path(f"/proc/{daemon.pid}/maps").read_text()


def test_its_own_tool_shows_nics_and_devices(lab: Lab, root: Path) -> None:
    daemon = lab.daemons["a"]
    inside = (*nodes.inside("a"), *container(root, daemon.folder, user=0, capabilities=RIGHTS))
    tool = (*inside, "/usr/local/bin/peermemctl", "--target", daemon.target)
    assert {nic["name"] for nic in json.loads(command(*tool, "nics", "--json"))["nics"]} == {"rxe1/1", "rxe1b/1"}
    assert nodes.HOST in command(*tool, "devices")
