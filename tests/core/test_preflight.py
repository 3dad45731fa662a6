"""What preflight makes of the facts of a node, a NIC port and a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import pytest
from tests import machines

from peermem.core.errors import (
    DeviceLost,
    FabricUnavailable,
    KernelLockedDown,
    MemlockTooSmall,
    NicForbidden,
    NicNotFound,
    PathUnsupported,
    PeermemError,
    PortDown,
    ProbeFailed,
    PyverbsMissing,
    RegistrationRefused,
)
from peermem.core.gid import Gid
from peermem.core.node import NicPort
from peermem.core.preflight import (
    Capability,
    Check,
    HostFacts,
    Needs,
    Verdict,
    judge_device,
    judge_nic,
    judge_node,
    known_reach,
)
from peermem.core.topology import Machine, Topology
from peermem.core.types import Path

GOOD = HostFacts(
    kernel="7.3.4-amd64",
    memlock=None,
    capabilities=frozenset(Capability),
    rdma_mode="exclusive",
    device_files={"uverbs0": ""},
    lockdown="none",
    iommu={},
    pyverbs=True,
    rdma_core="56.1",
)
NEEDS = Needs(None, frozenset({Path.HOST, Path.P2PDMA, Path.STAGED}), 64 << 20, True)
SOFTWARE = NicPort("rxe0/1", "ACTIVE", "Ethernet", 2_500_000_000, -1, netdev="v1", uverbs="uverbs0")
ONE_NIC = Topology(Machine(), {}, {"rxe0/1": SOFTWARE})
NO_NIC = Topology(Machine(), {}, {})


@dataclass(frozen=True)
class Device:
    name: str
    path: Path
    pci_address: str = ""
    kind: str = "pci_resource"


def judge(check: Check, host: HostFacts = GOOD, topology: Topology = ONE_NIC, needs: Needs = NEEDS) -> Verdict:
    verdicts = judge_node(host, topology, needs)
    assert [verdict.check for verdict in verdicts] == list(Check)
    assert all(verdict.detail.endswith(".") for verdict in verdicts)
    return next(verdict for verdict in verdicts if verdict.check is check)


def test_nothing_is_wrong_with_a_good_node() -> None:
    verdicts = judge_node(GOOD, ONE_NIC, NEEDS)
    assert [verdict.error for verdict in verdicts] == [None] * len(Check)
    assert [verdict.advice for verdict in verdicts] == [""] * len(Check)


@pytest.mark.parametrize(
    ("kernel", "lacks"),
    [
        ("6.1.0-18-amd64", ["6.2", "6.15", "6.16"]),
        ("6.12.9", ["6.15", "6.16"]),
        ("6.15.0-rc1", ["6.16"]),
        ("7.0.1", []),
        ("", []),
    ],
)
def test_a_kernel_that_lacks_something(kernel: str, lacks: list[str]) -> None:
    verdict = judge(Check.KERNEL, replace(GOOD, kernel=kernel))
    assert verdict.error is None
    assert [since for since in ("6.2", "6.15", "6.16") if f"({since})" in verdict.advice] == lacks


def test_lockdown_matters_where_bars_are_mapped() -> None:
    locked = replace(GOOD, lockdown="integrity")
    assert isinstance(judge(Check.LOCKDOWN, locked).error, KernelLockedDown)
    verdict = judge(Check.LOCKDOWN, locked, needs=replace(NEEDS, maps_bars=False))
    assert (verdict.error, verdict.detail) == (None, "The kernel is locked down (integrity).")
    assert judge(Check.LOCKDOWN, replace(GOOD, lockdown="")).error is None


@pytest.mark.parametrize(
    ("groups", "detail"),
    [
        ({}, "No IOMMU is in use."),
        ({"identity": 9}, "DMA passes through: IOMMU groups are 9 of type identity."),
        ({"DMA-FQ": 8, "identity": 1}, "DMA is translated: IOMMU groups are 8 of type DMA-FQ and 1 of type identity."),
    ],
)
def test_what_the_iommu_does(groups: dict[str, int], detail: str) -> None:
    assert judge(Check.IOMMU, replace(GOOD, iommu=groups)).detail == detail


def test_a_limit_of_locked_memory() -> None:
    limited = replace(GOOD, memlock=8 << 20, capabilities=frozenset())
    error = judge(Check.MEMLOCK, limited).error
    assert isinstance(error, MemlockTooSmall)
    assert "8MiB" in error.message
    assert "64MiB" in error.message
    assert "LimitMEMLOCK=infinity" in error.message
    verdict = judge(Check.MEMLOCK, replace(limited, memlock=64 << 20))
    assert verdict.error is None
    assert "LimitMEMLOCK=infinity" in verdict.advice
    lifted = judge(Check.MEMLOCK, replace(limited, capabilities=frozenset({Capability.CAP_IPC_LOCK})))
    assert (lifted.error, lifted.advice) == (None, "")


def test_capabilities_are_missed_where_bars_are_used() -> None:
    without = replace(GOOD, capabilities=frozenset({Capability.CAP_IPC_LOCK}))
    assert "CAP_SYS_ADMIN" in judge(Check.CAPABILITIES, without).advice
    assert judge(Check.CAPABILITIES, without, needs=replace(NEEDS, paths=frozenset({Path.HOST}))).advice == ""


def test_pyverbs() -> None:
    assert judge(Check.RDMA_CORE).detail == "pyverbs with rdma-core 56.1."
    assert "unknown release" in judge(Check.RDMA_CORE, replace(GOOD, rdma_core="")).detail
    missing = PyverbsMissing("pyverbs can't be imported: no such module.")
    assert judge(Check.RDMA_CORE, needs=replace(NEEDS, obstacle=missing)).error is missing
    assert judge(Check.RDMA_CORE, replace(GOOD, pyverbs=False)).error is None


def test_how_namespaces_share_nics() -> None:
    assert judge(Check.RDMA_SYSTEM).advice == ""
    assert "rdma system set netns exclusive" in judge(Check.RDMA_SYSTEM, replace(GOOD, rdma_mode="shared")).advice
    assert judge(Check.RDMA_SYSTEM, replace(GOOD, rdma_mode="")).detail == "No RDMA is loaded."


def test_device_files() -> None:
    assert judge(Check.DEVICE_FILES).detail == "uverbs0 can be opened."
    refused = replace(GOOD, device_files={"uverbs0": "", "uverbs1": "Permission denied"})
    error = judge(Check.DEVICE_FILES, refused).error
    assert isinstance(error, NicForbidden)
    assert "/dev/infiniband/uverbs1 (Permission denied)" in error.message
    without = replace(ONE_NIC, nics={"rxe0/1": replace(SOFTWARE, uverbs="")})
    error = judge(Check.DEVICE_FILES, topology=without).error
    assert isinstance(error, NicForbidden)
    assert "modprobe ib_uverbs" in error.message
    assert judge(Check.DEVICE_FILES, replace(GOOD, device_files={}), NO_NIC).error is None


@pytest.mark.parametrize(
    ("mode", "fix"), [("exclusive", "rdma dev set"), ("shared", "modprobe mlx5_ib"), ("", "rdma_rxe")]
)
def test_a_node_without_a_nic(mode: str, fix: str) -> None:
    error = judge(Check.NICS, replace(GOOD, rdma_mode=mode), NO_NIC).error
    assert isinstance(error, NicNotFound)
    assert fix in error.message


def test_a_daemon_that_is_configured_to_use_no_nic() -> None:
    error = FabricUnavailable("The daemon is configured to use no NIC.")
    assert judge(Check.NICS, needs=replace(NEEDS, obstacle=error)).error is error


def test_a_nic_port(gpu_server: Topology) -> None:
    verdict = judge_nic("mlx5_0/1", gpu_server, None)
    assert (verdict.nic, verdict.device, verdict.error, verdict.advice) == ("mlx5_0/1", "", None, "")
    for fact in (
        "ACTIVE",
        "InfiniBand",
        "400 Gb/s",
        "PCI 0000:18:00.0",
        "NUMA node 0",
        "firmware 28.39.1002",
        "fe80::",
    ):
        assert fact in verdict.detail
    down = PortDown("The port is not active.")
    assert judge_nic("mlx5_0/1", gpu_server, down).error is down
    assert judge_nic("gone0/1", gpu_server, down).detail == "The kernel shows no such port."


def test_a_nic_port_that_could_be_better() -> None:
    assert "for tests" in judge_nic("rxe0/1", ONE_NIC, None).advice
    old = replace(SOFTWARE, pci_address="0000:01:00.0", gids=(Gid(0, b"\xfe\x80" + bytes(13) + b"\1", "IB/RoCE v1"),))
    assert "RoCE v2" in judge_nic("rxe0/1", replace(ONE_NIC, nics={"rxe0/1": old}), None).advice


def test_a_device_behind_the_same_switch(gpu_server: Topology) -> None:
    verdict = judge_device(Device("gpu0", Path.P2PDMA, "0000:19:00.0"), Path.P2PDMA, "mlx5_0/1", gpu_server, None)
    assert "behind the same PCIe switch" in verdict.detail
    assert "turns around" in verdict.detail
    assert (verdict.device, verdict.nic, verdict.path, verdict.error, verdict.advice) == (
        "gpu0",
        "mlx5_0/1",
        Path.P2PDMA,
        None,
        "",
    )


@pytest.mark.parametrize("kind", [ProbeFailed, RegistrationRefused])
def test_a_failure_that_pci_explains(gpu_server: Topology, kind: type[PeermemError]) -> None:
    error = kind("The NIC could not write.")
    untrusted = {address: replace(function, device=0x1234) for address, function in gpu_server.functions.items()}
    topology = replace(gpu_server, functions=untrusted)
    verdict = judge_device(Device("gpu2", Path.P2PDMA, "0000:3b:00.0"), Path.P2PDMA, "mlx5_2/1", topology, error)
    assert isinstance(verdict.error, PathUnsupported)
    assert "The NIC could not write." in verdict.error.message
    assert "pci=disable_acs_redir=" in verdict.error.message
    assert verdict.error.metadata["probe"] == kind.reason


def test_a_failure_that_pci_does_not_explain(gpu_server: Topology) -> None:
    gone = DeviceLost("It is off.")
    behind_acs = Device("gpu2", Path.P2PDMA, "0000:3b:00.0")
    assert judge_device(behind_acs, Path.P2PDMA, "mlx5_2/1", gpu_server, gone).error is gone
    refused = ProbeFailed("The NIC could not write.")
    near = Device("gpu0", Path.P2PDMA, "0000:19:00.0")
    assert judge_device(near, Path.P2PDMA, "mlx5_0/1", gpu_server, refused).error is refused


def test_what_works_through_the_host_bridge_could_be_better(gpu_server: Topology) -> None:
    verdict = judge_device(Device("gpu2", Path.P2PDMA, "0000:3b:00.0"), Path.P2PDMA, "mlx5_2/1", gpu_server, None)
    assert verdict.error is None
    assert "pci=disable_acs_redir=" in verdict.advice


def test_staged_and_host_memory(gpu_server: Topology) -> None:
    staged = judge_device(Device("bar0", Path.STAGED, "0000:4a:00.0"), Path.STAGED, "mlx5_0/1", gpu_server, None)
    assert "p2pmem" in staged.advice
    gpu = judge_device(Device("gpu0", Path.STAGED, "0000:4a:00.0", "cuda"), Path.STAGED, "mlx5_0/1", gpu_server, None)
    assert "dma-bufs" in gpu.advice
    assert "root complex" not in staged.detail
    host = judge_device(Device("mem0", Path.HOST), Path.HOST, "mlx5_0/1", gpu_server, None)
    assert (host.advice, host.detail) == ("", "mlx5_0/1 is usable for host memory.")
    failed = judge_device(
        Device("mem0", Path.HOST), Path.HOST, "mlx5_0/1", gpu_server, ProbeFailed("It could not write.")
    )
    assert failed.detail == "Host memory."
    assert "no such port" in judge_device(Device("mem0", Path.HOST), Path.HOST, "gone0/1", gpu_server, None).detail


def test_what_is_known_of_a_devices_reach(gpu_server: Topology) -> None:
    device = Device("gpu0", Path.P2PDMA, "0000:19:00.0")
    failed = ProbeFailed("The NIC could not write.")
    tried: dict[Path, dict[str, PeermemError | None]]
    tried = {Path.P2PDMA: {"mlx5_0/1": None, "mlx5_4/1": None, "mlx5_1/1": failed}, Path.STAGED: {"mlx5_1/1": None}}
    path, choice = known_reach(device, tried, gpu_server)
    assert (path, choice.nics) == (Path.P2PDMA, ("mlx5_0/1",))
    tried[Path.P2PDMA] = {"mlx5_1/1": failed}
    path, choice = known_reach(device, tried, gpu_server)
    assert (path, choice.nics) == (Path.STAGED, ("mlx5_1/1",))
    path, choice = known_reach(device, {Path.P2PDMA: {"mlx5_1/1": failed}}, gpu_server)
    assert (path, choice.nics, choice.why) == (Path.P2PDMA, (), "No NIC reaches it: The NIC could not write.")
    assert known_reach(device, {}, gpu_server)[1].why == "No NIC has been tried with it."


@pytest.fixture
def gpu_server(tmp_path: FilePath) -> Topology:
    build: Callable[[str, FilePath], machines.Machine] = machines.build
    return build("gpu_server", tmp_path).read()
