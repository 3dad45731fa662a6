"""Nodes in the guest: real daemons in network namespaces, their memory, their links and their verbs objects.

Rules of this file:

* Node a is in namespace n1 and node b in n2, with two NICs each; node c is in the initial namespace and has none.
* Calls, tcp and HTTP use a network of their own, so that the NICs' links can be hurt while everybody is heard; tests
  are in the initial namespace, and reach everybody over it.
* All of a node's memory is one device for each kind: host memory, the NVMe's memory buffer that both nodes share, and
  a range of the plain BAR for each node.
"""

from __future__ import annotations

import json
import mmap
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy
from bench.daemons import Daemon, Place, daemons

import peermem
from peermem.core.types import Path as Way
from tests.e2e.support import eventually, holdings

MIB = 1 << 20
PATIENCE = "60s"
NAMESPACES = {"a": "n1", "b": "n2"}
HOSTS = {"a": "10.1.1.2", "b": "10.1.2.2", "c": "10.1.1.1"}
HOST, BAR = "host", "bar"
IVSHMEM, NVME = "0x1110", "0x0010"
BAR_BYTES = 8 * MIB
BAR_OFFSETS = {"a": 0, "b": 8 * MIB}
_PCI = Path("/sys/bus/pci/devices")
OPEN = 'insecure_network = true\npolicy.without_file = "open"\n'
"""For daemons that meet over a network of their own, where nobody proves who it is."""
HOST_DEVICE = f'[[device]]\nname = "{HOST}"\nsize = "256MiB"\n'


def command(*words: str) -> str:
    """Run a command; return what it prints. Raises AssertionError with what it complains of."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def inside(node: str) -> tuple[str, ...]:
    """Return what a command is handed to, to run where a node is."""
    return ("ip", "netns", "exec", NAMESPACES[node]) if node in NAMESPACES else ()


@contextmanager
def control_network() -> Iterator[None]:
    """Join the namespaces of the nodes by a network that no NIC uses, through the initial namespace."""
    _heal()
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    try:
        for number, namespace in enumerate(NAMESPACES.values(), 1):
            near, far, net = f"m{number}", f"m{number}n", f"10.1.{number}"
            command("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace)
            command("ip", "addr", "add", f"{net}.1/24", "dev", near)
            command("ip", "link", "set", near, "up")
            command("ip", "-n", namespace, "addr", "add", f"{net}.2/24", "dev", far)
            command("ip", "-n", namespace, "link", "set", far, "up")
            command("ip", "-n", namespace, "route", "add", "default", "via", f"{net}.1")
        yield
    finally:
        _heal()


def _heal() -> None:
    """Undo what a suite that was ended in the middle has left of this network and of what it did to the NICs'."""
    for number, (node, namespace) in enumerate(NAMESPACES.items(), 1):
        subprocess.run(["ip", "link", "delete", f"m{number}"], capture_output=True, check=False)
        for name in interfaces(node):
            subprocess.run(
                ["tc", "-n", namespace, "qdisc", "delete", "dev", name, "root"], capture_output=True, check=False
            )
            command("ip", "-n", namespace, "link", "set", name, "up")


def function(device: str) -> str:
    """Return the address of the PCI function with this device id."""
    (address,) = (entry.name for entry in _PCI.iterdir() if (entry / "device").read_text().strip() == device)
    return address


def has(name: str) -> bool:
    """Whether the machine has the NVMe or ivshmem plugged in."""
    device = {"nvme": NVME, "ivshmem": IVSHMEM}[name]
    found = False
    for entry in _PCI.iterdir():
        with suppress(OSError):  # it may go meanwhile
            found |= (entry / "device").read_text().strip() == device
    return found


def pull(name: str) -> None:
    """Have a device pulled out of the machine; it is gone a moment later."""
    _ask_the_host(f"pull {name}")


def plug(name: str) -> None:
    """Have a device put back into the machine, where it is pulled out; it is there a moment later."""
    if not has(name):
        _ask_the_host(f"plug {name}")


def _ask_the_host(what: str) -> None:
    with open("/dev/ttyS1", "w") as host:
        host.write(f"\n!{what}\n")


def ivshmem() -> str:
    """Return the address of the function whose BAR 2 is plain memory, switched on, and without a driver: a daemon that
    was killed leaves it with vfio-pci."""
    address = function(IVSHMEM)
    if (_PCI / address / "driver").exists():
        (_PCI / address / "driver/unbind").write_text(address)
        (_PCI / address / "driver_override").write_text("\n")
    (_PCI / address / "enable").write_text("1")
    return address


