"""The decisions on the machines of tests/machines, and on any tree the kernel's own rule beside ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import machines

from peermem.core.node import NicPort
from peermem.core.topology import Distance, Machine, P2pMapping, PciFunction, Topology

GPU = "0000:19:00.0"
"""Below the first switch of the GPU server."""
GPU_BEHIND_ACS = "0000:3b:00.0"
DRIVE = "0000:01:00.0"
"""The EPYC machine's, with p2pmem."""


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str], machines.Machine]:
    return lambda name: machines.build(name, tmp_path)


@pytest.fixture
def gpu_server(build: Callable[[str], machines.Machine]) -> machines.Machine:
    return build("gpu_server")


@pytest.fixture
def epyc(build: Callable[[str], machines.Machine]) -> machines.Machine:
    return build("epyc")


@pytest.mark.parametrize(
    ("nic", "distance", "hops"),
    [
        ("mlx5_0/1", Distance.PIX, 4),
        ("mlx5_1/1", Distance.PIX, 4),
        ("mlx5_2/1", Distance.NODE, 8),
        ("mlx5_10/1", Distance.NODE, 6),
        ("mlx5_4/1", Distance.SYS, 8),
    ],
)
def test_distances_from_a_gpu(gpu_server: machines.Machine, nic: str, distance: Distance, hops: int) -> None:
    topology = gpu_server.read()
    assert topology.distance(GPU, nic) is distance
    assert topology.hops(GPU, nic) == hops


@pytest.mark.parametrize(
    ("gpu", "nics"),
    [
        ("0000:19:00.0", ("mlx5_0/1", "mlx5_1/1")),
        ("0000:1a:00.0", ("mlx5_0/1", "mlx5_1/1")),
        ("0000:3b:00.0", ("mlx5_2/1", "mlx5_3/1")),
        ("0000:3c:00.0", ("mlx5_2/1", "mlx5_3/1")),
        ("0000:9b:00.0", ("mlx5_4/1", "mlx5_5/1")),
        ("0000:9c:00.0", ("mlx5_4/1", "mlx5_5/1")),
        ("0000:bd:00.0", ("mlx5_6/1",)),
        ("0000:bf:00.0", ("mlx5_7/1",)),
    ],
)
def test_each_gpu_gets_the_nics_of_its_switch(gpu_server: machines.Machine, gpu: str, nics: tuple[str, ...]) -> None:
    assert gpu_server.read().choose_nics(gpu).nics == nics


def test_the_choice_says_what_it_passed_over(gpu_server: machines.Machine) -> None:
    assert gpu_server.read().choose_nics("0000:bd:00.0").why == (
        "mlx5_6/1 is behind the same PCIe switch as 0000:bd:00.0; mlx5_7/1 is more than one PCIe switch away from it; "
        "mlx5_4/1 and mlx5_5/1 are at another host bridge of the same NUMA node as it; "
        "mlx5_0/1, mlx5_1/1, mlx5_2/1, mlx5_3/1 and mlx5_10/1 are across the sockets from it; "
        "mlx5_11/1 is in state DOWN."
    )


def test_only_proven_nics_are_chosen(gpu_server: machines.Machine) -> None:
    choice = gpu_server.read().choose_nics(GPU, {"mlx5_1/1", "mlx5_4/1", "mlx5_11/1"})
    assert choice.nics == ("mlx5_1/1",)
    assert choice.why.startswith(
        "mlx5_1/1 is behind the same PCIe switch as 0000:19:00.0; mlx5_4/1 is across the sockets"
    )
    assert "mlx5_0/1, mlx5_2/1, mlx5_3/1" in choice.why
    assert choice.why.endswith("are not proven by a probe; mlx5_11/1 is in state DOWN.")


def test_no_nic_is_a_choice_with_its_reasons(epyc: machines.Machine) -> None:
    topology = epyc.read()
    assert topology.choose_nics(DRIVE, set()).nics == ()
    assert topology.choose_nics(DRIVE, set()).why == (
        "No NIC port can be used; mlx5_0/1, mlx5_1/1 and mlx5_2/1 are not proven by a probe."
    )
    assert replace(topology, nics={}).choose_nics(DRIVE).why == "No NIC port can be used."


