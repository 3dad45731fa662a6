"""The part of the document about devices, NICs, and the PCI functions between them.

Rules of this file:

* Of the PCI functions only those are told that have a device or a NIC, and the bridges above them.
* A pair that was not tried has a verdict of its own: what PCI says about it is no proof.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peermem.core.errors import PeermemError
from peermem.core.node import DeviceFacts, NicPort
from peermem.core.preflight import Verdict
from peermem.core.topology import PciFunction, Topology

DEVICES, NICS = 32, 16
_TEXT = 600

Json = dict[str, Any]


def machine(
    devices: Sequence[DeviceFacts],
    topology: Topology,
    verdicts: Iterable[Verdict],
    errors: Mapping[str, PeermemError | None],
) -> Json:
    """Return the devices, NIC ports, PCI functions and pairs of a node; `errors` has what keeps the daemon from using
    each port."""
    listed = [*devices[:DEVICES]]
    ports = list(topology.nics.values())[:NICS]
    shown = {(device.name, port.name) for device in listed for port in ports}
    tried = [verdict for verdict in verdicts if (verdict.device, verdict.nic) in shown]
    known = {(verdict.device, verdict.nic) for verdict in tried}
    untried = [
        _untried(device, port.name, topology)
        for device in listed
        for port in ports
        if (device.name, port.name) not in known
    ]
    addresses = {device.pci_address for device in listed} | {port.pci_address for port in ports}
    return {
        "devices": {"total": len(devices), "listed": [_device(device) for device in listed]},
        "nics": {"total": len(topology.nics), "listed": [_nic(port, errors[port.name]) for port in ports]},
        "pairs": [_tried(verdict) for verdict in tried] + untried,
        "pci": {"virtual": topology.machine.is_virtual, "functions": _functions(addresses, topology)},
    }


def _device(device: DeviceFacts) -> Json:
    return {
        "name": device.name,
        "kind": device.kind,
        "path": device.path.value,
        "size": device.size,
        "available": device.available,
        "regions": device.region_count,
        "pci": device.pci_address,
        "nics": list(device.nics),
        "why": device.why[:_TEXT],
    }


def _nic(port: NicPort, error: PeermemError | None) -> Json:
    return {
        "name": port.name,
        "state": port.state,
        "link_layer": port.link_layer,
        "rate": port.rate,
        "numa": port.numa_node,
        "pci": port.pci_address,
        "netdev": port.netdev,
        "error": None if error is None else {"reason": error.reason, "message": error.message[:_TEXT]},
    }


def _tried(verdict: Verdict) -> Json:
    error = verdict.error
    return {
        "device": verdict.device,
        "nic": verdict.nic,
        "path": verdict.path.value if verdict.path else "",
        "state": "works" if error is None else "fails",
        "detail": verdict.detail[:_TEXT],
        "reason": error.reason if error else "",
        "message": error.message[:_TEXT] if error else "",
        "advice": verdict.advice[:_TEXT],
        "latency": verdict.latency,
        "write": verdict.write_bandwidth,
        "read": verdict.read_bandwidth,
    }


def _untried(device: DeviceFacts, nic: str, topology: Topology) -> Json:
    detail = topology.p2p(device.pci_address, nic).reason if device.pci_address else "Host memory."
    return {
        "device": device.name,
        "nic": nic,
        "path": device.path.value,
        "state": "untried",
        "detail": detail[:_TEXT],
        "reason": "",
        "message": "",
        "advice": "",
        "latency": 0.0,
        "write": 0.0,
        "read": 0.0,
    }


def _functions(addresses: Collection[str], topology: Topology) -> list[Json]:
    ends = [topology.functions[address] for address in sorted(addresses) if address in topology.functions]
    wanted = {function.address for function in ends} | {bridge for function in ends for bridge in function.bridges}
    return [_function(topology.functions[address]) for address in sorted(wanted) if address in topology.functions]


def _function(function: PciFunction) -> Json:
    return {
        "address": function.address,
        "host_bridge": function.host_bridge,
        "bridges": list(function.bridges),
        "numa": function.numa_node,
        "id": f"{function.vendor:04x}:{function.device:04x}",
        "driver": function.driver,
        "is_bridge": function.is_bridge,
        "redirects": function.redirects if function.is_bridge else False,
    }
