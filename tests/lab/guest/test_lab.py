"""The lab itself: what every other test in the guest relies on is there."""

from __future__ import annotations

import mmap
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

DEVICES = Path("/sys/bus/pci/devices")
NICS = {"n1": ["rxe1", "rxe1b"], "n2": ["rxe2", "rxe2b"]}


def inside(namespace: str, *command: str) -> str:
    return subprocess.run(
        ["ip", "netns", "exec", namespace, *command], capture_output=True, text=True, check=True
    ).stdout


def test_the_kernel_is_new_enough() -> None:
    assert tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 12)


@pytest.mark.parametrize("namespace", NICS)
def test_a_node_has_its_nics_alone_and_they_are_up(namespace: str) -> None:
    links = inside(namespace, "rdma", "link").splitlines()
    assert [line.split()[1] for line in links] == [f"{nic}/1" for nic in NICS[namespace]]
    assert all("state ACTIVE physical_state LINK_UP" in line for line in links)


def test_the_nodes_reach_each_other_over_both_links_in_big_frames() -> None:
    for address in ("10.0.0.2", "10.0.1.2"):
        inside("n1", "ping", "-c", "1", "-W", "10", "-M", "do", "-s", "8900", address)


@pytest.mark.parametrize("nic", NICS["n1"])
def test_the_nics_write_between_the_nodes(nic: str) -> None:
    perftest = ["ib_write_bw", "--gid-index=1", "--size=65536", "--iters=20"]
    address = "10.0.0.1" if nic == "rxe1" else "10.0.1.1"
    listen = ["ip", "netns", "exec", "n1", "stdbuf", "--output=L", *perftest, f"--ib-dev={nic}"]
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert any("Waiting for client" in line for line in server.stdout)
        assert "65536" in inside("n2", *perftest, f"--ib-dev={nic.replace('1', '2')}", address)
        server.stdout.read()
        assert server.wait(30) == 0


def test_pyverbs_opens_a_nic() -> None:
    script = "from pyverbs.device import Context; print(Context(name='rxe1').query_device().max_qp > 0)"
    assert inside("n1", "python3", "-c", script).strip() == "True"


def test_the_nvme_publishes_its_cmb() -> None:
    [pool] = DEVICES.glob("*/p2pmem")
    assert (pool / "published").read_text().strip() == "1"
    assert int((pool / "size").read_text()) == 64 << 20
    handle = os.open(pool / "allocate", os.O_RDWR)
    with mmap.mmap(handle, 4096, flags=mmap.MAP_SHARED) as memory:
        memory[:8] = b"12345678"
        assert memory[:8] == b"12345678"
    os.close(handle)


def test_the_ivshmem_bar_is_there_without_a_driver() -> None:
    [device] = [path for path in DEVICES.iterdir() if (path / "device").read_text().strip() == "0x1110"]
    assert not (device / "driver").exists()
    assert (device / "resource2").stat().st_size == 16 << 20


def test_locked_memory_is_unlimited() -> None:
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