def test_the_next_class_serves_when_the_nearest_is_down(gpu_server: machines.Machine) -> None:
    for device in ("mlx5_0", "mlx5_1", "mlx5_2"):
        (gpu_server.root / f"class/infiniband/{device}/ports/1/state").write_text("1: DOWN\n")
    assert gpu_server.read().choose_nics(GPU).nics == ("mlx5_3/1", "mlx5_10/1")


def test_host_memory_takes_all_active_nics_the_fastest_first(epyc: machines.Machine) -> None:
    choice = epyc.read().choose_nics("")
    assert choice.nics == ("mlx5_2/1", "mlx5_0/1", "mlx5_1/1")
    assert choice.why == "mlx5_2/1, mlx5_0/1 and mlx5_1/1 are usable for host memory."


def test_a_software_nic_is_taken_only_where_there_is_no_other(epyc: machines.Machine) -> None:
    topology = epyc.read()
    software = NicPort("rxe0/1", "ACTIVE", "Ethernet", rate=10**12, numa_node=-1)
    both = replace(topology, nics={**topology.nics, software.name: software})
    for address in ("", DRIVE):
        assert "rxe0/1" not in both.choose_nics(address).nics
        assert "rxe0/1 is software only, so that the CPU moves the bytes" in both.choose_nics(address).why
        assert both.choose_nics(address, {"rxe0/1"}).nics == ("rxe0/1",)


def test_one_socket_with_four_host_bridges(epyc: machines.Machine) -> None:
    topology = epyc.read()
    assert topology.distance(DRIVE, "mlx5_0/1") is Distance.PHB
    assert topology.distance(DRIVE, "mlx5_2/1") is Distance.NODE
    assert topology.choose_nics(DRIVE).nics == ("mlx5_0/1", "mlx5_1/1")
    for nic in topology.nics:
        verdict = topology.p2p(DRIVE, nic)
        assert (verdict.mapping, verdict.fix) == (P2pMapping.THRU_HOST_BRIDGE, "")


def test_a_machine_of_one_node_needs_no_numa_numbers(epyc: machines.Machine) -> None:
    for address in epyc.read().functions:
        epyc.write(address, "numa_node", "-1")
    assert epyc.read().distance(DRIVE, "mlx5_2/1") is Distance.NODE


def test_functions_of_one_device(epyc: machines.Machine) -> None:
    topology = epyc.read()
    assert topology.distance("0000:02:00.0", "mlx5_0/1") is Distance.SAME_FUNCTION
    assert topology.hops("0000:02:00.0", "mlx5_0/1") == 0
    assert topology.distance("0000:02:00.0", "mlx5_1/1") is Distance.SAME_DEVICE
    assert topology.hops("0000:02:00.0", "mlx5_1/1") == 2
    assert topology.choose_nics("0000:02:00.1").why.startswith(
        "mlx5_1/1 is on the same PCI function as 0000:02:00.1; mlx5_0/1 is on the same PCI device as it;"
    )


def test_a_switch_turns_packets_around(gpu_server: machines.Machine) -> None:
    verdict = gpu_server.read().p2p(GPU, "mlx5_0/1")
    assert verdict.mapping is P2pMapping.BUS_ADDR
    assert verdict.reason == "What passes between 0000:18:00.0 and 0000:19:00.0 turns around below the root complex."
    assert verdict.fix == ""


def test_acs_sends_packets_up_and_the_fix_names_the_bridges(gpu_server: machines.Machine) -> None:
    verdict = gpu_server.read().p2p(GPU_BEHIND_ACS, "mlx5_3/1")
    assert verdict.mapping is P2pMapping.THRU_HOST_BRIDGE
    assert "pci=disable_acs_redir=0000:39:01.0;0000:39:03.0 " in verdict.fix


def test_acs_below_a_root_complex_that_does_not_forward(gpu_server: machines.Machine) -> None:
    gpu_server.write("0000:37:00.0", "device", "0x6f00")
    verdict = gpu_server.read().p2p(GPU_BEHIND_ACS, "mlx5_3/1")
    assert verdict.mapping is P2pMapping.NOT_SUPPORTED
    assert verdict.reason == (
        "ACS at 0000:39:01.0 and 0000:39:03.0 sends what passes between 0000:3d:00.0 and 0000:3b:00.0 up to the root "
        "complex, which does not send it down again: host bridge 8086:6f00 of pci0000:37 is not in the kernel's list "
        "of those that do."
    )
    assert "pci=disable_acs_redir=0000:39:01.0;0000:39:03.0 " in verdict.fix


