"""Real daemons as processes of their own, on free ports of this host."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_CONFIG = """
node = "{node}"
grpc = {{ socket = "{folder}/{node}/peermem.sock", address = "127.0.0.1:{grpc}" }}
attach = {{ socket = "{folder}/{node}/attach.sock" }}
http = {{ address = "" }}
tcp = {{ address = "127.0.0.1:0" }}
storage = {{ directories = [{{ path = "{folder}", write = true }}] }}
device = [{{ name = "bar0", kind = "memfd", size = "1GiB" }}{devices}]
log = {{ format = "json" }}

[directory.nodes]
{directory}
"""


class Cluster:
    """Daemons that know each other; `target(node)` is how to reach one."""

    def __init__(self, folder: Path, *nodes: str, devices: str = "", environ: Mapping[str, str] | None = None) -> None:
        """`devices` are more ones, in TOML; `environ` is set besides."""
        self._folder = folder
        self._devices = f", {devices}" if devices else ""
        self._environ = {**os.environ, **(environ or {})}
        self._ports = dict(zip(nodes, _free_ports(len(nodes)), strict=True))
        self._daemons: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        for node in self._ports:
            self.start(node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for daemon in self._daemons.values():
            daemon.terminate()
        for node in list(self._daemons):
            self._end(node)

    def target(self, node: str) -> str:
        return f"unix://{self._folder}/{node}/peermem.sock"

    def address(self, node: str) -> str:
        return f"127.0.0.1:{self._ports[node]}"

    def start(self, node: str) -> None:
        """Start a daemon and wait until it is ready."""
        (self._folder / node).mkdir(exist_ok=True)
        directory = "\n".join(f'{name} = "{self.address(name)}"' for name in self._ports)
        config = self._folder / f"{node}.toml"
        values = {"folder": self._folder, "grpc": self._ports[node], "directory": directory, "devices": self._devices}
        config.write_text(_CONFIG.format(node=node, **values))
        daemon = subprocess.Popen(
            [sys.executable, "-m", "peermem", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environ,
        )
        assert daemon.stdout
        self._daemons[node] = daemon
        seen = []
        for line in daemon.stdout:
            seen.append(line)
            if '"event": "ready"' in line:
                break
        else:
            raise AssertionError(f"{node} did not start:\n" + "".join(seen))
        threading.Thread(target=_drain, args=(daemon.stdout,), daemon=True).start()

    def pause(self, node: str) -> None:
        """Stop a daemon where it stands."""
        self._daemons[node].send_signal(signal.SIGSTOP)

    def resume(self, node: str) -> None:
        """Let a stopped daemon go on."""
        self._daemons[node].send_signal(signal.SIGCONT)

    def _end(self, node: str) -> None:
        daemon = self._daemons.pop(node)
        try:
            daemon.wait(timeout=30)
        finally:
            daemon.kill()


def eventually(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Ask until `condition` holds: for what a daemon does by itself and tells nobody."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def _drain(lines: IO[str]) -> None:
    with lines:
        for _ in lines:
            pass


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
