"""The life of a daemon's process: its start, its end, and what others see of both."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from bench.daemons import Daemon, daemons
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import peermem
from peermem import errors
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, eventually, moving

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
BIG = 384 * MIB


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, Daemon]]:
    with daemons(tmp_path, ("a", "b"), DEVICE, {"PEERMEM_SHUTDOWN_GRACE": "300ms"}) as nodes:
        yield nodes
        for daemon in nodes.values():
            check_log(daemon)


def status(daemon: Daemon, page: str) -> int:
    """Return the HTTP status of a page, 0 where nobody answers."""
    host, _, port = daemon.http.partition(":")
    try:
        with socket.create_connection((host, int(port)), 10) as sock:
            sock.sendall(f"GET /{page} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = b""
            while piece := sock.recv(4096):
                head += piece
            return int(head.split(b" ")[1])
    except ConnectionError:
        return 0


def terminate(daemon: Daemon) -> None:
    os.kill(daemon.pid, signal.SIGTERM)


def end(daemon: Daemon) -> int:
    assert daemon.process is not None
    return daemon.process.wait(30)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is expected to end by itself."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PEERMEM_")}
    environ["PYTHONPATH"] = str(Path(peermem.__file__).parents[1])
    command = [sys.executable, "-m", "peermem", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


def test_an_idle_daemon_ends_at_once_and_in_order(nodes: dict[str, Daemon]) -> None:
    assert (status(nodes["a"], "readyz"), status(nodes["a"], "healthz")) == (200, 200)
    assert nodes["a"].stop() == 0
    assert status(nodes["a"], "readyz") == 0
    assert not (nodes["a"].folder / "attach.sock").exists()
    nodes["a"].start()
    nodes["a"].ready()
    with peermem.connect(nodes["a"].target) as node:
        node.create_region(device="bar0", length=4096, lease="none")
    assert nodes["a"].stop() == 0


def test_what_runs_longer_than_the_grace_time_fails_and_says_why(nodes: dict[str, Daemon]) -> None:
    """The other node stands still, so that the transfer can't end by itself."""
    with peermem.connect(nodes["a"].target) as a, peermem.connect(nodes["b"].target) as b:
        source = a.create_region(device="bar0", length=BIG)
        sink = b.create_region(device="bar0", length=BIG)
        transfer = b.transfer(source, sink)
        moving(transfer)
        os.kill(nodes["a"].pid, signal.SIGSTOP)
        try:
            with grpc.insecure_channel(nodes["b"].grpc) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                assert health.Check(health_pb2.HealthCheckRequest()).status == SERVING
                watch = health.Watch(health_pb2.HealthCheckRequest(service="peermem.v1.TransferService"))
                assert next(watch).status == SERVING
                terminate(nodes["b"])
                assert next(watch).status == NOT_SERVING
                watch.cancel()
            assert status(nodes["b"], "readyz") in (0, 503)
            with pytest.raises(errors.ShuttingDown):
                transfer.wait("30s")
        finally:
            os.kill(nodes["a"].pid, signal.SIGCONT)
    assert end(nodes["b"]) == 0


def test_running_work_may_end_within_the_grace_time_and_new_work_is_refused(tmp_path: Path) -> None:
    with daemons(tmp_path, ("a", "b"), DEVICE, {"PEERMEM_SHUTDOWN_GRACE": "30s"}) as nodes:
        with peermem.connect(nodes["a"].target) as a, peermem.connect(nodes["b"].target) as b:
            source = a.create_region(device="bar0", length=BIG)
            sink = b.create_region(device="bar0", length=BIG)
            source.write(b"all of it", BIG - 9)
            transfer = a.transfer(source, sink)
            moving(transfer)
            os.kill(nodes["b"].pid, signal.SIGSTOP)
            terminate(nodes["a"])
            eventually(lambda: status(nodes["a"], "readyz") == 503, "the end of readiness")
            with pytest.raises(errors.ShuttingDown):
                a.create_region(device="bar0", length=4096)
            with pytest.raises(errors.ShuttingDown):
                a.transfer(source[0:1], sink[0:1]).wait("30s")
            os.kill(nodes["b"].pid, signal.SIGCONT)
            assert transfer.wait("30s").state == "SUCCEEDED"
            assert sink.read(BIG - 9, 9) == b"all of it"
        assert end(nodes["a"]) == 0
        check_log(nodes["a"])


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with (
        daemons(tmp_path, ("a", "b"), DEVICE, {"PEERMEM_SHUTDOWN_GRACE": "1h"}) as nodes,
        peermem.connect(nodes["a"].target) as a,
        peermem.connect(nodes["b"].target) as b,
    ):
        transfer = a.transfer(a.create_region(device="bar0", length=BIG), b.create_region(device="bar0", length=BIG))
        moving(transfer)
        os.kill(nodes["b"].pid, signal.SIGSTOP)
        terminate(nodes["a"])
        eventually(lambda: status(nodes["a"], "readyz") == 503, "the first signal's effect")
        terminate(nodes["a"])
        assert end(nodes["a"]) == 130
        os.kill(nodes["b"].pid, signal.SIGCONT)