def test_a_host_bridge_that_forwards_only_below_itself(gpu_server: machines.Machine) -> None:
    for bridge in ("0000:15:00.0", "0000:48:00.0"):
        gpu_server.write(bridge, "device", "0x2f00")
    topology = gpu_server.read()
    assert topology.p2p("0000:4a:00.0", "mlx5_10/1").mapping is P2pMapping.THRU_HOST_BRIDGE
    verdict = topology.p2p(GPU, "mlx5_10/1")
    assert verdict.mapping is P2pMapping.NOT_SUPPORTED
    assert "host bridge 8086:2f00 of pci0000:15 does so only between its own devices" in verdict.reason
    assert verdict.fix == "Use a NIC behind the same PCIe switch, or put both behind one."


def test_a_root_port_stands_for_the_host_bridge_where_there_is_none(gpu_server: machines.Machine) -> None:
    gpu_server.write("0000:48:01.0", "device", "0x2030")
    (gpu_server.root / "bus/pci/devices/0000:48:00.0").unlink()
    assert gpu_server.read().p2p("0000:4a:00.0", "mlx5_10/1").mapping is P2pMapping.THRU_HOST_BRIDGE
    gpu_server.write("0000:48:01.0", "class", "0x088000")
    verdict = gpu_server.read().p2p("0000:4a:00.0", "mlx5_10/1")
    assert "pci0000:48 shows no host bridge or root port" in verdict.reason


def test_amd_forwards_from_zen_on(epyc: machines.Machine) -> None:
    cpuinfo = epyc.proc / "cpuinfo"
    cpuinfo.write_text(cpuinfo.read_text().replace("cpu family\t: 23", "cpu family\t: 22"))
    assert epyc.read().p2p(DRIVE, "mlx5_0/1").mapping is P2pMapping.NOT_SUPPORTED


def test_without_privilege_the_verdict_is_unknown_where_acs_decides(gpu_server: machines.Machine) -> None:
    topology = gpu_server.without_privilege().read()
    verdict = topology.p2p(GPU, "mlx5_0/1")
    assert verdict.mapping is P2pMapping.UNKNOWN
    assert verdict.reason.endswith("up to the root complex can't be read; if so, it comes back.")
    assert verdict.fix.startswith("Give the daemon CAP_SYS_ADMIN")
    assert topology.p2p(GPU, "mlx5_2/1").mapping is P2pMapping.THRU_HOST_BRIDGE

    gpu_server.write("0000:15:00.0", "device", "0x6f00")
    assert "if so, it ends there: host bridge 8086:6f00" in gpu_server.read().p2p(GPU, "mlx5_0/1").reason


def test_a_cloud_shows_neither_distance_nor_a_root_complex(build: Callable[[str], machines.Machine]) -> None:
    topology = build("cloud_vm").read()
    drive, nic = "c05b:00:00.0", "mlx5_ib0/1"
    assert topology.distance(drive, nic) is Distance.UNKNOWN
    assert topology.p2p(drive, nic).mapping is P2pMapping.NOT_SUPPORTED
    assert topology.choose_nics(drive).nics == (nic,)
    assert topology.choose_nics(drive).why == f"{nic} is at a distance that this machine does not show from {drive}."


def test_a_hypervisors_host_bridge_says_nothing(epyc: machines.Machine) -> None:
    cpuinfo = epyc.proc / "cpuinfo"
    cpuinfo.write_text(cpuinfo.read_text().replace("flags\t\t:", "flags\t\t: hypervisor"))
    assert epyc.read().distance(DRIVE, "mlx5_0/1") is Distance.NODE
    epyc.write(DRIVE, "numa_node", "-1")
    assert epyc.read().distance(DRIVE, "mlx5_0/1") is Distance.UNKNOWN
    assert epyc.read().distance("0000:02:00.1", "mlx5_0/1") is Distance.SAME_DEVICE


@pytest.mark.parametrize("address", ["0000:00:04.0", "0000:00:05.0", "0000:03:00.0", ""])
def test_the_lab_has_a_software_nic(build: Callable[[str], machines.Machine], address: str) -> None:
    topology = build("lab_guest").read()
    assert topology.choose_nics(address).nics == ("rxe1/1",)
    assert topology.choose_nics(address).why == "rxe1/1 is software only, so that the CPU moves the bytes."
    assert topology.distance(address, "rxe1/1") is Distance.SOFTWARE
    assert topology.hops(address, "rxe1/1") is None
    assert topology.p2p(address, "rxe1/1").mapping is P2pMapping.CPU


