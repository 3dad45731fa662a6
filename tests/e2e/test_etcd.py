"""Real daemons that find each other through a real etcd, and what they do while it is away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest
from bench.daemons import Daemon, daemons, free_ports

import peermem
from peermem import errors
from tests.directory.etcd_server import EtcdServer, etcd_server, needs_etcd
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, eventually, metric, noise

pytestmark = needs_etcd
_OPENER = build_opener(ProxyHandler({}))


def environ(etcd: EtcdServer, lease: str = "20s") -> dict[str, str]:
    """What has a daemon use etcd."""
    return {
        "PEERMEM_DIRECTORY_KIND": "etcd",
        "PEERMEM_DIRECTORY_NODES": "{}",
        "PEERMEM_DIRECTORY_ETCD_ENDPOINTS": f'["{etcd.endpoint}"]',
        "PEERMEM_DIRECTORY_ETCD_LEASE": lease,
    }


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path / "etcd") as server:
        yield server


@contextmanager
def pair(folder: Path, etcd: EtcdServer, lease: str = "20s") -> Iterator[dict[str, Daemon]]:
    """Run nodes a and b, which know each other."""
    with daemons(folder, ("a", "b"), DEVICE, environ(etcd, lease)) as nodes:
        for daemon in nodes.values():
            eventually(lambda daemon=daemon: metric(daemon, "peermem_directory_nodes") == 2)  # type: ignore[misc]
        yield nodes
        for daemon in nodes.values():
            check_log(daemon)


def ready(daemon: Daemon) -> tuple[int, str]:
    """Return what the readiness probe says."""
    try:
        with _OPENER.open(f"http://{daemon.http}/readyz", timeout=10) as page:
            return page.status, page.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def states(node: peermem.Node) -> dict[str, str]:
    return {info.name: info.state for info in node.nodes()}


@contextmanager
def watching(daemon: Daemon) -> Iterator[Iterator[bytes]]:
    """Run `peermemctl nodes --watch` and give its lines; interrupted, it ends as it should."""
    command = "from peermem.cli import main; main()", "nodes", "--watch", "--interval", "10ms", "--json"
    process = subprocess.Popen([sys.executable, "-c", *command, "--target", daemon.target], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def copy(source: peermem.Node, data: bytes) -> None:
    """Move bytes from one node to the other and compare them."""
    with peermem.connect(source.info("nodes/b").address) as there:
        made = source.create_region(device="bar0", length=len(data), lease="none")
        sink = there.create_region(device="bar0", length=len(data), lease="none")
        made.write(data)
        source.transfer(made, sink.name).wait(30)
        assert sink.read() == data
        made.delete()
        sink.delete()


def test_nodes_and_regions_are_found_and_nothing_breaks_without_etcd(etcd: EtcdServer, tmp_path: Path) -> None:
    with pair(tmp_path, etcd) as nodes, peermem.connect(nodes["a"].target) as a:
        infos = {info.name: info for info in a.nodes()}
        assert (infos["nodes/b"].address, infos["nodes/b"].state) == (nodes["b"].grpc, "UP")
        with peermem.connect(nodes["b"].target) as b:
            assert infos["nodes/b"].epoch == b.info().epoch
            made = b.create_region(device="bar0", length=MIB, name="x", labels={"step": "1"}, publish=True)
            eventually(lambda: len(list(a.find_regions({"step": "1"}))) == 1)
            (found,) = a.find_regions({"step": "1"})
            assert (found.name, found.length, found.device_kind) == (made.name, MIB, "memfd")
        eventually(lambda: not list(a.find_regions({"step": "1"})), "the end of the region with its job")

        etcd.kill()
        eventually(lambda: states(a)["nodes/b"] == "UNCONFIRMED")
        status, text = ready(nodes["a"])
        assert status == 200
        assert "The directory has been away for" in text
        assert metric(nodes["a"], "peermem_directory_connected") == 0
        copy(a, noise(MIB))
        with pytest.raises(errors.DirectoryUnreachable):
            list(a.find_regions())
        with pytest.raises(errors.NodeNotFound, match="has been away"):
            a.info("nodes/c")
        etcd.start()
        eventually(lambda: states(a)["nodes/b"] == "UP")
        eventually(lambda: "away" not in ready(nodes["a"])[1])


def test_a_daemon_that_dies_is_gone_and_is_back_at_once(etcd: EtcdServer, tmp_path: Path) -> None:
    with pair(tmp_path, etcd, "3s") as nodes, peermem.connect(nodes["a"].target) as a:
        copy(a, noise(4096))
        epoch = a.info("nodes/b").epoch
        nodes["b"].kill()
        nodes["b"].start()
        nodes["b"].ready()
        eventually(lambda: {info.name: info.epoch for info in a.nodes()}["nodes/b"] != epoch)
        assert states(a)["nodes/b"] == "UP", "its lease is still that of the run before, or a new one"
        copy(a, noise(4096))
        with watching(nodes["a"]) as lines:
            assert [node["state"] for node in json.loads(next(lines))["nodes"]] == ["UP", "UP"]
            nodes["b"].kill()
            assert any(json.loads(line)["nodes"][1]["state"] == "GONE" for line in lines)
        with pytest.raises(errors.NodeNotFound):
            a.info("nodes/b")


def test_a_second_node_of_a_name_is_not_ready_and_says_why(etcd: EtcdServer, tmp_path: Path) -> None:
    with daemons(tmp_path, ("a",), DEVICE, environ(etcd)) as nodes:
        first = nodes["a"]
        eventually(lambda: "peermem_directory_lease_remaining_seconds" in first.scrape())
        (tmp_path / "second").mkdir()
        second = Daemon("a", tmp_path / "second" / "a", free_ports(3), {}, DEVICE)
        second.environ = environ(etcd)
        try:
            second.start()
            eventually(lambda: "can't be nodes/a" in _refused(second))
            assert first.grpc in _refused(second)
            assert second.grpc in _refused(second)
            assert ready(first)[0] == 200
            first.stop()
            eventually(lambda: _refused(second) == "")
        finally:
            second.kill()
        check_log(second)


def _refused(daemon: Daemon) -> str:
    try:
        status, text = ready(daemon)
    except OSError:
        return "not there yet"
    return text if status != 200 else ""


def test_etcd_that_is_not_there_at_the_start(tmp_path: Path) -> None:
    etcd = EtcdServer(tmp_path / "etcd")
    with daemons(tmp_path, ("a",), DEVICE, environ(etcd)) as nodes:
        daemon = nodes["a"]
        assert "The directory has been away" in ready(daemon)[1]
        with peermem.connect(daemon.target) as a, a.create_region(device="bar0", length=MIB) as made:
            a.transfer(made[0:4096], made[4096:8192]).wait(30)
        try:
            etcd.start()
            eventually(lambda: bool(etcd.keys("/peermem/v1/default/nodes/")))
            eventually(lambda: metric(daemon, "peermem_directory_connected") == 1)
        finally:
            etcd.kill()
        check_log(daemon)


def test_links_are_there_only_while_they_are_used(etcd: EtcdServer, tmp_path: Path) -> None:
    entry = json.dumps({"v": 1, "address": "127.0.0.1:9", "epoch": "e", "fabrics": ["tcp"]}).encode()
    for number in range(300):
        etcd.put(f"/peermem/v1/default/nodes/other-{number}", entry)
    idle = environ(etcd) | {"PEERMEM_TRANSFER_LINK_IDLE": "0s"}
    with daemons(tmp_path, ("a", "b"), DEVICE, idle) as nodes, peermem.connect(nodes["a"].target) as a:
        eventually(lambda: len(a.nodes()) == 302)
        assert metric(nodes["a"], "peermem_links") == 0
        before = len(list(Path(f"/proc/{nodes['a'].pid}/fd").iterdir()))
        copy(a, noise(MIB))
        eventually(lambda: metric(nodes["a"], "peermem_links") == 0)
        eventually(lambda: len(list(Path(f"/proc/{nodes['a'].pid}/fd").iterdir())) <= before + 2)
