"""Metrics of NIC ports: node_exporter's names, read from a tree, on a page that Prometheus' own tool likes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests import machines

from peermem.core.node import NicPort
from peermem.device.sysfs import nic_ports, port_counters
from peermem.telemetry.metrics import Metrics
from peermem.telemetry.nics import NicUse

PORT = NicPort("mlx5_0/1", "ACTIVE", "InfiniBand", 400_000_000_000, 0, phys_state="LinkUp")


async def page(*nics: NicUse) -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = Metrics("0", registry)
    metrics.observe_nics(lambda: nics)
    await metrics.refresh()
    return registry


async def test_what_node_exporter_has_is_under_its_names(tmp_path: Path) -> None:
    root = machines.build("gpu_server", tmp_path).root
    read = (await page(*(NicUse(port, port_counters(port.name, root)) for port in nic_ports(root)))).get_sample_value
    labels = {"device": "mlx5_0", "port": "1"}
    assert read("node_infiniband_port_data_transmitted_bytes_total", labels) == 10_000
    assert read("node_infiniband_port_data_received_bytes_total", labels) == 20_000
    assert read("node_infiniband_port_packets_transmitted_total", labels) == 20
    assert read("node_infiniband_link_downed_total", labels) == 1
    assert read("node_infiniband_rate_bytes_per_second", labels) == 50_000_000_000
    assert read("node_infiniband_state_id", labels) == 4
    assert read("node_infiniband_physical_state_id", labels) == 5
    assert read("node_infiniband_port_transmit_wait_total", labels) is None
    assert read("peermem_nic_events_total", {**labels, "counter": "out_of_sequence"}) == 3
    assert read("peermem_nic_events_total", {**labels, "counter": "VL15_dropped"}) == 0


@pytest.mark.parametrize(
    ("state", "number"), [("NOP", 0), ("DOWN", 1), ("INIT", 2), ("ARMED", 3), ("ACTIVE_DEFER", 5), ("", 0), ("new", 0)]
)
async def test_states_have_the_kernels_numbers(state: str, number: int) -> None:
    read = (await page(NicUse(replace(PORT, state=state), {}))).get_sample_value
    labels = {"device": "mlx5_0", "port": "1"}
    assert read("node_infiniband_state_id", labels) == number


async def test_a_driver_that_counts_without_end_is_cut_off() -> None:
    counters = {f"counter_{number:05}": number for number in range(10_000)}
    families = (await page(NicUse(PORT, counters))).collect()
    (family,) = (family for family in families if family.name == "peermem_nic_events")
    assert len(family.samples) == 128


async def test_without_nics_there_is_nothing() -> None:
    assert not [family for family in (await page()).collect() if "nic" in family.name or "node_" in family.name]


async def test_nics_are_read_in_one_thread_however_many_ask() -> None:
    busy = threading.Lock()

    def read() -> list[NicUse]:
        assert threading.current_thread() is not threading.main_thread()
        assert busy.acquire(blocking=False)
        busy.release()
        return []

    metrics = Metrics("0")
    metrics.observe_nics(read)
    await asyncio.gather(*(metrics.refresh() for _ in range(50)))


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    root = machines.build("lab_guest", tmp_path).root
    metrics = Metrics("0")
    metrics.observe_nics(lambda: [NicUse(port, port_counters(port.name, root)) for port in nic_ports(root)])
    asyncio.run(metrics.refresh())
    rendered = metrics.render()[0]
    assert b'peermem_nic_events_total{counter="sent_pkts",device="rxe1",port="1"} 12.0' in rendered
    done = subprocess.run(["promtool", "check", "metrics"], input=rendered, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
