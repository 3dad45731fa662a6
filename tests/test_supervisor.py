"""What the daemon tells a service manager, heard on a real datagram socket, and the socket that it is handed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import peermem
from peermem.client.attach import Attachment
from peermem.config import given_by_manager
from peermem.supervisor import Given, Supervisor

PATIENCE = 30.0
ROOT = Path(__file__).resolve().parents[1]


class Manager:
    """A service manager's ear."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def hear(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")

    def hear_until(self, word: str) -> list[str]:
        """Return everything that was told up to this word."""
        heard: list[str] = []
        while word not in heard:
            heard += self.hear()
        return heard


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/notify" if request.param == "path" else f"@peermem-test-{os.getpid()}"


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    manager = Manager(address)
    with closing(manager.socket):
        yield manager


async def test_states_are_told(manager: Manager, address: str) -> None:
    supervisor = Supervisor(Given(address))
    supervisor.ready()
    supervisor.stopping()
    assert manager.hear() == ["READY=1"]
    assert manager.hear()[0] == "STOPPING=1"


async def test_signs_of_life_come_while_the_loop_runs_and_with_what_changed(manager: Manager, address: str) -> None:
    says = ["Node a."]
    tending = asyncio.create_task(Supervisor(Given(address, watchdog=0.03)).tend(lambda: says[-1]))
    await asyncio.sleep(0)
    assert manager.hear() == ["WATCHDOG=1", "STATUS=Node a."]
    while (said := await asyncio.to_thread(manager.hear)) == ["WATCHDOG=1"]:
        says.append("Node a. The policy is refused.")
    assert said == ["WATCHDOG=1", "STATUS=Node a. The policy is refused."]
    tending.cancel()


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028"])
async def test_a_status_is_one_short_line_whatever_is_in_it(manager: Manager, address: str, end: str) -> None:
    quoted = f"etcd says:{end}WATCHDOG=trigger {chr(0x1F600) * 5000}"
    tending = asyncio.create_task(Supervisor(Given(address, watchdog=0.03)).tend(lambda: quoted))
    await asyncio.sleep(0)
    message = manager.socket.recv(1 << 16)
    assert message.decode().splitlines()[1].startswith("STATUS=etcd says: WATCHDOG=trigger")
    assert len(message.splitlines()) == 2
    assert len(message) <= 4096
    tending.cancel()


async def test_without_a_manager_nothing_happens() -> None:
    supervisor = Supervisor(Given())
    supervisor.ready()
    await supervisor.tend(lambda: "never asked")
    assert supervisor.adopt("/run/attach.sock") is None


async def test_a_manager_that_is_gone_or_full_is_not_waited_for(manager: Manager, address: str) -> None:
    supervisor = Supervisor(Given(address))
    for _ in range(10_000):
        supervisor.ready()
    manager.socket.close()
    supervisor.ready()


def test_the_environment_counts_for_the_process_that_it_names() -> None:
    environ = {
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": "7",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "7",
    }
    assert given_by_manager(environ, 7) == Given("/run/systemd/notify", 30.0, 1)
    assert given_by_manager(environ, 8) == Given("/run/systemd/notify", 0.0, 0)
    assert given_by_manager({"WATCHDOG_USEC": "soon", "LISTEN_FDS": "-1", "LISTEN_PID": "7"}, 7) == Given()
    assert given_by_manager({}) == Given()


CONFIG = """
node = "a"
[grpc]
socket = "{folder}/peermem.sock"
address = ""
[attach]
socket = "{folder}/attach.sock"
[http]
address = ""
[tcp]
address = "127.0.0.1:0"
"""
LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, "-m", "peermem", "--config", sys.argv[2]])
"""


@contextmanager
def handed_over(folder: Path, listener: socket.socket, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon that got a socket from its service manager."""
    config = folder / "peermem.toml"
    config.write_text(CONFIG.format(folder=folder))
    daemon = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(listener.fileno()), str(config)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "service"), **environ},
        pass_fds=(listener.fileno(),),
        stderr=subprocess.PIPE,
    )
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.communicate()


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_a_job_that_comes_before_the_daemon_waits_for_it(tmp_path: Path) -> None:
    """And a service manager hears of the daemon's start, life and end."""
    address = f"{tmp_path}/notify"
    manager = Manager(address)
    with closing(manager.socket), closing(listening(tmp_path / "attach.sock")) as listener:
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(Attachment.open, f"{tmp_path}/attach.sock", PATIENCE)
            with handed_over(tmp_path, listener, NOTIFY_SOCKET=address, WATCHDOG_USEC="60000000") as daemon:
                job.result(PATIENCE).close()
                with peermem.connect(f"unix://{tmp_path}/peermem.sock", attach=f"{tmp_path}/attach.sock") as node:
                    assert node.name == "nodes/a"
                heard = manager.hear_until("WATCHDOG=1")
                assert "READY=1" in heard
                assert "STATUS=Node a." in heard
                daemon.send_signal(signal.SIGTERM)
                manager.hear_until("STOPPING=1")
                assert daemon.wait(PATIENCE) == 0
        assert (tmp_path / "attach.sock").exists()  # the service manager's, for the next daemon


def test_another_socket_than_the_configured_one_is_refused(tmp_path: Path) -> None:
    with closing(listening(tmp_path / "other.sock")) as listener, handed_over(tmp_path, listener) as daemon:
        _, log = daemon.communicate(timeout=PATIENCE)
        assert daemon.returncode == 1
        assert f"hands over {tmp_path}/other.sock" in log.decode()
        assert "ListenSequentialPacket= of the socket unit" in log.decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of processes takes root")
def test_a_signal_to_the_first_process_of_a_container_counts_before_the_daemon_runs(tmp_path: Path) -> None:
    """The kernel drops one that such a process has no handler for; it would be killed when its grace time is over."""
    fifo = tmp_path / "peermem.toml"
    os.mkfifo(fifo)
    unshared = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "peermem", "--config", str(fifo)]
    container = subprocess.Popen(unshared, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "service")})
    try:
        with fifo.open("w"):  # now it waits for its configuration
            (first,) = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
            os.kill(int(first), signal.SIGTERM)
            assert container.wait(PATIENCE) == 0
    finally:
        container.kill()
        container.wait()
