from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.gid import Gid
from peermem.core.node import NicPort
from peermem.core.topology import Bar, P2pmemPool, PciFunction, Topology
from peermem.device import sysfs
from tests import machines

DRIVE = "0000:00:04.0"
"""The lab guest's NVMe drive."""
PORT = "class/infiniband/rxe1/ports/1"


@pytest.fixture
def lab(tmp_path: Path) -> machines.Machine:
    return machines.build("lab_guest", tmp_path)


@pytest.fixture
def gpu_server(tmp_path: Path) -> machines.Machine:
    return machines.build("gpu_server", tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> machines.Machine:
    """A lab guest for tests that run many times and put back what they change."""
    return machines.build("lab_guest", tmp_path_factory.mktemp("kept"))


def test_a_function_behind_a_switch(gpu_server: machines.Machine) -> None:
    assert sysfs.pci_function("0000:18:00.0", gpu_server.root) == PciFunction(
        address="0000:18:00.0",
        host_bridge="pci0000:15",
        bridges=("0000:17:00.0", "0000:16:00.0", "0000:15:01.0"),
        numa_node=0,
        vendor=0x15B3,
        device=0x1021,
        class_code=0x020700,
        driver="mlx5_core",
        is_enabled=True,
        bars=(),
        acs=0,
    )
    port = gpu_server.read().functions["0000:39:01.0"]
    assert (port.is_bridge, port.acs, port.driver) == (True, 0x1D, "pcieport")


def test_a_function_without_a_driver(lab: machines.Machine) -> None:
    function = sysfs.pci_function("0000:00:05.0", lab.root)
    assert function is not None
    assert (function.driver, function.numa_node, function.bridges) == ("", -1, ())
    assert function.bars == (Bar(0, 0xFEA17000, 256, 0x40200), Bar(2, 0xFD000000, 16 << 20, 0x14220C))
    assert [bar.is_prefetchable for bar in function.bars] == [False, True]
    assert all(bar.is_memory for bar in function.bars)


@pytest.mark.parametrize("address", ["0000:00:09.0", "..", "", "0000:00:04.0/p2pmem", "lo"])
def test_there_is_no_such_function(lab: machines.Machine, address: str) -> None:
    assert sysfs.pci_function(address, lab.root) is None
    assert sysfs.p2pmem_pool(address, lab.root) is None


def test_a_function_that_is_switched_off(lab: machines.Machine) -> None:
    config = lab.function(DRIVE) / "config"
    config.write_bytes(machines.config(command=0x0004, acs=None))
    function = sysfs.pci_function(DRIVE, lab.root)
    assert function is not None
    assert (function.is_enabled, function.acs) == (False, 0)
    config.write_bytes(b"\xff" * 4096)  # as the kernel reads one without power
    function = sysfs.pci_function(DRIVE, lab.root)
    assert function is not None
    assert (function.is_enabled, function.acs) == (False, None)


@pytest.mark.parametrize(("length", "acs"), [(64, None), (128, 0), (256, 0), (4096, 0x1D)])
def test_acs_is_known_only_from_a_whole_configuration_space(
    lab: machines.Machine, length: int, acs: int | None
) -> None:
    (lab.function(DRIVE) / "config").write_bytes(machines.config(command=6, acs=0x1D)[:length])
    function = sysfs.pci_function(DRIVE, lab.root)
    assert function is not None
    assert (function.is_enabled, function.acs) == (True, acs)


@pytest.mark.parametrize(
    ("words", "acs"),
    [
        ({0x100: 0x10010001}, 0),
        ({0x100: 0x04010001, 0x40: 0x0000000D, 0x44: 0x001D0000}, 0),
        ({0x100: 0x14810001, 0x148: 0xFFFFFFFF}, None),
        ({0x100: 0x00010001}, 0),
        ({0x100: 0xFFC10001, 0xFFC: 0x0001000D}, 0),
    ],
    ids=["in a circle", "out of the extended part", "gone in the middle", "no ACS", "cut off"],
)
def test_capabilities_lead_to_acs_or_nowhere(lab: machines.Machine, words: dict[int, int], acs: int | None) -> None:
    space = bytearray(4096)
    for offset, word in words.items():
        space[offset : offset + 4] = word.to_bytes(4, "little")
    (lab.function(DRIVE) / "config").write_bytes(space)
    assert lab.read().functions[DRIVE].acs == acs


def test_only_bars_count_as_bars(lab: machines.Machine) -> None:
    """After them `resource` has the expansion ROM, what virtual functions get, and a bridge's windows."""
    lab.write(DRIVE, "resource", machines.resource("4:c080:20:40101,6:fe000000:10000:46200,7:f0000000:1000:14220c"))
    bars = lab.read().functions[DRIVE].bars
    assert bars == (Bar(4, 0xC080, 32, 0x40101),)
    assert not bars[0].is_memory


def test_a_hierarchy_inside_another_ends_at_its_own_host_bridge(tmp_path: Path) -> None:
    """As a drive behind Intel's VMD."""
    drawing = "pci0000:97\n  0000:97:00.5 8086:28c0 010400\n"
    machines.build_functions(tmp_path, drawing)
    below = tmp_path / "devices/pci0000:97/0000:97:00.5/pci10000:80/10000:80:02.0/10000:81:00.0"
    machines.build_function(tmp_path, below, "144d:a824", "010802", "1", {})
    function = sysfs.pci_function("10000:81:00.0", tmp_path)
    assert function is not None
    assert (function.host_bridge, function.bridges) == ("pci10000:80", ("10000:80:02.0",))


def test_a_software_nic(lab: machines.Machine) -> None:
    assert sysfs.nic_ports(lab.root) == [
        NicPort(
            name="rxe1/1",
            state="ACTIVE",
            link_layer="Ethernet",
            rate=10_000_000_000,
            numa_node=-1,
            phys_state="LinkUp",
            netdev="v1",
            gids=(
                Gid(0, bytes.fromhex("fe80000000000000 48042afffe2fbf28"), "RoCE v2", "v1"),
                Gid(1, bytes.fromhex("00000000000000000000ffff 0a000001"), "RoCE v2", "v1"),
            ),
            node_guid="4804:2aff:fe2f:bf28",
            uverbs="uverbs0",
        )
    ]


def test_nics_come_in_the_order_of_their_numbers(gpu_server: machines.Machine) -> None:
    ports = sysfs.nic_ports(gpu_server.root)
    assert [port.name for port in ports] == [f"mlx5_{number}/1" for number in (*range(8), 10, 11)]
    storage = ports[8]
    assert (storage.device, storage.port, storage.pci_address) == ("mlx5_10", 1, "0000:49:00.0")
    assert (storage.numa_node, storage.netdev, storage.firmware) == (0, "ens1f0np0", "26.38.1002")
    assert (ports[9].is_active, ports[9].phys_state, ports[9].uverbs) == (False, "Disabled", "uverbs9")


def test_a_nic_on_a_part_of_a_function(gpu_server: machines.Machine) -> None:
    """As mlx5's subfunctions, which are devices of the auxiliary bus."""
    part = gpu_server.function("0000:49:00.0") / "mlx5_core.sf.4"
    part.mkdir()
    device = gpu_server.root / "class/infiniband/mlx5_10/device"
    device.unlink()
    machines.link(part, device.parent.resolve() / "device")
    assert gpu_server.read().nics["mlx5_10/1"].pci_address == "0000:49:00.0"


def test_an_rxe_that_claims_its_network_cards_function(gpu_server: machines.Machine) -> None:
    """As before Linux 5.16: it is a software NIC all the same."""
    machines.files(gpu_server.root / "class/infiniband/mlx5_10", parent="ens1f0np0")
    port = gpu_server.read().nics["mlx5_10/1"]
    assert (port.pci_address, port.numa_node, port.netdev) == ("", -1, "ens1f0np0")


def test_no_rdma_and_no_pci(tmp_path: Path) -> None:
    topology = sysfs.read_topology(tmp_path, tmp_path)
    assert (topology.functions, topology.nics) == ({}, {})
    assert sysfs.p2pmem_pools(tmp_path) == []
    assert sysfs.port_counters("rxe0/1", tmp_path) == {}
    assert sysfs.lockdown(tmp_path) == ""


def test_p2pmem_pools(lab: machines.Machine) -> None:
    assert sysfs.p2pmem_pools(lab.root) == [
        P2pmemPool(DRIVE, 64 << 20, 66_977_792, is_published=True, is_mappable=True),
        P2pmemPool("0000:03:00.0", 32 << 20, 33_423_360, is_published=True, is_mappable=True),
    ]
    folder = lab.function(DRIVE) / "p2pmem"
    machines.files(folder, available="4096", published="0")
    (folder / "allocate").unlink()
    assert sysfs.p2pmem_pool(DRIVE, lab.root) == P2pmemPool(
        DRIVE, 64 << 20, 4096, is_published=False, is_mappable=False
    )


@pytest.mark.parametrize("size", ["", "0", "-4096", "9" * 40, "64M"])
def test_a_pool_without_a_size_is_none(lab: machines.Machine, size: str) -> None:
    machines.files(lab.function(DRIVE) / "p2pmem", size=size)
    assert sysfs.p2pmem_pool(DRIVE, lab.root) is None


def test_counters(gpu_server: machines.Machine) -> None:
    assert sysfs.port_counters("mlx5_0/1", gpu_server.root) == {
        "port_xmit_data": 10_000,
        "port_rcv_data": 20_000,
        "port_xmit_packets": 20,
        "link_downed": 1,
        "VL15_dropped": 0,
        "out_of_sequence": 3,
        "resp_remote_access_errors": 0,
    }


def test_counters_that_a_port_does_not_keep_are_left_out(lab: machines.Machine) -> None:
    machines.files(lab.root / PORT / "counters", port_xmit_wait="N/A (no PMA)", symbol_error="-1", link_downed="")
    (lab.root / PORT / "counters/port_rcv_data").symlink_to(machines.FAILS)
    assert sysfs.port_counters("rxe1/1", lab.root) == {"sent_pkts": 12, "rcvd_pkts": 34, "duplicate_request": 0}
    assert sysfs.port_counters("rxe9/1", lab.root) == {}


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("[none] integrity confidentiality", "none"),
        ("none [integrity] confidentiality", "integrity"),
        ("none integrity [confidentiality]", "confidentiality"),
        ("none integrity confidentiality", ""),
        ("[\ufffd]", ""),
    ],
)
def test_lockdown(lab: machines.Machine, text: str, mode: str) -> None:
    machines.files(lab.root / "kernel/security", lockdown=text)
    assert sysfs.lockdown(lab.root) == mode


