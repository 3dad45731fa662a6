"""A real etcd on loopback ports, in a folder of its own, that can be stopped, frozen, killed and wiped."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from bench.daemons import free_ports

_PATIENCE = 20.0
"""Seconds for its start."""
_OPENER = build_opener(ProxyHandler({}))
_READY = "serving client traffic"


class EtcdServer:
    """One etcd process."""

    def __init__(self, folder: Path, extra: Sequence[str] = (), scheme: str = "http", name: str = "default") -> None:
        """`extra` are more flags."""
        self.folder = folder
        self.name = name
        self.members: Sequence[EtcdServer] = (self,)
        """All of its cluster."""
        client, peer = free_ports(2)
        self.endpoint = f"127.0.0.1:{client}"
        self._url = f"{scheme}://{self.endpoint}"
        self._peer = f"http://127.0.0.1:{peer}"
        self._extra = extra
        self._log = folder / "log"
        self._began = 0
        """Where in the log its last start begins."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it serves."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start; it serves once most of its members do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._began = log.tell()
            self._process = subprocess.Popen(
                [
                    "etcd",
                    f"--name={self.name}",
                    f"--data-dir={self.folder}/data",
                    f"--listen-client-urls={self._url}",
                    f"--advertise-client-urls={self._url}",
                    f"--listen-peer-urls={self._peer}",
                    f"--initial-advertise-peer-urls={self._peer}",
                    f"--initial-cluster={','.join(f'{each.name}={each._peer}' for each in self.members)}",
                    "--heartbeat-interval=20",
                    "--election-timeout=200",
                    "--logger=zap",
                    *self._extra,
                ],
                stdout=log,
                stderr=log,
                env={},
            )

    def wait(self) -> None:
        """Wait until it serves."""
        assert self._process is not None
        deadline = time.monotonic() + _PATIENCE
        while _READY not in self._written():
            assert self._process.poll() is None, self._written()[-4000:]
            assert time.monotonic() < deadline, self._written()[-4000:]
            time.sleep(0.01)

    def _written(self) -> str:
        return self._log.read_bytes()[self._began :].decode(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def freeze(self) -> None:
        """SIGSTOP: it answers nothing, and its ports stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; `start` brings it back with what it had."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Kill it and delete all it had."""
        self.kill()
        shutil.rmtree(self.folder / "data")

    def ask(self, call: str, token: str = "", **fields: Any) -> dict[str, Any]:
        """Make a call on its JSON gateway: bytes are given as such."""
        plain = {
            key: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for key, value in fields.items()
        }
        headers = {"Authorization": token} if token else {}
        request = Request(f"{self._url}/v3/{call}", json.dumps(plain).encode(), headers)
        try:
            with _OPENER.open(request, timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except URLError as error:
            body = getattr(error, "read", lambda: b"")()
            raise AssertionError(f"{call}: {error} {body!r}") from None

    def put(self, key: str, value: bytes) -> None:
        self.ask("kv/put", key=key.encode(), value=value)

    def delete(self, key: str) -> None:
        self.ask("kv/deleterange", key=key.encode())

    def keys(self, prefix: str) -> list[str]:
        """Return all keys that begin so."""
        start = prefix.encode()
        end = start[:-1] + bytes([start[-1] + 1])
        kvs = self.ask("kv/range", key=start, range_end=end, keys_only=True).get("kvs", [])
        return [base64.b64decode(kv["key"]).decode() for kv in kvs]

    def values(self, prefix: str) -> dict[str, bytes]:
        """Return all keys that begin so, with their values."""
        start = prefix.encode()
        end = start[:-1] + bytes([start[-1] + 1])
        kvs = self.ask("kv/range", key=start, range_end=end).get("kvs", [])
        return {base64.b64decode(kv["key"]).decode(): base64.b64decode(kv["value"]) for kv in kvs}

    def leads(self) -> bool:
        """Whether it is its cluster's leader, as far as it knows."""
        status = self.ask("maintenance/status")
        return bool(status["header"]["member_id"] == status.get("leader"))

    def compact(self) -> None:
        """Forget all that happened until now."""
        revision = self.ask("kv/range", key=b"x")["header"]["revision"]
        self.ask("kv/compaction", revision=revision, physical=True)


@contextmanager
def etcd_server(folder: Path, extra: Sequence[str] = (), scheme: str = "http") -> Iterator[EtcdServer]:
    """Run one for the time of a block."""
    server = EtcdServer(folder, extra, scheme)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def etcd_members(folder: Path, count: int) -> Iterator[Sequence[EtcdServer]]:
    """Run a cluster of them for the time of a block."""
    members = [EtcdServer(folder / f"m{number}", name=f"m{number}") for number in range(count)]
    try:
        for each in members:
            each.members = members
            each.launch()
        for each in members:
            each.wait()
        yield members
    finally:
        for each in members:
            each.kill()
