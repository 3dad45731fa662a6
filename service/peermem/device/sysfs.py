"""What the kernel says about NICs, read from sysfs below a root that is a parameter.

Files and their contents: Documentation/ABI/stable/sysfs-class-infiniband of the Linux kernel.
"""

from __future__ import annotations

from pathlib import Path

from peermem.core.node import NicPort


def nic_ports(root: Path = Path("/sys")) -> list[NicPort]:
    """Return the ports of all RDMA devices in order of their names; none where there is no RDMA."""
    found = []
    for port in sorted(root.glob("class/infiniband/*/ports/*")):
        device = port.parent.parent
        found.append(
            NicPort(
                name=f"{device.name}/{port.name}",
                state=_text(port / "state").rpartition(":")[2].strip(),
                link_layer=_text(port / "link_layer"),
                rate=_rate(_text(port / "rate")),
                numa_node=int(_text(device / "device" / "numa_node") or "-1"),
            )
        )
    return found


def _rate(text: str) -> int:
    """`100 Gb/sec (4X EDR)` in bits per second."""
    number = text.partition(" Gb/sec")[0]
    try:
        return int(float(number) * 1e9)
    except ValueError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such attribute, or a port that went away while it was read
        return ""
