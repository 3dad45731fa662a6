"""Preflight on real kernel interfaces: what works, and one bad machine after the other. Runs in the namespace n1."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import TypeAlias

import pytest

import peermem
from peermem import Verdict
from tests.client.processes import eventually
from tests.lab.guest.conftest import Figures

DEVICES = FilePath("/sys/bus/pci/devices")
UVERBS = FilePath("/dev/infiniband")
IVSHMEM, NVME = "0x1110", "0x0010"
NICS = ["rxe1/1", "rxe1b/1"]
AS_NOBODY = (
    "prlimit",
    "--memlock=unlimited",
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--bounding-set=-all",
)
MIB = 1 << 20
Start: TypeAlias = "Callable[..., Daemon]"
_CONFIG = """
node = "a"
grpc = {{ socket = "{folder}/peermem.sock" }}
attach = {{ socket = "" }}
http = {{ address = "" }}
log = {{ format = "json" }}
device = [
    {{ name = "mem0", kind = "memfd", size = "8MiB" }},
    {{ name = "bar0", kind = "pci_resource", address = "{ivshmem}", bar = 2 }},
    {{ name = "bar1", kind = "pci_resource", address = "{nvme}", bar = 0 }},
]
"""


@dataclass(frozen=True)
class Found:
    """What preflight found."""

    alone: Mapping[str, Verdict]
    """On the node and its NICs, by the name of the check or the port."""
    tried: Mapping[tuple[str, str, str], Verdict]
    """On devices by a path with NICs."""

    def failures(self) -> dict[str, str]:
        """Return the reasons for which checks and NICs fail."""
        return {name: verdict.error.reason for name, verdict in self.alone.items() if verdict.error}

    def reasons(self, device: str) -> list[str | None]:
        """Return why a device does not work, for each path and NIC; None where it does."""
        found = (verdict.error for (name, *_), verdict in self.tried.items() if name == device)
        return [error.reason if error else None for error in found]


@dataclass(frozen=True)
class Daemon:
    """A daemon that runs."""

    target: str

    def preflight(self, *devices: str) -> Found:
        with peermem.connect(self.target, attach=False) as node:
            verdicts = list(node.preflight(*devices))
        return Found(
            {verdict.check or verdict.nic or "": verdict for verdict in verdicts if not verdict.device},
            {
                (verdict.device, verdict.path.value if verdict.path else "", verdict.nic or ""): verdict
                for verdict in verdicts
                if verdict.device
            },
        )

    def tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from peermem.cli import main; main()", *words, "--target", self.target]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def running(*prefix: str) -> Iterator[Daemon]:
    """Run a daemon with `prefix` before its command, in a folder that any user may enter."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        config = FilePath(folder, "peermem.toml")
        config.write_text(_CONFIG.format(folder=folder, ivshmem=function(IVSHMEM), nvme=function(NVME)))
        with subprocess.Popen(
            [*prefix, sys.executable, "-m", "peermem", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("PEERMEM_")},
        ) as daemon:
            assert daemon.stdout is not None
            seen: list[str] = []
            while '"event": "ready"' not in "".join(seen[-1:]):
                seen.append(daemon.stdout.readline())
                assert seen[-1], "".join(seen)
            try:
                yield Daemon(f"unix://{folder}/peermem.sock")
            finally:
                daemon.terminate()
                daemon.stdout.read()


def function(device: str) -> str:
    (address,) = (entry.name for entry in DEVICES.iterdir() if (entry / "device").read_text().strip() == device)
    return address


def p2pmem() -> str:
    return "p2pmem-" + function(NVME).replace(":", "-").replace(".", "-")


@pytest.fixture(autouse=True)
def switched_on() -> None:
    (DEVICES / function(IVSHMEM) / "enable").write_text("1")


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda *prefix: stack.enter_context(running(*prefix))


@contextmanager
def modes(files: Iterable[FilePath], mode: int) -> Iterator[None]:
    """Give files another mode for a while."""
    before = {file: file.stat().st_mode for file in files}
    for file in before:
        file.chmod(mode)
    try:
        yield
    finally:
        for file, old in before.items():
            file.chmod(old)


def test_what_works(start: Start, figures: Figures) -> None:
    daemon = start()
    found = daemon.preflight()
    assert found.failures() == {}
    works = [("mem0", "HOST"), ("adopted", "HOST"), ("bar0", "STAGED"), (p2pmem(), "P2PDMA"), (p2pmem(), "STAGED")]
    for device, path in works:
        for nic in NICS:
            verdict = found.tried[device, path, nic]
            assert verdict.error is None
            assert min(verdict.latency or 0, verdict.write_bandwidth or 0, verdict.read_bandwidth or 0) > 0
    assert found.reasons("bar1") == ["BAR_CLAIMED"] * 4
    figures("preflight", {" ".join(key): [v.works, v.latency, v.write_bandwidth] for key, v in found.tried.items()})


def test_a_bar_without_pages_is_registered_on_demand_and_then_found_out(start: Start) -> None:
    found = start().preflight("bar0")
    assert found.reasons("bar0") == ["PROBE_FAILED", "PROBE_FAILED", None, None]
    error = found.tried["bar0", "P2PDMA", NICS[0]].error
    assert error is not None
    assert "no pages that the NIC can reach" in error.message