def test_only_rows_in_use_of_an_address_table_are_read(lab: machines.Machine) -> None:
    """An address table has up to 1024 rows, each a file in three folders."""
    attributes = lab.root / PORT / "gid_attrs"
    for index in range(2, 16):
        for kind in ("types", "ndevs"):
            (attributes / kind / str(index)).unlink()
            os.mkfifo(attributes / kind / str(index))  # who opens it waits for ever
    assert [gid.index for gid in sysfs.nic_ports(lab.root)[0].gids] == [0, 1]
    assert sysfs.nic_ports(lab.root, gids=False)[0].gids == ()


def test_a_large_machine_is_read_in_bounded_time(gpu_server: machines.Machine) -> None:
    for ports in gpu_server.root.glob("class/infiniband/*/ports/1"):
        machines.files(ports / "gids", **{str(index): machines.NO_GID for index in range(8, 256)})
    start = perf_counter()
    gpu_server.read()
    assert perf_counter() - start < 2  # 0.06 s on an idle machine


def decide(topology: Topology) -> None:
    """Take every decision that there is on a snapshot."""
    for address in (*topology.functions, "", DRIVE):
        assert topology.choose_nics(address).why
        for nic in topology.nics:
            topology.distance(address, nic)
            topology.hops(address, nic)
            assert topology.p2p(address, nic).reason


