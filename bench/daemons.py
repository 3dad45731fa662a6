"""Real daemons as separate processes, for tests, the demo and the benchmarks.

Each has its sockets and its log in a folder of its own; all end with `Daemons.close`, whatever happened.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

_OPENER = build_opener(ProxyHandler({}))
_FIRST_PORT = 10_000
_SOURCE = Path(__file__).parents[1] / "service"


@dataclass(frozen=True)
class Place:
    """Where a daemon runs and what sets it apart there."""

    host: str = "127.0.0.1"
    """The address that it serves on."""
    prefix: tuple[str, ...] = ()
    """What its command is handed to, such as `ip netns exec NAME`; it must exec, not fork."""
    config: str = ""
    """TOML of this daemon alone, behind that of all."""
    program: tuple[str, ...] = (sys.executable, "-m", "peermem")
    """The daemon."""
    patience: float = 110.0
    """Seconds until it has to be ready."""


HERE = Place()


class Daemon:
    """One daemon process."""

    def __init__(
        self,
        node: str,
        folder: Path,
        ports: Sequence[int],
        others: Mapping[str, str],
        extra: str,
        place: Place = HERE,
    ) -> None:
        self.node = node
        self.folder = folder
        self.place = place
        self.log = folder / "log"
        self.grpc, self.tcp, self.http = (f"{place.host}:{port}" for port in ports)
        self.target = f"unix://{folder}/peermem.sock"
        self.config = folder / "peermem.toml"
        directory = "\n".join(f'{name} = "{address}"' for name, address in others.items())
        folder.mkdir()
        self.config.write_text(
            f'node = "{node}"\n{extra}\n{place.config}\n'
            f'[grpc]\nsocket = "{folder}/peermem.sock"\naddress = "{self.grpc}"\nreflection = true\n'
            f'[attach]\nsocket = "{folder}/attach.sock"\n'
            f'[http]\naddress = "{self.http}"\n[tcp]\naddress = "{self.tcp}"\n'
            f"[directory.nodes]\n{directory}\n"
        )
        self.environ: Mapping[str, str] = {}
        """Settings on top of the file's, as PEERMEM_... variables."""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start the process; `ready` waits for it."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PEERMEM_")}
        environ["PYTHONPATH"] = str(_SOURCE)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.place.prefix, *self.place.program, "--config", str(self.config)],
                stdout=log,
                stderr=log,
                env=environ | dict(self.environ),
            )

    def ready(self, timeout: float | None = None) -> None:
        """Wait until the daemon is ready. Raises AssertionError with its log when it isn't in time."""
        deadline = time.monotonic() + (self.place.patience if timeout is None else timeout)
        while time.monotonic() < deadline and self.process is not None and self.process.poll() is None:
            try:
                with _OPENER.open(f"http://{self.http}/readyz", timeout=1.0):
                    return
            except (URLError, OSError):
                time.sleep(0.02)
        raise AssertionError(f"node {self.node} did not become ready:\n{self.log.read_text()}")

    def scrape(self, accept: str = "*/*") -> str:
        """Return the metrics page, in a form that is accepted."""
        request = Request(f"http://{self.http}/metrics", headers={"Accept": accept})
        with _OPENER.open(request, timeout=10.0) as page:
            text: str = page.read().decode()
            return text

    def kill(self) -> None:
        """SIGKILL and wait."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM and wait; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextmanager
def daemons(
    folder: Path,
    nodes: Sequence[str] = ("a", "b"),
    extra: str = "",
    environ: Mapping[str, str] = MappingProxyType({}),
    places: Mapping[str, Place] = MappingProxyType({}),
) -> Iterator[dict[str, Daemon]]:
    """Run one daemon per node, each of which knows the others.

    `extra` is TOML for the top of each file; `environ` are settings as PEERMEM_... variables; a node without a place
    runs here.
    """
    ports = iter(free_ports(3 * len(nodes)))
    mine = {node: [next(ports) for _ in range(3)] for node in nodes}
    at = {node: places.get(node, HERE) for node in nodes}
    started = {}
    try:
        for node in nodes:
            others = {name: f"{at[name].host}:{mine[name][0]}" for name in nodes if name != node}
            started[node] = Daemon(node, folder / node, mine[node], others, extra, at[node])
            started[node].environ = environ
            started[node].start()
        for daemon in started.values():
            daemon.ready()
        yield started
    finally:
        for daemon in started.values():
            daemon.kill()


def free_ports(count: int) -> list[int]:
    """Return ports of this host that nobody listens on now, and that the kernel gives to no connection by itself."""
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(_FIRST_PORT, given) or (0,)
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        try:
            sockets.append(socket.create_server(("127.0.0.1", random.choice(candidates))))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