def test_wrong_use_is_refused_with_2(tmp_path: Path) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text('node = "a"\ntpc = 1\n')
    result = run("--config", str(config))
    assert result.returncode == 2
    assert "tpc" in result.stderr
    assert "wrong.toml" in result.stderr
    assert run("--config", str(tmp_path / "none.toml")).returncode == 2
    config.write_text('node = "a"\n')
    assert run("--config", str(config), "--check").returncode == 0
    config.write_text(f'[policy]\nfile = "{tmp_path}/policy.toml"\n')
    for words in ((), ("--check",)):
        result = run("--config", str(config), *words)
        assert result.returncode == 2
        assert "policy.toml: there is no such file" in result.stderr


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemons(tmp_path_factory.mktemp("live"), ("a",), DEVICE) as nodes:
        yield nodes["a"]


@pytest.mark.parametrize("taken", ["grpc.address", "tcp.address", "http.address", "grpc.socket", "attach.socket"])
def test_what_another_daemon_uses_is_refused_with_a_sentence(live: Daemon, tmp_path: Path, taken: str) -> None:
    folder = tmp_path / "second"
    text = live.config.read_text()
    for address in (live.grpc, live.tcp, live.http):
        text = text.replace(address, "127.0.0.1:0")
    text = text.replace(str(live.folder), str(folder))
    section, _, key = taken.partition(".")
    value = {
        "grpc.address": live.grpc,
        "tcp.address": live.tcp,
        "http.address": live.http,
        "grpc.socket": f"{live.folder}/peermem.sock",
        "attach.socket": f"{live.folder}/attach.sock",
    }[taken]
    lines = text.splitlines()
    start = lines.index(f"[{section}]")
    index = next(number for number in range(start, len(lines)) if lines[number].startswith(f"{key} ="))
    lines[index] = f'{key} = "{value}"'
    config = tmp_path / "second.toml"
    config.write_text("\n".join(lines))
    result = run("--config", str(config))
    assert result.returncode == 1, result.stderr
    assert "start_failed" in result.stderr
    assert value in result.stderr, f"it names what is taken: {result.stderr}"
    assert "Traceback" not in result.stderr
    with peermem.connect(live.target) as node:
        assert node.info().name == "nodes/a"


def test_the_sockets_of_a_daemon_that_died_are_replaced(nodes: dict[str, Daemon]) -> None:
    nodes["a"].kill()
    assert (nodes["a"].folder / "peermem.sock").is_socket()
    assert (nodes["a"].folder / "attach.sock").is_socket()
    nodes["a"].start()
    nodes["a"].ready()
    with peermem.connect(nodes["a"].target) as node, node.create_region(device="bar0", length=4096) as region:
        region.map()[0:1] = b"x"


def reflected(address: str) -> set[str]:
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return {service.name for answer in answers for service in answer.list_services_response.service}


def test_reflection_can_be_on_or_off(live: Daemon, tmp_path: Path) -> None:
    services = {f"peermem.v1.{name}Service" for name in ("Node", "Region", "Transfer", "Link")}
    assert services <= reflected(live.grpc)
    live.config.write_text(live.config.read_text().replace("reflection = true", "reflection = false"))
    assert live.stop() == 0
    live.start()
    live.ready()
    with pytest.raises(grpc.RpcError) as caught:
        reflected(live.grpc)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_likes_a_live_scrape(trio: dict[str, Daemon], a: peermem.Node, b: peermem.Node) -> None:
    with a.create_region(device="bar0", length=MIB) as x, b.create_region(device="bar0", length=MIB) as y:
        a.transfer(x, y, checksum=True).wait("30s")
        with pytest.raises(errors.RegionNotFound):
            a.transfer(x, "nodes/b/regions/none").wait("30s")
        page = trio["a"].scrape()
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=page, text=True, capture_output=True, timeout=30, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
        assert "rkey" not in page
        assert 'reason="REGION_NOT_FOUND"' in page