def test_a_device_that_is_gone_is_at_an_unknown_distance(gpu_server: machines.Machine) -> None:
    topology = gpu_server.read()
    assert topology.distance("0000:77:00.0", "mlx5_0/1") is Distance.UNKNOWN
    assert topology.hops("0000:77:00.0", "mlx5_0/1") is None
    verdict = topology.p2p("0000:77:00.0", "mlx5_0/1")
    assert (verdict.mapping, verdict.reason) == (P2pMapping.UNKNOWN, "PCI function 0000:77:00.0 is not on this node.")


# One root bus, and on any function up to three below it, down to four levels; ACS at random.
Node = tuple[int | None, list["Node"]]
acs_bits = st.sampled_from([0, 0, 0x1D, 0x10, 0x20, None])
trees: st.SearchStrategy[Node] = st.recursive(
    st.tuples(acs_bits, st.just([])), lambda below: st.tuples(acs_bits, st.lists(below, max_size=3)), max_leaves=8
)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Draw a machine of one or two host bridges, each trusted to forward or not, with a NIC on each function."""
    functions: dict[str, PciFunction] = {}

    def add(node: Node, host: str, bridges: tuple[str, ...], vendor: int) -> None:
        address = f"{host.removeprefix('pci')}:00.0" if not bridges else f"0000:{0x80 + len(functions):02x}:00.0"
        functions[address] = PciFunction(address, host, bridges, 0, vendor, 0x09A2, 0x060400, acs=node[0])
        for below in node[1]:
            add(below, host, (address, *bridges), vendor)

    for host in ["pci0000:00", "pci0000:40"][: draw(st.integers(1, 2))]:
        add(draw(trees), host, (), draw(st.sampled_from([0x8086, 0x1AF4])))
    nics = {f"{address}/1": NicPort(f"{address}/1", "ACTIVE", "Ethernet", 0, 0, address) for address in functions}
    return Topology(Machine("GenuineIntel", 6, 1), functions, nics)


def kernels_rule(topology: Topology, provider: str, client: str) -> tuple[P2pMapping, int]:
    """What calc_map_type_and_dist of drivers/pci/p2pdma.c does, step by step."""

    def upstream(address: str) -> str:
        return next(iter(topology.functions[address].bridges), "")

    def trusted(address: str) -> bool:
        return topology.functions[address].vendor == 0x8086

    acs: list[int | None] = []
    a, from_a = provider, 0
    while a:
        acs.append(topology.functions[a].acs)
        b, from_b = client, 0
        while b and b != a:
            b, from_b = upstream(b), from_b + 1
        if b:
            break
        a, from_a = upstream(a), from_a + 1
    through = P2pMapping.THRU_HOST_BRIDGE if trusted(provider) and trusted(client) else P2pMapping.NOT_SUPPORTED
    if not a:
        return through, from_a + from_b
    b = client
    while b != a:
        acs.append(topology.functions[b].acs)
        b = upstream(b)
    if any((bits or 0) & 0x2C for bits in acs):
        return through, from_a + from_b
    return P2pMapping.UNKNOWN if None in acs else P2pMapping.BUS_ADDR, from_a + from_b


@given(topologies())
def test_verdicts_are_the_kernels(topology: Topology) -> None:
    for provider in topology.functions:
        for nic, port in topology.nics.items():
            mapping, hops = kernels_rule(topology, provider, port.pci_address)
            verdict = topology.p2p(provider, nic)
            assert (verdict.mapping, topology.hops(provider, nic)) == (mapping, hops)
            assert (mapping in (P2pMapping.NOT_SUPPORTED, P2pMapping.UNKNOWN)) <= bool(verdict.fix)


@given(topologies())
def test_the_nearest_class_is_chosen_whole(topology: Topology) -> None:
    for address in topology.functions:
        distances = {nic: topology.distance(address, nic) for nic in topology.nics}
        nearest = [nic for nic, distance in distances.items() if distance is min(distances.values())]
        assert list(topology.choose_nics(address).nics) == nearest