def bar_bytes(node: str) -> bytes:
    """Return what is in a node's range of the BAR, as the test's own mapping of it shows."""
    with (
        (_PCI / ivshmem() / "resource2").open("r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), BAR_BYTES, offset=BAR_OFFSETS[node]) as mapping,
    ):
        return bytes(mapping)


def bar_device(node: str) -> str:
    """Return the TOML of a node's range of the BAR as a device."""
    return (
        f'[[device]]\nkind = "pci_resource"\nname = "{BAR}"\naddress = "{ivshmem()}"\nbar = 2\n'
        f"offset = {BAR_OFFSETS[node]}\nsize = {BAR_BYTES}\n"
    )


def bare_place(node: str) -> Place:
    """Return where a node's daemon runs, without a device of its own."""
    return Place(HOSTS[node], inside(node))


def place(node: str, config: str = "") -> Place:
    """Return where a node's daemon runs, with its devices; `config` is TOML of this node alone."""
    return replace(bare_place(node), config=config + HOST_DEVICE + (bar_device(node) if node in BAR_OFFSETS else ""))


@dataclass(frozen=True)
class Kind:
    """Memory of a kind, as a node's device and as the path on which it is reached."""

    device: str
    path: Way


@dataclass(frozen=True)
class Lab:
    """Running daemons, a connection to each, and the kinds of memory that they have."""

    daemons: Mapping[str, Daemon]
    nodes: dict[str, peermem.Node]
    kinds: Mapping[str, Kind]

    def restart(self, name: str) -> None:
        """Start a daemon that was killed, and connect to it."""
        self.nodes[name].close()
        self.daemons[name].start()
        self.daemons[name].ready()
        self.nodes[name] = peermem.connect(self.daemons[name].target)


def _close(nodes: Mapping[str, peermem.Node]) -> None:
    for node in nodes.values():
        node.close()


@contextmanager
def lab(folder: Path, config: str = "", places: Mapping[str, Place] | None = None) -> Iterator[Lab]:
    """Run the three nodes, in these places where they are not their own; `config` is TOML for the top of each file.

    At the end they have met no defect and hold nothing.
    """
    where = {node: place(node) for node in HOSTS} | dict(places or {})
    with ExitStack() as stack:
        stack.enter_context(control_network())
        running = stack.enter_context(daemons(folder, tuple(where), f"{OPEN}{config}", places=where))
        nodes: dict[str, peermem.Node] = {}
        stack.callback(_close, nodes)
        for name, daemon in running.items():
            nodes[name] = peermem.connect(daemon.target)
        (pool,) = (device.name for device in nodes["a"].devices() if device.kind == "p2pmem")
        kinds = {
            "memfd": Kind(HOST, Way.HOST),
            "p2pmem": Kind(pool, Way.P2PDMA),
            "staged": Kind(BAR, Way.STAGED),
        }
        yield Lab(running, nodes, kinds)
        for name, daemon in running.items():
            assert daemon.stop() == 0
            check_log(daemon)
            assert not any(any(counted.values()) for counted in resources(name).values())


def check_log(daemon: Daemon) -> None:
    """No test may make a daemon write of a defect."""
    text = daemon.log.read_text()
    assert "Traceback" not in text, text
    assert "_defect" not in text, text


def noise(length: int, seed: int = 7) -> bytes:
    """Return bytes that follow no pattern, without taking an emulated processor's time."""
    return numpy.random.default_rng(seed).bytes(length)


def sample(daemon: Daemon, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels; 0 where there are none."""
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    total = 0.0
    for line in daemon.scrape().splitlines():
        series, _, value = line.rpartition(" ")
        metric, _, has = series.partition("{")
        if metric == name and wanted <= set(has.rstrip("}").split(",")):
            total += float(value)
    return total


def resources(node: str) -> dict[str, dict[str, int]]:
    """Return how many objects the kernel has for each NIC of a node's namespace, of each kind."""
    devices = json.loads(command(*inside(node), "rdma", "-j", "resource", "show"))
    counted = ("pd", "cq", "qp", "mr", "ctx")
    return {device["ifname"]: {kind: device[kind] for kind in counted} for device in devices}


def queue_pairs(node: str) -> set[tuple[str, int]]:
    """Return the reliable connections' queue pairs of a node's namespace: the NIC of each, and its number there."""
    listed = json.loads(command(*inside(node), "rdma", "-j", "resource", "show", "qp"))
    pairs = {(pair["ifname"], pair["lqpn"]) for pair in listed if pair["type"] == "RC"}
    assert pairs
    return pairs


def held(lab: Lab, node: str) -> dict[str, object]:
    """Return all that a node's daemon holds for others, by its own account and by the kernel's."""
    daemon = lab.daemons[node]
    objects = {kind: sample(daemon, "peermem_verbs_objects", kind=kind) for kind in ("pd", "mr", "mw", "cq", "qp")}
    return holdings(daemon, lab.nodes[node]) | {
        "links": sample(daemon, "peermem_links"),
        "grants held": sample(daemon, "peermem_grants", side="held"),
        "verbs objects": objects,
        "kernel objects": resources(node),
    }


def until_idle(lab: Lab) -> None:
    """Wait until the links that nobody uses have ended."""
    for daemon in lab.daemons.values():
        eventually(partial(_has_no_links, daemon), "the end of links that nobody uses", 60)


def _has_no_links(daemon: Daemon) -> bool:
    return sample(daemon, "peermem_links") == 0


def until_held(lab: Lab, node: str, expected: Mapping[str, object]) -> None:
    """Wait until a node's daemon holds what it held before."""
    try:
        eventually(lambda: held(lab, node) == expected, "the baseline", 60)
    except AssertionError:
        assert held(lab, node) == expected


def interfaces(node: str) -> tuple[str, str]:
    """Return the network interfaces of a node's NICs."""
    number = NAMESPACES[node].removeprefix("n")
    return f"v{number}", f"v{number}b"


@contextmanager
def nics_down(node: str) -> Iterator[None]:
    """Take the links of a node's NICs down; its other network stays."""
    for name in interfaces(node):
        command("ip", "-n", NAMESPACES[node], "link", "set", name, "down")
    try:
        yield
    finally:
        for name in interfaces(node):
            command("ip", "-n", NAMESPACES[node], "link", "set", name, "up")


@contextmanager
def netem(*how: str) -> Iterator[None]:
    """Have the network between the NICs lose, delay or reorder packets, both ways."""
    places = [(NAMESPACES[node], name) for node in NAMESPACES for name in interfaces(node)]
    for namespace, name in places:
        command("tc", "-n", namespace, "qdisc", "add", "dev", name, "root", "netem", "limit", "100000", *how)
    try:
        yield
    finally:
        for namespace, name in places:
            command("tc", "-n", namespace, "qdisc", "delete", "dev", name, "root")
