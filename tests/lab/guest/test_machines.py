"""Machines on which verbs can't work: each says which reason holds and what to do, and serves over tcp all the same."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from bench.daemons import Daemon, Place, daemons

import peermem
from peermem import FabricKind, errors
from tests.lab.guest import nodes
from tests.lab.guest.nodes import HOST, MIB, PATIENCE, noise

pytestmark = pytest.mark.timeout(300)

_CONFIG = f"{nodes.OPEN}p2pmem = true\n{nodes.HOST_DEVICE}"
_SOURCE = Path(peermem.__file__).parents[1]
_NO_PYVERBS = Path("/tmp/no-pyverbs")
_NO_GID = 9
"""No NIC here has so many addresses."""
_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all")
_NO_LOCKING = ("prlimit", "--memlock=65536", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")


@contextmanager
def closed_device_files() -> Iterator[None]:
    """Let only root open the NICs' device files."""
    files = list(Path("/dev/infiniband").glob("uverbs*"))
    before = {file: file.stat().st_mode for file in files}
    try:
        for file in files:
            file.chmod(0o600)
        yield
    finally:
        for file, mode in before.items():
            file.chmod(mode)


@contextmanager
def shadowed_pyverbs() -> Iterator[None]:
    """Make a folder that hides pyverbs from a Python that looks there first."""
    (_NO_PYVERBS / "pyverbs").mkdir(parents=True, exist_ok=True)
    (_NO_PYVERBS / "pyverbs/__init__.py").write_text("raise ImportError('libibverbs.so.1 is of another release')\n")
    yield


@contextmanager
def without_addresses(node: str) -> Iterator[None]:
    """Take the addresses of a node's NICs away: what is left are the GIDs that follow from their MAC addresses."""
    namespace = nodes.NAMESPACES[node]
    addresses = [(name, _address(namespace, name)) for name in nodes.interfaces(node)]
    for name, address in addresses:
        nodes.command("ip", "-n", namespace, "addr", "delete", address, "dev", name)
    try:
        yield
    finally:
        for name, address in addresses:
            nodes.command("ip", "-n", namespace, "addr", "add", address, "dev", name)


def _address(namespace: str, interface: str) -> str:
    (found,) = json.loads(nodes.command("ip", "-n", namespace, "-j", "-4", "addr", "show", "dev", interface))
    (address,) = found["addr_info"]
    return f"{address['local']}/{address['prefixlen']}"


@dataclass(frozen=True)
class Machine:
    """Something that keeps a daemon from using its NICs."""

    reason: type[peermem.PeermemError]
    fix: str
    """What the sentences for people name."""
    node: str = "a"
    """Whose place the daemon takes."""
    prefix: tuple[str, ...] = ()
    made: Callable[[], AbstractContextManager[None]] = nullcontext


