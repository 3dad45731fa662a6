"""Facts of the host, read from trees that a test makes, and from the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peermem.core.node import OwnMemory
from peermem.core.preflight import Capability, HostFacts
from peermem.device.host import read_host, read_own_memory

_LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max processes             96365                96365                processes
Max locked memory         8388608              unlimited            bytes
"""
_MAPS = """7f0000000000-7f0000001000 r-xp 00000000 08:01 1 /usr/lib/python3/dist-packages/pyverbs/device.cpython-311.so
7f0000002000-7f0000003000 r-xp 00000000 08:01 2 /usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0
"""


class Tree:
    """The three roots, with what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def read(self, *files: str) -> HostFacts:
        return read_host(files, self.folder / "sys", self.folder / "proc", self.folder / "dev")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_host_that_says_nothing(tree: Tree) -> None:
    assert tree.read() == HostFacts("", None, frozenset(), "", {}, "", {}, pyverbs=False, rdma_core="")


def test_a_host_that_says_all(tree: Tree) -> None:
    tree.put("proc/sys/kernel/osrelease", "7.3.4-amd64\n")
    tree.put("proc/self/limits", _LIMITS)
    tree.put("proc/self/status", "Name:\tx\nCapEff:\t0000000000204000\nCapBnd:\t000001ffffffffff\n")
    tree.put("proc/self/uid_map", "         0          0 4294967295\n")
    tree.put("proc/self/maps", _MAPS)
    tree.put("sys/module/ib_core/parameters/netns_mode", "N\n")
    tree.put("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    for group, kind in enumerate(("DMA-FQ", "DMA-FQ", "identity")):
        tree.put(f"sys/kernel/iommu_groups/{group}/type", f"{kind}\n")
    assert tree.read() == HostFacts(
        kernel="7.3.4-amd64",
        memlock=8388608,
        capabilities=frozenset({Capability.CAP_IPC_LOCK, Capability.CAP_SYS_ADMIN}),
        rdma_mode="exclusive",
        device_files={},
        lockdown="integrity",
        iommu={"DMA-FQ": 2, "identity": 1},
        pyverbs=True,
        rdma_core="44.0",
    )


@pytest.mark.parametrize(("text", "limit"), [("unlimited ", None), ("0 ", 0), ("65536 ", 65536)])
def test_the_limit_of_locked_memory(tree: Tree, text: str, limit: int | None) -> None:
    tree.put("proc/self/limits", f"Max locked memory         {text:<21}unlimited            bytes\n")
    assert tree.read().memlock == limit


@pytest.mark.parametrize(("mode", "word"), [("Y", "shared"), ("N", "exclusive"), ("?", "")])
def test_the_mode_of_the_rdma_system(tree: Tree, mode: str, word: str) -> None:
    tree.put("sys/module/ib_core/parameters/netns_mode", mode)
    assert tree.read().rdma_mode == word


def test_capabilities_of_another_user_namespace_do_not_count(tree: Tree) -> None:
    tree.put("proc/self/status", "CapEff:\t000001ffffffffff\n")
    tree.put("proc/self/uid_map", "         0       1000          1\n")
    assert tree.read().capabilities == frozenset()


def test_device_files_are_tried(tree: Tree) -> None:
    tree.put("dev/infiniband/uverbs0", "")
    os.mkdir(tree.folder / "dev/infiniband/uverbs1")
    assert tree.read("uverbs0", "uverbs1", "uverbs2").device_files == {
        "uverbs0": "",
        "uverbs1": "Is a directory",
        "uverbs2": "No such file or directory",
    }


def test_this_host() -> None:
    facts = read_host([])
    assert facts.kernel == os.uname().release
    assert not facts.pyverbs


def test_memory_of_this_process(tree: Tree) -> None:
    proc = tree.folder / "proc"
    assert read_own_memory(proc) == OwnMemory(0, 0, None)
    tree.put("proc/self/limits", _LIMITS)
    status = "VmRSS:\t  900 kB\nRssAnon:\t     100 kB\nRssShmem:\t     800 kB\nVmPin:\t      20 kB\nCapEff:\t%x\n"
    tree.put("proc/self/status", status % 0)
    tree.put("proc/self/uid_map", "         0          0 4294967295\n")
    assert read_own_memory(proc) == OwnMemory(100 << 10, 20 << 10, 8388608)
    tree.put("proc/self/status", status % (1 << Capability.CAP_IPC_LOCK.value))
    assert read_own_memory(proc) == OwnMemory(100 << 10, 20 << 10, None)
    assert read_own_memory().private > 1 << 20
