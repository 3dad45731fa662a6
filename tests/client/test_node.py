from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peermem
from peermem import errors

from .daemon import ScriptedDaemon, succeed


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    target = f"unix://{tmp_path}/none.sock"
    with pytest.raises(errors.NodeUnreachable, match="start peermemd there") as caught:
        peermem.connect(target)
    assert caught.value.metadata == {"target": target}


def test_an_idempotent_call_is_repeated_once(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, succeed) as daemon:
        daemon.flaky = 1
        with peermem.connect(daemon.target) as node:
            assert node.name == "nodes/a"
        daemon.flaky = 2
        with pytest.raises(errors.NodeUnreachable):
            peermem.connect(daemon.target)


def test_without_an_attach_socket_nothing_is_mapped_or_handed_in(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, succeed) as daemon, peermem.connect(daemon.target) as node:
        region = node.create_region(device="bar0", length="4KiB", name="x")
        with pytest.raises(errors.NotMappable, match="mapped"):
            region.map()
        with pytest.raises(errors.NotMappable, match="handed in"):
            node.adopt(0)
        assert "peermem-session" not in daemon.metadata[-1]


def test_an_attach_socket_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with (
        ScriptedDaemon(tmp_path, succeed) as daemon,
        pytest.raises(errors.NodeUnreachable, match=r"none\.sock"),
    ):
        peermem.connect(daemon.target, attach=str(tmp_path / "none.sock"))


def test_a_lease_is_renewed_while_the_node_is_open(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, succeed) as daemon:
        with peermem.connect(daemon.target) as node:
            node.create_region(device="bar0", length=1, name="x", lease=0.03)
            assert all(daemon.renewal.acquire(timeout=10) for _ in range(3))
        assert daemon.renewed[:3] == [["nodes/a/regions/x"]] * 3


def test_a_lost_lease_does_not_take_others_with_it(tmp_path: Path) -> None:
    with ScriptedDaemon(tmp_path, succeed) as daemon:
        daemon.lost.add("nodes/a/regions/x")
        with peermem.connect(daemon.target) as node:
            node.create_region(device="bar0", length=1, name="x", lease=3600)
            node.create_region(device="bar0", length=1, name="y", lease=0.03)
            node.create_region(device="bar0", length=1, name="x", lease=0.03)
            while ["nodes/a/regions/x"] not in daemon.renewed:
                assert daemon.renewal.acquire(timeout=10)
            seen = len(daemon.renewed)
            while ["nodes/a/regions/y"] not in daemon.renewed[seen:]:
                assert daemon.renewal.acquire(timeout=10)


def test_everything_public_is_there() -> None:
    for name in peermem.__all__:
        assert getattr(peermem, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        getattr(peermem, "nothing")  # noqa: B009


_ISOLATED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "aiohttp", "msgspec", "structlog", "prometheus_client", "google_crc32c", "grpc_health",
            "grpc_reflection", "grpc_status", "click", "rich", "numpy",
        }:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import peermem
assert "grpc" not in sys.modules, "the package itself imports nothing"
for name in peermem.__all__:
    getattr(peermem, name)
import peermem.aio, peermem.errors
foreign = {name for name in sys.modules if name.startswith("peermem.")}
print(sorted(name for name in foreign if name.split(".")[1] not in {"client", "core", "v1", "aio", "errors"}))
"""


def test_a_job_imports_nothing_of_the_daemon() -> None:
    done = subprocess.run([sys.executable, "-c", _ISOLATED], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