def read_all(machine: machines.Machine) -> None:
    topology = machine.read()
    decide(topology)
    sysfs.p2pmem_pools(machine.root)
    sysfs.lockdown(machine.root)
    for nic in topology.nics:
        sysfs.port_counters(nic, machine.root)


def attributes(machine: machines.Machine) -> list[Path]:
    return sorted(path for top in (machine.root, machine.proc) for path in top.rglob("*") if path.is_file())


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try:
        yield
    finally:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            path.rmdir()
        aside.rename(path)


def test_any_attribute_may_be_missing_or_refused(lab: machines.Machine) -> None:
    for path in attributes(lab):
        with set_aside(path):
            read_all(lab)
            path.symlink_to(machines.FAILS)
            read_all(lab)
            path.unlink()
            path.mkdir()
            read_all(lab)


def test_anything_may_be_gone(gpu_server: machines.Machine) -> None:
    """What the folders of classes and buses name vanishes, one function with all below it after the other."""
    while below := sorted(gpu_server.root.glob("devices/pci*/*"), key=lambda path: len(list(path.rglob("*")))):
        shutil.rmtree(below[0])
        read_all(gpu_server)
    assert gpu_server.read().nics == {}
    shutil.rmtree(gpu_server.root)
    read_all(gpu_server)


