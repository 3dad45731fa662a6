"""Metrics of NIC ports, made of what sysfs says.

Rules of this file:

* What node_exporter exports has its names, labels and units, so that its dashboards and alerts show it; its
  collector may be off, or blind to the NICs of this network namespace.
* What it does not export, above all the counters of drivers, is one metric with the kernel's name as a label.
* Their number is bounded, whatever a driver counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from peermem.core.node import NicPort

_STATES = "NOP", "DOWN", "INIT", "ARMED", "ACTIVE", "ACTIVE_DEFER"
_PHYSICAL_STATES = (
    "",
    "Sleep",
    "Polling",
    "Disabled",
    "PortConfigurationTraining",
    "LinkUp",
    "LinkErrorRecovery",
    "Phy Test",
)
_PORT_COUNTERS = {
    "link_downed": ("link_downed", "Times that the link went down after an error."),
    "link_error_recovery": ("link_error_recovery", "Times that the link recovered from an error."),
    "multicast_rcv_packets": ("multicast_packets_received", "Multicast packets received."),
    "multicast_xmit_packets": ("multicast_packets_transmitted", "Multicast packets sent."),
    "port_rcv_constraint_errors": ("port_constraint_errors_received", "Packets discarded on receipt by a switch."),
    "port_xmit_constraint_errors": ("port_constraint_errors_transmitted", "Packets that a switch did not send."),
    "port_rcv_data": ("port_data_received_bytes", "Bytes received."),
    "port_xmit_data": ("port_data_transmitted_bytes", "Bytes sent."),
    "port_rcv_discards": ("port_discards_received", "Packets discarded on receipt: port down or congested."),
    "port_xmit_discards": ("port_discards_transmitted", "Packets discarded before sending: port down or congested."),
    "port_rcv_errors": ("port_errors_received", "Packets received with an error."),
    "port_rcv_packets": ("port_packets_received", "Packets received."),
    "port_xmit_packets": ("port_packets_transmitted", "Packets sent."),
    "port_xmit_wait": ("port_transmit_wait", "Ticks during which data waited and none was sent."),
    "unicast_rcv_packets": ("unicast_packets_received", "Unicast packets received."),
    "unicast_xmit_packets": ("unicast_packets_transmitted", "Unicast packets sent."),
}
"""Counters of sysfs that node_exporter exports, by its names for them (collector/infiniband_linux.go)."""
_MOST_COUNTERS = 128
"""Other counters of one port, at most; mlx5 has about 60."""


@dataclass(frozen=True, slots=True)
class NicUse:
    """A NIC port and its counters, now."""

    port: NicPort
    counters: Mapping[str, int]
    """By the names that sysfs has; data in bytes."""


def nic_metrics(nics: Sequence[NicUse]) -> Iterator[Metric]:
    """Return the metrics of NIC ports; none where there are none."""
    if not nics:
        return
    ids = [(nic.port.device, str(nic.port.port)) for nic in nics]
    for name, help_text, value in _GAUGES:
        gauge = GaugeMetricFamily(name, help_text, labels=("device", "port"))
        for nic, labels in zip(nics, ids, strict=True):
            gauge.add_metric(labels, value(nic))
        yield gauge
    for counter, (name, help_text) in _PORT_COUNTERS.items():
        family = CounterMetricFamily(f"node_infiniband_{name}", help_text, labels=("device", "port"))
        for nic, labels in zip(nics, ids, strict=True):
            if counter in nic.counters:
                family.add_metric(labels, nic.counters[counter])
        if family.samples:
            yield family
    others = CounterMetricFamily(
        "peermem_nic_events", "What else a NIC's driver counts of a port.", labels=("device", "port", "counter")
    )
    for nic, labels in zip(nics, ids, strict=True):
        for counter in sorted(nic.counters.keys() - _PORT_COUNTERS.keys())[:_MOST_COUNTERS]:
            others.add_metric((*labels, counter), nic.counters[counter])
    if others.samples:
        yield others


def _id(names: tuple[str, ...], name: str) -> int:
    """Return the kernel's number of a state; 0 for one that is not known."""
    return names.index(name) if name in names else 0


_GAUGES: tuple[tuple[str, str, Callable[[NicUse], int]], ...] = (
    ("node_infiniband_state_id", "State of the port: 1 down, 4 active.", lambda nic: _id(_STATES, nic.port.state)),
    (
        "node_infiniband_physical_state_id",
        "Physical state of the port: 2 polling, 3 disabled, 5 link up.",
        lambda nic: _id(_PHYSICAL_STATES, nic.port.phys_state),
    ),
    ("node_infiniband_rate_bytes_per_second", "Rate of the port.", lambda nic: nic.port.rate // 8),
)