def test_a_nic_that_misplaces_what_begins_within_a_page_is_told(start: Start) -> None:
    found = start().preflight(p2pmem())
    assert "multiples of 4096" in found.tried[p2pmem(), "P2PDMA", NICS[0]].advice
    assert "multiples of 4096" not in found.tried[p2pmem(), "STAGED", NICS[0]].advice


def test_the_tool_tells_what_works_and_what_does_not(start: Start) -> None:
    daemon = start()
    done = daemon.tool("preflight", "--device", "mem0")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "All works.")
    done = daemon.tool("preflight", "--device", "bar0")
    assert done.returncode == 0
    assert "NOT BY THIS PATH" in done.stdout
    done = daemon.tool("preflight", "--device", "bar1")
    assert done.returncode == 1
    assert "(BAR_CLAIMED)" in done.stdout


def test_a_port_that_goes_down_and_comes_back(start: Start) -> None:
    daemon = start()
    subprocess.run(["ip", "link", "set", "v1b", "down"], check=True)
    try:
        eventually(lambda: daemon.preflight("mem0").failures() == {"rxe1b/1": "PORT_DOWN"})
        assert daemon.preflight("mem0").reasons("mem0") == [None, "PORT_DOWN"]
    finally:
        subprocess.run(["ip", "link", "set", "v1b", "up"], check=True)
    eventually(lambda: daemon.preflight("mem0").failures() == {})
    assert daemon.preflight("mem0").reasons("mem0") == [None, None]


def test_a_daemon_that_may_lock_too_little(start: Start) -> None:
    without = ("prlimit", f"--memlock={64 << 10}", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
    found = start(*without).preflight("mem0")
    assert found.failures() == {"memlock": "MEMLOCK_TOO_SMALL"}
    assert found.reasons("mem0") == ["MEMLOCK_TOO_SMALL"] * 2


def test_a_daemon_that_may_not_open_the_nics(start: Start) -> None:
    with modes(UVERBS.glob("uverbs*"), 0o600):
        found = start(*AS_NOBODY).preflight("mem0")
    assert found.failures() == {"device-files": "NIC_FORBIDDEN", **dict.fromkeys(NICS, "NIC_FORBIDDEN")}
    assert found.reasons("mem0") == ["NIC_FORBIDDEN"] * 2


def test_a_daemon_that_may_not_open_the_devices(start: Start) -> None:
    with modes(UVERBS.glob("uverbs*"), 0o666):
        found = start(*AS_NOBODY).preflight("mem0", "bar0", p2pmem())
    assert found.failures() == {}
    assert found.reasons("mem0") == [None, None]
    assert found.reasons("bar0") == found.reasons(p2pmem()) == ["DEVICE_FORBIDDEN"] * 4


def test_a_pool_that_is_full(start: Start) -> None:
    daemon = start()
    pool = DEVICES / function(NVME) / "p2pmem"
    with (pool / "allocate").open("r+b", buffering=0) as file:
        with mmap.mmap(file.fileno(), int((pool / "available").read_text())):
            assert daemon.preflight(p2pmem()).reasons(p2pmem()) == ["DEVICE_FULL"] * 4
        assert daemon.preflight(p2pmem()).reasons(p2pmem()) == [None] * 4


def test_a_device_whose_driver_is_unbound(start: Start) -> None:
    daemon = start()
    device, address = p2pmem(), function(NVME)
    driver = (DEVICES / address / "driver").resolve()
    assert daemon.preflight(device).reasons(device) == [None] * 4
    (driver / "unbind").write_text(address)
    try:
        assert daemon.preflight(device).reasons(device) == ["DEVICE_LOST"] * 4
    finally:
        (driver / "bind").write_text(address)
    eventually((DEVICES / address / "p2pmem/allocate").exists)
    assert daemon.preflight(device).reasons(device) == [None] * 4


@pytest.fixture
def lonely() -> Iterator[str]:
    """Make a network namespace without NICs."""
    subprocess.run(["ip", "netns", "add", "lone"], check=True)
    subprocess.run(["ip", "-n", "lone", "link", "set", "lo", "up"], check=True)
    yield "lone"
    subprocess.run(["ip", "netns", "delete", "lone"], check=True)


def test_without_a_nic_the_daemon_serves_over_tcp(lonely: str, start: Start) -> None:
    daemon = start("ip", "netns", "exec", lonely)
    found = daemon.preflight()
    assert found.failures() == {"nics": "NIC_NOT_FOUND"}
    assert found.tried == {}
    assert "rdma dev set" in str(found.alone["nics"].error)
    with (
        peermem.connect(daemon.target, attach=False) as node,
        node.create_region(device="mem0", length=MIB) as source,
        node.create_region(device="mem0", length=MIB) as sink,
    ):
        source.write(b"over tcp")
        node.transfer(source, sink).wait()
        assert sink.read(0, 8) == b"over tcp"
        assert source.nics == ()