MACHINES = {
    "no NIC": Machine(errors.NicNotFound, "modprobe rdma_rxe", node="c"),
    "no pyverbs": Machine(
        errors.PyverbsMissing,
        "python3-pyverbs",
        prefix=("env", f"PYTHONPATH={_NO_PYVERBS}:{_SOURCE}"),
        made=shadowed_pyverbs,
    ),
    "no permission": Machine(errors.NicForbidden, "/dev/infiniband", prefix=_NOBODY, made=closed_device_files),
    "port down": Machine(errors.PortDown, "ip link set", made=lambda: nodes.nics_down("a")),
    "no usable GID": Machine(
        errors.NoGid,
        "IP address",
        prefix=("env", f"PEERMEM_VERBS_GID_INDEX={_NO_GID}"),
        made=lambda: without_addresses("a"),
    ),
    "memlock too small": Machine(errors.MemlockTooSmall, "LimitMEMLOCK", prefix=_NO_LOCKING),
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a folder that every user may write to."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        before = os.umask(0)
        yield Path(name)
        os.umask(before)


@pytest.fixture(scope="module")
def partner(folder: Path) -> Iterator[Daemon]:
    """A node that is all right."""
    with nodes.control_network(), daemons(folder, ("b",), _CONFIG, places={"b": nodes.bare_place("b")}) as running:
        yield running["b"]
        assert running["b"].stop() == 0
        nodes.check_log(running["b"])


@contextmanager
def ill(folder: Path, partner: Daemon, place: Place) -> Iterator[tuple[peermem.Node, peermem.Node]]:
    """Run two daemons in a place: one that chooses its fabrics, and one that insists on verbs."""
    environ = {"PEERMEM_DIRECTORY_NODES": f'{{b = "{partner.grpc}"}}'}
    places = {"auto": place, "verbs": Place(place.host, (*place.prefix, "env", "PEERMEM_FABRIC=verbs"))}
    with daemons(folder, tuple(places), _CONFIG, environ, places) as running:
        with (
            peermem.connect(running["auto"].target, attach=False) as auto,
            peermem.connect(running["verbs"].target, attach=False) as verbs,
        ):
            yield auto, verbs
        for daemon in running.values():
            assert daemon.stop() == 0
            nodes.check_log(daemon)


@pytest.mark.parametrize("name", MACHINES)
def test_what_keeps_verbs_from_working_is_told_and_tcp_serves(folder: Path, partner: Daemon, name: str) -> None:
    machine, home = MACHINES[name], folder / name.replace(" ", "-")
    home.mkdir()
    place = nodes.bare_place(machine.node)
    place = Place(place.host, (*place.prefix, *machine.prefix))
    with machine.made(), ill(home, partner, place) as (auto, verbs), peermem.connect(partner.target) as b:
        with pytest.raises(machine.reason) as caught:
            verbs.create_region(device=HOST, length=MIB)
        assert machine.fix in caught.value.message
        told = [verdict.error for verdict in auto.preflight(HOST) if verdict.error]
        assert machine.reason in {type(error) for error in told}
        with (
            auto.create_region(device=HOST, length=MIB) as here,
            b.create_region(device=HOST, length=MIB) as there,
            auto.create_region(device=HOST, length=MIB) as back,
        ):
            assert here.nics == ()
            assert machine.fix in here.why
            here.write(noise(MIB))
            for source, sink in ((here, there), (there, back)):
                info = auto.transfer(source, sink, checksum=True).wait(PATIENCE)
                assert info.fabric is FabricKind.TCP
                assert machine.fix in info.fabric_why
            assert back.read() == noise(MIB)


def test_nics_without_an_address_keep_no_transfer_from_ending_well(folder: Path, partner: Daemon) -> None:
    home = folder / "addresses"
    home.mkdir()
    with (
        without_addresses("a"),
        ill(home, partner, nodes.bare_place("a")) as (auto, _),
        peermem.connect(partner.target) as b,
        auto.create_region(device=HOST, length=MIB) as here,
        b.create_region(device=HOST, length=MIB) as there,
    ):
        here.write(noise(MIB))
        info = auto.transfer(here, there, checksum=True).wait(PATIENCE)
        assert info.fabric in (FabricKind.VERBS, FabricKind.TCP)
        assert info.fabric_why
        assert there.read() == noise(MIB)


def test_devices_that_give_no_memory(folder: Path, partner: Daemon) -> None:
    """The pool is too small, and the BAR is the NVMe driver's: each is a reason, and other devices go on."""
    home = folder / "devices"
    home.mkdir()
    nvme = nodes.function(nodes.NVME)
    claimed = f'[[device]]\nkind = "pci_resource"\nname = "claimed"\naddress = "{nvme}"\nbar = 0\n'
    place = nodes.bare_place("a")
    places = {"a": Place(place.host, place.prefix, claimed)}
    with daemons(home, ("a",), _CONFIG, places=places) as running, peermem.connect(running["a"].target) as node:
        with pytest.raises(errors.BarClaimed) as caught:
            node.create_region(device="claimed", length=4096)
        assert "driver nvme" in caught.value.message
        pool = next(device for device in node.devices() if device.kind == "p2pmem")
        with node.create_region(device=pool.name, length=pool.available // 4096 * 4096 - 8192):
            with pytest.raises(errors.DeviceFull) as full:
                node.create_region(device=pool.name, length=MIB)
            assert int(full.value.metadata["wanted"]) == MIB
        with node.create_region(device=pool.name, length=MIB) as region:
            assert region.nics
        with node.create_region(device=HOST, length=MIB) as region:
            assert region.nics
        assert running["a"].stop() == 0
        nodes.check_log(running["a"])