@given(content=st.binary(max_size=200) | st.text(max_size=50).map(str.encode), data=st.data())
def test_any_attribute_may_hold_anything(kept: machines.Machine, content: bytes, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(attributes(kept)))
    with set_aside(path):
        path.write_bytes(content)
        read_all(kept)


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=8))
def test_addresses_are_read_as_they_are(kept: machines.Machine, values: list[bytes]) -> None:
    gids = kept.root / PORT / "gids"
    texts = {str(index): value.hex(":", 2) for index, value in enumerate(values)}
    machines.files(gids, **dict.fromkeys(map(str, range(16)), machines.NO_GID) | texts)
    read = {gid.index: gid.value for gid in sysfs.nic_ports(kept.root)[0].gids}
    assert read == {index: value for index, value in enumerate(values) if any(value)}


@given(
    st.dictionaries(
        st.integers(0, 5), st.tuples(st.integers(0, 1 << 62), st.integers(2, 1 << 40), st.integers(0, 1 << 24))
    )
)
def test_bars_are_read_as_they_are(kept: machines.Machine, bars: dict[int, tuple[int, int, int]]) -> None:
    text = machines.resource(
        ",".join(f"{index:x}:{start:x}:{size:x}:{flags:x}" for index, (start, size, flags) in bars.items())
    )
    with set_aside(path := kept.function(DRIVE) / "resource"):
        path.write_text(text)
        function = sysfs.pci_function(DRIVE, kept.root)
    assert function is not None
    assert function.bars == tuple(Bar(index, *bars[index]) for index in sorted(bars))


@given(st.binary(max_size=4096), st.lists(st.tuples(st.integers(0x40, 0x3FF), st.integers(0, 0xFFFFFFFF)), max_size=20))
def test_any_configuration_space_ends(kept: machines.Machine, start: bytes, words: list[tuple[int, int]]) -> None:
    space = bytearray(start.ljust(4096, b"\0"))
    for index, word in words:  # capabilities that point at each other in circles, or anywhere
        space[4 * index : 4 * index + 4] = word.to_bytes(4, "little")
    with set_aside(path := kept.function(DRIVE) / "config"):
        path.write_bytes(space)
        function = sysfs.pci_function(DRIVE, kept.root)
    assert function is not None
    assert function.acs is None or 0 <= function.acs <= 0xFFFF


@given(st.decimals(min_value=0, max_value=999_999, places=1))
def test_rates(kept: machines.Machine, rate: object) -> None:
    machines.files(kept.root / PORT, rate=f"{rate} Gb/sec (4X HDR)")
    assert sysfs.nic_ports(kept.root)[0].rate == int(str(rate).replace(".", "")) * 10**8
